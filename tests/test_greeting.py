"""What a client tells the server in plain values, against what the server reads of it."""

from __future__ import annotations

from typing import Any

from federations import Lab

from ciphertune import flower
from ciphertune.hello import parse_hello
from ciphertune.scores import report_of, score_of, seconds_of


class Watched(dict[str, Any]):
    """Values that know which of them were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def test_a_client_says_nothing_that_the_server_does_not_read(lab: Lab) -> None:
    lab("method=sealed federation.compare_local=true federation.rounds=1")
    assert lab.grid is not None
    kinds = set()
    for _, reply in lab.grid.answered:
        kind = reply.metadata.message_type
        values = Watched(flower.unpack(reply.content)[0])
        if kind == "query.join":
            parse_hello(values, 1, None)
        elif kind == "train":
            report_of(values, 100, 100)
        else:
            score_of(values, 100, 100)
            seconds_of(values)
        assert values.read >= set(values), kind
        kinds.add(kind)
    assert kinds == {"query.join", "train", "evaluate", "train.alone"}
