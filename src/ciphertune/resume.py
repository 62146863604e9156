"""Going on with a run that ended early: what the server keeps after every round, and how it is taken up again.

    <run>/server/plan-<digest>.json   each plan that a kept aggregate was made under
    <run>/server/state_0007.json      after round 7: who takes part, which aggregates are needed, the figures so far
    <run>/server/round_0007.msg       its aggregate; a round counts once this is on disk: no client is sent it before

A resumed run keeps the id that the first one had from Flower. Messages, codes of columns and the files of the clients
are bound to it, so a client goes on with what it has. A round is never aggregated a second time: its clients could
subtract one aggregate from the other.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ciphertune import wire
from ciphertune.build import session
from ciphertune.errors import CiphertuneError, ResumeError, StateError
from ciphertune.federation import Federation, Member
from ciphertune.hello import Hello, parse_hello
from ciphertune.ledger import Ledger
from ciphertune.plan import Plan
from ciphertune.runs import ServerFolder, read_values
from ciphertune.settings import Settings
from ciphertune.versions import code_digest

_ANEW = "put it back from a copy, or start a new run under another name"


@dataclass(frozen=True)
class Earlier:
    """A run that can be gone on with. round: the last one that was aggregated.  state: what was kept after it."""

    folder: Path
    run: int
    round: int
    state: Mapping[str, Any]


def keep(folder: ServerFolder, federation: Federation, ledger: Ledger, aggregate: wire.Message) -> None:
    """Write down what was reached with the aggregate of a round, which goes to no client before."""
    link = federation.session
    state = {
        "run": federation.run,
        "settings": link.settings_digest.hex(),
        "code": code_digest(),
        "key": link.key_fingerprint.hex(),
        "plan": link.plan.digest().hex(),
        "history": [[message.round, message.rank, plan.digest().hex()] for message, plan in federation.history],
        "members": [_greeting(member.hello) for member in federation.members],
        "silent": [member.name for member in federation.members if member.silent],
        "ledger": ledger.state(),
    }
    folder.state(aggregate.round, state, {link.plan, *(plan for _, plan in federation.history)})
    folder.aggregate(aggregate.round, wire.encode(aggregate, link))


def find(folder: Path, settings: Settings) -> Earlier:
    """The run in `folder`, if these settings and this code can go on with it. Raises ResumeError."""
    overrides(folder)
    if (folder / "summary.json").is_file() and _read(folder / "summary.json").get("status") == "completed":
        raise ResumeError(f"the run in {folder} is completed: there is nothing to go on with")
    server = folder / "server"
    kept = [p.stem.removeprefix("state_") for p in server.glob("state_*.json")]
    found = [int(k) for k in kept if k.isdecimal() and (server / f"round_{k}.msg").is_file()]
    if not found:
        raise ResumeError(f"no round of the run in {folder} was aggregated: start a new one under another name")
    path = server / f"state_{max(found):04d}.json"
    state = _read(path)
    try:
        earlier = Earlier(folder, int(state["run"]), max(found), state)
        code, digest = str(state["code"]), str(state["settings"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(path) from None
    if digest != settings.digest().hex():
        raise ResumeError(f"the run in {folder} has other settings: {_difference(folder, settings)}")
    if code != code_digest():
        raise ResumeError(
            f"the run in {folder} was made by other code ({code}) than this ({code_digest()}): install that version"
        )
    return earlier


def overrides(folder: Path) -> list[str]:
    """The overrides that the run in `folder` was started with. Raises ResumeError."""
    path = folder / "settings.yaml"
    if not path.is_file():
        raise ResumeError(f"there is no run in {folder}: name the folder of one, as in resume=runs/NAME")
    try:
        return shlex.split(_read(path)["overrides"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path) from None


def restore(earlier: Earlier, federation: Federation, ledger: Ledger) -> None:
    """Bring the server back to where it was after the last aggregate. Raises ResumeError for a damaged file."""
    server, state = earlier.folder / "server", earlier.state
    try:
        plans = {digest: _plan(server, str(digest)) for digest in {state["plan"], *(h[2] for h in state["history"])}}
        plan = plans[state["plan"]]
        link = session(federation.settings, plan, run=earlier.run, key_fingerprint=bytes.fromhex(state["key"]))
        federation.session = link
        shapes = {"layers": [[x.name, x.m, x.n] for x in plan.layers], "heads": [[h.name, h.shape] for h in plan.heads]}
        hellos = [parse_hello(values | shapes, 0, values["client"]) for values in state["members"]]
        silent = set(state["silent"])
        federation.members = [Member(k, hello, silent=hello.name in silent) for k, hello in enumerate(hellos, 1)]
        ledger.restore(state["ledger"], federation.members)
        wanted = [(int(round_), int(rank), plans[digest]) for round_, rank, digest in state["history"]]
    except ResumeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, CiphertuneError):
        raise _damaged(server / f"state_{earlier.round:04d}.json") from None
    for round_, rank, made_under in wanted:
        path = server / f"round_{round_:04d}.msg"
        expected = wire.Expected(wire.AGGREGATE, round_, 0, rank)
        made_in = session(federation.settings, made_under, run=earlier.run, key_fingerprint=link.key_fingerprint)
        try:
            federation.history.append((wire.decode(path.read_bytes(), made_in, expected), made_under))
        except (OSError, CiphertuneError) as error:
            raise ResumeError(f"{path} cannot be used ({error}): {_ANEW}") from None
    federation.next_round = earlier.round + 1


def _greeting(hello: Hello) -> dict[str, Any]:
    """A greeting as it came, without what is in the plan."""
    values = asdict(hello) | {"key": hello.key.hex()}
    return {k: v for k, v in values.items() if k not in ("layers", "heads", "node_id")}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_values(path)
    except StateError:
        raise _damaged(path) from None


def _plan(server: Path, digest: str) -> Plan:
    path = server / f"plan-{digest}.json"
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, CiphertuneError):
        raise _damaged(path) from None
    if plan.digest().hex() != digest:
        raise _damaged(path)
    return plan


def _damaged(path: Path) -> ResumeError:
    return ResumeError(f"{path} is damaged or absent: {_ANEW}")


def _difference(folder: Path, settings: Settings) -> str:
    """The first settings that differ, with both values."""
    then = _read(folder / "settings.yaml")
    now = json.loads(json.dumps(settings.shared()))
    pairs: list[tuple[str, Any, Any]] = []
    for group, value in now.items():
        one, two = (x if isinstance(x, dict) else {"": x} for x in (then.get(group), value))
        pairs += [(f"{group}.{k}".rstrip("."), one.get(k), v) for k, v in two.items() if one.get(k) != v]
    shown = [f"{name} is {str(a)[:60]} there and {str(b)[:60]} here" for name, a, b in pairs[:3]]
    return "; ".join(shown or ["its settings.yaml was changed"]) + ": give the overrides that it was started with"
