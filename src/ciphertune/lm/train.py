"""Local training: AdamW (arXiv 1711.05101, algorithm 2) on the adapter, with moments that outlive the process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ciphertune.errors import DataError, StateError
from ciphertune.lm.batches import collate, count_targets, loss_sum, use_threads
from ciphertune.lm.formats import Encoded
from ciphertune.lm.model import LoraModel
from ciphertune.runs import write
from ciphertune.settings import TrainingSettings

_GROUPED = 8  # batches among which examples are sorted by length
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did. Losses are in nats per target token, or per example for classification."""

    loss: float  # mean over the steps; NaN or infinite when training diverged
    losses: tuple[float, ...]  # one per step


def train(
    model: LoraModel,
    data: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    seed: int,
    state: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainResult:
    """`settings.steps` optimizer steps on `data`, in an order and with a dropout that follow from `seed` alone.

    state: a file that carries AdamW's moments from one call to the next; created when absent.
    progress: called after every step with (steps done, steps, loss).
    Raises DataError without data, StateError when `state` is damaged. A loss that is not finite is returned as it is.
    """
    if not data:
        raise DataError("there is no training example: check the data settings of this client")
    use_threads(model, settings)
    model.freeze(model.frozen, model.components)  # PEFT's disable_adapter() leaves every factor trainable
    parameters = model.trainable()
    optimizer = _optimizer(parameters, settings)
    if state is not None and state.is_file():
        _restore(optimizer, parameters, _load(state))
    rows = batches(data, settings, seed)
    losses, count = [], settings.accumulation
    model.model.train()
    with torch.random.fork_rng(devices=_cuda(model.device)):
        torch.manual_seed(seed % 2**63)  # dropout
        for step in range(1, settings.steps + 1):
            losses.append(
                _step(model, parameters, optimizer, [[data[i] for i in next(rows)] for _ in range(count)], settings)
            )
            if progress is not None:
                progress(step, settings.steps, losses[-1])
    model.model.eval()
    if state is not None and _finite(optimizer):  # a step that went to NaN must not spoil the next round
        _store(optimizer, parameters, state)
    return TrainResult(float(np.mean(losses)), tuple(losses))


def _step(
    model: LoraModel,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: list[list[Encoded]],
    settings: TrainingSettings,
) -> float:
    """One step on the mean loss over all targets of `batches`, however they are divided; returns that mean."""
    targets = max(1, sum(count_targets(batch) for batch in batches))
    total = 0.0
    for examples in batches:
        summed, _ = loss_sum(model, collate(examples, model))
        (summed / targets).backward()  # type: ignore[no-untyped-call]
        total += float(summed.detach())
    resting = model.resting()
    before = [parameter.detach()[part].clone() for parameter, part in resting]
    for parameter, part in resting:
        if parameter.grad is not None:
            parameter.grad[part] = 0.0  # the others' norm is clipped as if these were not there
    nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        for (parameter, part), values in zip(resting, before, strict=True):
            parameter[part] = values  # neither decay nor earlier moments move them
    optimizer.zero_grad(set_to_none=True)
    return total / targets


def batches(data: Sequence[Encoded], settings: TrainingSettings, seed: int) -> Iterator[list[int]]:
    """The numbers of the examples in each batch, without end: full batches of one shuffled pass after the other.

    With `group_by_length` every eight batches of a pass are divided anew, by length, and shuffled as whole batches.
    """
    generator = np.random.default_rng(seed % 2**64)
    queue: list[int] = []
    while True:
        while len(queue) < settings.batch_size:
            rows = generator.permutation(len(data)).tolist()
            queue.extend(_by_length(rows, data, settings.batch_size, generator) if settings.group_by_length else rows)
        yield queue[: settings.batch_size]
        del queue[: settings.batch_size]


def _by_length(rows: list[int], data: Sequence[Encoded], size: int, generator: np.random.Generator) -> list[int]:
    found: list[int] = []
    for start in range(0, len(rows), _GROUPED * size):
        group = sorted(rows[start : start + _GROUPED * size], key=lambda i: len(data[i].input_ids))
        cuts = [group[i : i + size] for i in range(0, len(group), size)]
        found += [i for k in generator.permutation(len(cuts)) for i in cuts[k]]
    return found


def batch_seed(seed: int, name: str, round_: int) -> int:
    """Seed of one client's batches in one round, from the run's seed and the client's name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name} {round_}".encode()).digest()[:4], "little")


def _optimizer(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW; biases and norms, which have one dimension, do not decay."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)


def _restore(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], saved: dict[str, torch.Tensor]
) -> None:
    """Give back the moments of the parameters that train now and still have the shape they had."""
    for name, parameter in parameters.items():
        moments = {key: saved.get(f"{name}/{key}") for key in _MOMENTS}
        step, first, second = (moments[key] for key in _MOMENTS)
        if step is None or first is None or second is None or not first.shape == second.shape == parameter.shape:
            continue
        optimizer.state[parameter] = {
            "step": step.clone(),
            "exp_avg": first.to(parameter.device),
            "exp_avg_sq": second.to(parameter.device),
        }


def _store(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: Path) -> None:
    """Update the moments of the parameters that trained; those of a frozen factor stay in the file.

    Alternating methods freeze each factor every other round (RoLoRA, arXiv 2502.01755), and a process
    lives for one round: what is not kept here would be lost before the factor's next turn.
    """
    saved = _load(state) if state.is_file() else {}
    for name, parameter in parameters.items():
        for key in _MOMENTS:
            if key in optimizer.state[parameter]:
                saved[f"{name}/{key}"] = optimizer.state[parameter][key].detach().cpu().contiguous()
    write(state, save(saved))  # a crash leaves the old file or the new one, never half of one


def _finite(optimizer: torch.optim.Optimizer) -> bool:
    moments = (value for kept in optimizer.state.values() for value in kept.values())
    return all(bool(torch.isfinite(value).all()) for value in moments if isinstance(value, torch.Tensor))


def _load(state: Path) -> dict[str, torch.Tensor]:
    try:
        saved: dict[str, torch.Tensor] = load_file(state)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{state} cannot be read back ({error}): remove it to start with fresh moments") from None
    return saved


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
