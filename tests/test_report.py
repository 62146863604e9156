"""`report.html`: what it says of real runs, of broken ones, and of names that somebody made up to break it."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import CONF, ROOT
from federations import rounds, said, summary
from pages import HOSTILE, Page, check_harmless, lines_of, make_run

from ciphertune.cli import main
from ciphertune.errors import SettingsError
from ciphertune.report import figures, plans, words
from ciphertune.report import page as report
from ciphertune.report.show import duration
from ciphertune.report.source import read_run
from ciphertune.settings import compose

SHE = "method=she_lora 'federation.clients=[{rank:2,budget:0.1},{rank:4,budget:0.25},{rank:8,budget:0.5},{rank:8}]'"


def drawn(folder: Path) -> Page:
    return check_harmless(report.write_page(folder).read_text())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures, which take their time."""
    monkeypatch.setattr(figures, "figures", lambda *_: {})


# --- runs that really were -------------------------------------------------------------------------------------------


def test_the_server_writes_the_page_at_the_end_and_says_where(
    lab: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab("federation.compare_local=true", page=True)
    assert f"report: {run / 'report.html'}" in said(capsys)
    page, found = check_harmless((run / "report.html").read_text()), summary(run)
    assert page.tags.count("svg") == 3
    for who in (found, *found["nodes"].values()):
        for key in ("base", "local", "federated"):
            assert f"{who[key]['loss']:.3f}" in page.texts
    assert "100 % of the values" in page.texts and "Not audited: run" in page.text
    for name, node in found["nodes"].items():
        assert name in page.texts and str(node["samples"]) in page.texts and str(node["rank"]) in page.texts


def test_a_page_is_not_the_reason_for_a_run_to_fail(
    lab: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> Path:
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "write_page", broken)
    assert summary(lab(page=True))["status"] == "completed"
    assert "no page: RuntimeError: no ink" in said(capsys)


def test_a_run_that_failed_has_a_page_with_the_reason_on_top(lab: Callable[..., Path]) -> None:
    with pytest.raises(Exception, match="min_clients"):
        lab("federation.min_clients=9 federation.wait_timeout=1", page=True)
    (run,) = lab.runs.iterdir()  # type: ignore[attr-defined]
    page = check_harmless((run / "report.html").read_text())
    assert "failed" in page.texts and "min_clients" in page.text and page.text.index("min_clients") < 400


def test_the_heat_map_has_as_many_encrypted_columns_as_the_clients_sent(lab: Callable[..., Path]) -> None:
    run = lab(f"{SHE} record_server_view=true", page=True)
    found = read_run(run)
    covered = plans.coverage(found, plans.read_plan(found))
    assert covered and len(covered.labels) == len(found.plan["layers"])
    nodes = summary(run)["nodes"]
    sent = {x["node"]: x["values_cipher"] / nodes[x["node"]]["rank"] for x in rounds(run) if x["stage"] == "update"}
    assert sum(row.sum() for row in covered.shares) * len(sent) == pytest.approx(sum(sent.values()))
    assert 0 < max(row.max() for row in covered.shares) <= 1 + 1e-12
    page = check_harmless((run / "report.html").read_text())
    assert page.tags.count("svg") == 4 and page.tags.count("image") >= 1
    outcome = found.plan["negotiation"]
    for name in sent:
        for kind in ("coverage", "risk"):
            assert f"{100 * outcome[kind][name]:.3g} %" in page.texts
    assert "the server does not know which column is which" in page.text


def test_bars_add_up_to_the_bytes_that_travelled(tmp_path: Path) -> None:
    found = read_run(make_run(tmp_path / "r"))
    table = figures.bytes_by_round(found)
    assert table[0] == {"up, encrypted": 900, "up, readable": 100, "negotiation": 0, "down": 0}
    assert sum(table[2].values()) == 3000
    assert figures.seconds_by_stage(found) == {"load": 3.0, "train": 24.0, "seal": 1.5, "aggregate": 0.375}


def test_wide_and_narrow_layers_share_one_width_and_keep_their_mean() -> None:
    for width in (3, 256, 1000, 4096):
        row = (np.arange(width) % 3 == 0).astype(float)
        assert figures._binned(row).shape == (256,)
        assert figures._binned(row).mean() == pytest.approx(row.mean())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (0.0571, "0.057 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# --- loading the adapter ---------------------------------------------------------------------------------------------


def loaded_by(page: Page, run: Path) -> dict[str, Any]:
    """What the snippet of a page leaves behind, run in the run folder."""
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(run)
    try:
        exec(page.code, names)  # the page is ours
    finally:
        os.chdir(before)
    return names


@pytest.mark.parametrize("method", ["sealed", "flora", "flexlora"])
def test_the_snippet_loads_the_adapter_that_was_measured(lab: Callable[..., Path], method: str) -> None:
    import torch

    run = lab(f"method={method} model.release=float32 training.learning_rate=0.05 training.steps=4", page=True)
    names = loaded_by(check_harmless((run / "report.html").read_text()), run)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    texts = [json.loads(x)["text"] for x in (run.parents[1] / "heldout.jsonl").read_text().splitlines()]
    total = tokens = 0.0
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids[:, :32]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    found = summary(run)["nodes"]["client-0"]
    assert total / tokens == pytest.approx(found["federated"]["loss"], abs=1e-5)
    assert abs(found["federated"]["loss"] - found["base"]["loss"]) > 1e-2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedded", 'base = str(files("ciphertune") / "assets" / "base")'),
        ("HuggingFaceTB/SmolLM2-135M", "base = 'HuggingFaceTB/SmolLM2-135M'"),
        ("/home/someone/my-llama", "base = PeftConfig.from_pretrained(adapter).base_model_name_or_path  # 'my-llama'"),
        ("x'; import os #\n", 'base = "x\'; import os #\\n"'),
    ],
)
def test_the_snippet_names_the_base_model_and_no_folder(tmp_path: Path, name: str, expected: str) -> None:
    run = make_run(tmp_path / "r", settings={"model": {"name": name}})
    code = words.snippet(read_run(run), "lab-a")
    assert expected in code.splitlines() and "/home" not in code
    compile(code, "snippet", "exec")


