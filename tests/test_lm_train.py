from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ciphertune.adapter import Adapter
from ciphertune.errors import DataError, StateError
from ciphertune.lm.data import Encoded
from ciphertune.lm.model import LoraModel, load
from ciphertune.lm.train import batches, train
from ciphertune.settings import ModelSettings, TrainingSettings
from tests.tiny import SENTENCES, tiny_bert, tiny_llama

FAST = TrainingSettings(steps=3, batch_size=2, learning_rate=1e-2, threads=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    return ModelSettings(name=str(folder), targets=("all-linear",), max_length=32)


@pytest.fixture
def model(settings: ModelSettings) -> LoraModel:
    return load(settings, rank=4, device="cpu")


def sentences(model: LoraModel) -> list[Encoded]:
    rows = [tuple(model.tokenizer(text)["input_ids"]) for text in SENTENCES]
    return [Encoded(row, row) for row in rows]


def same(one: Adapter, other: Adapter, factor: str) -> bool:
    """Whether a factor is equal, bit by bit, in every layer."""
    return all(np.array_equal(getattr(f, factor), getattr(other.layers[n], factor)) for n, f in one.layers.items())


def equal(one: Adapter, other: Adapter) -> bool:
    return same(one, other, "a") and same(one, other, "b")


def test_the_loss_falls_on_what_it_sees_again(tmp_path: Path) -> None:
    # a model whose output layer is large enough for an adapter to move its predictions
    model = load(ModelSettings(name=str(tiny_llama(tmp_path / "m")), targets=("all-linear",), max_length=32), rank=8)
    with torch.no_grad():
        model.model.base_model.model.lm_head.weight.mul_(20)
    result = train(model, sentences(model)[:2], replace(FAST, steps=60, learning_rate=2e-2), seed=0)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert result.loss == pytest.approx(np.mean(result.losses))
    assert len(result.losses) == 60


def test_the_first_loss_is_the_one_that_transformers_computes(model: LoraModel) -> None:
    example = sentences(model)[0]
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        wanted = float(model.model.eval()(input_ids=ids, labels=ids).loss)
    result = train(model, [example], replace(FAST, steps=1, batch_size=1), seed=0)
    assert result.losses[0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("limit", "scale"), [(1 / 3, 1 / 3), (10, 1)])  # of the gradient's norm
def test_the_first_step_is_adamw(limit: float, scale: float, model: LoraModel, tmp_path: Path) -> None:
    """AdamW's first step moves by lr * g / (|g| + eps), and decays by lr * decay * w."""
    example = sentences(model)[0]
    model.freeze("a")
    name = "model.layers.0.self_attn.q_proj"
    other = {n: f.b + 0.5 for n, f in model.read().layers.items()}  # B = 0 would hide the decay
    model.write(Adapter({n: replace(f, b=other[n].astype(np.float32)) for n, f in model.read().layers.items()}, {}))
    before = {n: f.b.astype(np.float64) for n, f in model.read().layers.items()}
    ids = torch.tensor([example.input_ids])
    model.model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad.double().numpy() for n, p in model.trainable().items() if p.grad is not None}
    model.model.zero_grad()
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    settings = replace(FAST, steps=1, batch_size=1, weight_decay=0.1, max_grad_norm=limit * norm)
    train(model, [example], settings, seed=0, state=tmp_path / "state")
    g = scale * gradients[f"{name}.lora_B"]
    moments = load_file(tmp_path / "state")
    np.testing.assert_allclose(moments[f"{name}.lora_B/exp_avg"], 0.1 * g, rtol=1e-4, atol=1e-9)
    wanted = before[name] * (1 - 1e-2 * 0.1) - 1e-2 * g / (np.abs(g) + 1e-8)
    np.testing.assert_allclose(model.read().layers[name].b, wanted, atol=2e-6)


@pytest.mark.parametrize(("factor", "other"), [("a", "b"), ("b", "a")])
def test_a_frozen_factor_does_not_change_and_the_other_does(model: LoraModel, factor: str, other: str) -> None:
    train(model, sentences(model), FAST, seed=0)  # B = 0 would leave A without a gradient
    before = model.read()
    model.freeze(factor)
    with model.model.disable_adapter():
        pass  # PEFT makes everything trainable when it leaves
    train(model, sentences(model), FAST, seed=1)
    after = model.read()
    assert same(before, after, factor)
    for name, factors in after.layers.items():
        assert not np.array_equal(getattr(factors, other), getattr(before.layers[name], other))


