"""Sending and waiting: replies one at a time, within a time limit, and opened with suspicion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from ciphertune import flower
from ciphertune.errors import FederationError
from ciphertune.progress import MARK

_POLL = 0.2  # seconds between two looks for replies


def say(text: str) -> None:
    """One line for people. Text from the wire may be in it, so nothing in it can move the cursor or start a line."""
    print(f"{MARK} {''.join(c if c.isprintable() else '?' for c in text)}", flush=True)


def exchange(grid: Grid, messages: Sequence[Message], timeout: float) -> Iterator[tuple[int, Message]]:
    """Send all, then yield each reply as it comes with the index of the message it answers. Says who stays away."""
    waiting = {message_id: i for i, message_id in enumerate(grid.push_messages(messages))}
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        for message_id in list(waiting):  # one by one: a reply may be large
            for reply in grid.pull_messages([message_id]):
                yield waiting.pop(message_id), reply
        if waiting:
            time.sleep(_POLL)
    if waiting:
        say(f"{len(waiting)} of {len(messages)} clients did not answer within {timeout:.0f} s")


def open_reply(reply: Message) -> tuple[dict[str, Any], list[bytes]]:
    """The content of a reply. Raises CiphertuneError when the client reports a failure or sends nonsense."""
    if reply.has_error():
        raise FederationError(f"its process failed (Flower error {reply.error.code})")
    values, payload = flower.unpack(reply.content)
    if "error" in values:
        line = str(values.get("line") or "see its own log")[:500]
        raise FederationError(f"{str(values['error'])[:60]}: {line}")
    return values, payload
