"""Encrypted sums and rounds against peers: the benchmarks run, and their results hold what the tables read."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
AIM = {"name", "wanted", "found", "met"}


def ran(script: str, out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """The results of a benchmark run with these options."""
    monkeypatch.setattr(sys, "argv", [script, *words, "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return json.loads(out.read_text())


def test_sums_are_compared_with_every_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--values", "5000", "--repeat", "1", "--clients", "2")
    found = ran("crypto.py", tmp_path / "crypto.json", monkeypatch, *words)
    rows = found["rows"]
    peers = ["plaintext", "masking", "ckksvector", "nvflare", "fedshield", "column"]
    assert list(rows) == [*peers, "ckks", "ckks_8192", "ckks_packed", "ckks_packed_48", "bfv_packed"]
    for name, row in rows.items():
        assert row["error_of_mean"] < 2e-5, name
        assert {"client encrypt", "server add", "server release", "client decrypt"} <= set(row["seconds"]), name
    assert all("client decrypt many" in rows[name]["seconds"] for name in ("ckks_packed", "ckks_packed_48"))
    assert all(rows["ckksvector"]["over_a"][key] == 1.0 for key in ("client encrypt", "client decrypt", "up", "down"))
    assert rows["plaintext"]["bytes_per_value"] == {"up": 4.0, "down": 4.0, "down_many": 4.0}
    sent = rows["ckks_packed"]["bytes_per_value"]  # two blocks of 4096 values: bytes are exact
    assert sent["up"] == 2 * (64 + 5 * 4096) / 5000
    assert sent["down_many"] == 2 * 2 * 5 * 4096 / 5000
    assert len(found["aims"]) == 8 and all(set(aim) == AIM for aim in found["aims"])


def test_rounds_of_real_messages_are_compared_with_fedavg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "sealed-seed0"
    run.mkdir()
    stages = {"load": 1.0, "unseal": 0.5, "evaluate": 2.0, "train": 6.0, "seal": 0.5}
    lines = [{"round": 0, "stage": s, "node": n, "seconds": v} for n in ("a", "b") for s, v in stages.items()]
    lines.append({"round": 0, "stage": "aggregate", "node": "server", "seconds": 9.0})
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "settings.yaml").write_text("method: {name: sealed}\ncrypto: {backend: ckks_packed}\nmodel: {name: m}\n")
    words = ("--hidden", "32", "--layers", "1", "--repeat", "1", "--run", str(run))
    found = ran("round.py", tmp_path / "round.json", monkeypatch, *words)
    methods = ["fedavg", "full_he", "sealed", *(f"sealed crypto={c}" for c in ("ckks_packed_48", "bfv_packed", "ckks"))]
    for part in (found, *found["shapes"].values()):
        assert list(part["methods"]) == methods
        assert part["methods"]["fedavg"]["ratio_total"] == 1.0
        for row in part["methods"].values():
            assert row["bytes_up_many"] == row["bytes_up"]
            assert {"client seal", "client unseal", "server add", "server release"} == set(row["seconds"])
    share = found["runs"]["sealed-seed0"]
    assert share["share_of_round"] == share["largest_share_of_a_node"] == pytest.approx(0.1)
    assert share["share_of_training_and_cryptography"] == pytest.approx(1 / 7)
    assert all(set(aim) == AIM for aim in found["aims"])
    (missed,) = [aim for aim in found["aims"] if aim["name"].startswith("sealed-seed0")]
    assert (missed["wanted"], missed["met"]) == (0.05, False)
