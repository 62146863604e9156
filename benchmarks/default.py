"""The embedded default, as a newcomer runs it; its summary goes to benchmarks/results/default.json.

python benchmarks/default.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run it in a folder of its own and keep the summary."""
    with tempfile.TemporaryDirectory() as runs:
        command = [
            sys.executable,
            "-m",
            "ciphertune.cli",
            "run",
            "--app",
            str(ROOT),
            "--runs-dir",
            runs,
            "name=default",
        ]
        subprocess.run(command, check=True)
        summary = json.loads((Path(runs) / "default" / "summary.json").read_text())
    out = ROOT / "benchmarks/results/default.json"
    out.write_text(json.dumps({"versions": versions(), **summary}, indent=2) + "\n")
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
