"""Real models and data; skipped where they are absent. $CIPHERTUNE_SHARED, else ../shared beside the repository."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ciphertune.lm.data import load_client_data
from ciphertune.lm.evaluate import evaluate
from ciphertune.lm.model import load
from ciphertune.lm.train import train
from ciphertune.settings import DataSettings, ModelSettings, TrainingSettings

SHARED = Path(os.environ.get("CIPHERTUNE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
pytestmark = pytest.mark.slow


def need(*parts: str) -> str:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return str(path)


def test_an_encoder_learns_sentiment() -> None:
    settings = ModelSettings(
        name=need("models", "minilm-l6"), task="classification", targets=("query", "value"), max_length=64
    )
    data = DataSettings(
        source="jsonl",
        path=need("data", "sst2", "train.jsonl"),
        heldout_path=need("data", "sst2", "test.jsonl"),
        labels=("negative", "positive"),
        max_heldout=300,
    )
    model = load(settings, rank=8, labels=data.labels, device="cpu")
    found = load_client_data(data, settings, model.tokenizer, client=0, clients=1)
    training = TrainingSettings(steps=120, batch_size=16, learning_rate=1e-3, threads=1)
    before = evaluate(model, found.heldout, training)
    train(model, found.train, training, seed=0)
    after = evaluate(model, found.heldout, training)
    print(f"accuracy {before.metrics} -> {after.metrics}")
    assert after.samples == 300
    assert after.metrics["accuracy"] > 0.70
    assert after.loss < before.loss


def test_a_decoder_learns_medical_answers() -> None:
    settings = ModelSettings(name=need("models", "llama-4m"), targets=("all-linear",), max_length=128)
    data = DataSettings(
        source="jsonl",
        path=need("data", "medical_meadow_small", "train.jsonl"),
        heldout_path=need("data", "medical_meadow_small", "test.jsonl"),
        partition="iid",
        max_heldout=200,
    )
    model = load(settings, rank=8, device="cpu")
    found = load_client_data(data, settings, model.tokenizer, client=1, clients=4)
    training = TrainingSettings(steps=60, batch_size=8, learning_rate=2e-3, threads=1)
    before = evaluate(model, found.heldout, training)
    train(model, found.train, replace(training), seed=0)
    after = evaluate(model, found.heldout, training)
    print(f"loss {before.loss:.3f} -> {after.loss:.3f}; {found.description}")
    assert after.loss < before.loss - 0.2
