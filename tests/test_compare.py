"""`ciphertune compare`: what is asked for, what is run again, and what is written; runs are made up but in one test."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT
from pages import Page

from ciphertune import charts, compare, compare_runs
from ciphertune.cli import main
from ciphertune.comparison import Cell, deviation, read_run, shown
from ciphertune.versions import code_digest

HOSTILE = '<script>alert("x")</script> & $y^{$ | `z`'


def summary_of(cell: Cell) -> dict[str, Any]:
    """Figures that differ by row and seed."""
    loss = 3.0 + 0.1 * len(cell.row.name) + 0.01 * cell.seed**2
    score = {"loss": loss, "metric": {"accuracy": loss / 10}}
    alone = {"loss": 4.0, "metric": {"accuracy": 0.4}} if cell.settings.federation.compare_local else None
    base = {"loss": 5.0, "metric": {"accuracy": 0.3}}
    nodes = {f"client-{k}": {"base": base, "local": alone, "federated": score} for k in range(2)}
    return {
        "status": "completed", "method": cell.settings.method.name, "rounds": 2, "seconds": 9.0, "base": base,
        "local": alone, "federated": score, "bytes_up": 1e6 + cell.seed, "bytes_down": 2e6, "encrypted_fraction": 0.5,
        "seconds_by_stage": {}, "nodes": nodes,
    }  # fmt: skip


def lines_of(cell: Cell) -> list[dict[str, Any]]:
    """Two rounds of two clients; only the first is measured. Afterwards the last evaluation, and training alone."""
    lines: list[dict[str, Any]] = []
    for round_ in range(2):
        for k, loss in enumerate((4.0, 6.0)):
            node = {"round": round_, "node": f"client-{k}"}
            lines += [node | {"stage": s, "seconds": 1.0} for s in ("load", "train", "seal")]
            score = {"loss": loss, "metric": {"accuracy": loss / 10}} if round_ == 0 else {}
            lines.append(node | {"stage": "update", "bytes_up": 100 + k, "bytes_down": 50 * round_, **score})
        lines.append({"round": round_, "node": "server", "stage": "aggregate", "seconds": 0.5})
        lines.append({"round": round_, "node": "server", "stage": "round", "seconds": 10.0 + cell.seed})
    last = ["load", "unseal", "evaluate", "save"]
    alone = ["load", "train", "evaluate"] if cell.settings.federation.compare_local else []
    for stage in [*last, *last, *alone, *alone]:
        lines.append({"round": 2, "node": "client-0", "stage": stage, "seconds": 1.0})
    return lines


class Fake:
    """Stands for a started run: it has written what a run leaves behind."""

    def __init__(self, status: int) -> None:
        self.status, self.ended = status, False

    def poll(self) -> int:
        return self.status

    def terminate(self) -> None:
        self.ended = True

    def wait(self, timeout: float) -> int:
        return self.status


class Runner:
    """What is put in the place of `compare_runs.start`. failing: names of run folders that fail."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cells: list[Cell] = []
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.failing: set[str] = set()
        self.interrupt_at = ""

    def __call__(self, cell: Cell, command: Sequence[str], environment: Mapping[str, str]) -> Fake:
        name = cell.folder.name
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        self.started.append(name)
        self.cells.append(cell)
        self.commands.append([*command, *cell.words])
        self.environments.append(environment)
        if f"resume={cell.folder}" in command:
            shutil.rmtree(cell.folder)
        assert not cell.folder.exists()
        write_run(cell, "failed" if name in self.failing else "completed")
        cell.log.write_text("Flower's own\nround 1/2: 2 of 2 clients\nrun failed after 3 s: out of luck\n")
        return Fake(int(name in self.failing))


def write_run(cell: Cell, status: str) -> None:
    cell.folder.mkdir(parents=True)
    (cell.folder / "summary.json").write_text(json.dumps(summary_of(cell) | {"status": status}))
    (cell.folder / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines_of(cell)))
    saved = {"overrides": "x", **json.loads(json.dumps(asdict(cell.settings))), "runs_dir": str(cell.folder.parent)}
    (cell.folder / "settings.yaml").write_text(yaml.safe_dump(saved))
    (cell.folder / "versions.json").write_text(json.dumps({"code": code_digest()}))


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """With charts, which take their time."""
    found = Runner()
    monkeypatch.setattr(compare_runs, "start", found)
    monkeypatch.setattr(compare_runs, "_POLL", 0.0)
    return found


