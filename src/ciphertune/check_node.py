"""`ciphertune check`: what would stop a run on this node, found before it joins. Nothing is written, no key is shown.

Every line is a fact, or what to do. A line that depends on one that failed is not judged.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ciphertune.check_link import Answer, Link, ask, certificate, clock
from ciphertune.check_parts import Node, data, device, key, model
from ciphertune.check_room import disk, memory
from ciphertune.errors import CiphertuneError, SettingsError
from ciphertune.node import node_settings
from ciphertune.settings import Settings

_SHOWN = ("flwr", "torch", "tenseal")


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. ok: None where it could not be judged. text: the fact, or what to do."""

    name: str
    ok: bool | None
    text: str


def check_node(
    settings: Callable[[], Settings], config: Callable[[], Mapping[str, Any]], conf: Path, link: Link | None
) -> list[Line]:
    """All lines, in order. The first two arguments are called here, so that their errors become lines."""
    lines: dict[str, Line] = {}
    nodes: list[Node] = []
    answers: list[Answer] = []

    def add(name: str, look: Callable[[], str], *needs: str) -> None:
        missing = [n for n in needs if not lines[n].ok]
        lines[name] = Line(name, None, f"not looked at: {missing[0]} first") if missing else _line(name, look)

    def settle() -> str:
        nodes.append(_node(settings(), config(), conf))
        own, shared = nodes[0].own, nodes[0].settings
        return f"node {own.name}, rank {own.rank}, method {shared.method.name}, crypto {shared.crypto.backend}"

    def reach(link: Link) -> str:
        answers.append(ask(link))
        return answers[0].text

    add("python", python)
    add("packages", packages)
    add("settings", settle)
    add("key", lambda: key(nodes[0]), "settings")
    add("data", lambda: data(nodes[0]), "settings")
    add("model", lambda: model(nodes[0]), "settings")
    add("device", lambda: device(nodes[0]), "settings")
    add("disk", lambda: disk(nodes[0]), "settings", "data", "model")
    add("memory", lambda: memory(nodes[0]), "settings", "model", "device")
    if link is None:
        missing = "not looked at: give --superlink HOST:PORT"
        return [*lines.values(), *(Line(name, None, missing) for name in ("superlink", "certificate", "clock"))]
    add("superlink", lambda: reach(link))
    add("certificate", lambda: certificate(answers[0]), "superlink")
    add("clock", lambda: clock(answers[0]), "superlink")
    return list(lines.values())


def _line(name: str, look: Callable[[], str]) -> Line:
    """What `look` finds, or the remedy in its error."""
    try:
        return Line(name, True, look())
    except CiphertuneError as error:
        return Line(name, False, str(error))
    except Exception as error:  # whatever this machine has in store must not hide the other lines
        return Line(name, False, f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _node(settings: Settings, config: Mapping[str, Any], conf: Path) -> Node:
    return Node(settings, node_settings(settings, config, 0, node_id=0), conf)


# --- versions ---------------------------------------------------------------------------------------------------------


def python() -> str:
    """This Python against the range that the package asks for."""
    return judge_python(platform.python_version(), metadata("ciphertune")["Requires-Python"] or ">=3")


def judge_python(found: str, wanted: str) -> str:
    """Raises SettingsError with the remedy when `found` is out of the range."""
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        raise SettingsError(f"Python {found}, want {wanted}: make the virtual environment with another Python")
    return f"Python {found}"


def packages() -> str:
    """What is installed against the ranges that the package asks for. Raises SettingsError."""
    try:
        wanted = [Requirement(text) for text in requires("ciphertune") or ()]
    except PackageNotFoundError:
        raise SettingsError("ciphertune is not installed here: pip install -e . in the app's folder") from None
    return judge_packages([r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})])


def judge_packages(wanted: Sequence[Requirement]) -> str:
    """Raises SettingsError with the remedy for packages that are absent or out of range."""
    found, wrong = {}, []
    for one in wanted:
        try:
            found[one.name] = version(one.name)
        except PackageNotFoundError:
            wrong.append((one, "absent"))
            continue
        if not one.specifier.contains(found[one.name], prereleases=True):
            wrong.append((one, found[one.name]))
    if wrong:
        text = ", ".join(f"{one.name} is {was} (want {one.specifier or 'any'})" for one, was in wrong)
        raise SettingsError(f"{text}: pip install {' '.join(repr(str(one)) for one, _ in wrong)}")
    return ", ".join([f"ciphertune {version('ciphertune')}", *(f"{n} {found[n]}" for n in _SHOWN if n in found)])
