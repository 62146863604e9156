"""`ciphertune view` and `ciphertune audit` on federations of tiny models: what is clear, what is read, what fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import SENTENCES, tiny_llama

from ciphertune import cli, pruning, runs, wire
from ciphertune.audit import run as audit_run
from ciphertune.audit import view as audit_view
from ciphertune.audit.known import column_numbers, moved
from ciphertune.audit.run import audit
from ciphertune.audit.truth import data_of, trained_on
from ciphertune.crypto.indices import permutation
from ciphertune.errors import DataError, ModelError
from ciphertune.lm import model as lm_model
from ciphertune.lm import train as lm_train

RECORDED = "record_server_view=true record_updates=true model.targets=[q_proj,v_proj] "
EQUAL = "federation.clients='[{rank:4},{rank:4},{rank:4},{rank:4}]'"
PRODUCT = "model.targets=[q_proj,v_proj] crypto.bound=16"


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for a token's row to be told from another's: 64 numbers instead of 32."""
    return tiny_llama(tmp_path_factory.mktemp("wide"), hidden=64)


def read_update(run: Path, node: str, round_: int) -> dict[str, Any]:
    return load_file(run / "clients" / node / f"round_{round_:04d}" / "update.safetensors")


def test_the_view_of_a_clear_run_holds_every_tensor_as_the_client_had_it(
    lab: Callable[..., Any], tmp_path: Path
) -> None:
    run = lab(f"method=fedavg {RECORDED}")
    assert cli.main(["view", str(run), "--out", str(tmp_path / "out")]) == 0
    for round_, node in ((0, "client-2"), (1, "client-0")):
        found = load_file(tmp_path / "out" / f"round_{round_:04d}" / f"{node}.safetensors")
        sent = read_update(run, node, round_)
        assert set(found) == set(sent) and len(found) == 8  # A and B of query and value in two blocks
        for name, values in found.items():
            np.testing.assert_allclose(values, sent[name], rtol=1e-5, atol=1e-7)
    about = json.loads((tmp_path / "out/round_0000/client-2.json").read_text())
    assert about["rank"] == 8 and about["tensors"]["model.layers.0.self_attn.q_proj.a"] == [8, 64]


def test_the_view_of_she_lora_holds_b_and_the_columns_that_are_not_hidden(lab: Callable[..., Any]) -> None:
    run = lab(f"method=she_lora {RECORDED} {PRODUCT}")
    seen = audit_view.read_view(run)
    assert not seen.broken and not seen.says_encrypted
    one = next(s for s in seen.seen if (s.round, s.node) == (0, "client-3"))
    sent, name = read_update(run, "client-3", 0), "model.layers.0.self_attn.q_proj"
    codes = _codes(run, one, name)
    layer = one.layers[name]
    assert layer.a is not None and layer.codes is not None and layer.b is not None
    assert layer.a.shape[1] < 64 and not one.heads
    by_code = np.empty_like(sent[f"{name}.a"])
    by_code[:, codes] = sent[f"{name}.a"]
    np.testing.assert_allclose(layer.a, by_code[:, layer.codes], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.b / 2.0, sent[f"{name}.b"], rtol=1e-5, atol=1e-7)  # alpha / rank


def _codes(run: Path, one: audit_view.Seen, layer: str) -> Any:
    """The true codes, from the key that only clients hold."""
    from ciphertune.build_client import open_key
    from ciphertune.crypto import keys

    secret = open_key(audit_view.settings_of_run(run).crypto, keys.load(run / "clients" / "secret.key"))
    return permutation(secret.derive(f"column codes of run {one.link.run}".encode()), layer, 64)


def _initial(seen: audit_view.View) -> Any:
    settings = seen.settings
    return lm_model.load(settings.model, rank=8, device="cpu", seed=settings.seed).read()


def test_the_codes_of_she_lora_are_matched_to_columns_without_the_key(lab: Callable[..., Any]) -> None:
    run = lab(f"method=she_lora {RECORDED} {PRODUCT} training.learning_rate=0.001")
    seen, name = audit_view.read_view(run), "model.layers.0.self_attn.q_proj"
    one, initial = seen.seen[0], _initial(seen)
    numbers, true = column_numbers(seen, name, initial), np.argsort(_codes(run, one, name))
    shown = numbers >= 0
    assert shown.sum() >= 60
    assert (numbers[shown] == true[shown]).mean() > 0.99


