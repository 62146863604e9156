"""A run that ended early is taken up again from its last aggregate, and ends where it would have ended."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from federations import Lab, rounds, said, summary
from flwr.app import Context, Message, RecordDict
from grid import LocalGrid, simulated
from safetensors.numpy import load_file

import server_app.app
from ciphertune import flower
from ciphertune.cli import main
from ciphertune.errors import FederationError
from ciphertune.federation import Federation
from ciphertune.ledger import Ledger
from ciphertune.privacy import epsilon
from ciphertune.runs import ServerFolder
from server_app.conduct import Conduct

FOUR = "name=one federation.rounds=4 model.release=float32"


class Killed(BaseException):
    """What a process that is killed does: nothing more."""


class Cut:
    """Ends the server after this many answers to training, as a kill would: nothing is written after it."""

    def __init__(self, answers: int) -> None:
        self.left = answers

    def __call__(self, reply: Message, source: int) -> Message:
        if reply.metadata.message_type == "train":
            self.left -= 1
            if self.left < 0:
                raise Killed
        return reply


def interrupted(lab: Lab, overrides: str, answers: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run until so many clients have answered; the process gets no chance to write why it ended."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("server_app.strategy.EncryptedLora.fail", lambda *_: None)
        lab(overrides, tamper=Cut(answers))
    (run,) = lab.runs.iterdir()
    assert not (run / "summary.json").exists()
    return run


def resumed(
    lab: Lab, run: Path, overrides: str, nodes: dict[int, dict[str, Any]] | None = None, tamper: Any = None
) -> Path:
    """Go on with a run, under another id of Flower's."""
    words = f"{lab.base} {overrides} resume={run}"
    config = {"overrides": words, "num-server-rounds": 0, "runs-dir": str(lab.runs)}
    lab.grid = LocalGrid(simulated(4) if nodes is None else nodes, config, tamper, run_id=7777)
    server_app.app.app(lab.grid, Context(7777, 1, {}, RecordDict(), config))
    return run


