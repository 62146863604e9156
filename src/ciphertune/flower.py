"""Message <-> Flower records. Bulk travels as opaque byte arrays, so that no averaging strategy can touch it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from ciphertune.errors import FederationError, FormatError, KeyMismatchError, SettingsError

STYPE = "ciphertune"
# A JSON part beyond this is no message of ours.
_MAX_JSON = 1 << 26  # two plans that name every column of a model of 13 billion parameters
_MAX_ARRAYS = 10_000


def pack(values: Mapping[str, Any], payload: Sequence[bytes] = ()) -> RecordDict:
    """Plain values and byte strings -> records."""
    records = RecordDict({"ciphertune": ConfigRecord({"json": json.dumps(values)})})
    if payload:
        arrays = {f"{i:04d}": Array("bytes", (len(data),), STYPE, data) for i, data in enumerate(payload)}
        records["payload"] = ArrayRecord(arrays)
    return records


def unpack(records: RecordDict, *, most: int = _MAX_JSON) -> tuple[dict[str, Any], list[bytes]]:
    """The inverse of `pack`. most: characters of the values. Raises FormatError on anything else."""
    config, arrays = records.get("ciphertune"), records.get("payload", ArrayRecord())
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise FormatError("not a message of this application")
    if set(records) - {"ciphertune", "payload"} or set(config) != {"json"} or len(arrays) > _MAX_ARRAYS:
        raise FormatError(f"the message holds other records than expected: {len(records)} with {len(arrays)} arrays")
    text = config["json"]
    if not isinstance(text, str) or len(text) > most:
        raise FormatError(f"the message's values are not text of at most {most} characters")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("not a message of this application: its values are not readable") from error
    if not isinstance(values, dict):
        raise FormatError("not a message of this application: its values have no names")
    if any((a.dtype, a.shape, a.stype) != ("bytes", (len(a.data),), STYPE) for a in arrays.values()):
        raise FormatError("not a message of this application: an array in it is not of its bytes")
    return values, [arrays[key].data for key in sorted(arrays)]


def reply(message: Message, values: Mapping[str, Any], payload: Sequence[bytes] = ()) -> Message:
    """A reply to `message`."""
    return Message(pack(values, payload), reply_to=message)


def failure(message: Message, error: BaseException, name: str, *, show: bool) -> Message:
    """A reply that says that it did not work: the kind of error always, its text only with `show`; to a greeting, who.

    The text of an error may hold a path or a line of private data, so a real node keeps it in its own log. Another key
    is named in any case: the text is two fingerprints, which the server knows, and what to do.
    """
    kind = type(error).__name__
    line = " ".join(str(error).split())[:500] if show or isinstance(error, KeyMismatchError) else ""
    who = {"name": name, "simulated": show} if message.metadata.message_type == "query.join" else {}
    return reply(message, {"error": kind, "line": line, **who})


class _Joined:
    """Bytes that arrays may still grow to while a message is taken from Flower; None outside of `arrays_of`."""

    left: int | None = None


@contextmanager
def arrays_of(most: int) -> Iterator[None]:
    """While this is open, Flower joins the chunks of incoming arrays to at most so many bytes. Else a FormatError.

    A sender names the chunks that make up an array. A chunk of 5 MB that is named 20,000 times would become 100 GB
    before anybody could look at the message. Raises FederationError where this Flower joins them by code of its own.
    """
    if getattr(Array.inflate, "__func__", None) is not _bounded:
        raise FederationError(
            "nothing bounds what Flower makes of a message: install the flwr that pyproject.toml names"
        )
    _Joined.left = most
    try:
        yield
    finally:
        _Joined.left = None


def arrays_size(message: Message) -> int:
    """Bytes of the arrays that a message holds."""
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


_join = Array.inflate.__func__  # type: ignore[attr-defined]


def _bounded(cls: type[Array], object_content: bytes, children: Any = None) -> Array:
    """`Array.inflate`, within what `arrays_of` allows."""
    if _Joined.left is not None and children:
        named = json.loads(object_content.partition(b"\0")[2])["arraychunk_ids"]
        longest = max(len(chunk.data) for chunk in children.values())
        # all chunks but the last are of one size
        if (len(named) - 1) * longest > _Joined.left:
            raise FormatError(f"an array of {len(named)} chunks of {longest} bytes is longer than any that is expected")
    array: Array = _join(cls, object_content, children)
    if _Joined.left is not None:
        _Joined.left -= len(array.data)
        if _Joined.left < 0:
            raise FormatError("the message's arrays are longer than any that are expected")
    return array


Array.inflate = classmethod(_bounded)  # type: ignore[assignment]


def node_config(text: str) -> dict[str, Any]:
    """What a SuperNode makes of its `--node-config`. Raises SettingsError, also for a part that it would pass over."""
    from flwr.common.config import parse_config_args

    rest = re.sub(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)", "", text).split()  # Flower's own pattern
    if rest:
        raise SettingsError(f'--node-config has {rest[0]!r}, which Flower passes over: write key=value or key="text"')
    try:
        return dict(parse_config_args([text]))
    except Exception as error:  # click's, and of TOML: no common base class
        line = " ".join(str(getattr(error, "message", error)).split())
        raise SettingsError(f"--node-config cannot be read: {line[:300]}") from None
