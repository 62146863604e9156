"""`ciphertune compare`: the same federation by several methods under several seeds, one `ciphertune run` for each.

All settings are checked before the first run is started; what is finished is kept, so the same command goes on.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ciphertune.compare_runs import Runs
from ciphertune.comparison import Cell, Row, check_removable, is_done, write_results
from ciphertune.errors import SettingsError
from ciphertune.launch import app_folder, check_simulation
from ciphertune.outputs import writing
from ciphertune.settings import compose

# set for each run, and by what they are chosen
_OURS = {"seed": "--seeds", "data.seed": "--seeds", "name": "--row", "runs_dir": "--out"}
_ALONE = "federation.compare_local"


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
