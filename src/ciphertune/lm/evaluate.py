"""The loss and metrics of a model on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ciphertune.errors import DataError
from ciphertune.lm.batches import collate, loss_sum, use_threads
from ciphertune.lm.formats import Encoded
from ciphertune.lm.model import LoraModel
from ciphertune.settings import TrainingSettings


@dataclass(frozen=True)
class Evaluation:
    """A model on a set of examples."""

    loss: float  # nats: mean over all target tokens (causal) or all examples (classification)
    samples: int  # examples
    tokens: int  # target tokens (causal) or input tokens (classification)
    metrics: Mapping[str, float]  # causal: perplexity; classification: accuracy, f1 (macro), both 0 to 1


def evaluate(model: LoraModel, data: Sequence[Encoded], settings: TrainingSettings) -> Evaluation:
    """Loss and metrics of the model as it is, with its adapter; the result does not depend on the batch size.

    For the base model alone call it inside ``with model.model.disable_adapter():`` or with the initial adapter.
    Raises DataError without data.
    """
    if not data:
        raise DataError("there is no held-out example: check data.heldout_path and data.heldout_fraction")
    use_threads(model, settings)
    order = sorted(range(len(data)), key=lambda i: -len(data[i].input_ids))  # like with like: little padding
    total, targets = 0.0, 0
    predicted = np.zeros(len(data), dtype=np.int64)
    model.model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), settings.eval_batch_size):
            chunk = order[start : start + settings.eval_batch_size]
            batch = collate([data[i] for i in chunk], model)
            summed, logits = loss_sum(model, batch)
            total += float(summed)
            targets += batch.targets
            if model.task == "classification":
                predicted[chunk] = logits.argmax(-1).cpu().numpy()
    loss = total / max(1, targets)
    if model.task == "causal_lm":
        return Evaluation(loss, len(data), targets, {"perplexity": math.exp(loss) if loss < 700 else math.inf})
    true = np.array([example.labels for example in data], dtype=np.int64)
    metrics = {"accuracy": float(np.mean(true == predicted)), "f1": macro_f1(true, predicted)}
    return Evaluation(loss, len(data), sum(len(example.input_ids) for example in data), metrics)


def macro_f1(true: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """The unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), 0 to 1.

    Over the classes that occur in `true` or `predicted`, both of shape (examples,).
    """
    scores = []
    for label in np.union1d(true, predicted):
        hits = np.sum((true == label) & (predicted == label))
        misses = np.sum((true == label) != (predicted == label))
        scores.append(2 * hits / (2 * hits + misses))
    return float(np.mean(scores))
