"""`ciphertune audit` and `ciphertune view`: what the server saw, and what an attacker could read of it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ciphertune.errors import SettingsError
from ciphertune.outputs import check_writable, writing

if TYPE_CHECKING:
    from ciphertune.audit.report import Report


def add_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`audit` and `view` with their arguments."""
    audit = commands.add_parser(
        "audit",
        help="attack what the server of a run got, and say how much of the text could be read",
        description="Attack server_view/ of a run (record_server_view=true) as a curious server would, with the public "
        "model alone. The clients' text is used to score the attacks and for nothing else.",
        epilog="Before joining: `ciphertune audit --before method=she_lora model=hf model.name=FOLDER data=jsonl "
        "data.path=FILE` attacks what this machine would send. Exit code 1: more could be read than is allowed.",
    )
    audit.add_argument("overrides", nargs="*", metavar="RUN", help="a run folder; with --before Hydra overrides")
    audit.add_argument("--before", action="store_true", help="no run is needed: simulate one client's own first rounds")
    audit.add_argument("--rounds", type=int, default=1, help="with --before: rounds to simulate (default: 1)")
    audit.add_argument("--client", type=int, default=0, help="with --before: which of federation.clients (default: 0)")
    audit.add_argument(
        "--max-recall", type=float, metavar="X", help="fail where an attack reads more than X over chance"
    )
    audit.add_argument("--clients", type=Path, metavar="DIR", help="the clients' folders (default: RUN/clients)")
    audit.add_argument("--json", type=Path, metavar="FILE", help="write the result there (default: RUN/audit.json)")
    audit.add_argument("--app", type=Path, default=Path(), help="folder of the Flower app (default: here)")
    audit.set_defaults(action=_audit)
    view = commands.add_parser(
        "view",
        help="decode what the server got: readable tensors and everything else, for attacks of your own",
        description="Write, per message in server_view/, one safetensors file of the tensors that can be read without "
        "a key, and one JSON file of everything else.",
    )
    view.add_argument("run", type=Path, help="a run folder that was made with record_server_view=true")
    view.add_argument("--out", type=Path, required=True, help="folder for the files")
    view.set_defaults(action=_view)


def _view(options: argparse.Namespace) -> int:
    from ciphertune.audit.view import write_view

    found = write_view(options.run, options.out)
    print(f"{len(found.seen)} messages, {found.clear_tensors} clear tensors, in {options.out}")
    for where, why in found.broken.items():
        print(f"{where}: {why}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from ciphertune.runs import write_json

    if options.max_recall is not None and not 0 <= options.max_recall <= 1:
        raise SettingsError(f"--max-recall {options.max_recall:g} is out of range: want 0 to 1")
    _check_installed()
    out = options.json
    if not options.before:
        out = out or _folder(options) / "audit.json"
    if out:
        check_writable(out, "--json")
    report = _before(options) if options.before else _after(options)
    _show(report)
    if out:
        with writing(out, "--json"):
            write_json(out, report.plain())
    return 0 if report.passed else 1


def _check_installed() -> None:
    for package in ("rouge_score", "scipy"):
        if find_spec(package) is None:
            raise SettingsError(f"the audit needs {package}: pip install -e '.[audit]'")


def _after(options: argparse.Namespace) -> Report:
    from ciphertune.audit.run import audit

    with _bar() as tick:
        return audit(_folder(options), clients=options.clients, max_recall=options.max_recall, tick=tick)


def _folder(options: argparse.Namespace) -> Path:
    if len(options.overrides) != 1:
        raise SettingsError(f"audit wants one run folder, got {len(options.overrides)}; overrides need --before")
    return Path(options.overrides[0])


def _before(options: argparse.Namespace) -> Report:
    from ciphertune.audit.run import audit
    from ciphertune.audit.simulate import simulate
    from ciphertune.launch import app_folder, check_simulation
    from ciphertune.settings import compose

    settings = compose(app_folder(options.app) / "conf", options.overrides)
    check_simulation(settings)
    if not 0 <= options.client < len(settings.federation.clients):
        raise SettingsError(f"--client {options.client} is none of the {len(settings.federation.clients)} clients")
    if not 1 <= options.rounds <= settings.federation.rounds:
        raise SettingsError(f"--rounds {options.rounds} is out of range: want 1 to {settings.federation.rounds}")
    with tempfile.TemporaryDirectory(prefix="ciphertune-") as scratch, _bar() as tick:
        tick(0.0, "training as a client would")
        folder = simulate(replace(settings, runs_dir=scratch, name="before"), options.rounds, number=options.client)
        return audit(folder, max_recall=options.max_recall, tick=tick)


@contextmanager
def _bar() -> Iterator[Callable[[float, str], None]]:
    """One progress bar; yields what moves it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("audit", total=1.0)
        yield lambda share, what: progress.update(task, completed=share, description=what)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("attack", "round", "client", "read", "by chance", "ROUGE-1", "ROUGE-2")
    for r in report.attacks:
        rouge = [f"{x:.2f}" if x is not None else "-" for x in (r.rouge1, r.rouge2)]
        when = "all" if r.round is None else str(r.round + 1)
        table.add_row(f"{r.name}, {r.form}", when, str(r.node), f"{r.recall:.0%}", f"{r.chance:.0%}", *rouge)
    console = Console()
    console.print(table)
    for note in dict.fromkeys(f"{r.name}: {r.note}" for r in report.attacks if r.note and r.round is not None):
        console.print(note, highlight=False, markup=False)
    if m := report.membership:
        console.print(
            f"membership: AUROC {m.auroc:.3f} ({m.low:.3f} to {m.high:.3f}), {m.tpr_at_1_fpr:.1%} found at 1 % false "
            f"positives, Min-K% {m.min_k:.3f}; base model {m.control:.3f}; {m.members} members, {m.others} others",
            highlight=False,
        )
    for fact in report.metadata:
        console.print(f"metadata: {fact}", highlight=False, markup=False)
    console.print(f"{'passed' if report.passed else 'FAILED'}: {report.verdict}", highlight=False, markup=False)