@pytest.mark.parametrize("factor", ["", "a", "b"])
def test_components_at_rest_stay_as_they_are_and_the_others_train_as_if_they_were_alone(
    settings: ModelSettings, factor: str, tmp_path: Path
) -> None:
    """With B = 0 at rest a model of rank 4 is one of rank 2, which is trained beside it."""
    whole, half = (load(settings, rank=rank, device="cpu") for rank in (4, 2))
    decaying, initial = replace(FAST, weight_decay=0.1), whole.read()
    for model, folder in ((whole, tmp_path / "whole"), (half, tmp_path / "half")):
        for seed, frozen in enumerate(("", factor)):
            model.freeze(frozen, 2)
            train(model, sentences(model), decaying, seed=seed, state=folder)
    for name, factors in whole.read().layers.items():
        other = half.read().layers[name]
        np.testing.assert_allclose(factors.a[:2], other.a, atol=1e-4)
        np.testing.assert_allclose(factors.b[:, :2], other.b, atol=1e-4)
        assert np.array_equal(factors.a[2:], initial.layers[name].a[2:]) and not factors.b[:, 2:].any()
        assert (factors.b[:, :2] != 0).all()


def test_components_with_moments_of_their_own_do_not_move_while_they_rest(model: LoraModel, tmp_path: Path) -> None:
    decaying = replace(FAST, weight_decay=0.1)
    train(model, sentences(model), decaying, seed=0, state=tmp_path / "state")  # all train
    before = model.read()
    model.freeze("", 1)
    train(model, sentences(model), decaying, seed=1, state=tmp_path / "state")
    for name, factors in model.read().layers.items():
        old = before.layers[name]
        assert np.array_equal(factors.a[1:], old.a[1:]) and np.array_equal(factors.b[:, 1:], old.b[:, 1:])
        assert (factors.a[0] != old.a[0]).any() and (factors.b[:, 0] != old.b[:, 0]).any()


def test_the_same_seed_gives_the_same_adapter(settings: ModelSettings) -> None:
    results = []
    for seed in (3, 3, 4):
        model = load(replace(settings, dropout=0.1), rank=4, device="cpu")
        torch.manual_seed(len(results))  # the caller's generator has no influence
        train(model, sentences(model), FAST, seed=seed)
        results.append(model.read())
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_training_leaves_torchs_generator_alone(model: LoraModel) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(model, sentences(model), FAST, seed=9)
    assert torch.equal(torch.rand(3), wanted)


def test_accumulated_batches_equal_one_large_batch(settings: ModelSettings) -> None:
    """Also where the batches have unequal numbers of tokens: a mean of means would differ."""
    adapters = []
    for size, accumulation in [(4, 1), (2, 2), (1, 4)]:
        model = load(settings, rank=4, device="cpu")
        train(model, sentences(model), replace(FAST, batch_size=size, accumulation=accumulation), seed=2)
        adapters.append(model.read())
    for adapter in adapters[1:]:
        for name, factors in adapter.layers.items():
            np.testing.assert_allclose(factors.b, adapters[0].layers[name].b, atol=2e-4)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("examples", [5, 12, 100])
def test_no_pass_repeats_an_example_in_whatever_batches(examples: int, grouped: bool) -> None:
    data = [Encoded((7,) * n, 0) for n in range(1, examples + 1)]
    rows = batches(data, replace(FAST, batch_size=8, group_by_length=grouped), 3)
    seen = [i for _ in range(examples) for i in next(rows)]  # eight passes
    assert [sorted(seen[i : i + examples]) for i in range(0, len(seen), examples)] == [list(range(examples))] * 8


