"""Examples -> padded tensors -> the sum of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from ciphertune.lm.base import pad_id
from ciphertune.lm.formats import IGNORED, Encoded
from ciphertune.lm.model import LoraModel
from ciphertune.settings import TrainingSettings

_SMALL = 10_000_000  # parameters


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to the longest of them."""

    input_ids: torch.Tensor  # (batch, length)
    attention_mask: torch.Tensor  # (batch, length)
    labels: torch.Tensor  # causal: (batch, length), IGNORED where there is no loss; classification: (batch,)
    targets: int  # how many losses the batch has: target tokens, or examples


def collate(examples: Sequence[Encoded], model: LoraModel) -> Batch:
    """A batch on the model's device."""
    length = max(len(example.input_ids) for example in examples)
    filler = pad_id(model.tokenizer)
    ids = torch.full((len(examples), length), filler, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    classes = []
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        mask[row, :size] = 1
        if isinstance(example.labels, int):
            classes.append(example.labels)
        else:
            labels[row, :size] = torch.tensor(example.labels)
    if classes:
        labels = torch.tensor(classes)
    targets = count_targets(examples)
    return Batch(ids.to(model.device), mask.to(model.device), labels.to(model.device), targets)


def count_targets(examples: Sequence[Encoded]) -> int:
    """Losses that the examples have: one per class label, one per token that is predicted (never the first)."""
    return sum(
        1 if isinstance(example.labels, int) else sum(label != IGNORED for label in example.labels[1:])
        for example in examples
    )


def loss_sum(model: LoraModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the batch's losses in nats, float32, and the logits that they were computed from, (targets, classes).

    The sum and not the mean, so that batches of unequal numbers of targets can be added up exactly.
    """
    with _autocast(model):
        logits = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    labels = batch.labels
    if model.task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]  # position t predicts token t + 1
        chosen = labels != IGNORED
        logits, labels = logits[chosen], labels[chosen]  # before the copy to float32, which is the large one
    logits = logits.float()
    return cross_entropy(logits, labels, reduction="sum"), logits


def _autocast(model: LoraModel) -> AbstractContextManager[object]:
    if model.autocast is None:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=model.autocast)


def use_threads(model: LoraModel, settings: TrainingSettings) -> None:
    """Set the CPU threads. Below some ten million parameters a second thread costs more in waiting than it gives."""
    small = sum(p.numel() for p in model.model.parameters()) < _SMALL
    if settings.threads > 0 or small:
        torch.set_num_threads(settings.threads or 1)
