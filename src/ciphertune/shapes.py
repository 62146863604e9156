"""The shapes of a model's adapted layers and heads from its configuration alone: no weights, no torch, no network.

For `ciphertune plan`. Which modules a target names is PEFT's rule, as in `lm/model.py`: the ending of a module's path,
or all-linear for every linear layer but the output. A configuration tells no weights: a head counts as new, and an
encoder's pooler as part of the base model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ciphertune.errors import ModelError, SettingsError
from ciphertune.model_folder import resolve
from ciphertune.plan import HeadShape, LayerShape
from ciphertune.settings import ModelSettings

_LARGEST = 1 << 24  # of any number in a configuration
_MAX_BLOCKS = 1000


def _decoder(hidden: int, wide: int, blocks: int, heads: int, kv_heads: int, words: int, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": words,
    }


# What the models' own config.json say; the pattern is for the last part of a hub id, in small letters.
_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2-7B": (r"llama-?2-7b(-chat)?(-hf)?", _decoder(4096, 11008, 32, 32, 32, 32000, "llama")),
    "Llama-2-13B": (r"llama-?2-13b(-chat)?(-hf)?", _decoder(5120, 13824, 40, 40, 40, 32000, "llama")),
    "Llama-3-8B": (
        r"(meta-)?llama-?3(\.1)?-8b(-instruct)?(-hf)?",
        _decoder(4096, 14336, 32, 32, 8, 128256, "llama"),
    ),
    "Qwen3-4B": (r"qwen3-4b(-base|(-instruct|-thinking)-2507)?", _decoder(2560, 9728, 36, 32, 8, 151936, "qwen3")),
    "Mistral-7B": (r"mistral-7b(-v0\.1|-instruct(-v0\.[12])?)?", _decoder(4096, 14336, 32, 32, 8, 32000, "mistral")),
    "Mistral-7B-v0.3": (r"mistral-7b(-instruct)?-v0\.3", _decoder(4096, 14336, 32, 32, 8, 32768, "mistral")),
}
KNOWN = (*_KNOWN, "embedded")


@dataclass(frozen=True)
class _Linear:
    """A linear layer: its weight is (m, n), whichever way the model stores it."""

    name: str
    m: int
    n: int
    output: bool = False  # scores over words, which all-linear leaves out
    head: bool = False  # of classification: it travels whole


class _Config:
    """A model's configuration. Its errors name the key and where it was read."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def number(self, key: str, default: int | None = None, largest: int = _LARGEST) -> int:
        """A size. A key that is absent or null has the default. Raises SettingsError, also where there is none."""
        found = self._values.get(key)
        if found is None:
            found = default
        if found is None:
            raise SettingsError(f"{self._where} has no {key}, from which the shapes would follow")
        if type(found) is not int or not 1 <= found <= largest:
            raise SettingsError(f"{self._where}: {key}={found!r} is no number from 1 to {largest}")
        return found

    def output(self, name: str, hidden: int) -> Iterator[_Linear]:
        """The layer that scores words, where the configuration says how many there are: hardly anybody adapts it."""
        if "vocab_size" in self._values:
            yield _Linear(name, self.number("vocab_size"), hidden, output=True)

    @property
    def known(self) -> bool:
        """Whether the layers of its model_type are known here."""
        return self._values.get("model_type") in _FAMILIES

    @property
    def kind(self) -> str:
        """The model_type. Raises SettingsError for one whose layers are not known here."""
        found = self._values.get("model_type")
        if not isinstance(found, str) or found not in _FAMILIES:
            raise SettingsError(
                f"{self._where} has model_type {found!r}, whose layers are unknown here. Known: {', '.join(_FAMILIES)}"
            )
        return found


def layer_shapes(name: str, targets: Sequence[str], task: str = "causal_lm") -> tuple[LayerShape, ...]:
    """The layers that LoRA adapts, in the order in which they are packed.

    name: a known model or a hub id of one, "embedded", a folder with a config.json, or such a file.  targets: endings
    of module names, or all-linear.  task: causal_lm | classification.
    Raises SettingsError for an unknown name, a configuration that cannot be used, or a target that is no layer.
    """
    linear = [x for x in _linear(_read(name), task, labels=1) if not x.head]
    if tuple(targets) == ("all-linear",):
        chosen = {x.name: x for x in linear if not x.output}
    else:
        chosen = {}
        for target in targets:
            found = {x.name: x for x in linear if f".{x.name}".endswith(f".{target}")}
            if not found:
                raise SettingsError(_no_target(target, linear, name))
            chosen.update(found)
    return tuple(LayerShape(x.name, x.m, x.n) for _, x in sorted(chosen.items()))


def is_known(name: str) -> bool:
    """Whether a model's shapes can be told. Raises SettingsError where there is no configuration to tell them from."""
    return _read(name).known


def head_shapes(name: str, task: str, labels: int) -> tuple[HeadShape, ...]:
    """The tensors of the task head, which travel whole; none for causal_lm. Raises SettingsError."""
    config, found = _read(name), []
    for x in _linear(config, task, labels):
        if x.head:
            found.append(HeadShape(f"{x.name}.weight", (x.m, x.n)))
            if _FAMILIES[config.kind].biased:
                found.append(HeadShape(f"{x.name}.bias", (x.m,)))
    return tuple(sorted(found, key=lambda h: h.name))


