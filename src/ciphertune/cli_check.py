"""`ciphertune check`: its arguments, and its table."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ciphertune.check_node import Line

_MARKS = {True: "[green]ok[/]", False: "[red]to do[/]", None: "-"}


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check` to the command line."""
    check = commands.add_parser(
        "check",
        help="on a node, before it joins: say what would stop a run",
        description="Look at versions, key, data, model, device, disk, memory, the way to the SuperLink and the "
        "clock. Each line is a fact or what to do. Exit status 0: all is well, 1: something is to do. Run it as "
        "the user who will run the SuperNode.",
        epilog="Overrides are those of the run that the node will take part in.",
    )
    check.add_argument("overrides", nargs="*", help="e.g. data=jsonl model=hf model.name=/models/my-llama")
    check.add_argument("--node-config", default="", help="as flower-supernode is given it: 'name=\"lab-a\" rank=8 ...'")
    check.add_argument("--superlink", metavar="HOST:PORT", help="as flower-supernode is given it")
    check.add_argument("--root-certificates", default="", metavar="FILE", help="the server's ca.crt")
    check.add_argument("--insecure", action="store_true", help="the SuperLink speaks no TLS")
    check.add_argument("--json", action="store_true", help="print JSON in the place of the table")
    check.add_argument("--app", type=Path, default=Path(), help="folder of the Flower app (default: here)")
    check.set_defaults(action=_check)


def _check(options: argparse.Namespace) -> int:
    from ciphertune.check_link import Link
    from ciphertune.check_node import check_node
    from ciphertune.flower import node_config
    from ciphertune.launch import app_folder
    from ciphertune.settings import compose

    conf = app_folder(options.app) / "conf"
    link = Link(options.superlink, options.root_certificates, options.insecure) if options.superlink else None
    lines = check_node(lambda: compose(conf, options.overrides), lambda: node_config(options.node_config), conf, link)
    passed = not any(line.ok is False for line in lines)
    if options.json:
        print(json.dumps({"ok": passed, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        _print(lines)
    return 0 if passed else 1


def _print(lines: list[Line]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(line.name, _MARKS[line.ok], escape(line.text))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    if to_do := [line.name for line in lines if line.ok is False]:
        console.print(f"to do: {', '.join(to_do)}")
