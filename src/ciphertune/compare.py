"""`ciphertune compare`: the same federation by several methods under several seeds, one `ciphertune run` for each.

All settings are checked before the first run is started; what is finished is kept, so the same command goes on.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ciphertune.comparison import Cell, Row, check_removable, is_done, write_results
from ciphertune.errors import SettingsError
from ciphertune.launch import app_folder, check_simulation, end_tree
from ciphertune.outputs import writing
from ciphertune.progress import MARK
from ciphertune.runs import read_summary
from ciphertune.scores import Score, show
from ciphertune.settings import compose

# set for each run, and by what they are chosen
_OURS = {"seed": "--seeds", "data.seed": "--seeds", "name": "--row", "runs_dir": "--out"}
_ALONE = "federation.compare_local"
_POLL = 0.3  # seconds
_ENDING = 30.0  # seconds that a run has to end what it started


def compare(
    app: Path,
    words: Sequence[str],
    *,
    rows: Sequence[str] = (),
    seeds: int | None = None,
    out: Path,
    parallel: int = 1,
    verbose: bool = False,
) -> int:
    """Run what is not finished yet and write the results after each run. 0 when all are finished, 1 when any failed.

    Raises SettingsError before anything is started for a mistake in any row, or when `out` holds other runs.
    """
    folder, out = app_folder(app), out.expanduser().resolve()
    words, count = _seeds(words, seeds)
    if parallel < 1:
        raise SettingsError(f"--parallel {parallel}: want 1 or more")
    common, found = read_rows(words, rows)
    cells = grid(folder / "conf", common, found, range(count), out)
    command = [sys.executable, "-m", "ciphertune.cli", "run", "--app", str(folder), "--runs-dir", str(out / "runs")]
    with _held(out):
        states = {cell: "completed" if is_done(cell) else "not run" for cell in cells}
        for cell in (c for c, state in states.items() if state == "not run"):
            check_removable(cell.folder)
        (out / "logs").mkdir(exist_ok=True)
        write_results(out, common, states)
        runs = Runs([*command, *(["--verbose"] if verbose else [])], parallel, states)
        try:
            runs.run(lambda: write_results(out, common, states))
        except KeyboardInterrupt:
            print("cut off: the same command goes on from here")
            raise
    failed = sum(state == "failed" for state in states.values())
    print(f"results in {out}: compare.html, compare.md, compare.csv, compare.json")
    if failed:
        print(f"ciphertune: {failed} of {len(cells)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


# --- what is asked for ------------------------------------------------------------------------------------------------


def _seeds(words: Sequence[str], seeds: int | None) -> tuple[list[str], int]:
    """The words without `seeds=N`, and the number of seeds. Raises SettingsError."""
    given = [w.partition("=")[2] for w in words if _key(w) == "seeds"] + ([] if seeds is None else [str(seeds)])
    if len(set(given)) > 1:
        raise SettingsError(f"the number of seeds is given as {' and as '.join(given)}")
    text = given[0] if given else "3"
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise SettingsError(f"--seeds {text}: want a number from 1 to 1000")
    return [w for w in words if _key(w) != "seeds"], int(text)


def read_rows(words: Sequence[str], rows: Sequence[str]) -> tuple[list[str], list[Row]]:
    """The overrides of all rows without `method=a,b`, and the rows: one per method, then the ones given by --row.

    Raises SettingsError for a row without a name or a method, names that are not distinct, and overrides set here.
    """
    methods = [m.strip() for w in words if _key(w) == "method" for m in w.partition("=")[2].split(",")]
    if methods and not all(methods):
        raise SettingsError("method=... names an empty method: write method=fedavg,sealed")
    common = [w for w in words if _key(w) != "method"]
    found = [(m, [f"method={m}"]) for m in methods] + [_own_row(text, methods) for text in rows]
    if not found:
        raise SettingsError("nothing to compare: give method=fedavg,sealed or --row 'NAME: OVERRIDE ...'")
    for word in (*common, *(w for _, own in found for w in own)):
        if _key(word) in _OURS:
            raise SettingsError(f"{word}: compare sets {_key(word)} for each run; {_OURS[_key(word)]} is the choice")
    made: dict[str, Row] = {}
    for name, own in found:
        slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:60] or f"row{len(made) + 1}"
        if slug in made:
            raise SettingsError(f"two rows are named {made[slug].name!r} and {name!r}: their folders would be the same")
        made[slug] = Row(name, slug, tuple(own))
    return common, list(made.values())


def _own_row(text: str, methods: Sequence[str]) -> tuple[str, list[str]]:
    """Name and overrides of `NAME: OVERRIDE ...`. Raises SettingsError."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not name or len(name) > 80 or not name.isprintable():
        raise SettingsError(f"--row {text!r}: want 'NAME: OVERRIDE OVERRIDE', with a name of at most 80 characters")
    try:
        own = shlex.split(rest)
    except ValueError as error:
        raise SettingsError(f"--row {text!r}: {error}") from None
    if all(_key(w) != "method" for w in own):
        if len(methods) > 1:
            raise SettingsError(f"--row {text!r} does not say which of the methods {', '.join(methods)} it has")
        own = [*(f"method={m}" for m in methods), *own]  # with none, the one that conf/ chooses
    return name, own


def grid(conf: Path, common: Sequence[str], rows: Sequence[Row], seeds: Sequence[int], out: Path) -> list[Cell]:
    """Every run, settings composed and checked: all rows under one seed, then under the next, so that a comparison
    that is cut off has all rows. Raises SettingsError naming the row.
    """
    cells = []
    for seed in seeds:
        for index, row in enumerate(rows):
            # training alone does not depend on the method: once is enough
            alone = [] if any(_key(w) == _ALONE for w in common) else [f"{_ALONE}={str(index == 0).lower()}"]
            name = f"{row.slug}-seed{seed}"
            ours = [f"seed={seed}", f"data.seed={seed}", f"name={name}"]
            words = tuple(_merged(*common, *alone, *row.words, *ours))
            try:
                settings = compose(conf, words)
                if not settings.model.name:
                    raise SettingsError("model.name is empty: give a folder, a hub id, or 'embedded'")
                check_simulation(settings)
            except SettingsError as error:
                raise SettingsError(f"row {row.name!r}: {error}") from None
            cells.append(Cell(row, seed, words, settings, out / "runs" / name, out / "logs" / f"{name}.log"))
    return cells


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _merged(*words: str) -> list[str]:
    """Overrides of which the last one for a key counts: Hydra refuses a group that is chosen twice."""
    kept: dict[str, str] = {}
    for word in words:
        kept.pop(_key(word), None)
        kept[_key(word)] = word
    return list(kept.values())


# --- running ----------------------------------------------------------------------------------------------------------


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder: a second comparison there would take the first one's running cells for unfinished ones."""
    import fcntl

    with writing(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(f"another comparison is running in {out}: wait for it, or give another --out") from None
        yield


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
        if cell.folder.exists():  # an unfinished run
            shutil.rmtree(cell.folder)
        self._rounds[cell] = 0
        self._active[cell] = start(cell, self._command, self._environment), time.monotonic()

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
        if not done:
            return "\n  ".join([f"{cell.label}: failed, {reason}; all of it is in {cell.log}", *last])
        seconds, summary = time.monotonic() - began, read_summary(cell.folder)
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
