"""`ciphertune report`: write the page of a run anew, from its folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `report` to the command line."""
    report = commands.add_parser(
        "report",
        help="write the page of a run: what was tuned, what it cost, what the server saw",
        description="Write report.html from what the server left in a run folder. Every run writes it at its end; "
        "this writes it again, after an audit for example. Runs that failed or were cut off have one too.",
    )
    report.add_argument("run", type=Path, help="the run folder, e.g. runs/NAME")
    report.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: RUN/report.html)")
    report.set_defaults(action=_report)


def _report(options: argparse.Namespace) -> int:
    from ciphertune.report.page import write_page

    print(write_page(options.run.expanduser(), options.out.expanduser() if options.out else None))
    return 0