def test_the_start_of_a_later_round_is_known_where_means_are_clear(lab: Callable[..., Any]) -> None:
    for method in ("fedavg", "drop_columns"):
        lab.runs = lab.runs.with_name(method)  # type: ignore[attr-defined]
        run = lab(f"method={method} {RECORDED}")
        seen, name = audit_view.read_view(run), "model.layers.0.self_attn.v_proj"
        one = next(s for s in seen.seen if (s.round, s.node) == (1, "client-3"))
        got = moved(seen, one, _initial(seen), [name])[name]
        before = load_file(run / "clients/client-3/round_0000/received.safetensors")[f"{name}.a"]
        after = read_update(run, "client-3", 1)[f"{name}.a"]
        assert got.a is not None and np.abs(got.a).max() > 1e-4
        np.testing.assert_allclose(got.a, (after - before)[:, got.columns], atol=2e-6)


def test_outside_the_mean_a_she_lora_update_is_the_change_alone(lab: Callable[..., Any]) -> None:
    run = lab(f"method=she_lora {RECORDED} {PRODUCT} training.learning_rate=0.001")
    seen, name = audit_view.read_view(run), "model.layers.0.self_attn.q_proj"
    one = next(s for s in seen.seen if (s.round, s.node) == (1, "client-3"))
    got = moved(seen, one, _initial(seen), [name])[name]
    before = load_file(run / "clients/client-3/round_0000/received.safetensors")[f"{name}.a"]
    change = (read_update(run, "client-3", 1)[f"{name}.a"] - before)[:, got.columns].astype(np.float64)
    assert got.a is not None and got.projection is not None and np.abs(got.a).max() > 1e-4
    np.testing.assert_allclose(got.a, change @ got.projection, atol=1e-5)


@pytest.mark.parametrize("grouped", ["false", "true"])
def test_the_texts_to_score_against_are_those_the_client_trained_on(
    lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, grouped: str
) -> None:
    used: list[set[tuple[int, ...]]] = []
    step = lm_train._step

    def watched(model: Any, parameters: Any, optimizer: Any, batches: Any, settings: Any) -> float:
        used.append({e.input_ids for batch in batches for e in batch})
        return step(model, parameters, optimizer, batches, settings)

    monkeypatch.setattr(lm_train, "_step", watched)
    run = lab(f"method=fedavg {RECORDED} federation.rounds=1 training.group_by_length={grouped}")
    settings = audit_view.settings_of_run(run)
    one = audit_view.read_view(run).seen[0]
    told = [
        set(trained_on(settings, f"client-{k}", 0, data_of(run / "clients", f"client-{k}", one.link.run)))
        for k in range(4)
    ]
    assert told == [used[2 * k] | used[2 * k + 1] for k in range(4)]  # two steps per client


@pytest.mark.parametrize("method", ["sealed", "fedshield"])
def test_an_encrypted_run_shows_nothing_and_is_read_at_chance(lab: Callable[..., Any], method: str) -> None:
    run = lab(f"method={method} {RECORDED}")
    report = audit(run, max_recall=0.0)
    assert report.passed and report.clear_tensors == 0 and report.verdict == "nothing to attack: 0 clear tensors"
    assert len(report.attacks) == 2 * 4 * 3  # rounds, clients, forms of attack
    assert {(r.recall, r.chance) for r in report.attacks} == {(0.0, 0.0)}


