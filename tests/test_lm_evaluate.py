from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ciphertune.adapter import Adapter
from ciphertune.errors import DataError
from ciphertune.lm.data import Encoded
from ciphertune.lm.evaluate import evaluate, macro_f1
from ciphertune.lm.model import LoraModel, load
from ciphertune.settings import ModelSettings, TrainingSettings
from tests.tiny import SENTENCES, tiny_bert, tiny_llama

ONE_THREAD = TrainingSettings(threads=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoraModel:
    settings = ModelSettings(name=str(tiny_llama(tmp_path_factory.mktemp("llama"))), max_length=32)
    model = load(settings, rank=4, device="cpu")
    with torch.no_grad():
        model.model.base_model.model.lm_head.weight.mul_(10)  # so that losses differ from token to token
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> LoraModel:
    folder = tiny_bert(tmp_path_factory.mktemp("bert"))
    settings = ModelSettings(name=str(folder), task="classification", targets=("query",), max_length=32)
    return load(settings, rank=2, labels=["a", "b", "c"], device="cpu")


def examples(model: LoraModel) -> list[Encoded]:
    """Texts of unequal length, with the first half of each without loss."""
    made = []
    for number, text in enumerate(SENTENCES):
        ids = tuple(model.tokenizer(text)["input_ids"])[: 5 + 3 * number]
        made.append(Encoded(ids, (-100,) * (len(ids) // 2) + ids[len(ids) // 2 :]))
    return made


def test_causal_loss_is_the_mean_over_all_target_tokens(llama: LoraModel) -> None:
    """Against transformers' own loss, one example at a time."""
    total, tokens = 0.0, 0
    for example in examples(llama):
        count = sum(label != -100 for label in example.labels[1:])
        with torch.no_grad():
            out = llama.model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]))
        total, tokens = total + count * float(out.loss), tokens + count
    found = evaluate(llama, examples(llama), ONE_THREAD)
    assert (found.samples, found.tokens) == (8, tokens)
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.metrics == {"perplexity": pytest.approx(np.exp(total / tokens), rel=1e-4)}


def test_the_batch_size_does_not_matter(llama: LoraModel) -> None:
    losses = [evaluate(llama, examples(llama), replace(ONE_THREAD, eval_batch_size=n)).loss for n in (1, 3, 8, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_the_adapter_counts_unless_it_is_disabled(llama: LoraModel) -> None:
    base = evaluate(llama, examples(llama), ONE_THREAD).loss  # B = 0
    initial = llama.read()
    llama.write(Adapter({n: replace(f, b=np.full_like(f.b, 0.3)) for n, f in initial.layers.items()}, {}))
    adapted = evaluate(llama, examples(llama), ONE_THREAD).loss
    with llama.model.disable_adapter():
        disabled = evaluate(llama, examples(llama), ONE_THREAD).loss
    llama.write(initial)
    assert abs(adapted - base) > 1e-3
    assert disabled == base


def test_dropout_is_off(tmp_path: Path) -> None:
    settings = ModelSettings(name=str(tiny_llama(tmp_path / "base")), max_length=32, dropout=0.5)
    model = load(settings, rank=4, device="cpu")
    model.write(Adapter({n: replace(f, b=np.full_like(f.b, 0.3)) for n, f in model.read().layers.items()}, {}))
    model.model.train()
    first = evaluate(model, examples(model), ONE_THREAD).loss
    model.model.train()
    assert evaluate(model, examples(model), ONE_THREAD).loss == first


def test_classification(bert: LoraModel) -> None:
    """A head that answers class 1 whatever it reads, by a margin of log(8): p = (1, 8, 1) / 10."""
    heads = {
        "classifier.weight": np.zeros((3, 32), np.float32),
        "classifier.bias": np.array([0, np.log(8), 0], np.float32),
    }
    bert.write(Adapter(bert.read().layers, heads))
    ids = (1, 40, 41, 42, 2)
    data = [Encoded(ids[:length], label) for length, label in [(3, 1), (5, 0), (4, 1), (5, 1), (3, 2)]]
    found = evaluate(bert, data, replace(ONE_THREAD, eval_batch_size=2))
    assert found.loss == pytest.approx(-(3 * np.log(0.8) + 2 * np.log(0.1)) / 5, rel=1e-6)
    assert (found.samples, found.tokens) == (5, 20)
    assert found.metrics["accuracy"] == pytest.approx(3 / 5)
    assert found.metrics["f1"] == pytest.approx((0 + 2 * 3 / (2 * 3 + 2) + 0) / 3)


def test_predictions_belong_to_their_own_example(bert: LoraModel) -> None:
    """Examples are sorted by length inside; each must still be compared with its own label."""
    rng = np.random.default_rng(0)
    data = [Encoded((1, *rng.integers(30, 200, size).tolist(), 2), 0) for size in (3, 20, 8, 14, 5, 11)]

    def outputs() -> np.ndarray:
        with torch.no_grad():
            rows = [bert.model.eval()(input_ids=torch.tensor([example.input_ids])).logits[0] for example in data]
        return torch.stack(rows).numpy()

    weight, bias = rng.normal(size=(3, 32)).astype(np.float32), np.zeros(3, np.float32)
    bert.write(Adapter(bert.read().layers, {"classifier.weight": weight, "classifier.bias": bias}))
    bias = -np.median(outputs(), axis=0)  # so that the answers differ
    bert.write(Adapter(bert.read().layers, {"classifier.weight": weight, "classifier.bias": bias}))
    answers = outputs().argmax(axis=1).tolist()
    assert len(set(answers)) > 1
    right = [replace(example, labels=answer) for example, answer in zip(data, answers, strict=True)]
    assert evaluate(bert, right, replace(ONE_THREAD, eval_batch_size=2)).metrics == {"accuracy": 1.0, "f1": 1.0}


def test_macro_f1_by_hand() -> None:
    true = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 2])
    # class 0: 2 hits, 1 missed, 1 false: 4/6; class 1: 1, 1, 1: 2/4; class 2: 1
    assert macro_f1(true, predicted) == pytest.approx((4 / 6 + 2 / 4 + 1) / 3)
    assert macro_f1(np.array([0, 0]), np.array([1, 1])) == 0.0
    assert macro_f1(np.array([3, 3]), np.array([3, 3])) == 1.0


def test_no_data(llama: LoraModel) -> None:
    with pytest.raises(DataError, match="no held-out example"):
        evaluate(llama, [], ONE_THREAD)