def test_the_snippet_of_a_classifier_has_its_number_of_labels(tmp_path: Path) -> None:
    settings = {"model": {"name": "a/b", "task": "classification"}, "data": {"labels": ["no", "yes", "so"]}}
    code = words.snippet(read_run(make_run(tmp_path / "r", settings=settings)))
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)" in code


@pytest.mark.slow
def test_the_page_of_the_first_command_loads_its_adapter(tmp_path: Path) -> None:
    words_ = ["experiment=smoke", "training.steps=2", "data.max_heldout=8", "training.threads=1", "name=first"]
    command = [sys.executable, "-m", "ciphertune.cli", "run", "--runs-dir", str(tmp_path), *words_]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "first/report.html"
    assert f"report: {path}" in done.stdout.splitlines()
    names = loaded_by(check_harmless(path.read_text()), tmp_path / "first")
    assert [*names["model"].peft_config] == ["default"] and names["model"].peft_config["default"].r == 8
    ids = names["tokenizer"]("one", return_tensors="pt")
    assert names["model"].generate(**ids, max_new_tokens=4).shape[1] > ids.input_ids.shape[1]


# --- what the server saw ----------------------------------------------------------------------------------------------

# SECURITY.md: how A and B travel, and whether any entry of an update is encrypted
SEEN = {
    "fedavg": ("readable", "readable", "none"),
    "flexlora": ("readable", "readable", "none"),
    "flora": ("readable", "readable", "none"),
    "hetlora": ("readable", "readable", "none"),
    "rolora": ("readable", "readable", "none"),
    "ffa_lora": ("not sent", "readable", "none"),
    "drop_columns": ("readable", "readable", "none"),
    "dp_lora": ("readable", "readable", "none"),
    "local": ("not sent", "not sent", "nothing"),
    "she_lora": ("partly", "readable", "some"),
    "maskcrypt": ("partly", "partly", "some"),
    "full_he": ("encrypted", "encrypted", "all"),
    "fedshield": ("encrypted", "encrypted", "all"),
    "sealed": ("encrypted", "encrypted", "all"),
}


def settings_of(*overrides: str) -> dict[str, Any]:
    from dataclasses import asdict

    plain: dict[str, Any] = json.loads(json.dumps(asdict(compose(CONF, list(overrides)))))
    return plain