def _one_clear_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client and server agree on a layout that leaves the first segment of every update in the clear."""
    counts, divide = pruning.counts, pruning.divide

    def leaky_counts(*words: Any) -> Any:
        clear, secret = counts(*words)
        return (*clear, secret[0]), secret[1:]

    def leaky_divide(*words: Any) -> Any:
        clear, secret = divide(*words)
        return [*clear, secret[0]], secret[1:]

    monkeypatch.setattr(pruning, "counts", leaky_counts)
    monkeypatch.setattr(pruning, "divide", leaky_divide)


def test_one_clear_tensor_fails_the_audit_of_a_method_that_encrypts_everything(
    lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _one_clear_tensor(monkeypatch)
    monkeypatch.setattr(pruning, "unite", lambda clear, secret, *_: (np.concatenate([clear, *secret]), None))
    run = lab(f"method=sealed {RECORDED} federation.rounds=1 {EQUAL}")
    assert cli.main(["audit", str(run)]) == 1
    assert "the settings say that everything is encrypted" in capsys.readouterr().out
    found = json.loads((run / "audit.json").read_text())
    assert not found["passed"] and found["clear_tensors"] >= 4


def test_numbers_in_a_ciphertexts_place_fail_the_audit(
    lab: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab(f"method=sealed {RECORDED} federation.rounds=1")
    path = run / "server_view/round_0000/client-1.msg"
    seen = next(s for s in audit_view.read_view(run).seen if s.node == "client-1")
    plain = np.random.default_rng(0).normal(0, 0.02, 200).astype("<f4").tobytes()
    secret = seen.message.secret[:1001] + plain + seen.message.secret[1001 + len(plain) :]
    path.write_bytes(wire.encode(replace(seen.message, secret=secret), seen.link))
    assert cli.main(["audit", str(run), "--json", str(run / "out.json")]) == 1
    assert "plain numbers" in capsys.readouterr().out


def test_bytes_after_a_message_fail_the_audit(lab: Callable[..., Any]) -> None:
    run = lab(f"method=sealed {RECORDED} federation.rounds=1")
    path = run / "server_view/round_0000/client-1.msg"
    path.write_bytes(path.read_bytes() + bytes(400))
    report = audit(run)
    assert not report.passed and report.clear_tensors == 1 and "0/client-1" in report.verdict


def test_random_bytes_never_read_as_numbers_and_numbers_always_do() -> None:
    generator = np.random.default_rng(1)
    noise = generator.bytes(200_000)
    assert audit_view.looks_clear(noise) == -1
    for kind in ("<f4", "<f8"):
        for at in (0, 1, 50_003):
            plain = generator.normal(0, 0.02, 100).astype(kind).tobytes()
            found = audit_view.looks_clear(noise[:at] + plain + noise[at:])
            assert abs(found - at) <= 64


def test_a_clear_run_is_read_and_fails_where_that_is_not_allowed(
    lab: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab(
        f"method=fedavg {RECORDED} training.batch_size=1 training.steps=1 federation.clients=[{{rank:8}},{{rank:8}},"
        "{rank:8},{rank:8}]"
    )
    assert cli.main(["audit", str(run), "--max-recall", "0.3"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "--max-recall 0.3" in out
    found = json.loads((run / "audit.json").read_text())
    adapted = [r for r in found["attacks"] if (r["name"], r["form"], r["round"]) == ("span", "adapted", 1)]
    assert len(adapted) == 4 and max(r["recall"] - r["chance"] for r in adapted) > 0.3
    assert set(found) == {"attacks", "membership", "metadata", "verdict", "clear_tensors", "max_recall", "passed"}
    first = [r for r in found["attacks"] if r["name"] == "span" and r["round"] == 0]
    assert all(r["recall"] == 0 and "A did not move" in r["note"] for r in first)  # B is zero: one step leaves A
    assert cli.main(["audit", str(run)]) == 0  # without a limit reading is no failure
    assert any("training examples" in fact for fact in found["metadata"])


def test_before_joining_a_client_learns_what_could_be_read_of_it(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import write_lines

    write_lines(tmp_path / "mine.jsonl", [{"text": t} for t in SENTENCES])
    words = [
        "model=hf", f"model.name={llama}", "model.max_length=12", "model.targets=[q_proj,v_proj]", "data=jsonl",
        f"data.path={tmp_path}/mine.jsonl", "training.steps=2", "training.batch_size=1", "training.threads=1",
        "training.learning_rate=0.001",
    ]  # fmt: skip
    assert (
        cli.main(["audit", "--before", "method=she_lora", *words, "--client", "3", "--json", str(tmp_path / "a.json")])
        == 0
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["clear_tensors"] == 8 and {r["node"] for r in found["attacks"]} == {"client-3"}
    assert max(r["recall"] - r["chance"] for r in found["attacks"]) > 0.3
    assert cli.main(["audit", "--before", "method=sealed", *words, "--max-recall", "0"]) == 0
    assert "nothing to attack" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["nowhere"], "not a run folder"),
        ([], "wants one run folder"),
        (["a", "--max-recall", "2"], "out of range"),
        (["--before", "--client", "9"], "--client 9 is none of the 4 clients"),
        (["--before", "--rounds", "0"], "--rounds 0 is out of range"),
    ],
)
def test_a_mistake_gets_one_line(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", *words]) == 2
    assert wanted in capsys.readouterr().err


def test_a_run_that_recorded_nothing_says_how_to_record(
    lab: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab("method=fedavg federation.rounds=1")
    assert cli.main(["audit", str(run)]) == 2
    assert "record_server_view=true" in capsys.readouterr().err


@pytest.fixture
def clear(lab: Callable[..., Any]) -> Path:
    """Three rounds in the clear."""
    run: Path = lab(f"method=fedavg {RECORDED} federation.rounds=3")
    return run


def test_damaged_lines_of_a_run_are_left_out_and_said(clear: Path) -> None:
    whole = audit(clear)
    lines = (clear / "rounds.jsonl").read_bytes()
    (clear / "rounds.jsonl").write_bytes(b"[]\n" + lines + b'\xff\n{"round": 2, "stage": "up')
    report = audit(clear)
    at = lines.count(b"\n")
    lost = f"rounds.jsonl: 3 damaged lines left out (lines 1, {at + 2}, {at + 3})"
    assert report.attacks == whole.attacks
    assert set(report.metadata) == {*whole.metadata, lost}


@pytest.mark.parametrize("text", [b"method: \xff\n", b"- 1\n", b"method: [\n", b""])
def test_a_run_with_damaged_settings_is_refused_in_one_line(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_bytes(text)
    for words in (["audit", str(tmp_path)], ["view", str(tmp_path), "--out", str(tmp_path / "out")]):
        assert cli.main(words) == 2
        wanted = f"ciphertune: {tmp_path} is not a run folder: it has no readable settings.yaml"
        assert capsys.readouterr().err.strip() == wanted


def test_what_is_no_round_and_no_plan_is_named(clear: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clear / "server_view/round_0001").rename(clear / "server_view/round_old")
    assert cli.main(["audit", str(clear)]) == 2
    assert "server_view/round_old is the folder of no round: move it out" in capsys.readouterr().err
    (clear / "server_view/round_old").rename(clear / "server_view/round_0001")
    (clear / "plan.json").write_bytes(b"\xff")
    assert cli.main(["audit", str(clear)]) == 2
    wanted = f"ciphertune: {clear / 'plan.json'} is damaged: put it back from a copy"
    assert capsys.readouterr().err.strip() == wanted


@pytest.mark.parametrize("missing", [(0, 1, 2), (0,), (1,)])
def test_without_the_means_that_a_round_began_from_an_attack_is_refused_not_led_astray(
    clear: Path, missing: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for round_ in missing:
        (clear / f"server/round_{round_:04d}.msg").unlink()
    assert cli.main(["audit", str(clear), "--max-recall", "0.9"]) == 2
    name = f"server/round_{missing[0]:04d}.msg"
    assert f"{clear / name} is missing: without it nobody knows from where" in capsys.readouterr().err


def test_without_a_readable_mean_she_lora_is_not_called_safe(lab: Callable[..., Any]) -> None:
    run = lab(f"method=she_lora {RECORDED} {PRODUCT} training.learning_rate=0.001")
    path = run / "server/round_0000.msg"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"round_0000\.msg cannot be used \("):
        audit(run)
    path.unlink()
    with pytest.raises(DataError, match=r"round_0000\.msg is missing"):
        audit(run)


def _where_nothing_can_be_written(run: Path) -> list[list[str]]:
    (run / "audit.json").mkdir(exist_ok=True)
    return [[], ["--json", str(run)], ["--json", str(run / "settings.yaml/x.json")]]


def test_where_the_result_cannot_go_the_audit_says_so_before_it_attacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_run, "audit", lambda *_, **__: pytest.fail("it attacked"))
    (tmp_path / "settings.yaml").write_text("")
    for words in _where_nothing_can_be_written(tmp_path):
        assert cli.main(["audit", str(tmp_path), *words]) == 2
        err = capsys.readouterr().err.strip()
        assert err.startswith("ciphertune: ") and err.endswith("): give another --json") and "\n" not in err
        assert (words[1] if words else str(tmp_path / "audit.json")) in err
    assert cli.main(["audit", "--before", "--json", str(tmp_path)]) == 2
    assert "cannot be written (Is a directory)" in capsys.readouterr().err


def test_a_disk_that_is_full_in_the_end_does_not_take_the_result_away(
    lab: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lab(f"method=sealed {RECORDED} federation.rounds=1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    assert cli.main(["audit", str(run)]) == 2
    out, err = capsys.readouterr()
    assert "passed: nothing to attack: 0 clear tensors" in out
    assert err.strip() == (
        f"ciphertune: {run / 'audit.json'} cannot be written (No space left on device): give another --json"
    )


def test_a_view_is_not_written_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert cli.main(["view", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "file/broken.json cannot be written (Not a directory): give another --out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"r": "x"}'])
def test_a_finished_adapter_that_is_damaged_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json is absent or damaged: put it back"):
        audit_run.adapter_rank(tmp_path)


torch.set_num_threads(1)
