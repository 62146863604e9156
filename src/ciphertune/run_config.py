"""Flower's run config -> settings. It is flat, so one string carries all overrides; both apps come through here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ciphertune.checks import check
from ciphertune.settings import Settings, compose


def settings_of(conf: Path, run_config: Mapping[str, Any]) -> Settings:
    """Compose the settings of a run: `overrides`, then Flower's own `num-server-rounds` and `runs-dir` when given."""
    settings = compose(conf, str(run_config.get("overrides", "")))
    rounds = int(run_config.get("num-server-rounds", 0))
    if rounds:
        settings = replace(settings, federation=replace(settings.federation, rounds=rounds))
    runs_dir = str(run_config.get("runs-dir", ""))
    if runs_dir:
        settings = replace(settings, runs_dir=runs_dir)
    check(settings)
    return settings
