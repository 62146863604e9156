"""What the adapted layers of a model read, in numbers per input feature: the norms of Wanda (arXiv 2306.11695).

Streamed: of every batch only the sums of squares stay, so memory does not grow with the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ciphertune.errors import DataError, ModelError
from ciphertune.lm import quantization
from ciphertune.lm.batches import _autocast, collate, use_threads
from ciphertune.lm.formats import Encoded
from ciphertune.lm.model import LoraModel
from ciphertune.settings import TrainingSettings

Vector = npt.NDArray[np.float64]


def input_norms(
    model: LoraModel,
    data: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    samples: int,
) -> dict[str, Vector]:
    """The L2 norm (n,) of each input feature of each adapted layer, over the tokens of the first `samples` examples.

    Named and ordered as in `LoraModel.read`. Padding does not count. A layer that reads pooled rows (batch, n) counts
    all of them; one that no example reaches has norms 0. The adapter acts as it is; dropout is off.
    Values are not checked: a model that computes NaN has norms of NaN.
    Raises DataError without data, ModelError for a layer whose input cannot be told from padding, ValueError when
    `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: want at least 1")
    if not data:
        raise DataError("there is no calibration example: check the data settings of this client")
    use_threads(model, settings)
    chosen = sorted(data[:samples], key=lambda example: -len(example.input_ids))  # like with like: little padding
    layers = dict(sorted(model._layers()))
    sums = _Sums({name: layer.lora_A["default"].in_features for name, layer in layers.items()})
    training = model.model.training
    try:
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(layer.register_forward_pre_hook(sums.hook(name)))
            model.model.eval()
            _forward(model, chosen, settings.eval_batch_size, sums)
    finally:
        model.model.train(training)
    return {name: np.sqrt(squares) for name, squares in sums.squares.items()}


def weight_columns(model: LoraModel) -> dict[str, Vector]:
    """The sums sum_k |W0_kj| (n,) over the rows of each adapted layer's frozen weight W0 (m, n), named as in `read`."""
    found = {}
    for name, layer in sorted(model._layers()):
        found[name] = _float64(quantization.weight(layer.get_base_layer()).abs().sum(0, dtype=torch.float32))
    return found


class _Sums:
    """Sums of squares per layer and input feature, over the tokens that `mask` (batch, length) marks."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.squares: dict[str, Vector] = {name: np.zeros(n) for name, n in widths.items()}
        self.mask = torch.zeros(0, 0, dtype=torch.bool)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A forward pre-hook that adds up what the layer `name` reads."""

        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = self._rows(name, inputs[0]).float()
            self.squares[name] += _float64(rows.square().sum(0))

        return add

    def _rows(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The rows (count, n) of `x` that are no padding, picked and not weighted by 0: padding may hold anything."""
        if x.shape[:-1] == self.mask.shape:
            return x[self.mask]
        if x.ndim == 2 and len(x) == self.mask.numel():  # all tokens in one row after the other
            return x[self.mask.flatten()]
        if x.ndim == 2:  # one row per example
            return x
        raise ModelError(
            f"layer {name} reads an input of shape {tuple(x.shape)} for tokens {tuple(self.mask.shape)}, which cannot "
            "be told from padding: leave it out of model.targets, or choose a score that needs no activations"
        )


def _forward(model: LoraModel, examples: Sequence[Encoded], size: int, sums: _Sums) -> None:
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], model)
        sums.mask = batch.attention_mask.bool()
        with torch.inference_mode(), _autocast(model):
            model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def _float64(values: torch.Tensor) -> Vector:
    """A float64 copy on the CPU; converted there, since not every device has float64."""
    return values.cpu().double().numpy()
