"""Membership inference on the finished adapter: which texts were trained on?

loss: Yeom et al., arXiv 1709.01604: members have the smaller loss.  Min-K%: Shi et al., arXiv 2310.16789: the mean of
the 20 % least likely tokens. Reported as Carlini et al., arXiv 2112.03570, ask: the area under the ROC curve with a
bootstrap interval, and the true-positive rate at 1 % false positives. The control is the base model, which has seen
neither: it must be near 0.5, else members and others differ by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.stats import bootstrap, rankdata

from ciphertune.errors import ModelError
from ciphertune.lm.batches import collate, loss_sum, use_threads
from ciphertune.lm.data import ClientData
from ciphertune.lm.formats import Encoded
from ciphertune.lm.model import LoraModel
from ciphertune.settings import TrainingSettings

Scores = npt.NDArray[np.float64]

_MOST, _LEAST_LIKELY = 400, 0.2
FEWEST = 200  # of members and of others, below which the interval says more than the figure


@dataclass(frozen=True)
class Membership:
    """How well losses tell members from others; 0.5 is guessing."""

    auroc: float
    low: float  # 95 % bootstrap interval
    high: float
    tpr_at_1_fpr: float
    control: float  # the base model's AUROC
    min_k: float  # AUROC of Min-K%
    members: int
    others: int


def infer(model: LoraModel, adapter: Path, data: ClientData, settings: TrainingSettings) -> Membership:
    """Attack a client's finished adapter with its own examples. Raises ModelError for an unreadable adapter."""
    use_threads(model, settings)
    generator = np.random.default_rng(0)
    members, others = (_some(examples, generator) for examples in (data.train, data.heldout))
    with model.model.disable_adapter():
        base = [_losses(model, x) for x in (members, others)]
    load_adapter(model, adapter)
    tuned = [_losses(model, x) for x in (members, others)]
    low, high = interval(tuned[0][:, 0], tuned[1][:, 0])
    return Membership(
        auroc=auroc(tuned[0][:, 0], tuned[1][:, 0]),
        low=low,
        high=high,
        tpr_at_1_fpr=tpr_at(tuned[0][:, 0], tuned[1][:, 0], 0.01),
        control=auroc(base[0][:, 0], base[1][:, 0]),
        min_k=auroc(tuned[0][:, 1], tuned[1][:, 1]),
        members=len(members),
        others=len(others),
    )


def auroc(members: Scores, others: Scores) -> float:
    """The probability that a member's loss is below another's, ties counted half, from 0 to 1.

    members, others: (count,) each, at least one; of any unit, lower for what the model knows better.
    """
    ranks = rankdata(np.concatenate([members, others]))
    over = ranks[: members.size].sum() - members.size * (members.size + 1) / 2
    return float(1 - over / (members.size * others.size))


def interval(members: Scores, others: Scores) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `auroc` over both groups; all of 0 to 1 for fewer than two in one."""
    if min(members.size, others.size) < 2:
        return 0.0, 1.0
    found = bootstrap(
        (members, others), auroc, vectorized=False, paired=False, n_resamples=1000, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def tpr_at(members: Scores, others: Scores, rate: float) -> float:
    """The share of members, 0 to 1, that is found where at most a share `rate` of the others is taken for members.

    members, others: (count,) losses; `rate` is from 0 to below 1, and whole others are counted.
    """
    allowed = int(rate * others.size)
    threshold = np.sort(others)[allowed]  # strictly below it lie at most `allowed` others
    return float(np.mean(members < threshold))


def load_adapter(model: LoraModel, folder: Path) -> None:
    """Put a finished adapter, a PEFT folder, into the model. Raises ModelError."""
    try:
        result = set_peft_model_state_dict(model.model, load_file(folder / "adapter_model.safetensors"))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder} holds no adapter that fits this run's model ({type(error).__name__})") from None
    if result.unexpected_keys:
        raise ModelError(f"{folder} is the adapter of another model: it has {result.unexpected_keys[0]}")


def _losses(model: LoraModel, examples: Sequence[Encoded]) -> Scores:
    """(examples, 2): mean loss, and minus the mean log-likelihood of the least likely 20 % of the targets."""
    rows = []
    model.model.eval()
    for example in examples:
        with torch.inference_mode():
            _, logits = loss_sum(model, batch := collate([example], model))
        likely = logits.log_softmax(-1).gather(1, _targets(model, batch)[:, None])[:, 0].cpu().double().numpy()
        least = np.sort(likely)[: max(1, round(_LEAST_LIKELY * likely.size))]
        rows.append((-likely.mean(), -least.mean()))
    return np.array(rows)


def _targets(model: LoraModel, batch: Any) -> torch.Tensor:
    if model.task != "causal_lm":
        return torch.as_tensor(batch.labels)
    labels = batch.labels[:, 1:]
    return torch.as_tensor(labels[labels >= 0])


def _some(examples: Sequence[Encoded], generator: np.random.Generator) -> list[Encoded]:
    return [examples[i] for i in sorted(generator.permutation(len(examples))[:_MOST])]
