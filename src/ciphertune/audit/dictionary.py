"""What the first adapted layers read for each token: the candidates of every attack on the first layers.

Found by asking the public model, not by knowing its architecture: a probe stops the forward pass at each adapted layer
and looks whether what the layer reads depends on the token and its place alone. Of a Llama those are query, key and
value of the first block, and the place does not matter; of BERT the same, and it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ciphertune.audit.pursuit import Common
from ciphertune.errors import ModelError
from ciphertune.lm.batches import _autocast
from ciphertune.lm.model import LoraModel

Rows = npt.NDArray[np.float32]

_CHUNK = 1 << 14  # tokens embedded at once


class _Found(Exception):
    """What a layer reads."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs


@dataclass(frozen=True)
class Dictionary:
    """The rows that a group of layers reads for each candidate token at each place."""

    model: LoraModel
    layers: tuple[str, ...]  # that read the same
    tokens: npt.NDArray[np.int64]  # (V,) candidate token ids
    places: int  # 1 where the place does not matter
    width: int  # n
    kept: dict[bytes, Common] = field(default_factory=dict)  # by the name of what sees the rows

    def rows(self, place: int, which: npt.NDArray[np.int64] | None = None) -> Rows:
        """What the layers read for each candidate token, or those of the given indices, at a place, (count, n)."""
        tokens = self.tokens if which is None else self.tokens[which]
        found = []
        for start in range(0, tokens.size, _CHUNK):
            ids = torch.from_numpy(tokens[start : start + _CHUNK]).to(self.model.device)
            found.append(_read(self.model, self.layers[0], ids, place))
        return np.concatenate(found)

    def sample(self, place: int, count: int, generator: np.random.Generator) -> Rows:
        """The rows of some tokens drawn at random."""
        return self.rows(place, generator.choice(self.tokens.size, min(count, self.tokens.size), replace=False))

    def frames(self) -> list[list[tuple[int, int]]]:
        """What may be known of a text without reading it: (place, index of the token) of its beginning, and its end.

        Nothing first, then what takes more for granted.
        """
        tokenizer, index = self.model.tokenizer, {int(t): i for i, t in enumerate(self.tokens)}
        first, last = (
            next((index[t] for t in ids if t in index), None)
            for ids in (
                (tokenizer.cls_token_id, tokenizer.bos_token_id),
                (tokenizer.sep_token_id, tokenizer.eos_token_id),
            )
        )
        begun = [[]] if first is None else [[], [(0, first)]]
        ends = [] if last is None else [(place, last) for place in range(self.places)]
        return [*begun, *([*begun[-1], end] for end in ends)]

    def all_rows(self) -> Iterator[tuple[int, Rows]]:
        """(place, rows) for every place."""
        for place in range(self.places):
            yield place, self.rows(place)


def dictionary(model: LoraModel, length: int) -> Dictionary:
    """The candidates of a model, at the first `length` places.

    Raises ModelError when no adapted layer reads tokens apart from each other: then there is nothing to look up.
    """
    tokens = _candidates(model)
    layers = _context_free(model, tokens)
    if not layers:
        raise ModelError("no adapted layer reads a token apart from the others: there is no dictionary to attack with")
    probe = torch.from_numpy(tokens[:1]).to(model.device)
    first, later = (_read(model, layers[0], probe, place) for place in (0, min(1, length - 1)))
    same = bool(np.allclose(first, later, atol=1e-5))
    return Dictionary(model, layers, tokens, 1 if same else length, first.shape[1])


def special_ids(model: LoraModel) -> frozenset[int]:
    """Tokens that say nothing about a text: its beginning, its end, padding."""
    return frozenset(int(i) for i in model.tokenizer.all_special_ids)


def _candidates(model: LoraModel) -> npt.NDArray[np.int64]:
    """All tokens but the place holders that never occur in a text."""
    words = model.tokenizer.get_vocab()
    size = int(model.model.get_input_embeddings().weight.shape[0])
    return np.array(sorted(i for word, i in words.items() if i < size and not word.startswith("[unused")), np.int64)


def _read(model: LoraModel, layer: str, ids: torch.Tensor, place: int) -> Rows:
    """What a layer reads for each token (count,) at a place, (count, n)."""
    more = {"position_ids": torch.full((ids.numel(), 1), place, device=ids.device)} if place else {}
    return _input(model, layer, ids[:, None], **more)[:, 0]


def _input(model: LoraModel, layer: str, ids: torch.Tensor, **more: Any) -> Rows:
    """What a layer reads, (batch, length, n), for token ids (batch, length)."""

    def stop(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _Found(inputs[0])

    hook = dict(model._layers())[layer].register_forward_pre_hook(stop)
    model.model.eval()
    try:
        with torch.inference_mode(), _autocast(model):
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    except _Found as found:
        return np.asarray(found.inputs.float().cpu().numpy(), np.float32)
    finally:
        hook.remove()
    raise ModelError(f"layer {layer} takes no part in the forward pass")


def _context_free(model: LoraModel, tokens: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Adapted layers whose input at a place depends on the token there alone, those of the first one's input."""
    generator = np.random.default_rng(0)
    ids = generator.choice(tokens, (2, 6))
    ids[:, 3] = ids[0, 3]
    batch = torch.from_numpy(ids).to(model.device)
    found: list[str] = []
    first: Rows | None = None
    for name, _ in model._layers():
        rows = _input(model, name, batch)
        if rows.ndim != 3 or not np.allclose(rows[0, 3], rows[1, 3], atol=1e-5):
            continue
        if first is None or (first.shape == rows.shape and np.allclose(first, rows, atol=1e-6)):
            first = rows if first is None else first
            found.append(name)
    return tuple(found)
