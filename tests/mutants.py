"""Ways to damage a reply of a client: its payload, its values, its records, its metadata, the objects it travels in."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from grid import Objects, Wire, message_of, objects_of, set_metadata

from ciphertune import flower
from tests.messages import mutated as damaged

# of any type, and as large or small as JSON lets them be
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"), "", "x" * 5000,
    "\udc00\x1b[2J", "../..", "client-2", [], {}, [[]], [1, [2, [3]]], {"a": {"b": {}}}, [0] * 1000, [None], "1", "NaN",
)  # fmt: skip


def mutant(good: Objects, rng: random.Random, others: tuple[int, ...]) -> Wire:
    """A damaged reply, or two, as what comes over the wire. others: node ids that are not its sender's."""
    way = rng.choice(WAYS)
    if way in (_objects, _graph):
        return [way(dict(good), rng)]
    if way is _twice:
        return [dict(good), mutant(good, rng, others)[0] if rng.random() < 0.5 else dict(good)]
    message = message_of(good)
    try:
        return [objects_of(way(message, rng, others) if way is _metadata else way(message, rng))]
    except (TypeError, ValueError, AttributeError, OverflowError, UnicodeError):  # Flower cannot even send that
        return [_objects(dict(good), rng)]


def _payload(reply: Message, rng: random.Random) -> Message:
    """The bytes of the update, mostly with their SHA-256 made right again."""
    values, sent = flower.unpack(reply.content)
    if not sent or len(sent[0]) < 200:
        return _values(reply, rng)
    reply.content = flower.pack(values, [damaged(sent[0], rng), *sent[1:]])
    return reply


def _values(reply: Message, rng: random.Random) -> Message:
    """The report: values replaced, left out, put in; or its text."""
    values, sent = flower.unpack(reply.content)
    for _ in range(rng.choice([1, 1, 3])):
        at: Any = values
        while isinstance(at, dict | list) and at and rng.random() < 0.8:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner or rng.random() < 0.4:
                if rng.random() < 0.2:
                    del at[key]
                else:
                    at[key] = rng.choice(JUNK)
                break
            at = inner
    text = json.dumps(values)
    if rng.random() < 0.3:
        start = rng.randrange(len(text))
        text = text[:start] + rng.choice(["", "[", "}", "\0", "NaN", "9" * 5000, "[" * 50_000]) + text[start + 1 :]
    reply.content = flower.pack({}, sent)
    reply.content["ciphertune"] = ConfigRecord({"json": text})
    return reply


def _record(rng: random.Random) -> ArrayRecord | ConfigRecord | MetricRecord:
    """One of any kind."""
    shape = tuple(rng.choice([0, 1, 7, -1, 2**62]) for _ in range(rng.randrange(3)))
    kinds: list[Callable[[], ArrayRecord | ConfigRecord | MetricRecord]] = [
        lambda: MetricRecord({"x": rng.choice([1.0, 3, float("nan"), [1.0, 2.0]])}),
        lambda: ConfigRecord({rng.choice(["json", "x"]): rng.choice([b"{}", "{}", True, 1.5, 7, ["{}"], [], "[]"])}),
        lambda: ConfigRecord({}),
        lambda: ArrayRecord(),
        lambda: ArrayRecord(
            {
                str(i): Array(rng.choice(["bytes", "float32", ""]), shape, rng.choice(["ciphertune", "numpy.ndarray"]),
                              rng.randbytes(rng.choice([0, 7, 500])))
                for i in range(rng.choice([1, 2, 40]))
            }
        ),
    ]  # fmt: skip
    return rng.choice(kinds)()


def _records(reply: Message, rng: random.Random) -> Message:
    """Records left out, put in, swapped, of another kind; arrays that say something else of themselves."""
    found: dict[str, Any] = dict(reply.content)
    names = [*found, "payload", "ciphertune", "extra", ""]
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(names)
        if rng.random() < 0.3:
            found.pop(name, None)
        elif rng.random() < 0.3 and "payload" in reply.content:
            good = next(iter(reply.content.array_records["payload"].values()))
            fields = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype, "data": good.data}
            changes = {"dtype": "float32", "shape": (2**40,), "stype": "x", "data": good.data[: rng.randrange(50)]}
            key = rng.choice(list(fields))
            found["payload"] = ArrayRecord({rng.choice(["0000", "9", ""]): Array(**fields | {key: changes[key]})})
        else:
            found[name] = _record(rng)
    reply.content = RecordDict(found)
    return reply


def _metadata(reply: Message, rng: random.Random, others: tuple[int, ...]) -> Message:
    field, values = rng.choice(
        [
            ("src_node_id", [0, 1, 2**63, *others]),
            ("dst_node_id", [0, *others]),
            ("run_id", [0, 1, 2**64 - 1]),
            ("reply_to_message_id", ["", "m0", "m5", "x" * 5000]),
            ("group_id", ["", "-1", "7", "nonsense"]),
            ("message_type", ["evaluate", "query.join", "train.alone", "system", "reconnect"]),
            ("ttl", [0.0, -1.0, float("nan"), 1e300]),
            ("created_at", [0.0, -1.0, float("inf")]),
        ]
    )
    return set_metadata(reply, **{field: rng.choice(values)})


def _error(reply: Message, rng: random.Random) -> Message:
    ours = {k: getattr(reply.metadata, k) for k in ("src_node_id", "dst_node_id", "reply_to_message_id", "group_id")}
    error = Error(rng.choice([0, 1, -1, 2**31, 999]), rng.choice([None, "", "\x1b[2J" * 100, "x" * 5000]))
    return set_metadata(Message(error, reply_to=reply), **ours)


def _failure(reply: Message, rng: random.Random) -> Message:
    reply.content = flower.pack({"error": rng.choice(JUNK), "line": rng.choice(JUNK), "name": rng.choice(JUNK)})
    return reply


def _objects(found: Objects, rng: random.Random) -> Objects:
    """Bytes of one object: flipped, cut, put in."""
    name = rng.choice(list(found))
    data = bytearray(found[name])
    for _ in range(rng.choice([1, 1, 4])):
        at = rng.randrange(len(data) or 1)
        if rng.random() < 0.6 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.5:
            del data[at : at + rng.choice([1, 8, 1000])]
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 64]))
    return found | {name: bytes(data)}


def _graph(found: Objects, rng: random.Random) -> Objects:
    """Which objects there are, of which kind, and which is whose part."""
    names = list(found)
    one, two = rng.choice(names), rng.choice(names)
    way = rng.randrange(5)
    if way == 0:
        del found[one]
        return found or {"0" * 64: b""}
    if way == 1:
        found[one] = found[two]
    elif way == 2:  # perhaps of itself
        found = {n: content.replace(one.encode(), two.encode()) for n, content in found.items()}
    elif way == 3:
        kinds = ("Message", "RecordDict", "ConfigRecord", "MetricRecord", "ArrayRecord", "Array", "ArrayChunk", "dict")
        _kind, _, rest = found[one].partition(b" ")
        found[one] = rng.choice(kinds).encode() + b" " + rest
    else:
        named = rng.choice([b"", b"0,0", b"1", b"-1", b"0.5", b'"x"', b"0," * 5000 + b"0", b"0," * 200_000 + b"0"])
        found = {
            n: content.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [%s]' % named)
            for n, content in found.items()
        }
    return found


def _twice(reply: Message, rng: random.Random) -> Message:
    raise NotImplementedError


WAYS: tuple[Callable[..., Any], ...] = (
    _payload, _payload, _payload, _payload, _values, _values, _records, _metadata, _error, _failure, _objects, _objects,
    _graph, _twice,
)  # fmt: skip