def model_shapes(
    model: ModelSettings, labels: int, ranks: Sequence[int]
) -> tuple[tuple[LayerShape, ...], tuple[HeadShape, ...]]:
    """Layers and heads of the model in the settings. labels: how many (classification).

    Raises SettingsError also for a rank that some layer is too small for.
    """
    if model.task == "classification" and labels < 2:
        raise SettingsError("model.task=classification needs data.labels, e.g. data.labels=[negative,positive]")
    layers, rank = layer_shapes(model.name, model.targets, model.task), max(ranks)
    smallest = min(layers, key=lambda x: (min(x.m, x.n), x.name))
    if rank > min(smallest.m, smallest.n):
        raise SettingsError(
            f"rank {rank} is above the size of layer {smallest.name} ({min(smallest.m, smallest.n)}): use a smaller "
            "rank, or other model.targets"
        )
    return layers, head_shapes(model.name, model.task, labels)


def _no_target(target: str, linear: Sequence[_Linear], model: str) -> str:
    endings = sorted({x.name.split(".")[-1] for x in linear})
    near = get_close_matches(target, endings, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"model.targets: {target!r} is no linear layer of model.name={model!r}{hint} There are: {', '.join(endings)}"


def _read(name: str) -> _Config:
    """The configuration of a model. Raises SettingsError."""
    if not name:
        raise SettingsError("model.name is empty: give a folder with a config.json, or one of " + ", ".join(KNOWN))
    path = Path(name).expanduser()
    if name == "embedded" or path.is_dir():
        try:
            path = Path(resolve(name)) / "config.json"
        except ModelError as error:
            raise SettingsError(str(error)) from None
    elif not path.is_file():
        last = name.rsplit("/", 1)[-1].lower()
        found = next((config for pattern, config in _KNOWN.values() if re.fullmatch(pattern, last)), None)
        if found is None:
            raise SettingsError(
                f"model.name={name!r}: shapes are known of {', '.join(KNOWN)}; for any other model give a folder with "
                "config.json"
            )
        return _Config(found, name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} is not the configuration of a model: it holds no keys")
    return _Config(values, str(path))


# --- families of models -----------------------------------------------------------------------------------------------


def _linear(config: _Config, task: str, labels: int) -> list[_Linear]:
    return list(_FAMILIES[config.kind].layers(config, task == "classification", labels))


def _llama(config: _Config, classifies: bool, labels: int) -> Iterator[_Linear]:
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    wide, blocks = config.number("intermediate_size"), config.number("num_hidden_layers", largest=_MAX_BLOCKS)
    # older Llamas say neither; of the others both are in every file
    grouped = config.number("num_key_value_heads", heads if config.kind == "llama" else None)
    size = config.number("head_dim", hidden // heads if config.kind in _EVEN_HEADS else None)
    query, key = heads * size, grouped * size
    shapes = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for i in range(blocks):
        yield from (_Linear(f"model.layers.{i}.{name}", *shape) for name, shape in shapes.items())
    if classifies:
        yield _Linear("score", labels, hidden, head=True)
    else:
        yield from config.output("lm_head", hidden)


def _bert(config: _Config, classifies: bool, labels: int) -> Iterator[_Linear]:
    hidden, wide = config.number("hidden_size"), config.number("intermediate_size")
    plain = config.kind == "bert"
    base = "bert" if plain else "roberta"
    shapes = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (wide, hidden),
        "output.dense": (hidden, wide),
    }
    for i in range(config.number("num_hidden_layers", largest=_MAX_BLOCKS)):
        yield from (_Linear(f"{base}.encoder.layer.{i}.{name}", *shape) for name, shape in shapes.items())
    if not classifies:
        first, last = ("cls.predictions.transform.dense", "cls.predictions.decoder") if plain else _ROBERTA_OUTPUT
        yield _Linear(first, hidden, hidden)
        yield from config.output(last, hidden)
    elif plain:
        yield _Linear("bert.pooler.dense", hidden, hidden)
        yield _Linear("classifier", labels, hidden, head=True)
    else:
        yield _Linear("classifier.dense", hidden, hidden, head=True)
        yield _Linear("classifier.out_proj", labels, hidden, head=True)


def _gpt2(config: _Config, classifies: bool, labels: int) -> Iterator[_Linear]:
    hidden = config.number("n_embd")
    wide = config.number("n_inner", 4 * hidden)
    shapes = {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (wide, hidden),
        "mlp.c_proj": (hidden, wide),
    }
    for i in range(config.number("n_layer", largest=_MAX_BLOCKS)):
        yield from (_Linear(f"transformer.h.{i}.{name}", *shape) for name, shape in shapes.items())
    if classifies:
        yield _Linear("score", labels, hidden, head=True)
    else:
        yield from config.output("lm_head", hidden)


@dataclass(frozen=True)
class _Family:
    layers: Callable[[_Config, bool, int], Iterator[_Linear]]
    biased: bool  # whether the head has biases


_ROBERTA_OUTPUT = ("lm_head.dense", "lm_head.decoder")
_EVEN_HEADS = ("llama", "mistral", "qwen2", "olmo2", "smollm3")  # head_dim is hidden_size / heads where none is given
_FAMILIES = {
    **dict.fromkeys((*_EVEN_HEADS, "qwen3", "gemma", "gemma2"), _Family(_llama, False)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _Family(_bert, True)),
    "gpt2": _Family(_gpt2, False),
}
