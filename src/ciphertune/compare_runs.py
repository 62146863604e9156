"""The runs of a comparison: each a process of its own, how far they are, and what they said."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ciphertune import resume
from ciphertune.comparison import Cell, is_done
from ciphertune.errors import CiphertuneError, SettingsError
from ciphertune.launch import end_tree
from ciphertune.progress import MARK
from ciphertune.runs import read_summary
from ciphertune.scores import Score, show

_POLL = 0.3  # seconds
_ENDING = 30.0  # seconds that a run has to end what it started


def start(cell: Cell, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One `ciphertune run`, its output in the cell's log. In a session of its own: Ctrl-C reaches it once, from us."""
    with cell.log.open("wb") as log:
        return subprocess.Popen(
            [*command, *cell.words], env=dict(environment), stdout=log, stderr=log, start_new_session=True
        )


class Runs:
    """What runs, and what is shown of it."""

    def __init__(self, command: Sequence[str], parallel: int, states: dict[Cell, str]) -> None:
        self._command, self._parallel, self._states = command, parallel, states
        self._environment = dict(os.environ)
        if parallel > 1:  # each would take all processors
            threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
            self._environment["OMP_NUM_THREADS"] = str(max(1, threads // parallel))
        self._active: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}
        self._rounds: dict[Cell, int] = {}  # done in each active run
        self._resumed: set[Cell] = set()  # those that go on with a run that was cut off
        there = [read_summary(cell.folder) for cell, state in states.items() if state == "completed"]
        self._pace = [(s["seconds"], s["rounds"]) for s in there]  # seconds and rounds of what is finished

    def run(self, finished: Callable[[], None]) -> None:
        """Every cell that is not completed, `finished` after each. An interrupt ends what runs."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        waiting = [cell for cell, state in self._states.items() if state == "not run"]
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # of the terminal's width
        last = TextColumn("{task.fields[line]}", markup=False, table_column=rest)
        with Progress(TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), last, expand=True) as bar:
            task = bar.add_task("", total=sum(c.settings.federation.rounds for c in self._states), line="")
            try:
                while waiting or self._active:
                    while waiting and len(self._active) < self._parallel:
                        self._begin(waiting.pop(0))
                    for cell in [c for c, (process, _) in self._active.items() if process.poll() is not None]:
                        bar.console.print(self._end(cell), markup=False, highlight=False, soft_wrap=True)
                        finished()
                    bar.update(task, **self._shown())
                    time.sleep(_POLL if self._active else 0)
            finally:
                self._stop()

    def _begin(self, cell: Cell) -> None:
        command = list(self._command)
        if cell.folder.exists():  # an unfinished run
            try:
                resume.find(cell.folder, cell.settings)
                self._resumed.add(cell)
                command.append(f"resume={cell.folder}")
            except CiphertuneError:  # nothing that could be gone on with
                shutil.rmtree(cell.folder)
        self._rounds[cell] = 0
        self._active[cell] = start(cell, command, self._environment), time.monotonic()

    def _end(self, cell: Cell) -> str:
        """Note how a run ended; what is to be said of it."""
        process, began = self._active.pop(cell)
        self._rounds.pop(cell)
        reason, last = f"exit status {process.poll()}", said(cell.log)
        try:
            done = process.poll() == 0 and is_done(cell)
        except SettingsError as error:  # someone changed the code meanwhile
            done, reason, last = False, str(error), []
        self._states[cell] = "completed" if done else "failed"
        if not done and cell in self._resumed:
            shutil.rmtree(cell.folder)  # what it could not go on with is not tried twice
        if not done:
            return "\n  ".join([f"{cell.label}: failed, {reason}; all of it is in {cell.log}", *last])
        seconds, summary = time.monotonic() - began, read_summary(cell.folder)
        if cell not in self._resumed:
            self._pace.append((seconds, summary["rounds"]))
        found = summary["federated"]
        score = Score(found["loss"], found["metric"], 1.0) if found else None
        return f"{cell.label}: held-out {show(score)}, {seconds:.0f} s"

    def _shown(self) -> dict[str, Any]:
        """Fields of the progress bar."""
        ended = sum(state != "not run" for state in self._states.values())
        rounds = sum(c.settings.federation.rounds for c, state in self._states.items() if state != "not run")
        line = ""
        for cell in self._active:
            tail = _tail(cell.log)
            found = re.findall(r"round (\d+)/\d+: ", tail)
            self._rounds[cell] = int(found[-1]) if found else self._rounds[cell]
            line = f"{cell.label}: {(tail.splitlines() or [''])[-1].split(MARK)[-1].strip()}"
        rounds += sum(self._rounds.values())
        left = sum(c.settings.federation.rounds for c in self._states) - rounds
        seconds, known = (sum(x) for x in zip((0.0, 0), *self._pace, strict=True))
        time_left = f", {seconds / known * left / self._parallel / 60:.0f} min left" if known else ""
        return {"completed": rounds, "description": f"{ended} of {len(self._states)} runs{time_left}", "line": line}

    def _stop(self) -> None:
        """End what still runs; each run ends what it started itself."""
        for process, _ in self._active.values():
            process.terminate()
        for process, _ in self._active.values():
            try:
                process.wait(_ENDING)
            except subprocess.TimeoutExpired:
                end_tree(process.pid)


def said(log: Path) -> list[str]:
    """The last lines that a run said, from why it failed if it says so; Flower's own only where there are no others."""
    lines = [line.strip() for line in _tail(log, 20_000).splitlines() if line.strip()]
    lines = ([line.split(MARK, 1)[1].strip() for line in lines if MARK in line] or lines)[-6:]
    why = next((i for i, line in enumerate(lines) if line.startswith(("run failed", "ciphertune: "))), 0)
    return lines[why:]


def _tail(path: Path, size: int = 4000) -> str:
    """The end of a text file that somebody may still be writing."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace").rstrip()
