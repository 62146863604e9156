"""What a client does with each message. All of it is in `ciphertune.client`; this is the door."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors import SafetensorError

from ciphertune import flower
from ciphertune.errors import CiphertuneError, RoundMismatchError, SettingsMismatchError
from ciphertune.node import in_simulation, node_settings
from ciphertune.progress import log_trace, say
from ciphertune.run_config import settings_of
from ciphertune.settings import Settings
from ciphertune.versions import code_digest

# Before torch is imported: waiting OpenMP threads must not spin where several clients share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# flwr-datasets would report the name of a hub data set.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

CONF = Path(__file__).parents[1] / "conf"

app = ClientApp()


def answer(message: Message, context: Context, what: str) -> Message:
    """Open the client this message is for, do what it asks, reply. Errors become one line, never a crash of the run."""
    simulated = in_simulation()
    name = f"node {context.node_id}"
    try:
        values, payload = flower.unpack(message.content)
        settings = settings_of(CONF, context.run_config)
        node = node_settings(
            settings,
            context.node_config,
            context.run_id,
            node_id=context.node_id,
            client=values.get("client"),
            simulated=simulated,
        )
        name = node.name
        _same_as_server(values, settings)
        run = _run(values, settings, context.run_id)
        from ciphertune import client  # torch and transformers only once they are needed

        task = client.task_of(what, values)
        report, update = client.handle(what, client.open_client(settings, node, run, task), task, payload)
        return flower.reply(message, report, update)
    except CiphertuneError as error:
        if not simulated:  # there the server shows it
            say(f"{name}: {type(error).__name__}: {error}")
        return flower.failure(message, error, name, show=simulated)
    except (OSError, SafetensorError) as error:  # a full disk, most of all
        path = getattr(error, "filename", None)
        where = f" ({path})" if path else ""
        say(
            f"{name}: cannot read or write its files{where}: {getattr(error, 'strerror', None) or error}; once that is "
            "mended, this node takes part again"
        )
        return flower.failure(message, error, name, show=simulated)
    except Exception as error:  # a defect of ours: the trace stays here, the run goes on without this client
        log_trace(error)
        say(f"{name}: unexpected {type(error).__name__}; the trace is in this node's log")
        return flower.failure(message, error, name, show=simulated)


def _same_as_server(values: dict[str, Any], settings: Settings) -> None:
    if values.get("code") != code_digest():
        raise SettingsMismatchError(
            f"this node's ciphertune (code {code_digest()}) is not the server's ({str(values.get('code'))[:16]}): "
            "install one version everywhere, and stop a local SuperLink that was started from another project's folder"
        )
    if values.get("settings") != settings.digest().hex():
        raise SettingsMismatchError("this client's settings differ from the server's: use one conf and overrides")


def _run(values: dict[str, Any], settings: Settings, run_id: int) -> int:
    """The id that messages and files are bound to: Flower's, or where a run is resumed that of the first one."""
    run = values.get("run")
    if not isinstance(run, int) or not 0 <= run < 2**64 or (run != run_id and not settings.resume):
        raise RoundMismatchError("the message is of another run, and nobody asked to resume one")
    return run


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say who this is, what it can do and what it starts from."""
    return answer(message, context, "join")


@app.query("wish")
def wish(message: Message, context: Context) -> Message:
    """Negotiation: take the last means, score the columns of A, name those to encrypt."""
    return answer(message, context, "wish")


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: take the last means, evaluate, train, seal."""
    return answer(message, context, "train")


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The end: take the last mean, evaluate, save the adapter."""
    return answer(message, context, "evaluate")


@app.train("alone")
def alone(message: Message, context: Context) -> Message:
    """Train without the others, for comparison."""
    return answer(message, context, "alone")
