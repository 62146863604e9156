"""What a client tells the server in plain values, against what the server reads of it."""

from __future__ import annotations

from typing import Any

import pytest
from federations import Lab

from ciphertune import client, flower
from ciphertune.errors import FederationError, StateError
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


@pytest.mark.parametrize("method", ["sealed", "she_lora"])
def test_a_client_says_nothing_that_the_server_does_not_read(lab: Lab, method: str) -> None:
    lab(f"method={method} federation.compare_local=true federation.rounds=1")
    assert lab.grid is not None
    kinds = set()
    for _, reply in lab.grid.answered:
        kind = reply.metadata.message_type
        values = Watched(flower.unpack(reply.content)[0])
        if kind == "query.join":
            parse_hello(values, 1, None)
        elif kind == "query.wish":
            assert all(isinstance(codes, list) for codes in values["columns"])  # `Table.wish` reads them
            seconds_of(values)
        elif kind == "train":
            report_of(values, 100, 100)
        else:
            score_of(values, 100, 100)
            seconds_of(values)
        assert values.read >= set(values), kind
        kinds.add(kind)
    wished = {"query.wish"} if method == "she_lora" else set()
    assert kinds == {"query.join", "train", "evaluate", "train.alone"} | wished


def test_a_client_that_fails_says_only_what_and_to_a_greeting_who(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(what: str, *rest: Any) -> Any:
        raise StateError("/home/doctor/adapter.safetensors cannot be read back")

    for where, wanted in (("open_client", {"error", "line", "name", "simulated"}), ("train_round", {"error", "line"})):
        with monkeypatch.context() as patched, pytest.raises(FederationError):
            patched.setattr(client, where, broken)
            lab(f"name={where}")
        assert lab.grid is not None
        failed = [v for _, r in lab.grid.answered if "error" in (v := flower.unpack(r.content)[0])]
        assert failed and all(set(values) == wanted for values in failed)