def test_every_example_is_used_before_one_is_used_again(model: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import ciphertune.lm.train as module

    seen: list[Encoded] = []
    collate = module.collate
    monkeypatch.setattr(module, "collate", lambda examples, m: seen.extend(examples) or collate(examples, m))
    data = sentences(model)[:5]
    train(model, data, replace(FAST, steps=5, batch_size=3), seed=0)
    assert len(seen) == 15
    passes = [seen[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(p, key=str) == sorted(data, key=str) for p in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_grouped_batches_hold_texts_of_like_length_and_every_example_once() -> None:
    lengths = np.random.default_rng(5).permutation(np.arange(1, 65)).tolist()
    data = [Encoded((7,) * n, 0) for n in lengths]
    orders = []
    for seed in range(4):
        rows = batches(data, replace(FAST, batch_size=8, group_by_length=True), seed)
        found = [sorted(lengths[i] for i in next(rows)) for _ in range(8)]
        assert sorted(found) == [list(range(first, first + 8)) for first in range(1, 65, 8)]
        orders.append(tuple(batch[0] for batch in found))
    assert len(set(orders)) == 4  # not the short ones first: the batches come in an order of their own


def test_a_run_in_two_parts_with_state_equals_one_run(settings: ModelSettings, tmp_path: Path) -> None:
    def run(steps: list[int], state: Path | None) -> Adapter:
        model = load(settings, rank=4, device="cpu")
        for count in steps:
            fresh = load(settings, rank=4, device="cpu")  # a new process
            fresh.write(model.read())
            train(fresh, sentences(fresh)[:1], replace(FAST, steps=count, batch_size=1), seed=0, state=state)
            model = fresh
        return model.read()

    whole = run([6], None)
    assert equal(whole, run([2, 4], tmp_path / "deep" / "state.safetensors"))
    assert not equal(whole, run([2, 4], None))  # so the state is what makes them equal


def test_moments_of_a_frozen_factor_wait_for_its_turn(model: LoraModel, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    rounds = []
    for factor in ("a", "b", "a"):
        model.freeze(factor)
        train(model, sentences(model), FAST, seed=0, state=state)
        rounds.append(load_file(state))
    b_names = [name for name in rounds[0] if "lora_B" in name]
    assert len(b_names) == 14 * 3
    assert not [name for name in rounds[0] if "lora_A" in name]
    for name in b_names:
        assert torch.equal(rounds[0][name], rounds[1][name])
        assert name.endswith("step") or not torch.equal(rounds[1][name], rounds[2][name])
    step = "model.layers.0.self_attn.q_proj.lora_{}/step"
    assert [float(r[step.format("B")]) for r in rounds] == [3, 3, 6]
    assert [float(r[step.format("A")]) for r in rounds[1:]] == [3, 3]


def test_moments_of_another_shape_are_not_used(settings: ModelSettings, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    train(load(settings, rank=2, device="cpu"), sentences(load(settings, rank=2)), FAST, seed=0, state=state)
    with_old, without = load(settings, rank=4, device="cpu"), load(settings, rank=4, device="cpu")
    train(with_old, sentences(with_old), FAST, seed=1, state=state)
    train(without, sentences(without), FAST, seed=1)
    assert equal(with_old.read(), without.read())
    assert load_file(state)["model.layers.0.self_attn.q_proj.lora_A/exp_avg"].shape == (4, 32)


def test_a_damaged_state_is_named(model: LoraModel, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"not a state")
    with pytest.raises(
        StateError, match=r"state.safetensors cannot be read back .*: remove it to start with fresh moments"
    ):
        train(model, sentences(model), FAST, seed=0, state=state)


def test_biases_do_not_decay(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    settings = ModelSettings(name=str(folder), task="classification", targets=("query",), max_length=32)
    model = load(settings, rank=2, labels=["no", "yes"], device="cpu")
    heads = {"classifier.weight": np.ones((2, 32), np.float32), "classifier.bias": np.ones(2, np.float32)}
    model.write(Adapter(model.read().layers, heads))
    data = [Encoded((1, 40, 41, 2), 0), Encoded((1, 40, 41, 2), 1)]  # no gradient on a bias: the classes balance
    train(model, data, replace(FAST, steps=1, learning_rate=1e-6, weight_decay=10.0 * 1e4), seed=0)
    after = model.read().heads
    np.testing.assert_allclose(after["classifier.bias"], 1.0, atol=1e-5)
    np.testing.assert_allclose(after["classifier.weight"], 0.9, atol=1e-5)


def test_heads_train_while_a_factor_is_frozen(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    settings = ModelSettings(name=str(folder), task="classification", targets=("query",), max_length=32)
    model = load(settings, rank=2, labels=["no", "yes"], device="cpu")
    for factor in ("a", "b"):
        before = model.read().heads
        model.freeze(factor)
        train(model, [Encoded((1, 40, 41, 2), 0)], FAST, seed=0)
        for name, values in model.read().heads.items():
            assert not np.array_equal(values, before[name])


def test_bfloat16_trains(settings: ModelSettings) -> None:
    model = load(replace(settings, dtype="bfloat16"), rank=4, device="cpu")
    before = model.read()
    result = train(model, sentences(model), replace(FAST, steps=10), seed=0)
    assert result.losses[-1] < result.losses[0]
    assert not same(before, model.read(), "b")


def test_progress_is_reported_after_every_step(model: LoraModel) -> None:
    calls: list[tuple[int, int, float]] = []
    result = train(model, sentences(model), FAST, seed=0, progress=lambda *call: calls.append(call))
    assert calls == [(step, 3, result.losses[step - 1]) for step in (1, 2, 3)]


def test_a_loss_that_is_no_number_is_returned(model: LoraModel) -> None:
    with torch.no_grad():
        model.model.base_model.model.lm_head.weight.fill_(float("nan"))
    assert np.isnan(train(model, sentences(model), FAST, seed=0).loss)


def test_no_data(model: LoraModel) -> None:
    with pytest.raises(DataError, match="no training example"):
        train(model, [], FAST, seed=0)
