"""What the server says when something is wrong with its own machine, or at the very end."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from federations import Lab, said

from ciphertune.ledger import Ledger
from ciphertune.progress import MARK


def test_a_runs_folder_that_is_a_file_ends_the_run_in_one_line(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.runs.write_text("kept")
    with pytest.raises(RuntimeError, match="runs"):
        lab("name=one")
    (line,) = said(capsys).splitlines()
    assert line.startswith(f"{MARK} ") and str(lab.runs / "one") in line
    assert lab.runs.read_text() == "kept" and lab.grid is not None and not lab.grid.sent


def test_why_a_run_failed_is_said_even_where_no_summary_can_be_written(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def failing(*args: Any, **more: Any) -> None:
        raise RuntimeError("the first reason")

    monkeypatch.setattr(Ledger, "finish", full)
    monkeypatch.setattr("server_app.strategy.EncryptedLora.configure_train", failing)
    with pytest.raises(RuntimeError, match="the first reason"):
        lab()
    lines = said(capsys).splitlines()
    (at,) = [i for i, line in enumerate(lines) if "run failed after" in line]
    assert "the first reason" in lines[at] and "no summary: OSError: " in lines[at + 1]


def test_a_page_that_cannot_be_drawn_leaves_a_trace_in_the_log(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_ink(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("ciphertune.report.page.write_page", no_ink)
    lab("federation.rounds=1", page=True)
    assert "no page: RuntimeError: no ink" in said(capsys)
    assert [r for r in caplog.records if "in no_ink" in r.getMessage()]
