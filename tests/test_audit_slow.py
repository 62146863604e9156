"""The audit on real models and texts; skipped where they are absent. $CIPHERTUNE_SHARED, else ../shared."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF, ROOT

from ciphertune.audit.run import audit
from ciphertune.audit.simulate import simulate
from ciphertune.settings import compose

sys.path.insert(0, str(ROOT / "benchmarks"))
SHARED = Path(os.environ.get("CIPHERTUNE_SHARED", ROOT.parent / "shared")).resolve()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "models/minilm-l6").is_dir(), reason="needs ../shared/models and ../shared/data"),
]


def read(rows: list[dict[str, Any]], hidden: float, form: str) -> float:
    return next(r["recall"] for r in rows if r["hidden"] == hidden and r["form"] == form)


@pytest.mark.parametrize(
    ("rank", "batch", "least"),
    [
        (8, 1, 0.99),
        (8, 4, 0.67),
        (16, 4, 0.82),
        pytest.param(8, 2, 0.88, marks=pytest.mark.long),
        pytest.param(16, 1, 0.99, marks=pytest.mark.long),
    ],
)
def test_one_gradient_gives_most_tokens_away_however_columns_are_hidden(rank: int, batch: int, least: float) -> None:
    import privacy

    rows = privacy.gradient(f"gradient/sgd/{rank}/{batch}", 0, SHARED / "models", SHARED / "data")
    assert read(rows, 0.0, "adapted") >= least
    assert read(rows, 0.0125, "adapted") >= least  # the budget of SHE-LoRA
    assert read(rows, 0.0125, "published") == 0.0
    if batch == 1:
        assert read(rows, 0.95, "adapted") >= 0.98


@pytest.mark.parametrize("method", ["fedavg", "she_lora"])
def test_what_a_client_sends_after_one_step_of_adamw_is_read_in_the_second_round(method: str, tmp_path: Path) -> None:
    import privacy

    words = privacy.words("encoder", "fedavg", 1, 1, 0, SHARED / "models", SHARED / "data")
    settings = compose(CONF, f"{words} method={method} runs_dir={tmp_path} name=run")
    report = audit(simulate(settings, 2), node="client-0", max_recall=0.5)
    found = next(r for r in report.attacks if (r.name, r.form, r.round) == ("span", "adapted", 1))
    assert found.recall >= 0.8 and found.over > 0.5 and not report.passed


def test_an_adapter_that_learned_texts_by_heart_shows_its_members_and_the_base_model_does_not(tmp_path: Path) -> None:
    from ciphertune.audit.membership import infer
    from ciphertune.lm import model as lm_model
    from ciphertune.lm.data import ClientData, load_client_data
    from ciphertune.lm.train import train
    from ciphertune.settings import DataSettings, ModelSettings, TrainingSettings

    settings = ModelSettings(name=str(SHARED / "models/llama-4m"), max_length=48)
    stories = DataSettings(
        source="jsonl", path=str(SHARED / "data/tinystories_excerpt/train.jsonl"), heldout_fraction=0.5, max_train=60,
        max_heldout=60,
    )  # fmt: skip
    model = lm_model.load(settings, rank=16, device="cpu")
    data = load_client_data(stories, settings, model.tokenizer, client=0, clients=1)
    training = TrainingSettings(steps=150, batch_size=10, learning_rate=5e-3, threads=1)
    train(model, data.train, training, seed=0)
    model.save(tmp_path / "adapter")
    again = lm_model.load(settings, rank=16, device="cpu")
    found = infer(again, tmp_path / "adapter", ClientData(data.train, data.heldout, ""), training)
    assert found.auroc > 0.75 and found.low < found.auroc < found.high and found.min_k > 0.7
    assert abs(found.control - 0.5) < 0.15
