"""A budget from a device profile: the largest that fits, never more, and the log says why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import budget as module
from ciphertune.budget import Profile, choose, measure
from ciphertune.errors import SettingsError

# 10 layers of 1000 columns, 100 slots: 1 block per component up to 10 columns a layer, 100 blocks for all columns
WIDTHS = (1000,) * 10
CALL: dict[str, Any] = {"widths": WIDTHS, "rank": 2, "slots": 100, "block_bytes": 1000, "seconds": 10.0}
FREE = Profile(0.0, 0.0, 0)


def brute_force(profile: Profile, widths: tuple[int, ...], rank: int, slots: int, bytes_: int, seconds: float) -> float:
    """Every budget of 4 digits, from the definition."""
    best = 0.0
    for step in range(1, 10_001):
        columns = sum(min(n, max(1, math.floor(step / 10_000 * n + 0.5))) for n in widths)
        blocks = rank * math.ceil(columns / slots)
        time = blocks * profile.seconds_per_block
        if profile.upstream > 0:
            time += blocks * bytes_ / profile.upstream
        fits = profile.memory == 0 or 4 * blocks * bytes_ < profile.memory / 2
        if time <= seconds and fits:
            best = step / 10_000
    return best


@st.composite
def cases(draw: st.DrawFn) -> tuple[Profile, dict[str, Any]]:
    """Any sizes; the time and the memory allowed are shares of what all columns take, so that they do limit."""
    widths = tuple(draw(st.lists(st.integers(1, 5000), min_size=1, max_size=4)))
    rank, slots, size = draw(st.integers(1, 32)), draw(st.integers(1, 2048)), draw(st.integers(1, 40_000))
    pace, upstream = draw(st.floats(1e-6, 10.0)), draw(st.just(0.0) | st.floats(1.0, 1e8))
    blocks = rank * math.ceil(sum(widths) / slots)
    memory = draw(st.just(0) | st.floats(0.01, 1.2).map(lambda share: int(share * 8 * blocks * size) + 1))
    whole = blocks * pace + (blocks * size / upstream if upstream else 0.0)
    call = {"widths": widths, "rank": rank, "slots": slots, "block_bytes": size}
    return Profile(pace, upstream, memory), {**call, "seconds": whole * draw(st.floats(0.01, 1.2))}


@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_largest_budget_of_a_fine_grid_that_fits(case: tuple[Profile, dict[str, Any]]) -> None:
    profile, call = case
    expected = brute_force(profile, call["widths"], call["rank"], call["slots"], call["block_bytes"], call["seconds"])
    found = choose(profile, **call)
    assert found.value == expected
    assert found.reason.startswith(f"budget {expected:g}: ") and "\n" not in found.reason


@given(case=cases(), factor=st.integers(2, 5), name=st.sampled_from(["rank", "block_bytes"]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_more_to_pay_never_buys_more(case: tuple[Profile, dict[str, Any]], factor: int, name: str) -> None:
    profile, call = case
    before = choose(profile, **call).value
    assert choose(profile, **{**call, name: call[name] * factor}).value <= before
    assert choose(profile, **{**call, "widths": (*call["widths"], 7)}).value <= before
    slower = replace(profile, seconds_per_block=profile.seconds_per_block * factor)
    assert choose(slower, **call).value <= before


@given(case=cases(), factor=st.integers(2, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_more_to_pay_with_never_buys_less(case: tuple[Profile, dict[str, Any]], factor: int) -> None:
    profile, call = case
    before = choose(profile, **call).value
    for name in ("seconds", "slots"):
        assert choose(profile, **{**call, name: call[name] * factor}).value >= before
    assert choose(replace(profile, upstream=profile.upstream * factor), **call).value >= before
    assert choose(replace(profile, memory=profile.memory * factor), **call).value >= before
    assert choose(replace(profile, memory=0, upstream=0.0), **call).value >= before


def test_all_columns_fit() -> None:
    found = choose(FREE, **CALL)
    assert found.value == 1.0
    assert found.reason == "budget 1: all 10000 columns in 200 blocks fit, 0 s of 10 s"
    assert choose(Profile(0.05, 0.0, 0), **CALL).value == 1.0  # 200 blocks at 0.05 s are exactly 10 s


def test_encrypting_limits() -> None:
    # 10 s at 1 s a block: 10 blocks, 5 per component, 500 columns, 50 a layer. Half up: 50.4 columns are 50.
    found = choose(Profile(1.0, 0.0, 0), **CALL)
    assert found.value == 0.0504
    assert found.reason == (
        "budget 0.0504: 500 columns in 10 blocks; 510 columns in 12 blocks would be too much, "
        "limited by time (12 s to encrypt and 0 s to send, 10 s allowed)"
    )


def test_sending_limits() -> None:
    # 2 blocks of 1000 bytes a second: 20 blocks, 10 per component, 1000 columns, 100 a layer
    found = choose(Profile(0.0, 2000.0, 0), **CALL)
    assert found.value == 0.1004
    assert found.reason.endswith("limited by time (0 s to encrypt and 11 s to send, 10 s allowed)")


def test_memory_limits_and_stays_strictly_below_half() -> None:
    # 4 copies of 10 blocks of 1000 bytes are 40 000: half of 80 001 and more, not below half of 80 000
    assert choose(replace(FREE, memory=80_001), **CALL).value == 0.0504
    found = choose(replace(FREE, memory=80_000), **CALL)
    assert found.value == 0.0404
    assert found.reason.endswith("limited by memory (0.03815 MiB, half of the free 0.07629 MiB allowed)")


def test_both_limits_are_named() -> None:
    reason = choose(Profile(1.0, 0.0, 80_001), **CALL).reason
    assert "limited by time (12 s" in reason and " and memory (0.04578 MiB" in reason


@pytest.mark.parametrize(
    ("profile", "limit"),
    [(Profile(6.0, 0.0, 0), "time"), (Profile(0.0, 100.0, 0), "time"), (Profile(0.0, 0.0, 16_000), "memory")],
)
def test_nothing_fits(profile: Profile, limit: str) -> None:
    found = choose(profile, **CALL)
    assert found.value == 0.0
    assert found.reason.startswith(
        f"budget 0: not even one column per layer fits, 10 columns in 2 blocks: limited by {limit} ("
    )


def test_a_layer_so_wide_that_the_smallest_budget_is_more_than_a_column() -> None:
    found = choose(Profile(1.0, 0.0, 0), **{**CALL, "widths": (50_000,), "slots": 1})  # 0.0001 of 50 000 are 5
    assert found.value == 0.0001 and "5 columns in 10 blocks" in found.reason
    none = choose(Profile(1.1, 0.0, 0), **{**CALL, "widths": (50_000,), "slots": 1})
    assert none.value == 0.0 and "not even the smallest budget above it fits, 5 columns in 10 blocks" in none.reason


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, -math.inf])
def test_no_time_is_a_wrong_setting(seconds: float) -> None:
    with pytest.raises(SettingsError, match="want more than 0"):
        choose(FREE, **{**CALL, "seconds": seconds})


@pytest.mark.parametrize("upstream", [-1.0, math.nan])
def test_a_wrong_upstream_is_a_wrong_setting(upstream: float) -> None:
    with pytest.raises(SettingsError, match="upstream="):
        choose(replace(FREE, upstream=upstream), **CALL)


def test_measure_takes_the_median_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[npt.NDArray[np.float64]] = []
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 20.4])  # 9 s (the first call warms up), 2 s, 0.4 s
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12345, "free": 1}))

    def encrypt(values: npt.NDArray[np.float64]) -> bytes:
        seen.append(values)
        return b""

    assert measure(encrypt, 64, 1e6) == Profile(0.5, 1e6, 12345)  # 2 s for 4 blocks
    assert [v.shape for v in seen] == [(256,)] * 3
    assert all(v.dtype == np.float64 and 0 < np.abs(v).max() < 1 and np.unique(v).size == 256 for v in seen)


def test_measure_reads_this_machine() -> None:
    profile = measure(lambda values: values.tobytes(), 64, 0.0)
    assert 0 < profile.seconds_per_block < 1 and profile.memory > 2**20 and profile.upstream == 0.0
