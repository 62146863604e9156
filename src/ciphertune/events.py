"""`log=tensorboard`: the lines of rounds.jsonl as TensorBoard event files too, in `tensorboard/` of the run folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ciphertune.errors import SettingsError
from ciphertune.settings import Settings

_LARGEST = 3e38  # event files hold float32
_FINAL = {"base": "_base", "local": "_alone", "federated": "_mean"}  # no client's name begins with an underscore


def check_log(settings: Settings) -> None:
    """Raise SettingsError when the settings ask for a log that cannot be written here."""
    if settings.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise SettingsError("log=tensorboard needs its library: pip install 'ciphertune[tensorboard]', or leave it out")


class Events:
    """A writer of event files: steps are rounds, tags are `loss/client-0`, `loss/_mean`, `seconds/train/client-0`.

    By the library of TensorBoard itself: torch's own writer and tensorboardX would load torch into the server.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def line(self, round_: int, stage: str, node: str, values: Mapping[str, Any]) -> None:
        """The figures of one line of rounds.jsonl. On the disk at the latest when the round is over."""
        for tag, value in _tags(stage, node, values):
            self._writer.add_scalar(tag, value, step=round_)
        if stage == "round":
            self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The outcome after the last round; base model and training alone as levels over all rounds."""
        last = int(summary["rounds"])
        for key, name in _FINAL.items():
            for tag, value in _scores(name, summary.get(key) or {}):
                for step in {last} if key == "federated" else {0, last}:
                    self._writer.add_scalar(tag, value, step=step)
        for node, found in summary["nodes"].items():
            for tag, value in _scores(node, found.get("federated") or {}):
                self._writer.add_scalar(tag, value, step=last)
        self._writer.close()


def _tags(stage: str, node: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of each figure. What clients measured and the mean of it stand side by side."""
    yield from _scores("_mean" if stage == "round" else node, values)
    for key, value in values.items():
        if key != "loss" and _is_figure(value):
            yield f"{key}/{node}" if stage == "update" else f"{key}/{stage}/{node}", float(value)


def _scores(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    found = {"loss": values.get("loss"), **(values.get("metric") or {})}
    return ((f"{key}/{name}", float(value)) for key, value in found.items() if _is_figure(value))


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
