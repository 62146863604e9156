"""The grid of real runs and its page: what is run, what counts as known, and that a loss of ours is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONF, ROOT
from matplotlib.axes import Axes

from ciphertune.comparison import shown
from ciphertune.settings import compose

sys.path.insert(0, str(ROOT / "benchmarks"))
import results
import results_page
import results_plot

CELL = "sst2-dirichlet-unequal"


@pytest.fixture(autouse=True)
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty grid."""
    monkeypatch.setattr(results, "GRID", tmp_path)
    return tmp_path


def row(cell: str, own: str, accuracies: list[float], up: float = 100.0, rounds: int = 8) -> dict[str, Any]:
    """A finished row of made-up figures; its loss is one minus the accuracy."""
    seeds = {}
    for seed, accuracy in enumerate(accuracies):
        score = {
            "loss": 1 - accuracy,
            "metric": {"accuracy": accuracy} if "medical" not in cell else {"perplexity": 9.0},
        }
        spent = rounds * up + (rounds - 1) * 2 * up
        stages = {"train": 8.0, "seal": 1.0, "unseal": 0.5, "load": 0.5, "aggregate": 5.0}
        seeds[str(seed)] = {
            "base": {"loss": 0.7, "metric": score["metric"] | {"accuracy": 0.5}}, "federated": score, "bytes_up": up,
            "bytes_down": 2 * up, "encrypted_fraction": 0.0, "seconds": 1.0, "seconds_by_stage": stages,
            "course": [[rounds, spent, score["loss"], score["metric"]]],
        }  # fmt: skip
    return {"overrides": [shown(word) for word in results.words(cell, own)], "seeds": seeds, "versions": {}}


def keep(cell: str, **accuracies: list[float]) -> None:
    for name, values in accuracies.items():
        results.keep(cell, name, row(cell, f"method={name}", values))


@pytest.mark.parametrize("cell", results.cells())
def test_every_row_of_the_grid_is_a_run_that_composes_and_says_each_setting_once(cell: str) -> None:
    folders = results.Folders(Path("/m"), Path("/d"), Path("/w"))
    rows = results.rows_of(cell)
    assert len(rows) >= (4 if cell == results.FEDSHIELD else 6)
    for own in rows.values():
        words = results.words(cell, own, folders)
        keys = [word.partition("=")[0] for word in words]
        assert len(set(keys)) == len(keys)
        settings = compose(CONF, words)
        if cell in (*results.RATES_OF, results.FEDSHIELD):
            continue
        data, division, ranks = cell.split("-")
        assert data in settings.data.path and settings.data.partition == division
        assert [c.rank for c in settings.federation.clients] == list(results.RANKS[ranks])
        assert settings.data.dirichlet_alpha == 0.3


def test_all_methods_sets_divisions_and_ranks_are_in_the_grid() -> None:
    methods = {compose(CONF, results.words(CELL, own)).method.name for own in results.rows_of(CELL).values()}
    assert methods == {path.stem for path in (CONF / "method").glob("*.yaml")}
    wanted = {f"{s}-{d}-{r}" for s in results.SETS for d in ("iid", "dirichlet") for r in ("equal", "unequal")}
    assert wanted <= set(results.cells())


def test_a_row_that_was_run_under_other_settings_is_run_again_and_not_shown(grid: Path) -> None:
    keep(CELL, fedavg=[0.8], sealed=[0.7])
    assert set(results.read(CELL)) == {"fedavg", "sealed"}
    path = grid / f"{CELL}.json"
    found = json.loads(path.read_text())
    words = found["rows"]["sealed"]["overrides"]
    words[words.index(f"federation.rounds={results.ROUNDS}")] = "federation.rounds=99"
    path.write_text(json.dumps(found))
    assert set(results.read(CELL)) == {"fedavg"}
    assert (CELL, "sealed") in results.missing([CELL], ["fedavg", "sealed"])
    assert "| `sealed` |" not in results_page.page()
    keep(CELL, flexlora=[0.8])
    assert set(json.loads(path.read_text())["rows"]) == {"fedavg", "flexlora"}


def test_a_peer_at_the_bytes_of_sealed_runs_the_rounds_that_move_as_much() -> None:
    cell = "sst2-iid-unequal"
    results.keep(cell, "sealed", row(cell, "method=sealed", [0.8], up=70.0))
    results.keep(cell, "fedavg", row(cell, "method=fedavg", [0.8], up=100.0))
    own = results.rows_of(cell)[f"fedavg{results.AT_BYTES}"]
    rounds = compose(CONF, results.words(cell, own)).federation.rounds
    spent, each = 8 * 70 + 7 * 140, 100 + 200
    moved = {k: k * 100 + (k - 1) * 200 for k in (rounds - 1, rounds)}
    assert moved[rounds - 1] + 0.1 * each < spent <= moved[rounds] + 0.1 * each


