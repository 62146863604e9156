"""Sending and waiting: replies one at a time, within a time limit, and opened with suspicion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from ciphertune import flower
from ciphertune.errors import CiphertuneError, FederationError, FormatError, RoundMismatchError, WireError
from ciphertune.progress import log_trace, printable, say

_POLL = 0.2  # seconds between two looks for replies
# What Flower 1.41 raises when it makes a message of bytes that are none: of a name, a graph of objects, JSON, a record.
# Anything else, no memory or no room on the disk, is this machine's own trouble and nobody is blamed for it.
_NO_MESSAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, DecodeError)
MOST_TEXT = 1 << 16  # characters of a reply's values, unless the question asks for more


class Unusable(Error):
    """In place of a reply that could not even be asked for or taken from Flower, or that answers something else."""

    def __init__(self, why: CiphertuneError) -> None:
        super().__init__(0, str(why))
        self.__dict__["why"] = why


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float, most: Sequence[int] = ()
) -> Iterator[tuple[int, Message]]:
    """Send all, then yield each reply as it comes with the index of the message it answers. Says who stays away.

    most: bytes of arrays that each reply may hold, none where it is not given. A reply that is of no use is not taken
    for its sender's last word before the SuperLink says that there is no other: anybody may have put it there.
    """
    stored = set(grid.push_messages(messages))  # of one that could not be stored there is "" or nothing
    waiting = {m.metadata.message_id: i for i, m in enumerate(messages) if m.metadata.message_id in stored}
    for i in sorted(set(range(len(messages))).difference(waiting.values())):
        yield i, Message(Unusable(FederationError("the SuperLink took no message for it")), reply_to=messages[i])
    unusable: dict[str, WireError] = {}
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        for message_id, i in list(waiting.items()):  # one by one: a reply may be large
            found = _pull(grid, message_id, messages[i].metadata.dst_node_id, most[i] if most else 0)
            if isinstance(found, WireError):
                unusable[message_id] = found
            elif found is not None:
                del waiting[message_id]
                why = unusable.pop(message_id, None)
                yield i, Message(Unusable(why), reply_to=messages[i]) if why and found.has_error() else found
        if waiting:
            time.sleep(_POLL)
    for message_id, why in unusable.items():
        i = waiting.pop(message_id)
        yield i, Message(Unusable(why), reply_to=messages[i])
    if waiting:
        say(f"{len(waiting)} of {len(messages)} clients did not answer within {timeout:.0f} s")


def _pull(grid: Grid, message_id: str, node: int, most: int) -> Message | WireError | None:
    """The reply to one message, what is wrong with what came, or nothing yet.

    Who sends a message decides all of it, its metadata too: the SuperLink checks only what it was told beside it.
    """
    try:
        with flower.arrays_of(2 * most):  # a second reply gets its own line
            found = list(grid.pull_messages([message_id]))
    except (httpx.HTTPError, OSError):  # the SuperLink cannot be reached
        raise
    except WireError as error:
        return error
    except _NO_MESSAGE as error:
        log_trace(error)
        return FormatError(f"its reply is not a message of Flower ({type(error).__name__})")
    if sum(map(flower.arrays_size, found)) > 2 * most:
        return FormatError("its reply's arrays are longer than any that are expected")
    ours = [r for r in found if r.metadata.reply_to_message_id == message_id]
    right = [r for r in ours if r.has_error() or r.metadata.src_node_id == node]
    if len(right) > 1:
        return RoundMismatchError(f"{len(right)} replies came to one message")
    if right or not found:
        return right[0] if right else None
    said = f"comes from node {found[0].metadata.src_node_id}" if ours else "answers another message"
    return RoundMismatchError(f"its reply {said}: node {node} was asked")


def open_reply(reply: Message, *, most: int = MOST_TEXT) -> tuple[dict[str, Any], list[bytes]]:
    """The content of a reply, of at most `most` characters of values. Raises CiphertuneError when the client reports
    a failure or sends nonsense.
    """
    if reply.has_error():
        if isinstance(reply.error, Unusable):
            raise reply.error.__dict__["why"]
        raise FederationError(f"its process failed (Flower error {reply.error.code})")
    values, payload = flower.unpack(reply.content, most=most)
    if "error" in values:
        kind, line = (printable(str(x)) for x in (values["error"], values.get("line") or "see its own log"))
        raise FederationError(f"{kind[:60]}: {line[:500]}")
    return values, payload


def declines(reply: Message) -> bool:
    """Whether the client says that it failed, and sends nothing beside that."""
    if reply.has_error() or "payload" in reply.content:
        return False
    try:
        return "error" in flower.unpack(reply.content, most=MOST_TEXT)[0]
    except FormatError:
        return False
