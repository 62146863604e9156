"""A client's budget from what its device measures: the largest share of columns it can encrypt and send in time.

SHE-LoRA (arXiv 2505.21051) lets each client state how many columns it can afford "from its device profile"; this is the
profile and the rule. The encrypted columns of all layers are packed into one row of slots per component, so
`blocks = rank * ceil(columns / slots)` and a budget is paid in whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt
import psutil

from ciphertune.errors import SettingsError
from ciphertune.plan import column_count

_STEPS = 10_000  # budgets are stated in 4 digits
_COPIES = 4  # blocks in memory per block sent: values, ciphertext, bytes, message
_MEMORY_SHARE = 0.5  # of the free memory may be used
_TRIAL_BLOCKS, _TRIALS = 4, 3


@dataclass(frozen=True)
class Profile:
    """What a device can do."""

    seconds_per_block: float  # to encrypt one
    upstream: float  # bytes per second, 0: not given, sending costs no time
    memory: int  # free bytes, 0: unknown, memory limits nothing


@dataclass(frozen=True)
class Budget:
    """A share of columns per layer and, for the client's log, one line saying what limited it."""

    value: float
    reason: str


@dataclass(frozen=True)
class _Cost:
    """What encrypting at one budget takes."""

    columns: int
    blocks: int
    encrypting: float  # seconds
    sending: float  # seconds
    memory: int  # bytes

    def excess(self, profile: Profile, seconds: float) -> str:
        """The limits it breaks, with figures; empty when it fits."""
        broken = []
        if self.encrypting + self.sending > seconds:
            time = f"{self.encrypting:.3g} s to encrypt and {self.sending:.3g} s to send"
            broken.append(f"time ({time}, {seconds:g} s allowed)")
        if profile.memory and self.memory >= _MEMORY_SHARE * profile.memory:
            broken.append(f"memory ({_mib(self.memory)}, half of the free {_mib(profile.memory)} allowed)")
        return " and ".join(broken)

    def __str__(self) -> str:
        return f"{self.columns} columns in {self.blocks} blocks"


def choose(
    profile: Profile, widths: Sequence[int], rank: int, *, slots: int, block_bytes: int, seconds: float
) -> Budget:
    """The largest budget in [0, 1], of 4 digits, at which encrypting and sending take at most `seconds`.

    `widths` are the columns per layer, `rank` the client's components, `slots` and `block_bytes` those of the backend.
    Memory, too, must suffice: four copies of the blocks stay below half of what is free. 0 when not even one column per
    layer fits. Raises SettingsError unless `seconds` is above 0 and `profile.upstream` at least 0.
    """
    if not seconds > 0:
        raise SettingsError(f"the time allowed for encrypting and sending is {seconds} s: want more than 0")
    if not profile.upstream >= 0:
        raise SettingsError(f"upstream={profile.upstream} bytes per second: want 0 (not given) or more")

    def cost(step: int) -> _Cost:
        columns = sum(column_count(n, step / _STEPS) for n in widths)
        blocks = rank * -(-columns // slots)
        sending = blocks * block_bytes / profile.upstream if profile.upstream else 0.0
        return _Cost(columns, blocks, blocks * profile.seconds_per_block, sending, _COPIES * blocks * block_bytes)

    fits, breaks = 0, _STEPS + 1  # the cost never falls with the step, so halve what lies between
    while breaks - fits > 1:
        middle = (fits + breaks) // 2
        fits, breaks = (fits, middle) if cost(middle).excess(profile, seconds) else (middle, breaks)
    now, over = cost(fits), cost(min(breaks, _STEPS))
    excess = over.excess(profile, seconds)
    if not excess:
        reason = f"all {now} fit, {now.encrypting + now.sending:.3g} s of {seconds:g} s"
    elif fits:
        reason = f"{now}; {over} would be too much, limited by {excess}"
    else:
        least = "one column per layer" if over.columns == len(widths) else "the smallest budget above it"
        reason = f"not even {least} fits, {over}: limited by {excess}"
    return Budget(fits / _STEPS, f"budget {fits / _STEPS:g}: {reason}")


def measure(encrypt: Callable[[npt.NDArray[np.float64]], bytes], slots: int, upstream: float) -> Profile:
    """The profile of this device: `encrypt` timed on 4 blocks of ordinary values (median of 3), and the free memory."""
    values = np.random.default_rng(0).normal(0.0, 0.02, _TRIAL_BLOCKS * slots)
    times = []
    for _ in range(_TRIALS):
        start = perf_counter()
        encrypt(values)
        times.append(perf_counter() - start)
    return Profile(median(times) / _TRIAL_BLOCKS, upstream, int(psutil.virtual_memory().available))


def _mib(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"
