"""Message <-> Flower records. Bulk travels as opaque byte arrays, so that no averaging strategy can touch it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from ciphertune.errors import FormatError, KeyMismatchError, SettingsError

STYPE = "ciphertune"
# A JSON part beyond this is no message of ours.
_MAX_JSON = 1 << 26  # two plans that name every column of a model of 13 billion parameters


def pack(values: Mapping[str, Any], payload: Sequence[bytes] = ()) -> RecordDict:
    """Plain values and byte strings -> records."""
    records = RecordDict({"ciphertune": ConfigRecord({"json": json.dumps(values)})})
    if payload:
        arrays = {f"{i:04d}": Array("bytes", (len(data),), STYPE, data) for i, data in enumerate(payload)}
        records["payload"] = ArrayRecord(arrays)
    return records


def unpack(records: RecordDict) -> tuple[dict[str, Any], list[bytes]]:
    """The inverse of `pack`. Raises FormatError on anything else."""
    try:
        text = records.config_records["ciphertune"]["json"]
        if not isinstance(text, str) or len(text) > _MAX_JSON:
            raise FormatError("the message's values are not text of a sane length")
        values = json.loads(text)
        arrays = records.array_records.get("payload") or ArrayRecord()
        payload = [arrays[key].data for key in sorted(arrays)]
        kinds = {array.stype for array in arrays.values()}
    except (KeyError, ValueError, RecursionError, AttributeError) as error:
        raise FormatError("not a message of this application") from error
    if not isinstance(values, dict) or kinds - {STYPE}:
        raise FormatError("not a message of this application")
    return values, payload


def reply(message: Message, values: Mapping[str, Any], payload: Sequence[bytes] = ()) -> Message:
    """A reply to `message`."""
    return Message(pack(values, payload), reply_to=message)


def failure(message: Message, error: BaseException, name: str, *, show: bool) -> Message:
    """A reply that says that it did not work: the kind of error always, its text only with `show`.

    The text of an error may hold a path or a line of private data, so a real node keeps it in its own log. Another key
    is named in any case: the text is two fingerprints, which the server knows, and what to do.
    """
    kind = type(error).__name__
    line = " ".join(str(error).split())[:500] if show or isinstance(error, KeyMismatchError) else ""
    return reply(message, {"error": kind, "line": line, "name": name, "simulated": show})


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
