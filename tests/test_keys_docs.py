"""The commands of docs/keys.md, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from ciphertune.crypto import keys

TEXT = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_the_walk_through_of_the_documents_hands_a_key_over_and_replaces_it(tmp_path: Path) -> None:
    for name in ("conf", "pyproject.toml"):  # the app's folder, as far as these commands need it
        (tmp_path / name).symlink_to(ROOT / name)
    program = tmp_path / "bin" / "ciphertune"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ciphertune.cli "$@"\n')
    program.chmod(0o700)
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    told = "$(ciphertune keys show a.key | sed -n 's/^words *//p')"  # what lab A reads out
    script = "\n".join(["set -eu", *(line.replace("WORDS", told) for line in COMMANDS)])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same key") == 1 and done.stdout.count("made for the parameters of this run") == 1
    assert done.stdout.count("is kept in") == 2  # lab A's old key and lab B's
    assert (tmp_path / "a.key").read_bytes() == (tmp_path / "b.key").read_bytes()
    old = [keys.load(p).fingerprint for p in tmp_path.glob("*.old")]
    assert len(old) == 2 and len(set(old)) == 1 and keys.load(tmp_path / "a.key").fingerprint not in old


def test_the_walk_through_uses_every_command_that_changes_something() -> None:
    used = {line.split()[2] for line in COMMANDS}
    assert used == {"create", "identity", "offer", "accept", "check", "rotate"} and "keys show a.key" in TEXT
