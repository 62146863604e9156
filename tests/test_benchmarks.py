"""Encrypted sums and rounds against peers: the benchmarks run, and their results hold what the tables read."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

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
    words = ("--hidden", "32", "--layers", "1", "--repeat", "1")
    found = ran("round.py", tmp_path / "round.json", monkeypatch, *words)
    methods = ["fedavg", "full_he", "sealed", *(f"sealed crypto={c}" for c in ("ckks_packed_48", "bfv_packed", "ckks"))]
    for part in (found, *found["shapes"].values()):
        assert list(part["methods"]) == methods
        assert part["methods"]["fedavg"]["ratio_total"] == 1.0
        for row in part["methods"].values():
            assert row["bytes_up_many"] == row["bytes_up"]
            assert {"client seal", "client unseal", "server add", "server release"} == set(row["seconds"])
    assert all(set(aim) == AIM for aim in found["aims"])


def test_the_growth_of_the_servers_memory_is_the_slope_over_the_second_half_of_the_rounds(tmp_path: Path) -> None:
    report = runpy.run_path(str(BENCHMARKS / "load.py"))["report"]
    (tmp_path / "server").mkdir()
    (tmp_path / "server/state_0009.json").write_text("{}")
    lines = [{"round": r, "stage": "round", "node": "server", "seconds": 1.0, "contributors": 2} for r in range(10)]
    lines += [{"round": r, "stage": "update", "node": f"c{r % 3}", "bytes_up": 5} for r in range(10)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report(tmp_path, [100.0, *(200.0 + 10 * r for r in range(5)), *(300.0 + 2 * r for r in range(5)), 999.0])
    assert [r["server_mib"] for r in found["rounds"]][::9] == [200.0, 308.0]
    assert found["growth_mib_per_round"] == pytest.approx(2.0)  # neither the warming up nor the end count
    assert (found["before_mib"], found["after_mib"], found["different_clients"]) == (100.0, 999.0, 3)
    assert not found["aim"]["met"] and found["aim"]["found"] == pytest.approx(2 / 308, abs=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_sealed_message_of_100_mb_arrives_as_it_was_sent_over_a_superlink(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / "large_message.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    first, second, last = json.loads(out.read_text())["exchanges"]
    assert min(first["bytes_up"], second["bytes_up"], second["bytes_down"], last["bytes_down"]) > 10**8
    assert max(second["largest_error"], last["largest_error"]) < 1e-6  # of the mean in float64


@pytest.mark.slow
@pytest.mark.long
def test_a_federation_in_one_process_sums_and_counts_what_the_simulation_does(tmp_path: Path) -> None:
    words = ["experiment=smoke", "federation.rounds=2", "federation.compare_local=false", "method=fedavg"]
    own = [str(BENCHMARKS / "in_process.py"), str(tmp_path), "--clients", "4", "--seeds", "2", *words]
    subprocess.run([sys.executable, *own], check=True, capture_output=True)
    flower = ["-m", "ciphertune.cli", "run", "--app", str(BENCHMARKS.parent), "--runs-dir", str(tmp_path)]
    flower += [
        "name=flower",
        "seed=1",
        "data.seed=1",
        *words,
    ]  # that after what is kept of the first
    subprocess.run([sys.executable, *flower], check=True, capture_output=True)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("seed-1", "flower"))
    assert (one["bytes_up"], one["bytes_down"]) == (two["bytes_up"], two["bytes_down"])
    assert one["federated"]["loss"] == pytest.approx(two["federated"]["loss"], abs=1e-5)
    assert one["federated"]["loss"] < one["base"]["loss"] - 0.01  # something was learned
    for k in range(4):
        path = f"clients/client-{k}/adapter/adapter_model.safetensors"
        found, wanted = (load_file(tmp_path / name / path) for name in ("seed-1", "flower"))
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_a_claim_of_less_holds_from_the_rate_from_which_on_every_measured_one_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it shares a function with another
    first = runpy.run_path(str(BENCHMARKS / "fedshield.py"))["first_rate"]
    rows = [{"mask": "own", "rate": r, "bytes": b} for r, b in ((0.0, 50), (0.2, 70), (0.5, 60), (0.9, 10))]
    assert first(rows, "own", "bytes", 100) == 0.5  # a single dip before does not count
    assert first(rows, "own", "bytes", 10) is None
    assert first(rows, "own", "bytes", 1000) == 0.0


def test_bytes_of_the_pruned_forms_are_those_that_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = ("--hidden", "128", "--layers", "1", "--repeat", "1")
    found = ran("fedshield.py", tmp_path / "fedshield.json", monkeypatch, *words)
    rows = {(r["mask"], r["rate"]): r for r in found["rows"]}
    values = 2 * 32 * (128 + 128)  # query and value, A and B
    assert 4 * values < rows["plaintext", 0.0]["bytes_up"] < 4 * values + 500
    assert len({rows["own", r]["bytes_up"] for r in (0.0, 0.2, 0.5, 0.9)}) == 1  # zeros are encrypted too
    assert rows["agreed", 0.9]["bytes_up"] < rows["agreed", 0.0]["bytes_up"]
    assert rows["published", None]["ciphertexts"] == 4
