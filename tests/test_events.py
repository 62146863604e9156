"""`log=tensorboard`: what is in the event files, read back by TensorBoard's own reader, and where it is absent."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF, ROOT
from federations import rounds, summary

from ciphertune.cli import main
from ciphertune.errors import SettingsError
from ciphertune.events import check_log
from ciphertune.settings import compose

Series = dict[str, dict[int, float]]


def read(folder: Path) -> Series:
    """Tag -> step -> value, of every event file in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util import tensor_util

    events = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def test_event_files_hold_the_figures_of_rounds_jsonl_and_of_the_summary(lab: Callable[..., Path]) -> None:
    run = lab("log=tensorboard federation.compare_local=true")
    found, outcome = read(run / "tensorboard"), summary(run)
    compared = 0
    for line in rounds(run):
        step, stage, node = line.pop("round"), line.pop("stage"), line.pop("node")
        where = "_mean" if stage == "round" else node
        for name, value in {"loss": line.pop("loss", None), **line.pop("metric", {})}.items():
            if value is not None:
                assert found[f"{name}/{where}"][step] == pytest.approx(value, rel=1e-6)
                compared += 1
        for name, value in line.items():
            tag = f"{name}/{node}" if stage == "update" else f"{name}/{stage}/{node}"
            if (stage, step) != ("train", 2) and (stage, step) not in (
                ("load", 2),
                ("evaluate", 2),
            ):  # twice: alone too
                assert found[tag][step] == pytest.approx(value, rel=1e-6)
                compared += 1
    assert compared > 100
    assert found["loss/_mean"][2] == pytest.approx(outcome["federated"]["loss"], rel=1e-6)
    assert found["loss/_alone"] == {s: pytest.approx(outcome["local"]["loss"], rel=1e-6) for s in (0, 2)}
    assert found["perplexity/_base"][0] == pytest.approx(outcome["base"]["metric"]["perplexity"], rel=1e-6)
    for name, node in outcome["nodes"].items():
        assert found[f"loss/{name}"][2] == pytest.approx(node["federated"]["loss"], rel=1e-6)


def test_event_files_of_a_run_that_failed_hold_what_came_before(lab: Callable[..., Path]) -> None:
    def silent(message: Any, node: int) -> Any:
        if message.metadata.message_type == "train" and message.metadata.group_id == "1":
            raise AssertionError("cut off")
        return message

    with pytest.raises(AssertionError, match="cut off"):
        lab("log=tensorboard", tamper=silent)
    (run,) = lab.runs.iterdir()  # type: ignore[attr-defined]
    found = read(run / "tensorboard")
    assert set(found["loss/_mean"]) == {0} and summary(run)["status"] == "failed"


def test_without_the_setting_nothing_is_written_and_the_library_is_not_loaded(lab: Callable[..., Path]) -> None:
    assert not (lab() / "tensorboard").exists()
    code = "import sys, server_app.app, ciphertune.events; print('tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_writer_does_not_load_torch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code = (
        "import sys, pathlib; from ciphertune.events import Events; "
        f"e = Events(pathlib.Path({str(tmp_path)!r})); "
        "e.line(0, 'round', 'server', {'loss': 1.5, 'contributors': True}); "
        "e.finish({'rounds': 1, 'nodes': {}}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert read(tmp_path) == {"loss/_mean": {0: 1.5}}


def test_a_round_is_on_the_disk_when_it_is_over(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from ciphertune.events import Events

    events = Events(tmp_path)  # never finished: the process may be ended at any time
    for round_ in range(2):
        events.line(round_, "update", "a", {"bytes_up": 7})
        events.line(round_, "round", "server", {"seconds": 1.5})
    assert read(tmp_path) == {"bytes_up/a": {0: 7.0, 1: 7.0}, "seconds/round/server": {0: 1.5, 1: 1.5}}


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the library is not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else real(name, *a))


def test_without_its_library_nothing_is_spent(
    absent: None, lab: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"pip install 'ciphertune\[tensorboard\]'"):
        lab("log=tensorboard")
    assert not list((tmp_path / "runs").glob("*"))
    assert main(["run", "--app", str(ROOT), "--runs-dir", str(tmp_path / "x"), "log=tensorboard"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x").exists()
    check_log(compose(CONF))


def test_another_log_is_refused_and_the_log_is_no_part_of_what_parties_agree_on() -> None:
    with pytest.raises(SettingsError, match="log='wandb' is not one of: nothing, tensorboard"):
        compose(CONF, ["log=wandb"])
    assert compose(CONF, ["log=tensorboard"]).digest() == compose(CONF).digest()


def test_values_that_an_event_file_cannot_hold_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from ciphertune.events import Events

    events = Events(tmp_path)
    events.line(3, "update", "a", {"loss": 1e300, "metric": {"perplexity": float("inf")}, "bytes_up": 7, "x": "y"})
    events.finish({"rounds": 4, "nodes": {}, "federated": None})
    assert json.loads(json.dumps(read(tmp_path))) == {"bytes_up/a": {"3": 7.0}}