def adapters(run: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    files = sorted(run.glob("clients/*/adapter/adapter_model.safetensors"))
    assert len(files) == 4
    return {p.parts[-3]: load_file(p) for p in files}


def same(one: Path, two: Path) -> bool:
    """Whether all clients of both runs have the same adapters, bit by bit."""
    a, b = adapters(one), adapters(two)
    return a.keys() == b.keys() and all(
        a[c].keys() == b[c].keys() and all(np.array_equal(a[c][k], b[c][k]) for k in a[c]) for c in a
    )


OWN = "'federation.clients=[{rank:4},{rank:8},{rank:8},{rank:16}]'"
CASES = {
    "sealed": "method=sealed crypto=clear",
    "components of its own": f"method=sealed crypto=clear {OWN}",
    "she_lora": "method=she_lora crypto=clear method.renegotiate_every=2 "
    "'federation.clients=[{rank:2,budget:0.1},{rank:4,budget:0.2},{rank:8,budget:0.2},{rank:8,budget:0.5}]'",
    "flora": "method=flora",
    "local": "method=local",
    "agreed masks": "method=fedshield crypto=clear method.prune=agreed",
    "half of the clients": "method=sealed crypto=clear federation.fraction=0.5",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("answers", [6, 9], ids=["in round 2", "in round 3"])
def test_a_resumed_run_ends_bit_by_bit_where_an_uninterrupted_one_does(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, answers: int
) -> None:
    words = f"{FOUR} {CASES[case]}"
    answers = answers // 2 if "fraction" in words else answers
    run = interrupted(lab, words, answers, monkeypatch)
    whole = resumed(lab, run, words)
    lab.runs = tmp_path / "whole"
    never = lab(words)
    assert same(whole, never)
    for key in ("rounds", "base", "federated", "bytes_up", "encrypted_fraction", "status"):
        assert summary(whole)[key] == summary(never)[key], key
    one, two = (updates(run) for run in (whole, never))
    assert [{k: v for k, v in line.items() if k != "bytes_down"} for line in one] == [
        {k: v for k, v in line.items() if k != "bytes_down"} for line in two
    ]  # what clients lacked was sent once more


def updates(run: Path) -> list[dict[str, Any]]:
    return [line for line in rounds(run) if line["stage"] == "update"]


def test_a_resumed_encrypted_run_keeps_its_aggregates_and_all_clients_end_at_one_adapter(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{FOUR} method=sealed record_server_view=true"
    run = interrupted(lab, words, 9, monkeypatch)
    before = {p.name: p.read_bytes() for p in (run / "server").glob("*.msg")}
    assert set(before) == {"round_0000.msg", "round_0001.msg"}
    key = (run / "clients/secret.key").read_bytes()
    resumed(lab, run, words)
    assert {name: (run / "server" / name).read_bytes() for name in before} == before
    assert (run / "clients/secret.key").read_bytes() == key
    assert "round 3/4: 4 of 4 clients" in (text := said(capsys)) and text.count("round 2/4") == 1
    found = adapters(run)
    assert all(np.array_equal(found["client-2"][k], v) for k, v in found["client-3"].items())
    lab.runs = tmp_path / "whole"
    never = adapters(lab(words))
    for name, tensors in found.items():  # the noise of encryption is drawn anew
        assert all(np.abs(tensors[k] - v).max() < 2e-4 for k, v in never[name].items())


def test_what_was_cut_off_is_kept_apart_and_every_round_is_written_down_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted(lab, FOUR, 8, monkeypatch)
    with (run / "rounds.jsonl").open("ab") as file:  # as after a kill in the middle of a line
        file.write(b'{"round": 2, "stage": "update", "node": "client-0"}\n{"round": 0}\n[]\n\xff\n{"round": 2, "sta')
    assert [p.stem for p in sorted((run / "server").glob("state_*"))] == ["state_0000", "state_0001"]
    resumed(lab, run, FOUR)
    wanted = [(r, f"client-{k}") for r in range(4) for k in range(4)]
    assert sorted((x["round"], x["node"]) for x in updates(run)) == wanted
    assert (run / "interrupted.jsonl").read_text().count("\n") == 5
    assert len(list((run / "server").glob("round_*.msg"))) == 4


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Lab, Path]:
    """A run of which two of three rounds were aggregated. Copy it before it is changed."""
    lab = Lab(tmp_path_factory.mktemp("cut-off"), llama)
    with pytest.MonkeyPatch.context() as patch:
        return lab, interrupted(lab, "name=one federation.rounds=3 method=sealed", 9, patch)


def copy_of(cut_off: tuple[Lab, Path], folder: Path) -> tuple[Lab, Path, str]:
    lab, run = cut_off
    lab.runs = folder / "runs"
    shutil.copytree(run, lab.runs / "one")
    return lab, lab.runs / "one", "name=one federation.rounds=3 method=sealed"


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown": (lambda run: shutil.rmtree(run), "there is no run in .*one: name the folder of one, as in resume=runs/"),
    "completed": (
        lambda run: (run / "summary.json").write_text('{"status": "completed"}'),
        "the run in .*one is completed: there is nothing to go on with",
    ),
    "damaged summary": (lambda run: (run / "summary.json").write_text('{"status"'), r"summary\.json is damaged"),
    "a summary without names": (lambda run: (run / "summary.json").write_text("[]"), r"summary\.json is damaged"),
    "damaged settings": (
        lambda run: (run / "settings.yaml").write_bytes(b"overrides: \xff\n"),
        r"settings\.yaml is damaged or absent: put it back from a copy",
    ),
    "settings without names": (lambda run: (run / "settings.yaml").write_text("- 1\n"), r"settings\.yaml is damaged"),
    "nothing aggregated": (
        lambda run: [p.unlink() for p in (run / "server").glob("*.msg")],
        "no round of the run in .*one was aggregated: start a new one under another name",
    ),
    "damaged aggregate": (
        lambda run: spoil(run / "server/round_0001.msg"),
        r"round_0001\.msg cannot be used \(the message is damaged: .*\): put it back from a copy, or start a new run",
    ),
    "missing aggregate": (lambda run: (run / "server/round_0000.msg").unlink(), r"round_0000\.msg cannot be used"),
    "cut aggregate": (lambda run: (run / "server/round_0001.msg").write_bytes(b""), "too few for a message"),
    "damaged state": (
        lambda run: (run / "server/state_0001.json").write_text("{"),
        r"state_0001\.json is damaged or absent: put it back from a copy, or start a new run",
    ),
    "other state": (
        lambda run: (run / "server/state_0001.json").write_text('{"run": []}'),
        "state_0001.json is damaged",
    ),
    "damaged plan": (
        lambda run: [p.write_text(p.read_text().replace("q_proj", "k_proj")) for p in (run / "server").glob("plan-*")],
        r"plan-[0-9a-f]{32}\.json is damaged",
    ),
    "other code": (
        lambda run: (run / "server/state_0001.json").write_text(
            json.dumps(json.loads((run / "server/state_0001.json").read_text()) | {"code": "0" * 16})
        ),
        r"was made by other code \(0{16}\) than this \(\w{16}\): install that version",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_run_that_cannot_be_gone_on_with_is_refused_in_one_line_that_names_what_and_the_remedy(
    cut_off: tuple[Lab, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    lab, run, words = copy_of(cut_off, tmp_path)
    change, reason = SPOILED[case]
    change(run)
    before = {p: p.read_bytes() for p in lab.runs.rglob("*") if p.is_file()}
    with pytest.raises(RuntimeError, match=reason):
        resumed(lab, run, words)
    assert len(said(capsys).splitlines()) == 1
    assert {p: p.read_bytes() for p in lab.runs.rglob("*") if p.is_file()} == before
    assert lab.grid is not None and not lab.grid.sent


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("federation.rounds=3 seed=1", "other settings: seed is 0 there and 1 here: give the overrides that it was"),
        ("federation.rounds=5", "federation.rounds is 3 there and 5 here"),
    ],
)
def test_a_run_is_not_resumed_under_other_settings(
    cut_off: tuple[Lab, Path], tmp_path: Path, words: str, reason: str
) -> None:
    lab, run, _ = copy_of(cut_off, tmp_path)
    with pytest.raises(RuntimeError, match=reason):
        resumed(lab, run, words)


def test_two_servers_never_work_in_one_folder(cut_off: tuple[Lab, Path], tmp_path: Path) -> None:
    lab, run, words = copy_of(cut_off, tmp_path)
    other = ServerFolder(run, resumed=True)
    other.hold()
    with pytest.raises(RuntimeError, match=r"another server works in .*one: wait until it has ended, or end it"):
        resumed(lab, run, words)
    other.release()
    assert summary(resumed(lab, run, words))["status"] == "completed"


def test_an_update_of_a_round_that_was_aggregated_is_refused_after_a_resume(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{FOUR} record_server_view=true"
    run = interrupted(lab, words, 9, monkeypatch)
    old = (run / "server_view/round_0000/client-1.msg").read_bytes()

    def replay(reply: Message, source: int) -> Message:
        if source == 101 and "payload" in reply.content:
            reply.content = flower.pack(flower.unpack(reply.content)[0], [old])
        return reply

    resumed(lab, run, words, tamper=replay)
    assert "round 3: left out client-1: the message is of round 0, expected 2" in said(capsys)


def test_a_client_takes_no_second_part_in_a_round_whose_mean_it_holds(
    cut_off: tuple[Lab, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two aggregates of one round, of different clients, would show by their difference who is in one alone."""
    lab, run, words = copy_of(cut_off, tmp_path)
    for name in ("state_0001.json", "round_0001.msg"):
        (run / "server" / name).unlink()
    # two clients had been sent the second mean when the server ended
    resumed(lab, run, words)
    text = said(capsys)
    assert (
        "left out client-0: PlanMismatchError: this node holds the mean of round 1, and is asked for round 1 again"
        in (text)
    )
    assert "round 2/3: 2 of 4 clients" in text and "round 3/3: 4 of 4 clients" in text


def test_a_client_refuses_another_run_than_flowers_unless_one_is_to_be_resumed(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(message: Message) -> None:
        values, payload = flower.unpack(message.content)
        message.content = flower.pack(values | {"run": 5}, payload)

    with pytest.raises(Exception, match="0 usable updates"):
        lab("", outgoing=("train", other))
    assert "RoundMismatchError: the message is of another run, and nobody asked to resume one" in said(capsys)


def test_a_round_that_is_asked_for_again_gets_the_release_that_was_made_for_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second release of the same data would cost privacy again, and the last round would have none left."""
    words = f"{FOUR} method=dp_lora record_updates=true"
    run = interrupted(lab, words, 10, monkeypatch)
    sent = [load_file(run / f"clients/client-{k}/round_0002/update.safetensors") for k in range(2)]
    resumed(lab, run, words)
    assert said(capsys).count("round 3 again: the update that was sent before, with its noise") >= 2
    for k, tensors in enumerate(sent):
        again = load_file(run / f"clients/client-{k}/round_0002/update.safetensors")
        assert all(np.array_equal(again[name], value) for name, value in tensors.items())
    assert [int(p.read_text()) for p in run.glob("clients/*/state/releases-*")] == [4] * 4
    epsilons = {x["node"]: x["epsilon_server"] for x in rounds(run) if x["stage"] == "privacy" and x["round"] == 3}
    assert epsilons == {f"client-{k}": pytest.approx(epsilon([1.0] * 4, 1e-5)) for k in range(4)}


def test_a_resumed_run_waits_for_all_and_goes_on_without_those_that_stay_away(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def node(k: int) -> dict[str, Any]:
        own = {"name": f"lab-{k}", "rank": 4, "data-path": str(lab.folder / f"lab-{k}.jsonl"), "allow-clear": True}
        return own | {"run-dir": str(lab.folder / f"node-{k}")}

    words = f"{FOUR} method=fedavg federation.min_clients=3 federation.wait_timeout=3"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("server_app.strategy.EncryptedLora.fail", lambda *_: None)
        lab(words, nodes={k: node(k) for k in range(3)}, tamper=Cut(7))
    run = lab.runs / "one"
    resumed(lab, run, words, nodes={50 + k: node(k) for k in (0, 2)})  # started anew: other node ids
    assert "2 of at least 3 clients (federation.min_clients) have joined (lab-0, lab-2)" in (text := said(capsys))
    assert "round 3/4: 2 of 2 clients" in text
    assert summary(run)["status"] == "completed" and set(summary(run)["nodes"]) == {"lab-0", "lab-1", "lab-2"}
    own = lab.folder / "node-0/one"
    assert not (own / "server").exists() and (own / "clients/lab-0/adapter").is_dir()


def test_ciphertune_run_says_what_is_wrong_with_a_run_to_resume_before_anything_is_started(
    cut_off: tuple[Lab, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, _ = copy_of(cut_off, tmp_path)
    for words, reason in (
        (["resume=runs/nowhere"], "there is no run in "),
        ([f"resume={run}", "seed=3"], "seed is 0 there and 3 here"),
        (["resume=.."], "there is no run in "),
    ):
        assert main(["run", "--app", str(ROOT), "--runs-dir", str(tmp_path), *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize("method", ["sealed crypto=clear", "she_lora crypto=clear method.renegotiate_every=1"])
def test_a_round_with_too_few_usable_updates_is_begun_again_as_if_it_had_not_been(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    failures = {(node, "1"): 1 for node in (100, 101, 103)}

    def tamper(reply: Message, source: int) -> Message:
        at = (source, reply.metadata.group_id)
        if reply.metadata.message_type == "train" and failures.get(at):
            failures[at] -= 1
            values = flower.unpack(reply.content)[0]
            reply.content = flower.pack({"error": "OSError", "line": "disk full", "name": values.get("name", "")})
        return reply

    words = f"{FOUR} method={method}"
    run = lab(words, tamper=tamper)
    text = said(capsys)
    assert "round 2: 1 usable updates, fewer than federation.min_contributors=2" in text and "it is begun again" in text
    assert "round 2/4: 4 of 4 clients" in text
    assert [(x["round"], x["node"]) for x in updates(run)] == [(r, f"client-{k}") for r in range(4) for k in range(4)]
    assert '"client-2"' in (run / "interrupted.jsonl").read_text()
    lab.runs = tmp_path / "never"
    assert same(run, lab(words))


def test_a_resumed_server_remembers_who_was_silent(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weight counts in the next round follows from it."""

    def gone(reply: Message, source: int) -> Message:
        if reply.metadata.message_type == "train" and (source == 100 or reply.metadata.group_id == "2"):
            reply.content = flower.pack({"error": "OSError", "line": "disk full", "name": f"client-{source - 100}"})
        return reply

    words = "name=one method=sealed federation.rounds=3"
    with pytest.raises(FederationError, match="0 usable updates"):
        lab(words, tamper=gone)
    silent: list[list[bool]] = []
    shares = Federation.shares

    def seen(self: Federation, chosen: Any) -> tuple[float, ...]:
        silent.append([m.silent for m in chosen])
        return shares(self, chosen)

    monkeypatch.setattr(Federation, "shares", seen)
    resumed(lab, lab.runs / "one", words)
    assert silent == [[True, False, False, False]]


def test_a_client_whose_disk_is_full_says_so_in_one_line_and_comes_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_file() and "client-1" in path.parts and "before" in path.parts and len(left) < 2:
            left.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(handle)

    left: list[Path] = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    nodes: dict[int, dict[str, Any]] = {
        k: {"name": f"client-{k}", "rank": 4, "data-path": f"{lab.folder}/lab-{k}.jsonl", "allow-clear": True}
        | {"run-dir": str(lab.folder / "own")}
        for k in range(3)
    }
    run = lab("method=fedavg federation.min_clients=3 federation.rounds=4", nodes=nodes)
    lines = said(capsys).splitlines()
    own = [x for x in lines if "| client-1:" in x]
    assert len(own) == 2 and all("cannot read or write its files" in x and "No space left on device" in x for x in own)
    assert [x for x in lines if "left out client-1: OSError: see its own log" in x]
    assert "Traceback" not in "".join(lines)
    assert [x["round"] for x in updates(run) if x["node"] == "client-1"][-2:] == [2, 3]
    assert not [p for p in left if p.exists()]  # nor is half a file left


def test_a_client_that_was_excluded_stays_excluded_when_the_run_is_resumed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{FOUR} method=fedavg federation.exclude_after=1"

    def tamper(reply: Message, source: int) -> Message:
        if source == 101 and reply.metadata.group_id == "0" and "payload" in reply.content:
            values, (data,) = flower.unpack(reply.content)
            reply.content = flower.pack(values, [data[:-1] + bytes([data[-1] ^ 1])])
        return cut(reply, source)

    cut = Cut(9)  # four of round 1, three each of the next ones
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("server_app.strategy.EncryptedLora.fail", lambda *_: None)
        lab(words, tamper=tamper)
    (run,) = lab.runs.iterdir()
    assert "excluded client-1 from the run" in said(capsys)
    resumed(lab, run, words)
    assert list(summary(run)["excluded"]) == ["client-1"]
    assert {line["node"] for line in updates(run)} == {"client-0", "client-2", "client-3"}
    assert "round 4/4: 3 of 3 clients" in said(capsys)


def damaged(*groups: str, then: Callable[[Message, int], Message]) -> Callable[[Message, int], Message]:
    """The updates of client-1 in these rounds do not survive their way, before `then` sees the reply."""

    def tamper(reply: Message, source: int) -> Message:
        if source == 101 and reply.metadata.group_id in groups and "payload" in reply.content:
            values, (data,) = flower.unpack(reply.content)
            reply.content = flower.pack(values, [data[:-1] + bytes([data[-1] ^ 1])])
        return then(reply, source)

    return tamper


def test_a_fault_in_an_attempt_that_was_begun_again_still_counts_after_a_resume(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its second unusable update is in an attempt of which nothing else is kept."""
    gone: list[int] = []
    cut = Cut(12)  # four answers to round 1, four and three to round 2, then one to round 3

    def then(reply: Message, source: int) -> Message:
        if reply.metadata.group_id == "1" and source != 101 and len(gone) < 2 and "payload" in reply.content:
            gone.append(source)
            reply.content = flower.pack({"error": "OSError", "line": "disk full", "name": f"client-{source - 100}"})
        return cut(reply, source)

    words = f"{FOUR} method=fedavg federation.exclude_after=2"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("server_app.strategy.EncryptedLora.fail", lambda *_: None)
        lab(words, tamper=damaged("0", "1", then=then))
    run = lab.runs / "one"
    assert "it is begun again" in (text := said(capsys)) and "excluded client-1 from the run" in text
    resumed(lab, run, words)
    assert list(summary(run)["excluded"]) == ["client-1"]
    assert [line["round"] for line in rounds(run) if line["stage"] == "fault"] == [0, 1]
    assert [line["node"] for line in updates(run) if line["node"] == "client-1"] == []


def test_a_fault_in_the_round_that_a_kill_cut_off_still_counts_after_a_resume(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def left_out(*args: Any) -> None:
        original(*args)
        if args[2] == 1:
            raise Killed

    words, original = f"{FOUR} method=fedavg federation.exclude_after=2", Conduct.left_out
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("server_app.strategy.EncryptedLora.fail", lambda *_: None)
        patch.setattr(Conduct, "left_out", left_out)
        lab(words, tamper=damaged("0", "1", then=lambda reply, _: reply))
    run = lab.runs / "one"
    assert "excluded client-1 from the run" in said(capsys)
    resumed(lab, run, words)
    assert list(summary(run)["excluded"]) == ["client-1"]
    assert {line["node"] for line in updates(run)} == {"client-0", "client-2", "client-3"}


def test_an_update_with_noise_of_a_round_that_a_kill_cut_off_still_counts_though_its_client_never_comes_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(reply: Message, source: int) -> Message:
        if source == 101 and reply.metadata.message_type == "train":
            reply.content = flower.pack({"error": "OSError", "line": "disk full", "name": "client-1"})
        return reply

    def killed(*args: Any, **more: Any) -> None:
        if args[1] == 2:
            raise Killed
        original(*args, **more)

    words, original = f"{FOUR} method=dp_lora", Ledger.update
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("server_app.strategy.EncryptedLora.fail", lambda *_: None)
        patch.setattr(Ledger, "update", killed)  # all four have sent theirs, the first is taken in
        lab(words)
    run = lab.runs / "one"
    resumed(lab, run, words, tamper=gone)
    found = {name: node["epsilon"]["server"] for name, node in summary(run)["nodes"].items()}
    assert found.pop("client-1") == pytest.approx(epsilon([1.0] * 3, 1e-5))
    assert list(found.values()) == [pytest.approx(epsilon([1.0] * 4, 1e-5))] * 3


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [("summary.json", '{"status": "completed"}', "is completed"), ("server/state_0001.json", "{", "is damaged")],
)
def test_what_another_server_did_until_it_let_go_of_the_folder_is_seen(
    cut_off: tuple[Lab, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, reason: str
) -> None:
    lab, run, words = copy_of(cut_off, tmp_path)

    def hold(folder: ServerFolder, *args: Any) -> None:
        (run / file).write_text(text)
        original(folder, *args)

    original = ServerFolder.hold
    monkeypatch.setattr(ServerFolder, "hold", hold)
    with pytest.raises(RuntimeError, match=reason):
        resumed(lab, run, words)
    assert lab.grid is not None and not lab.grid.sent
    monkeypatch.setattr(ServerFolder, "hold", original)
    ServerFolder(run, resumed=True).hold()  # the refused one let go of it


def test_two_servers_that_begin_at_once_in_one_folder_do_not_both_write_into_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold(folder: ServerFolder, *args: Any) -> None:
        (folder.path / "settings.yaml").write_text("of another")
        original(folder, *args)

    original = ServerFolder.hold
    monkeypatch.setattr(ServerFolder, "hold", hold)
    with pytest.raises(RuntimeError, match="holds another run already"):
        lab("name=one")
    assert (lab.runs / "one/settings.yaml").read_text() == "of another"


def test_to_resume_where_there_is_no_run_leaves_nothing_behind(lab: Lab, tmp_path: Path) -> None:
    (lab.runs / "empty").mkdir(parents=True)
    for run in (lab.runs / "empty", lab.runs / "absent"):
        with pytest.raises(RuntimeError, match="there is no run in"):
            resumed(lab, run, FOUR)
    assert [p.name for p in lab.runs.rglob("*")] == ["empty"]