@pytest.mark.parametrize("method", sorted(p.stem for p in (CONF / "method").glob("*.yaml")))
def test_the_privacy_box_says_of_every_method_what_the_server_read(tmp_path: Path, method: str, undrawn: None) -> None:
    run = make_run(tmp_path / "r", settings=settings_of(f"method={method}"))
    a, b, kind = SEEN[method]
    found = read_run(run)
    rows = {what: how for what, how, _ in words.seen(found, heads=False)}
    assert (rows["Factor A"], rows["Factor B"], words.protection(found)) == (a, b, kind)
    assert rows["Scores"] == rows["Who"] == "readable"
    page = drawn(run)
    assert all(limit in page.text for limit in words.limits(found)) and len(words.limits(found)) >= 2
    if "encrypted" not in (a, b):
        assert words.limits(found)[0] != words.limits(read_run(make_run(tmp_path / "s")))[0]


def test_a_dry_run_is_not_called_encrypted(tmp_path: Path, undrawn: None) -> None:
    page = drawn(make_run(tmp_path / "r", settings=settings_of("crypto=clear")))
    assert "The server could read every update of every client." in page.text and "dry run" in page.text
    assert "no entry of an update" not in page.text


AUDIT = {
    "attacks": [
        {"name": "span", "form": "adapted", "round": 0, "node": "lab-a", "batch": 1, "recall": 0.625, "rouge1": 0.5,
         "rouge2": None, "chance": 0.0125, "note": "a note"},
        {"name": "span", "form": "published", "round": None, "node": None, "batch": None, "recall": 0.0, "rouge1": None,
         "rouge2": None, "chance": 0.0, "note": ""},
    ],
    "membership": {"auroc": 0.5125, "low": 0.4, "high": 0.62, "tpr_at_1_fpr": 0.015, "control": 0.5},
    "metadata": ["ranks"], "verdict": "words can be read", "clear_tensors": 12, "max_recall": 0.625, "passed": False,
}  # fmt: skip


def test_the_page_shows_what_an_audit_found(tmp_path: Path, undrawn: None) -> None:
    page = drawn(make_run(tmp_path / "r", audit=AUDIT))
    assert "Audit: failed" in page.text and "62.5 %" in page.texts and "1.25 %" in page.texts
    assert "AUROC 0.512" in page.text and "words can be read" in page.text and "Not audited" not in page.text
    passed = drawn(make_run(tmp_path / "s", audit={"passed": True, "verdict": "nothing was read"}))
    assert "Audit: passed" in passed.text
    # only what says so has passed
    assert "Audit: failed" in drawn(make_run(tmp_path / "t", audit={"passed": "yes"})).text


# --- runs that are broken, and names that are meant to break ----------------------------------------------------------


def test_a_run_that_was_cut_off_has_a_page(tmp_path: Path) -> None:
    lines = [x for r in range(2) for x in lines_of(r, ("lab-a", "lab-b"))][:-3]
    page = drawn(make_run(tmp_path / "r", rounds=lines, summary=None))
    assert "not finished" in page.texts and "cut off after 1 round" in page.text
    assert page.tags.count("svg") == 3 and "lab-a" in page.texts


def test_a_run_of_which_only_the_settings_are_left_has_a_page(tmp_path: Path) -> None:
    page = drawn(make_run(tmp_path / "r", rounds=None, summary=None, plan=None, versions=None))
    assert "rounds.jsonl is missing." in page.texts and "svg" not in page.tags


def test_a_run_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    lines = [
        {k: v for k, v in x.items() if k in ("round", "stage", "node", "seconds")} for x in lines_of(0, ("lab-a",))
    ]
    old = {"status": "completed", "nodes": {"lab-a": {}}}
    run = make_run(
        tmp_path / "r", rounds=lines, summary=old, plan={"members": [{"name": "lab-a"}]}, settings={"name": "x"}
    )
    page = drawn(run)
    assert "lab-a" in page.texts and "plan.json is damaged or of another version" in page.text


def test_damaged_lines_are_named_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    whole = figures.course(read_run(run), "loss")
    lines = (run / "rounds.jsonl").read_text().splitlines()
    bad = ['{"round": 0, "stage"', '{"round": 0, "stage": "update", "node": "lab-a", "loss": NaN}', "[]", '"x"',
           '{"round": -1, "stage": "x", "node": "y"}', '{"round": 1e400, "stage": "x", "node": "y"}']  # fmt: skip
    (run / "rounds.jsonl").write_bytes("\n".join([*lines[:4], *bad, *lines[4:]]).encode() + b"\n\xff\xfe\n")
    found = read_run(run)
    assert found.faults == ("rounds.jsonl: 7 damaged lines left out (lines 5, 6, 7, 8, 9, ...).",)
    assert figures.course(found, "loss") == whole
    assert found.faults[0] in drawn(run).texts


