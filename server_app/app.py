"""The server: it composes the settings, opens the run folder and hands over to the strategy. It holds no key."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ciphertune import resume
from ciphertune.errors import CiphertuneError
from ciphertune.events import check_log
from ciphertune.node import run_folder
from ciphertune.progress import log_trace, printable, say
from ciphertune.run_config import settings_of
from ciphertune.runs import ServerFolder
from server_app.strategy import EncryptedLora

CONF = Path(__file__).parents[1] / "conf"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation. An error ends the run as failed, after one clear line."""
    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            strategy = _open(context, stack)
        except (CiphertuneError, OSError, ValueError) as error:
            say(f"{type(error).__name__}: {error}")
            if not isinstance(error, CiphertuneError):
                log_trace(error)
            raise RuntimeError(printable(str(error))) from None
        stack.callback(draw, strategy.folder.path)
        try:
            strategy.run(grid)
        except BaseException as error:
            strategy.fail(error, time.perf_counter() - start)
            raise


def _open(context: Context, stack: ExitStack) -> EncryptedLora:
    """The strategy at the beginning of a run, or where an earlier one is gone on with, in a folder that is held.

    Nothing is read of an earlier run before no other server can change it, and nothing written before it is found good.
    """
    settings = settings_of(CONF, context.run_config)
    check_log(settings)
    path = run_folder(settings, context.run_id)
    if settings.resume:
        resume.overrides(path)  # where there is no run none is begun
    folder = ServerFolder(path, resumed=bool(settings.resume))
    folder.hold()
    stack.callback(folder.release)
    earlier = resume.find(path, settings) if settings.resume else None
    strategy = EncryptedLora(settings, folder, earlier.run if earlier else context.run_id)
    if earlier:
        resume.restore(earlier, strategy.federation, strategy.ledger)
        folder.cut(earlier.round + 1)
        strategy.conduct.recall()
        strategy.ledger.recall()
    else:
        folder.start(settings, str(context.run_config.get("overrides", "")))
    folder.open_log(settings.log)
    return strategy


def draw(folder: Path) -> None:
    """Write the page of the run. That it cannot be drawn is no reason for a run to fail."""
    try:
        from ciphertune.report.page import write_page  # matplotlib: not before the work is done

        say(f"report: {write_page(folder)}")
    except Exception as error:
        log_trace(error)
        say(f"no page: {type(error).__name__}: {error}; `ciphertune report {folder}` tries again")
