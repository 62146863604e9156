"""What the server makes of what comes from Flower, and of what Flower does not take."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

import pytest
from federations import Lab, said
from flwr.app import Message
from grid import LocalGrid, set_metadata

from ciphertune import flower
from ciphertune.errors import CiphertuneError, FederationError, FormatError
from ciphertune.progress import MARK, log_trace, note, say
from server_app import mail

FORGED = f"x\n{MARK} round 2/2: all is well\x1b[2J"


class Full(LocalGrid):
    """A SuperLink that takes no message for some nodes, which Flower says in one of two ways."""

    def __init__(self, without: set[int], *, left_out: bool) -> None:
        super().__init__({k: {} for k in range(1, 5)}, {})
        self.without, self.left_out = without, left_out
        self.answers: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        found = []
        for i, message in enumerate(messages):
            node = message.metadata.dst_node_id
            set_metadata(message, message_id=f"m{i}")
            taken = node not in self.without
            if taken:
                answer = Message(flower.pack({"node": node}), reply_to=message)
                self.answers[f"m{i}"] = set_metadata(answer, src_node_id=node)
            if taken or not self.left_out:
                found.append(f"m{i}" if taken else "")
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.answers.pop(i) for i in message_ids if i in self.answers]


@pytest.mark.parametrize("left_out", [True, False])
def test_a_message_that_the_superlink_did_not_take_is_said_to_be_so_and_no_other_is_mistaken_for_it(
    left_out: bool,
) -> None:
    grid = Full({1, 3}, left_out=left_out)
    questions = [Message(flower.pack({}), node, "train", group_id="0") for node in grid.nodes]
    found = dict(mail.exchange(grid, questions, 1.0))
    assert sorted(found) == [0, 1, 2, 3]
    for i, reply in found.items():
        if i + 1 in grid.without:
            with pytest.raises(FederationError, match="the SuperLink took no message for it"):
                mail.open_reply(reply)
        else:
            assert mail.open_reply(reply)[0] == {"node": i + 1}


def test_arrays_that_flower_did_not_count_are_counted_once_they_are_there() -> None:
    grid = Full(set(), left_out=False)
    question = Message(flower.pack({}), 1, "train", group_id="0")
    assert list(grid.push_messages([question])) == ["m0"]
    grid.answers["m0"] = set_metadata(Message(flower.pack({}, [bytes(401)]), reply_to=question), src_node_id=1)
    assert isinstance(mail._pull(grid, "m0", 1, 200), FormatError)
    grid.answers["m0"] = set_metadata(Message(flower.pack({}, [bytes(150)]), reply_to=question), src_node_id=1)
    assert isinstance(mail._pull(grid, "m0", 1, 200), Message)


class Failing(LocalGrid):
    """A grid in which taking the reply raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__({1: {}}, {})
        self.error = error

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [set_metadata(m, message_id="m0").metadata.message_id for m in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise self.error


def asked(error: Exception) -> dict[str, Any]:
    ((_, reply),) = mail.exchange(Failing(error), [Message(flower.pack({}), 1, "train")], 0.05)
    return mail.open_reply(reply)[0]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("can't start new thread"), sqlite3.OperationalError("disk is full"), OSError(28, "")],
)
def test_what_goes_wrong_on_the_servers_own_machine_is_blamed_on_no_client(error: Exception) -> None:
    with pytest.raises(type(error)):
        asked(error)


@pytest.mark.parametrize("error", [KeyError("Massage"), ValueError(FORGED), RecursionError(), UnicodeError()])
def test_bytes_that_are_no_message_count_against_their_sender_and_leave_a_trace_in_the_log(
    error: Exception, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FormatError, match=f"not a message of Flower .{type(error).__name__}"):
        asked(error)
    (record,) = caplog.records
    assert "in pull_messages" in record.getMessage() and f"\n{MARK}" not in record.getMessage()
    assert said(capsys) == ""


def test_text_from_the_wire_starts_no_line_and_moves_no_cursor(
    lab: Lab, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where we say it nor in the error that ends the run, which Flower writes to its log."""

    def tamper(reply: Message, source: int) -> Message:
        if source != 100:
            texts = {"error": FORGED, "line": FORGED, "name": FORGED, "simulated": True}
            reply.content = flower.pack(texts if source != 101 else flower.unpack(reply.content)[0] | {"name": FORGED})
        return reply

    with pytest.raises(FederationError) as caught:
        lab("federation.min_clients=2", tamper=tamper)
    lines = said(capsys).splitlines()
    assert str(caught.value).isprintable() and "x?ciphertune | round 2/2: all is well" in str(caught.value)
    assert all(line.startswith(MARK) and line.isprintable() for line in lines)


def test_everything_that_the_apps_say_is_one_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    say(FORGED)
    note(FORGED, FORGED)
    lines = said(capsys).splitlines()
    assert len(lines) == 2 and all(line.startswith(MARK) and line.isprintable() for line in lines)
    log_trace(ValueError(FORGED))
    assert f"\n{MARK}" not in caplog.text


def test_a_client_that_cannot_go_on_says_so_in_one_line(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of its error may hold what the server sent."""
    node = {"name": "lab-0", "data-path": "/no\nsuch", "rank": 2, "allow-clear": True, "run-dir": str(lab.folder / "n")}
    with pytest.raises(FederationError):
        lab(
            "method=fedavg federation.min_clients=1 federation.min_contributors=1 federation.wait_timeout=1",
            nodes={0: node},
        )
    assert all(line.startswith(MARK) for line in said(capsys).splitlines())


@pytest.mark.parametrize(("pad", "taken"), [(0, True), (mail.MOST_TEXT, False)])
def test_a_reply_that_only_says_that_it_failed_holds_no_more_text_than_any_other(pad: int, taken: bool) -> None:
    reply = Message(flower.pack({"error": "OSError", "line": "", "pad": "x" * pad}), 1, "train")
    assert mail.declines(reply) == taken
    with pytest.raises(CiphertuneError, match="OSError" if taken else "not text of at most 65536 characters"):
        mail.open_reply(reply)