def everywhere(value: Any, text: str) -> Any:
    """The same value with every text in it, keys of clients included, made hostile."""
    if isinstance(value, dict):
        return {k: everywhere(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, text) for v in value]
    return text + value if isinstance(value, str) else value


def test_text_from_clients_is_shown_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", names=(HOSTILE, "_x"))
    for path in run.glob("*.json"):
        path.write_text(json.dumps(everywhere(json.loads(path.read_text()), HOSTILE)))
    settings = everywhere(yaml.safe_load((run / "settings.yaml").read_text()), HOSTILE)
    settings["method"]["select"] = "negotiated"
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    (run / "audit.json").write_text(json.dumps(everywhere(AUDIT, HOSTILE)))
    page = drawn(run)
    assert sum(HOSTILE[:8] in x for x in page.texts) > 10
    plan = json.loads((run / "plan.json").read_text()) | {"budgets": [0.5], "columns": [[0, 1, 2, 3]] * 4}
    plan["members"] = [{"name": HOSTILE, "budget": 0.5}]
    (run / "plan.json").write_text(json.dumps(plan))
    assert drawn(run).tags.count("svg") == 4  # and in the labels of a figure


def junk(value: Any, draw: random.Random) -> Any:
    """The same value with something in it replaced by something else, or taken away."""
    odd = [
        None,
        True,
        -1,
        1e400,
        float("nan"),
        10**400,
        "",
        "x\x00\ud800",
        [],
        [[]],
        {},
        {"a": {}},
        [1, "b", None],
        0.5,
    ]
    if draw.random() < 0.05 or not isinstance(value, dict | list) or not value:
        return draw.choice(odd)
    made = copy.deepcopy(value)
    at = draw.choice([*made]) if isinstance(made, dict) else draw.randrange(len(made))
    if draw.random() < 0.2:
        del made[at]
    else:
        made[at] = junk(made[at], draw)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_no_file_whatever_is_in_it_leads_to_a_trace(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    source = make_run(tmp_path / "whole", audit=AUDIT)
    plan = json.loads((source / "plan.json").read_text())
    plan |= {"budgets": [0.25, 0.5], "columns": [[0, 1, 2, 3]] * 4, "negotiation": {"coverage": {"lab-a": 1.0}}}
    plan["members"] = [member | {"budget": 0.25} for member in plan["members"]]
    (source / "plan.json").write_text(json.dumps(plan))
    files = {p.name: json.loads(p.read_text()) for p in source.glob("*.json")}
    files["settings.yaml"] = yaml.safe_load((source / "settings.yaml").read_text())
    lines = [json.loads(x) for x in (source / "rounds.jsonl").read_text().splitlines()]
    for step in range(60):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        for name, values in files.items():
            (run / name).write_text(json.dumps(junk(values, draw) if draw.random() < 0.6 else values), errors="replace")
        odd = [junk(x, draw) if draw.random() < 0.2 else x for x in lines]
        (run / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in odd))
        page = report.page(read_run(run)) if step % 6 == 0 else quick(run)
        check_harmless(page)


def quick(run: Path) -> str:
    """The page without figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "figures", lambda *_: {})
        return report.page(read_run(run))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    run = make_run(tmp_path / "r")
    assert main(["report", str(run)]) == 0 and capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(run), "--out", str(tmp_path / "new/x.html")]) == 0
    assert (tmp_path / "new/x.html").read_text() == (run / "report.html").read_text()
    text = (run / "report.html").read_text()
    assert "my-llama" in text and "/home/someone" not in text and str(tmp_path) not in text


@pytest.fixture
def wrong(tmp_path: Path) -> Iterator[list[list[str]]]:
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "r")
    yield [[str(tmp_path / "empty")], [str(tmp_path / "none")], [str(run), "--out", str(tmp_path)],
           [str(run), "--out", str(run / "settings.yaml/x")]]  # fmt: skip


def test_a_mistake_gets_one_line(
    wrong: list[list[str]], capsys: pytest.CaptureFixture[str], undrawn: None, tmp_path: Path
) -> None:
    for arguments in wrong:
        assert main(["report", *arguments]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.startswith(f"ciphertune: {tmp_path}")
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(SettingsError, match="not the folder of a run"):
        read_run(tmp_path / "empty")
