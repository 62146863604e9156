"""The command line: `ciphertune run`, `plan`, `compare`, `audit`, `view`, `keys`, `check` and `report`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import ciphertune
from ciphertune.cli_audit import add_audit
from ciphertune.cli_check import add_check
from ciphertune.cli_keys import add_keys
from ciphertune.cli_report import add_report
from ciphertune.errors import CiphertuneError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 1: the run failed; 2: a mistake in what was asked, with one line saying which."""
    options = _parse(arguments)
    for one in (signal.SIGTERM, signal.SIGHUP):  # so that what was started is ended
        signal.signal(one, _interrupt)
    try:
        status: int = options.action(options)
        return status
    except CiphertuneError as error:
        print(f"ciphertune: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a file that is another user's
        where = f"{error.filename}: " if error.filename else ""
        print(f"ciphertune: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ciphertune: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after the options: argparse alone takes only the first group of them."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    root = argparse.ArgumentParser(prog="ciphertune", description=ciphertune.__doc__)
    commands = root.add_subparsers(required=True, metavar="command")

    run = commands.add_parser(
        "run",
        help="run a federation: simulated here, or on a SuperLink with --superlink",
        description="Run a federation. Without overrides: four simulated labs, every update encrypted, embedded text.",
        epilog="Choices are the files in conf/method, model, data, crypto, federation, training and experiment: "
        "method=fedavg, experiment=smoke. Any setting is group.key=value: federation.rounds=4.",
    )
    run.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. method=fedavg federation.rounds=4")
    run.add_argument("--app", type=Path, default=Path(), help="folder of the Flower app (default: here)")
    run.add_argument(
        "--superlink", help="name of a connection in Flower's config.toml (default: one started for this run)"
    )
    run.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run folder goes (default: runs)")
    run.add_argument("--verbose", action="store_true", help="show all of Flower's log")
    run.set_defaults(action=_run)

    _add_plan(commands)
    _add_compare(commands)
    add_audit(commands)
    add_keys(commands)
    add_check(commands)
    add_report(commands)
    return root


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a round of each method would cost, before anything runs",
        description="Bytes, ciphertexts, seconds and memory of a round under each method, from the model's config.json "
        "alone and a calibration of seconds on this machine.",
        epilog="Overrides are those of `ciphertune run`; besides, model=NAME (Llama-2-7B, Llama-2-13B, Llama-3-8B, "
        "Qwen3-4B, Mistral-7B, a folder or a config.json), rank=R for all clients, clients=N.",
    )
    plan.add_argument("overrides", nargs="*", help="e.g. model=Llama-2-7B rank=32 clients=4")
    plan.add_argument("--methods", help="names with commas between (default: all but local)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    plan.add_argument("--app", type=Path, default=Path(), help="folder of the Flower app (default: here)")
    plan.set_defaults(action=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ciphertune.forecast import plan

    return plan(options.app, options.overrides, methods=options.methods, out=options.json)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="run several methods under several seeds and put the results side by side",
        description="Run every row under every seed, one run each, and write compare.json, .csv, .md and .html. The "
        "same command goes on where it was cut off; what is finished is not run again.",
        epilog="Rows are the methods of method=fedavg,sealed and what --row adds, e.g. "
        "--row 'sealed, in the clear: method=sealed crypto=clear'. Other overrides hold for all rows.",
    )
    compare.add_argument("overrides", nargs="*", help="method=fedavg,flexlora,sealed and Hydra overrides for all rows")
    compare.add_argument("--seeds", type=int, help="how many: 0, 1, 2, ... (default: 3); also as seeds=3")
    compare.add_argument("--out", type=Path, required=True, help="folder for the runs, their logs and the results")
    compare.add_argument("--row", action="append", default=[], metavar="'NAME: OVERRIDE ...'", help="one more row")
    compare.add_argument("--app", type=Path, default=Path(), help="folder of the Flower app (default: here)")
    compare.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    compare.add_argument("--verbose", action="store_true", help="keep all of Flower's log in the log of each run")
    compare.set_defaults(action=_compare)


def _compare(options: argparse.Namespace) -> int:
    from ciphertune.compare import compare

    return compare(
        options.app,
        options.overrides,
        rows=options.row,
        seeds=options.seeds,
        out=options.out,
        parallel=options.parallel,
        verbose=options.verbose,
    )


def _run(options: argparse.Namespace) -> int:
    from ciphertune.launch import launch

    return launch(
        options.app,
        options.overrides,
        runs_dir=options.runs_dir,
        superlink=options.superlink,
        verbose=options.verbose,
    )


if __name__ == "__main__":
    sys.exit(main())
