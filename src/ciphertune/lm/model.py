"""A base model with a LoRA adapter (arXiv 2106.09685, section 4), read and written as plain numbers."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import ModelError
from ciphertune.lm import quantization
from ciphertune.lm.base import heads, load_base, load_tokenizer, new_modules, pick_autocast, pick_device
from ciphertune.settings import ModelSettings

__all__ = ["LoraModel", "adapt", "load", "load_tokenizer"]

_NAME = "default"  # PEFT's name of the one adapter
_TASKS = {"causal_lm": TaskType.CAUSAL_LM, "classification": TaskType.SEQ_CLS}


@dataclass
class LoraModel:
    """A base model that does not train, and the adapter that does; the adapter is float32 whatever the base is."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    autocast: torch.dtype | None  # compute in this type, None = float32
    task: str
    rank: int
    scale: float  # alpha / rank; common to all clients unless model.scaling=own
    frozen: str = ""  # the factor that does not train now
    components: int = 0  # of each layer, that train now; see `freeze`

    def read(self) -> Adapter:
        """The adapter as float32 copies: a (r, n), b (m, r) per layer, named by module path; heads by parameter."""
        layers = {
            name: LoraFactors(_numpy(layer.lora_A[_NAME].weight), _numpy(layer.lora_B[_NAME].weight), self.scale)
            for name, layer in self._layers()
        }
        return Adapter(layers, {name: _numpy(parameter) for name, parameter in self._heads()})

    def write(self, adapter: Adapter) -> None:
        """The inverse of `read`. Raises ModelError unless names, shapes and scale are those of this model."""
        targets: dict[str, tuple[nn.Parameter, Any]] = {}
        for name, layer in self._layers():
            factors = adapter.layers.get(name)
            if factors is None:
                raise ModelError(f"the adapter has no layer {name}: it was made for another model or other targets")
            if not math.isclose(factors.scale, self.scale, rel_tol=1e-9):
                raise ModelError(f"layer {name} has scale {factors.scale}, this model {self.scale}: check model.alpha")
            targets[f"{name}.a"] = (layer.lora_A[_NAME].weight, factors.a)
            targets[f"{name}.b"] = (layer.lora_B[_NAME].weight, factors.b)
        for name, parameter in self._heads():
            targets[name] = (parameter, adapter.heads.get(name))
        extra = sorted(
            {*adapter.layers, *adapter.heads} - {n for n, _ in self._layers()} - {n for n, _ in self._heads()}
        )
        if extra:
            raise ModelError(
                f"the adapter has {extra[0]}, this model has not: it was made for another model or targets"
            )
        for name, (parameter, values) in targets.items():
            shape = None if values is None else values.shape
            if shape != tuple(parameter.shape):
                raise ModelError(f"{name} has shape {shape}, this model wants {tuple(parameter.shape)}")
        with torch.no_grad():
            for parameter, values in targets.values():
                parameter.copy_(torch.from_numpy(np.require(values, np.float32, ["C", "W"])))

    def add_to_base(self, changes: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]) -> None:
        """Add (m, n) changes to the frozen weights of adapted layers.

        Raises ModelError for a layer that there is not, or whose weights are quantized.
        """
        layers = dict(self._layers())
        with torch.no_grad():
            for name, change in changes.items():
                if name not in layers:
                    raise ModelError(f"the merged update has layer {name}, this model has not")
                base = layers[name].get_base_layer()
                if quantization.is_quantized(base):
                    raise ModelError(f"nothing can be merged into layer {name}: it is quantized; use the plain model")
                values = torch.from_numpy(change.T if isinstance(base, Conv1D) else change)
                base.weight.add_(values.to(base.weight))

    def freeze(self, factor: str, components: int | None = None) -> None:
        """Train everything but LoRA factor "a" or "b" from now on; "" freezes neither. Heads always train.

        components: of each layer, the first ones alone train (default: all).
        Raises ValueError for any other factor.
        """
        if factor not in ("", "a", "b"):
            raise ValueError(f"factor {factor!r}: want 'a', 'b' or ''")
        self.frozen, self.components = factor, self.rank if components is None else components
        for _, layer in self._layers():
            layer.lora_A[_NAME].weight.requires_grad_(factor != "a")
            layer.lora_B[_NAME].weight.requires_grad_(factor != "b")
        for _, parameter in self._heads():
            parameter.requires_grad_(True)

    def resting(self) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        """The parts of the adapter's trainable parameters that do not train: the components after the first ones."""
        if self.components >= self.rank:
            return []
        rest = slice(self.components, None)
        both = (("lora_A", (rest,)), ("lora_B", (slice(None), rest)))
        found = [(getattr(layer, name)[_NAME].weight, part) for _, layer in self._layers() for name, part in both]
        return [(weight, part) for weight, part in found if weight.requires_grad]

    def save(self, folder: Path) -> None:
        """Write a PEFT folder that ``PeftModel.from_pretrained(base, folder)`` loads with the same outputs."""
        # "auto" would ask the hub whether the base model's vocabulary has changed
        self.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train now, by names that do not depend on PEFT's wrapping."""
        named: dict[str, nn.Parameter] = {}
        for name, layer in self._layers():
            named[f"{name}.lora_A"] = layer.lora_A[_NAME].weight
            named[f"{name}.lora_B"] = layer.lora_B[_NAME].weight
        named.update(self._heads())
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def _heads(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.model.base_model.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                for key, parameter in module.modules_to_save[_NAME].named_parameters():
                    yield f"{name}.{key}", parameter


def load(
    settings: ModelSettings, *, rank: int, labels: Sequence[str] = (), device: str = "auto", seed: int = 0
) -> LoraModel:
    """The base model with a fresh adapter of `rank`, the same on every client that has the same `seed`.

    labels: every class, in the order of the outputs (classification only). seed: of the initial adapter; component k
    of a layer depends on (seed, k, layer) alone, so the adapter of a small rank is the beginning of a larger one's.
    Raises ModelError when the model cannot be found, loaded or adapted as asked.
    """
    if settings.task == "classification" and len(labels) < 2:
        raise ModelError(
            f"model.task=classification needs two labels or more, got {list(labels)}: set e.g. data.labels=[no,yes]"
        )
    where = pick_device(device)
    quantization.check(settings.quantization, where)
    tokenizer = load_tokenizer(settings)
    dtype = pick_autocast(settings.dtype, where) or torch.float32
    base, new = load_base(settings, tokenizer, labels, dtype, where)
    return adapt(base, tokenizer, settings, rank=rank, new=new, seed=seed)


def adapt(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelSettings,
    *,
    rank: int,
    new: Set[str] = frozenset(),
    seed: int = 0,
) -> LoraModel:
    """`base`, on the device where it is, with a fresh adapter there, as `load` gives it.

    new: names of the base's parameters that have no values yet. Raises ModelError when it cannot be adapted as asked.
    """
    trained = new_modules(base, set(new))
    _check_targets(settings, base, heads(base, set(new)) if settings.task == "classification" else set(), rank)
    with torch.no_grad():
        for name in sorted(new):
            parameter = base.get_parameter(name)
            parameter.data = parameter.data.float()  # before it gets its values: the same ones whatever the base is
            _init_head(name, parameter, seed)
    if settings.gradient_checkpointing:
        _checkpoint(base, settings.name)
    scale = settings.alpha / (rank if settings.scaling == "own" else settings.rank)
    config = LoraConfig(
        task_type=_TASKS[settings.task],
        target_modules="all-linear" if settings.targets == ("all-linear",) else list(settings.targets),
        r=rank,
        lora_alpha=scale * rank,  # PEFT scales by lora_alpha / r
        lora_dropout=settings.dropout,
        modules_to_save=sorted(trained) or None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, which PEFT corrects by itself
        # not PEFT's prepare_model_for_kbit_training: it would make all that is not quantized float32
        peft = get_peft_model(base, config)
    autocast = pick_autocast(settings.dtype, base.device)
    model = LoraModel(peft, tokenizer, base.device, autocast, settings.task, rank, scale, components=rank)
    for parameter in model.trainable().values():
        parameter.data = parameter.data.to(base.device, torch.float32)
    model.write(_initial(model.read(), seed))
    return model


def _checkpoint(base: PreTrainedModel, name: str) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again there (arXiv 1604.06174)."""
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"model.name={name!r} cannot compute its activations again: set model.gradient_checkpointing=false"
        )
    # also makes the embeddings' output require a gradient, since no parameter of the base does
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _initial(adapter: Adapter, seed: int) -> Adapter:
    """`adapter` with the A of PEFT's default distribution, drawn row by row, and B = 0 (arXiv 2106.09685, 4.1)."""
    layers = {}
    for name, factors in adapter.layers.items():
        n = factors.a.shape[1]
        bound = 1 / math.sqrt(n)
        rows = [_generator(seed, k, name).uniform(-bound, bound, n) for k in range(factors.rank)]
        layers[name] = LoraFactors(np.array(rows, dtype=np.float32), np.zeros_like(factors.b), factors.scale)
    return Adapter(layers, adapter.heads)


def _init_head(name: str, parameter: nn.Parameter, seed: int) -> None:
    """New matrices normal(0, 0.02), new norms one, new biases zero; never from torch's own generator."""
    if parameter.ndim >= 2:
        values = _generator(seed, 0, name).normal(0.0, 0.02, tuple(parameter.shape))
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    else:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _generator(seed: int, component: int, name: str) -> np.random.Generator:
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
    return np.random.default_rng(np.random.SeedSequence([seed % 2**64, component, *words]))


def _check_targets(settings: ModelSettings, base: PreTrainedModel, outside: set[str], rank: int) -> None:
    """Raise ModelError for a target that is no linear layer of the model, or a rank that some adapted layer lacks.

    outside: names of modules that train as a whole.
    """
    linear = {
        name: min(quantization.size(module))
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{head}.") for head in outside)
    }
    every = settings.targets == ("all-linear",)
    chosen = dict(linear) if every else {}
    for target in () if every else settings.targets:
        found = {name: size for name, size in linear.items() if f".{name}".endswith(f".{target}")}
        if not found:
            raise ModelError(_no_target(target, linear, settings.name))
        chosen.update(found)
    if not chosen:
        raise ModelError(f"model.targets is empty: name linear layers of model.name={settings.name!r}, or all-linear")
    smallest = min(chosen, key=lambda name: (chosen[name], name))
    if rank > chosen[smallest]:
        raise ModelError(
            f"rank {rank} is above the size of layer {smallest} ({chosen[smallest]}): "
            f"use a rank of at most {chosen[smallest]}, or other model.targets"
        )


def _no_target(target: str, linear: dict[str, int], model: str) -> str:
    endings = sorted({name.split(".")[-1] for name in linear})
    near = get_close_matches(target, endings, n=3, cutoff=0.4) or endings[:10]
    return f"model.targets: {target!r} is no linear layer of model.name={model!r}; nearest: {', '.join(near)}"


def _numpy(parameter: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return parameter.detach().to("cpu", torch.float32, copy=True).numpy()