@pytest.fixture
def runner(drawing: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(charts, "charts", lambda _: [])
    return drawing


def go(out: Path, *words: str) -> int:
    return main(["compare", "--app", str(ROOT), "--out", str(out), *words])


def test_rows_share_seeds_and_data_and_all_of_them_come_before_the_next_seed(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg,sealed", "federation.rounds=2", "--seeds", "2", "--row", "Half: training.steps=3"
              " method=sealed crypto=clear", "training.steps=5") == 0  # fmt: skip
    names = [f"{row}-seed{seed}" for seed in range(2) for row in ("fedavg", "sealed", "half")]
    assert runner.started == names
    for index, command in enumerate(runner.commands):
        row, seed = index % 3, index // 3
        assert command[1:4] == ["-m", "ciphertune.cli", "run"]
        assert command[command.index("--runs-dir") + 1] == str(tmp_path / "runs")
        assert {f"seed={seed}", f"data.seed={seed}", f"name={names[index]}", "federation.rounds=2"} <= set(command)
        assert f"method={'fedavg' if row == 0 else 'sealed'}" in command
        assert [w for w in command if w.startswith("training.steps")] == [f"training.steps={3 if row == 2 else 5}"]
        assert f"federation.compare_local={'true' if row == 0 else 'false'}" in command
        assert ("crypto=clear" in command) == (row == 2)


@pytest.mark.parametrize("word", ["federation.compare_local=false", "federation.compare_local=true"])
def test_what_the_user_says_of_training_alone_holds_for_all_rows(word: str, tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg,sealed", word, "seeds=1") == 0
    assert [[w for w in c if "compare_local" in w] for c in runner.commands] == [[word], [word]]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["method=fedavg,seald"], "row 'seald': unknown method=seald; did you mean sealed?"),
        (["method=fedavg", "--row", "x: training.stepz=3"], "row 'x': unknown setting training.stepz"),
        (["method=fedavg,sealed", "federation.min_clients=9"], "row 'fedavg': federation.min_clients=9, but 4 clients"),
        (["method=fedavg", "model=hf"], "row 'fedavg': model.name is empty"),
        (["method=fedavg,fedavg"], "two rows are named 'fedavg' and 'fedavg'"),
        (["method=fedavg", "--row", "FedAvg!: crypto=clear"], "two rows are named 'fedavg' and 'FedAvg!'"),
        (["method=fedavg,sealed", "--row", "x: training.steps=3"], "does not say which of the methods fedavg, sealed"),
        (["method=fedavg", "--row", "training.steps=3"], "want 'NAME: OVERRIDE OVERRIDE'"),
        (["method=fedavg", "--row", "x: 'a"], "No closing quotation"),
        (["method=fedavg,"], "names an empty method"),
        (["training.steps=3"], "nothing to compare"),
        (["method=fedavg", "seed=3"], "seed=3: compare sets seed for each run; --seeds is the choice"),
        (["--row", "x: name=y"], "name=y: compare sets name"),
        (["method=fedavg", "seeds=0"], "--seeds 0: want a number"),
        (["method=fedavg", "seeds=2", "--seeds", "3"], "the number of seeds is given as 2 and as 3"),
        (["method=fedavg", "--parallel", "0"], "--parallel 0"),
    ],
)
def test_a_mistake_in_any_row_is_one_line_and_status_2_before_anything_is_started(
    words: list[str], part: str, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(tmp_path / "out", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ciphertune: ") and part in err
    assert runner.started == [] and not (tmp_path / "out").exists()


def test_a_comparison_is_not_written_over_a_file(
    tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert go(tmp_path / "file", "method=fedavg", "seeds=1") == 2
    assert f"{tmp_path / 'file'} cannot be written (File exists): give another --out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept" and not runner.started


def test_a_row_takes_the_only_method_there_is(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg", "--row", "few: training.steps=1", "seeds=1") == 0
    assert "method=fedavg" in runner.commands[1] and "training.steps=1" in runner.commands[1]
    assert go(tmp_path / "b", "--row", "default: training.steps=1", "seeds=1") == 0
    assert json.loads((tmp_path / "b/compare.json").read_text())["rows"]["default"]["method"] == "sealed"


def test_the_same_command_runs_only_what_is_not_finished(tmp_path: Path, runner: Runner) -> None:
    runner.interrupt_at = "fedavg-seed1"
    words = ["method=fedavg,sealed", "seeds=2"]
    assert go(tmp_path, *words) == 130
    assert runner.started == ["fedavg-seed0", "sealed-seed0"]
    assert json.loads((tmp_path / "compare.json").read_text())["about"]["completed"] == 2
    cut = tmp_path / "runs/fedavg-seed1"  # as a run leaves it that was ended
    cut.mkdir()
    (cut / "settings.yaml").write_text("unfinished")
    runner.interrupt_at = ""
    assert go(tmp_path, *words) == 0
    assert runner.started[2:] == ["fedavg-seed1", "sealed-seed1"]
    assert go(tmp_path, *words) == 0 and len(runner.started) == 4
    assert go(tmp_path, "method=fedavg,sealed", "seeds=3") == 0
    assert runner.started[4:] == ["fedavg-seed2", "sealed-seed2"]


def test_a_run_that_was_cut_off_goes_on_and_begins_anew_where_that_fails(
    tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "runs/fedavg-seed0"

    def left() -> None:
        cut.mkdir(parents=True)
        (cut / "settings.yaml").write_text("unfinished")

    left()
    monkeypatch.setattr(compare_runs.resume, "find", lambda folder, settings: None)  # it could be gone on with
    runner.failing = {"fedavg-seed0"}
    assert go(tmp_path, "method=fedavg", "seeds=1") == 1
    assert f"resume={cut}" in runner.commands[-1] and not cut.exists()
    runner.failing = set()
    assert go(tmp_path, "method=fedavg", "seeds=1") == 0
    assert f"resume={cut}" not in runner.commands[-1]
    shutil.rmtree(cut)
    left()
    assert go(tmp_path, "method=fedavg", "seeds=1") == 0 and f"resume={cut}" in runner.commands[-1]


def test_the_bar_counts_the_rounds_of_all_runs_and_tells_the_time_left(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg,sealed", "seeds=2") == 0
    found = {path.name: path for path in (tmp_path / "runs").iterdir()}
    cells = [c for c in runner.cells if c.folder.name in found]
    states = {cell: "completed" if k < 2 else "not run" for k, cell in enumerate(cells)}
    runs = compare_runs.Runs(["x"], 1, states)
    bar = runs._shown()
    total = sum(c.settings.federation.rounds for c in cells)
    per_round = 9.0 / 2  # as `summary_of` has it
    done = sum(c.settings.federation.rounds for c in cells[:2])
    assert bar["completed"] == done
    assert bar["description"] == f"2 of 4 runs, {per_round * (total - done) / 60:.0f} min left"
    runs._active[cells[2]] = (Fake(0), 0.0)  # type: ignore[assignment]
    runs._rounds[cells[2]] = 0
    cells[2].log.write_text("ciphertune | round 1/2: 4 clients\nciphertune | round 2/2: 4 clients\n")
    assert runs._shown()["completed"] == done + 2


def test_an_interrupt_ends_the_runs_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Fake):
        def poll(self) -> None:  # type: ignore[override]
            return None

    started: list[Endless] = []

    def start(*_: object) -> Endless:
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(Endless(0))
        return started[-1]

    monkeypatch.setattr(compare_runs, "start", start)
    assert go(tmp_path, "method=fedavg,sealed,full_he", "seeds=1", "--parallel", "3") == 130
    assert [one.ended for one in started] == [True, True]


@pytest.mark.parametrize(
    ("file", "old", "new", "part"),
    [
        ("settings.yaml", "steps: 20", "steps: 21", "holds a run with training.steps=21, not 20: give another --out"),
        ("settings.yaml", "method:", "methods:", "holds a run with"),
        ("settings.yaml", "seed: 0", "seed: [", "settings.yaml cannot be read back (it is damaged)"),
        ("settings.yaml", "seed: 0", "seed: \0", "settings.yaml cannot be read back (it is damaged)"),
        ("versions.json", code_digest(), "0123", "holds a run of other code (0123, now"),
        ("summary.json", "}", "", "summary.json cannot be read back (it is damaged)"),
        ("summary.json", '"nodes"', '"knots"', "lacks figures of a finished run ('nodes')"),
        (
            "rounds.jsonl",
            '{"round": 1, "node": "client-1", "stage": "seal"',
            "{{",
            "rounds.jsonl is damaged in line 17",
        ),
        ("rounds.jsonl", '"seconds": 10.0', '"minutes": 10.0', "lacks figures of a finished run ('seconds')"),
    ],
)
def test_a_finished_run_of_something_else_is_refused_and_kept(
    file: str, old: str, new: str, part: str, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(tmp_path, "method=fedavg", "seeds=1") == 0
    path = tmp_path / "runs/fedavg-seed0" / file
    path.write_text(path.read_text().replace(old, new))
    assert go(tmp_path, "method=fedavg", "seeds=1") == 2
    err = capsys.readouterr().err
    assert part in err and f"or delete {path.parent}" in err
    assert len(runner.started) == 1 and new in path.read_text()


def test_a_folder_that_no_run_made_is_never_removed(
    tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/fedavg-seed0").mkdir(parents=True)
    (tmp_path / "runs/fedavg-seed0/thesis.tex").write_text("kept")
    assert go(tmp_path, "method=fedavg", "seeds=1") == 2
    assert "is in the way" in capsys.readouterr().err
    assert (tmp_path / "runs/fedavg-seed0/thesis.tex").read_text() == "kept"


def test_two_comparisons_do_not_share_a_folder(
    tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    with compare._held(tmp_path):
        assert go(tmp_path, "method=fedavg", "seeds=1") == 2
    assert "another comparison is running" in capsys.readouterr().err and runner.started == []


def test_a_failed_run_is_reported_with_its_own_words_and_the_others_go_on(
    tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.failing = {"fedavg-seed0"}
    assert go(tmp_path, "method=fedavg,sealed", "seeds=2") == 1
    out, err = capsys.readouterr()
    assert len(runner.started) == 4
    assert "fedavg, seed 0: failed, exit status 1" in out and "\n  run failed after 3 s: out of luck\n" in out
    assert "Flower's own" not in out
    assert "1 of 4 runs failed" in err
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["rows"]["fedavg"]["status"] == {"0": "failed", "1": "completed"}
    assert found["rows"]["fedavg"]["std"]["loss"] is None and found["rows"]["sealed"]["std"]["loss"] is not None
    assert "| fedavg |" in (tmp_path / "compare.md").read_text() and "1 of 2 |" in (tmp_path / "compare.md").read_text()
    with (tmp_path / "compare.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["failed", "completed", "completed", "completed"]
    runner.failing = set()
    assert go(tmp_path, "method=fedavg,sealed", "seeds=2") == 0 and runner.started[4:] == ["fedavg-seed0"]


def test_processors_are_divided_among_the_runs_at_a_time(
    tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert go(tmp_path, "method=fedavg,sealed", "seeds=1", "--parallel", "3") == 0
    assert [e["OMP_NUM_THREADS"] for e in runner.environments] == ["2", "2"]


def test_means_and_deviations_are_numpys(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg,sealed", "seeds=3") == 0
    row = json.loads((tmp_path / "compare.json").read_text())["rows"]["sealed"]
    runs = [row["seeds"][str(k)] for k in range(3)]
    for key, values in {
        "loss": [r["federated"]["loss"] for r in runs],
        "accuracy": [r["federated"]["metric"]["accuracy"] for r in runs],
        "base_loss": [r["base"]["loss"] for r in runs],
        "bytes_up": [r["bytes_up"] for r in runs],
        "seconds": [r["seconds"] for r in runs],
    }.items():
        assert row["mean"][key] == pytest.approx(np.mean(values), rel=1e-12)
        assert row["std"][key] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert deviation([1.0]) is None and "local_loss" not in row["mean"]


def test_the_figures_of_a_run_leave_training_alone_out_and_bytes_add_up(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg,sealed", "seeds=1") == 0
    first, second = (read_run(tmp_path / "runs" / f"{row}-seed0") for row in ("fedavg", "sealed"))
    assert first["local"] and not second["local"]
    assert first["seconds_by_stage"] == second["seconds_by_stage"]
    assert first["seconds_by_stage"] == {
        "load": 6.0, "train": 4.0, "seal": 4.0, "aggregate": 1.0, "unseal": 2.0, "evaluate": 2.0, "save": 2.0
    }  # fmt: skip
    assert first["seconds"] == 20.0 and first["seconds_run"] == 9.0
    course = first["rounds"]
    assert [x["bytes_so_far"] for x in course] == [0.0, 100.5, 251.0]
    assert [x["loss"] for x in course] == [5.0, None, pytest.approx(3.6)]
    assert course[0]["metric"] == {"accuracy": pytest.approx(0.5)} and course[1]["metric"] is None


def test_what_was_negotiated_counts_once(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg", "seeds=1") == 0
    path = tmp_path / "runs/fedavg-seed0/rounds.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    sent = {"round": 1, "stage": "negotiation", "bytes_up": 10, "bytes_down": 20}
    lines[:0] = [sent | {"node": "client-0"}, sent | {"node": "client-1"}]
    lines = [x for x in lines if not (x["round"] == 1 and x["stage"] == "update" and x["node"] == "client-1")]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    # client-0: 10 up and 20 down, and an update of 100 up and 50 down; client-1: 10 up, 20 down, no update
    assert read_run(path.parent)["rounds"][2]["bytes_so_far"] == pytest.approx(100.5 + (30 + 150 + 30) / 2)


def test_csv_has_a_line_per_row_and_seed(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path, "method=fedavg", "--row", f"{HOSTILE}: method=sealed", "seeds=2") == 0
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], r["method"], r["seed"]) for r in rows] == [
        ("fedavg", "fedavg", "0"), ("fedavg", "fedavg", "1"), (HOSTILE, "sealed", "0"), (HOSTILE, "sealed", "1")
    ]  # fmt: skip
    assert float(rows[1]["loss"]) == pytest.approx(3.61) and float(rows[1]["bytes_up"]) == 1e6 + 1
    assert rows[0]["local_loss"] == "4.0" and rows[2]["local_loss"] == "" and rows[0]["seconds_train"] == "4.0"


def test_markdown_has_base_and_alone_once_and_marks_no_winner(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path / "mine", "method=fedavg", "--row", f"{HOSTILE}: method=sealed", "seeds=2") == 0
    text = (tmp_path / "mine/compare.md").read_text()
    assert text.startswith("# mine\n") and "**" not in text and "<script>" not in text
    assert text.count("base model, not tuned") == 1 and text.count("each client alone, settings of fedavg") == 1
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(line.replace("\\|", "").strip("|").split("|")) for line in table}
    assert columns == {8} and len(table) == 6
    assert (
        "| fedavg | 3.6050 ± 0.0071 | 36.0% ± 0.1% | 1.0 MB ± 1 B | 2.0 MB ± 0 B | 50% ± 0% | 21.0 ± 1.4 | 2 |" in table
    )


def test_the_page_is_one_file_that_loads_nothing_and_escapes_what_comes_from_the_user(
    tmp_path: Path, drawing: Runner
) -> None:
    rows = ["--row", f"{HOSTILE}: method=sealed", "--row", "_x: method=full_he"]
    assert go(tmp_path / "a<b>", "method=fedavg", *rows, "seeds=2") == 0
    text = (tmp_path / "a<b>/compare.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "b"} & set(page.tags)
    assert page.tags.count("svg") == 4 and page.tags.count("table") == 1
    assert [v for k, v in page.attributes if k in ("href", "src") and not v.startswith("#")] == []
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    referred = [v[1:] for k, v in page.attributes if k == "href"]
    assert set(referred) <= set(ids)
    assert HOSTILE in page.texts and "a<b>" in page.texts and "prefers-color-scheme:dark" in text
    assert [t for t in page.texts if "alert" in t and t.startswith("\u200b")]  # in the legends as well


def test_a_page_without_results_is_a_page(tmp_path: Path, drawing: Runner) -> None:
    drawing.failing = {"fedavg-seed0"}
    assert go(tmp_path, "method=fedavg", "seeds=1") == 1
    text = (tmp_path / "compare.html").read_text()
    assert "svg" not in Page(text).tags and "0 of 1 runs are finished" in text


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("model.name=/home/me/models/llama", "model.name=llama"),
        ("model.name=some/hub-id", "model.name=hub-id"),
        ("data.path=/data/my lab/lab-{client}.jsonl", "data.path=lab-{client}.jsonl"),
        ("data.heldout_path='../x/test.jsonl'", "data.heldout_path=test.jsonl"),
        ("federation.clients=[{rank:2,key_file:/k/a.key},{data_path:~/b c/d.jsonl}]",
         "federation.clients=[{rank:2,key_file:a.key},{data_path:d.jsonl}]"),
        ("data.dataset=org/name", "data.dataset=org/name"),
        ("training.steps=3", "training.steps=3"),
    ],
)  # fmt: skip
def test_results_name_no_folder_of_this_machine(word: str, kept: str) -> None:
    assert shown(word) == kept


def test_results_hold_no_path_of_runs_or_logs(tmp_path: Path, runner: Runner) -> None:
    assert go(tmp_path / "c", "method=fedavg", "seeds=1", f"model.name={ROOT / 'src/ciphertune/assets/base'}") == 0
    for name in ("compare.json", "compare.csv", "compare.md", "compare.html"):
        text = (tmp_path / "c" / name).read_text()
        assert str(tmp_path) not in text and str(ROOT) not in text


def test_an_unknown_option_is_refused(tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        go(tmp_path / "c", "method=fedavg", "--seed", "3", "--sedes", "4")
    assert ended.value.code == 2 and "unrecognized arguments: --sedes 4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_two_methods_are_really_compared_and_not_run_again(tmp_path: Path) -> None:
    words = ["method=fedavg,sealed", "experiment=smoke", "training.steps=2", "data.max_heldout=8", "training.threads=1"]
    command = [sys.executable, "-m", "ciphertune.cli", "compare", "--out", str(tmp_path / "c"), "--seeds", "1", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "c/compare.json").read_text())
    fedavg, sealed = (found["rows"][name]["seeds"]["0"] for name in ("fedavg", "sealed"))
    assert fedavg["base"] == sealed["base"] and fedavg["local"] and not sealed["local"]
    assert fedavg["rounds"][0]["loss"] == sealed["rounds"][0]["loss"]
    assert fedavg["encrypted_fraction"] == 0.0 and sealed["encrypted_fraction"] == 1.0
    assert [x["round"] for x in sealed["rounds"]] == [0, 1, 2]
    assert Page((tmp_path / "c/compare.html").read_text()).tags.count("svg") == 4
    made = (tmp_path / "c/runs/sealed-seed0/summary.json").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0 and (tmp_path / "c/runs/sealed-seed0/summary.json").stat().st_mtime_ns == made


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_was_really_cut_off_goes_on_after_its_last_round(tmp_path: Path) -> None:
    words = ["method=fedavg", "experiment=smoke", "federation.rounds=4", "training.threads=1"]
    command = [sys.executable, "-m", "ciphertune.cli", "compare", "--out", str(tmp_path / "c"), "--seeds", "1", *words]
    run = tmp_path / "c/runs/fedavg-seed0"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(1200):
            if (run / "server/state_0001.json").is_file() or process.poll() is not None:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130 and not (run / "server/state_0003.json").is_file()
    first = (run / "server/round_0000.msg").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "c/compare.json").read_text())["rows"]["fedavg"]["seeds"]["0"]
    assert [x["round"] for x in found["rounds"]] == [0, 1, 2, 3, 4]
    assert (run / "server/round_0000.msg").stat().st_mtime_ns == first
