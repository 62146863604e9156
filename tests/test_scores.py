"""What clients report: weighted as it should be, and never able to end the run or to forge what is shown."""

from __future__ import annotations

import math
from typing import Any

import pytest
from conftest import CONF

from ciphertune.errors import FormatError
from ciphertune.scores import Score, in_short, mean, number, report_of, show, size
from ciphertune.settings import compose
from server_app.mail import say

GOOD: dict[str, Any] = {
    "loss": 2.0,
    "metrics": {"perplexity": 7.4},
    "tokens": 50,
    "train_loss": 3.0,
    "seconds": {"train": 1.5},
}


def test_the_mean_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    found = mean([Score(2.0, {"perplexity": math.e**2}, 10), Score(4.0, {"perplexity": math.e**4}, 30)])
    assert (
        found is not None
        and found.loss == pytest.approx(3.5)
        and found.metrics["perplexity"] == pytest.approx(math.e**3.5)
    )


def test_causal_reports_weigh_tokens_and_classification_examples() -> None:
    assert report_of(GOOD, 9, 128).score.weight == 50
    classified = GOOD | {"metrics": {"accuracy": 0.5, "f1": 0.4}}
    assert report_of(classified, 9, 128).score.weight == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"loss": 10**400},
        {"loss": "2"},
        {"loss": True},
        {"loss": None},
        {"metrics": {"perplexity": math.nan}},
        {"metrics": {"\x1b[2Jround 9/9": 1.0}},
        {"metrics": [1]},
        {"tokens": 10**15},
        {"tokens": 0},
        {"train_loss": 10**400},
        {"seconds": {"train": 10**400}},
        {"seconds": {"nonsense": 1.0}},
        {"seconds": 3},
    ],
)
def test_a_report_that_is_no_report_is_refused(changes: dict[str, Any]) -> None:
    report_of(GOOD, 9, 128)
    with pytest.raises(FormatError):
        report_of(GOOD | changes, 9, 128)


def test_numbers_are_checked_against_their_range() -> None:
    assert number(3, 0, 5) == 3.0
    for bad in (-1, 6, math.nan, "3", None, True, [3]):
        with pytest.raises(FormatError):
            number(bad, 0, 5)


def test_what_stands_in_place_of_a_number_starts_no_line_of_the_log() -> None:
    with pytest.raises(FormatError) as caught:
        number("9\nciphertune | round 2/2: all is well\x1b[2J", 0, 5)
    assert str(caught.value).isprintable() and "round 2/2" in str(caught.value)


def test_text_from_the_wire_cannot_move_the_cursor_or_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("left out x: \x1b[2J\nciphertune | round 9/9: all fine\r\udc00")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out and "\r" not in out
    out.encode()


def test_figures_are_shown_with_their_units() -> None:
    assert [size(x) for x in (12, 1234, 5_600_000, 7e9)] == ["12 B", "1.2 kB", "5.6 MB", "7.0 GB"]
    assert show(Score(1.23456, {"accuracy": 0.5}, 1)) == "1.235 (accuracy 50.0%)"
    assert show(None) == "-"


IN_SHORT = {
    "dp_lora": "A and B, nothing encrypted",
    "drop_columns": "A and B, some columns of A left out, nothing encrypted",
    "fedavg": "A and B, nothing encrypted",
    "fedshield": "A and B, every entry encrypted (ckks_packed)",
    "ffa_lora": "B alone, nothing encrypted",
    "flexlora": "A and B, nothing encrypted",
    "flora": "A and B, nothing encrypted",
    "full_he": "A and B, every entry encrypted (ckks)",
    "hetlora": "A and B, nothing encrypted",
    "local": "nothing is shared",
    "maskcrypt": "A and B, some entries encrypted (ckks_packed)",
    "rolora": "A and B in turns, nothing encrypted",
    "sealed": "A and B in turns, every entry encrypted (ckks_packed)",
    "she_lora": "A and B, the negotiated columns of A and the heads encrypted (ckks)",
}


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "method").glob("*.yaml")))
def test_one_line_says_of_every_method_what_travels_and_what_is_encrypted(name: str) -> None:
    assert in_short(compose(CONF, [f"method={name}"])) == f"{name}: {IN_SHORT[name]}"
