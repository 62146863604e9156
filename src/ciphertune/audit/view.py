"""What the server could read of each message it got: `server_view/` decoded without a key.

Everything here works on the bytes, the plan and the settings, all of which the server has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ciphertune import columns, pruning, split, wire
from ciphertune.adapter import Adapter, FloatArray, LoraFactors
from ciphertune.build import session
from ciphertune.crypto.clear import parse
from ciphertune.errors import DataError, SettingsError, StateError, WireError
from ciphertune.outputs import check_writable, writing
from ciphertune.plan import Plan
from ciphertune.runs import read_values, write, write_json
from ciphertune.settings import Settings, from_dict

_WINDOW = 64  # values that must look like numbers in a row for bytes to count as readable


@dataclass(frozen=True)
class ClearLayer:
    """What is readable of one layer's factors, as the client had them before weighting.

    a: (r, c).  codes: (c,) of the columns of a where they travel by code (`crypto/indices.py`), else None and c = n.
    b: (m, r); of a product times alpha / r.
    """

    a: FloatArray | None = None
    codes: npt.NDArray[np.int64] | None = None
    b: FloatArray | None = None


@dataclass(frozen=True)
class Seen:
    """One update as the server saw it."""

    round: int
    node: str
    link: wire.Session
    message: wire.Message
    layers: Mapping[str, ClearLayer]
    heads: Mapping[str, FloatArray]
    loose: FloatArray = field(default_factory=lambda: np.zeros(0))  # readable values whose places are hidden

    @property
    def plan(self) -> Plan:
        """The plan the message was made under."""
        return self.link.plan

    def tensors(self) -> dict[str, FloatArray]:
        """All that is readable, by name."""
        found = dict(self.heads) | ({"values": self.loose} if self.loose.size else {})
        for name, layer in self.layers.items():
            found |= {f"{name}.{k}": x for k in ("a", "codes", "b") if (x := getattr(layer, k)) is not None and x.size}
        return found

    @property
    def clear_tensors(self) -> int:
        """How many tensors are readable; codes are none."""
        return sum(not name.endswith(".codes") for name in self.tensors())


@dataclass(frozen=True)
class View:
    """All that one run's server got. broken: messages that do not decode, or hold readable numbers where they must not,
    each with the reason."""

    settings: Settings
    folder: Path
    seen: tuple[Seen, ...]
    broken: Mapping[str, str]

    @property
    def clear_tensors(self) -> int:
        """Readable tensors in all messages; what does not decode counts as one each."""
        return sum(s.clear_tensors for s in self.seen) + len(self.broken)

    @property
    def says_encrypted(self) -> bool:
        """Whether the settings promise that nothing travels in the clear."""
        return self.settings.method.select == "all" and self.settings.crypto.backend != "clear"


def settings_of_run(folder: Path) -> Settings:
    """The settings a run folder was made with. Raises SettingsError."""
    try:
        values = read_values(folder / "settings.yaml")
    except StateError:
        raise SettingsError(f"{folder} is not a run folder: it has no readable settings.yaml") from None
    return from_dict({k: v for k, v in values.items() if k != "overrides"})


def read_view(folder: Path) -> View:
    """Decode `server_view/` of a run folder. Raises SettingsError, DataError when nothing was recorded."""
    settings = settings_of_run(folder)
    files = sorted((folder / "server_view").glob("round_*/*.msg"))
    if not files:
        raise DataError(f"{folder} holds no server_view: run with record_server_view=true to audit it")
    plans = {p.digest(): p for p in _plans(folder)}
    seen, broken = [], {}
    for path in files:
        round_, node = _round_of(path.parent), path.stem
        try:
            one = see(path.read_bytes(), settings, plans, round_, node)
            seen.append(one)
            if where := readable_at(one):
                broken[f"{round_}/{node}"] = where
        except (WireError, DataError) as error:
            broken[f"{round_}/{node}"] = str(error)
    return View(settings, folder, tuple(seen), broken)


def _round_of(folder: Path) -> int:
    number = folder.name.removeprefix("round_")
    if not (number.isascii() and number.isdecimal()):
        raise DataError(f"{folder} is the folder of no round: move it out of {folder.parent}")
    return int(number)


def see(data: bytes, settings: Settings, plans: Mapping[bytes, Plan], round_: int, node: str) -> Seen:
    """One message decoded as far as the server can. Raises WireError, DataError when its plan was not kept."""
    head = wire.heading(data)
    if head.plan not in plans:
        raise DataError("the message was made under a plan that the run folder does not hold")
    link = session(settings, plans[head.plan], run=head.run, key_fingerprint=head.key_fingerprint)
    message = wire.decode(data, link, wire.Expected(wire.UPDATE, round_, head.sender, head.rank, tier=head.tier))
    layers, heads, loose = _clear(message, link)
    return Seen(round_, node, link, message, layers, heads, loose)


def _clear(
    message: wire.Message, link: wire.Session
) -> tuple[dict[str, ClearLayer], dict[str, FloatArray], FloatArray]:
    plan, who = link.plan, message.contributors[0]
    weight = who.samples / message.total
    clear = parse(message.clear, link.clear.dtype)
    hidden = parse(message.secret, link.clear.dtype) if not link.public.encrypts else np.zeros(0)
    if plan.aggregate == "separate":
        return _separate(np.concatenate([clear, hidden]) / weight, message, plan)
    if not clear.size:
        return {}, {}, clear
    found = columns.read_clear(clear, plan, (who.rank,) * len(plan.layers), who.tier)
    codes = columns.clear_codes(plan, who.tier)
    heads: dict[str, FloatArray] = {}
    if hidden.size:  # a dry run without encryption
        heads = split.join_heads(hidden[: split.head_size(plan)] / weight, plan, _zeros(plan, who.rank))
        rows = hidden[split.head_size(plan) :]
        rows = rows.reshape(who.rank, -1) if rows.size else np.zeros((who.rank, 0))
        if rows.shape[1]:
            whole = columns.join_columns(found, rows, plan, who.tier)
            found = [columns.Factors(f.left, a) for f, a in zip(found, whole, strict=True)]
            codes = [np.arange(x.n) for x in plan.layers]
    layers = {
        x.name: ClearLayer(f.right / weight, c, f.left) for x, f, c in zip(plan.layers, found, codes, strict=True)
    }
    return layers, heads, np.zeros(0)


def _separate(
    packed: npt.NDArray[np.float64], message: wire.Message, plan: Plan
) -> tuple[dict[str, ClearLayer], dict[str, FloatArray], FloatArray]:
    whole = sum(split.segments(plan, message.factors, message.rank))
    if packed.size != whole or pruning.counts_kept(plan, message.round):  # some entries are missing: which, is hidden
        return {}, {}, packed
    if not packed.size:
        return {}, {}, packed
    adapter = split.join(packed, plan, message.factors, _zeros(plan, message.rank))
    layers = {
        name: ClearLayer(f.a if "a" in message.factors else None, None, f.b if "b" in message.factors else None)
        for name, f in adapter.layers.items()
    }
    return layers, dict(adapter.heads), np.zeros(0)


def _zeros(plan: Plan, rank: int) -> Adapter:
    layers = {x.name: LoraFactors(np.zeros((rank, x.n)), np.zeros((x.m, rank)), plan.scale) for x in plan.layers}
    return Adapter(layers, {h.name: np.zeros(h.shape) for h in plan.heads})


def readable_at(one: Seen) -> str:
    """Where an encrypted part reads as plain numbers, empty where it does not."""
    if not one.link.public.encrypts:
        return ""
    at = looks_clear(one.message.secret)
    return f"byte {at} of its encrypted part begins plain numbers" if at >= 0 else ""


def looks_clear(data: bytes) -> int:
    """The first byte from which 64 values in a row have magnitudes of trained factors, -1 where there is none.

    Tried as float32, float64 and bfloat16 at every alignment. Of random bytes one float32 in eight has a magnitude of
    2^-27 to 2^4, so 64 in a row have it with probability 1e-58.
    """
    for kind, low, high, shift in (("<u4", 100, 131, 23), ("<u8", 996, 1027, 52), ("<u2", 100, 131, 7)):
        width = np.dtype(kind).itemsize
        for start in range(min(width, len(data))):
            words = np.frombuffer(data, kind, (len(data) - start) // width, start)
            exponent = (words >> np.array(shift, words.dtype)) & np.array(2047 if width == 8 else 255, words.dtype)
            count = np.cumsum(np.concatenate([[0], (exponent >= low) & (exponent <= high)]))
            whole = np.flatnonzero(count[_WINDOW:] - count[:-_WINDOW] == _WINDOW)
            if whole.size:
                return start + width * int(whole[0])
    return -1


def _plans(folder: Path) -> Iterator[Plan]:
    for path in [folder / "plan.json", *sorted((folder / "plans").glob("*.json"))]:
        if path.is_file():
            try:
                yield Plan.from_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, WireError):
                raise DataError(f"{path} is damaged: put it back from a copy") from None


def write_view(folder: Path, out: Path) -> View:
    """One safetensors file of readable tensors and one JSON of everything else per message, for any attack.

    Raises as `read_view` does, and SettingsError where `out` cannot be written.
    """
    check_writable(out / "broken.json", "--out")
    found = read_view(folder)
    with writing(out, "--out"):
        for one in found.seen:
            stem = out / f"round_{one.round:04d}" / one.node
            tensors = {name: np.ascontiguousarray(x) for name, x in one.tensors().items()}
            write(stem.with_name(f"{stem.name}.safetensors"), save(tensors))
            write_json(stem.with_name(f"{stem.name}.json"), about(one))
        write_json(out / "broken.json", dict(found.broken))
    return found


def about(one: Seen) -> dict[str, Any]:
    """Everything about a message that is no tensor."""
    message, plan = one.message, one.plan
    return {
        "round": one.round,
        "node": one.node,
        "sender": message.sender,
        "rank": message.rank,
        "weight": message.contributors[0].samples / message.total,
        "contributor": asdict(message.contributors[0]),
        "factors": list(message.factors),
        "bytes": {"clear": len(message.clear), "secret": len(message.secret), "mask": len(message.mask)},
        "tensors": {name: list(x.shape) for name, x in one.tensors().items()},
        "hidden_codes": {
            x.name: list(c[: plan.hidden(message.contributors[0].tier)[i]])
            for i, (x, c) in enumerate(zip(plan.layers, plan.columns, strict=False))
        },
        "plan": json.loads(plan.to_json()),
    }