@pytest.mark.parametrize("other", ["flexlora", "rolora", "fedavg", "local"])
@pytest.mark.parametrize("own", ["sealed", "she_lora"])
def test_where_a_method_of_ours_loses_the_page_says_so_whichever_beats_it(own: str, other: str) -> None:
    keep(CELL, **{own: [0.70, 0.71, 0.72], other: [0.80, 0.82, 0.81]})
    assert (
        f"**Loses** (mean of the pairs above their spread): `{own}` to `{other}` by 10.0 ± 1.0." in results_page.page()
    )


def test_where_a_method_of_ours_does_not_lose_the_page_says_no_such_thing() -> None:
    keep(CELL, sealed=[0.80, 0.82, 0.81], fedavg=[0.70, 0.71, 0.72], flexlora=[0.90, 0.79, 0.78])  # within the spread
    assert "Loses" not in results_page.page()


def test_a_loss_is_worse_when_it_is_larger() -> None:
    cell = "medical_meadow_small-iid-unequal"
    keep(cell, sealed=[0.30, 0.31, 0.32], fedavg=[0.40, 0.42, 0.41])  # losses of 0.7 and 0.6
    assert "`sealed` to `fedavg` by 0.100 ± 0.010." in results_page.page()


def test_the_summary_shows_what_is_known_and_which_figure_is_of_which_set() -> None:
    assert results_page.summary() == ["Not run yet."]
    keep("rotten_tomatoes-dirichlet-unequal", fedavg=[0.5, 0.6], sealed=[0.5, 0.7])
    keep("medical_meadow_small-dirichlet-unequal", sealed=[0.2, 0.4])
    head, _, *rows = results_page.summary()
    assert "rotten_tomatoes: accuracy in % | medical_meadow_small: loss" in head
    assert "up per round, rotten_tomatoes" in head
    assert rows[0] == "| `fedavg` | 55.0 ± 7.1 | - | 0 kB | 0% |"
    assert rows[1] == "| `sealed` | 60.0 ± 14.1 | 0.700 ± 0.141 | 0 kB | 0% |"
    assert rows[-1] == "Of their clients' time 4 runs of `sealed` spent at most 15.0% on cryptography."


def test_the_learning_rate_is_that_of_the_best_mean_of_both() -> None:
    cell = "rates-classifiers"
    rates = results.RATES["classifiers"]
    for k, rate in enumerate(rates):
        for method, accuracy in (("fedavg", (0.80, 0.82, 0.85)[k]), ("sealed", (0.81, 0.80, 0.60)[k])):
            own = results.rows_of(cell)[f"{method} {rate}"]
            results.keep(cell, f"{method} {rate}", row(cell, own, [accuracy] * 3))
    text = results_page.page()
    assert f"`fedavg` alone is best at {rates[2]}; `sealed` alone is best at {rates[0]}." in text
    assert f"The best mean of both is at {rates[1]}; below, all take {results.RATE['classifiers']}." in text


def test_instructions_get_the_commonest_first_words_as_kinds() -> None:
    lines = [{"input": f"what {k}"} for k in range(12)] + [{"input": w} for w in "abcdefghijklm"] + [{"input": ""}]
    kinds = [line["kind"] for line in results.with_kinds(lines)]
    assert kinds[:12] == ["what"] * 12 and kinds[-1] == "other" and len(set(kinds)) == 11


def test_the_figure_is_out_of_date_as_soon_as_a_result_changes(tmp_path: Path) -> None:
    path = tmp_path / "results.svg"
    assert not results_plot.is_current(path)
    keep(CELL, fedavg=[0.5, 0.7], sealed=[0.8])
    results_plot.plot(path)
    assert results_plot.is_current(path)
    keep(CELL, sealed=[0.81])
    assert not results_plot.is_current(path)


def test_the_figure_draws_the_mean_and_spread_of_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, x, y, **more: drawn.append((x, more["xerr"])) or errorbar(axis, x, y, **more)
    )
    keep(CELL, fedavg=[0.5, 0.7], sealed=[0.8])
    results_plot.plot(tmp_path / "results.svg")
    [(means, spreads)] = [found for found in drawn if found[0]]
    assert means == pytest.approx([60.0, 80.0])
    assert spreads == pytest.approx([np.std([50, 70], ddof=1), 0.0])
