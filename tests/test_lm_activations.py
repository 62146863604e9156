"""Norms of what the layers read, against activations collected one unpadded example at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ciphertune.adapter import Adapter
from ciphertune.errors import DataError, ModelError
from ciphertune.lm import activations
from ciphertune.lm.activations import input_norms, weight_columns
from ciphertune.lm.data import Encoded
from ciphertune.lm.model import LoraModel, load
from ciphertune.settings import ModelSettings, TrainingSettings
from tests.tiny import SENTENCES, tiny_bert, tiny_llama, tiny_tokenizer

ONE_THREAD = TrainingSettings(threads=1, eval_batch_size=3)
KINDS = ("llama", "bert", "gpt2")


def tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 folder: its Conv1D layers hold (n, m), e.g. c_attn (32, 96)."""
    tokenizer = tiny_tokenizer("llama")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(kind: str, folder: Path, **changes: Any) -> LoraModel:
    """A model whose adapter acts, and whose embedding of padding is large enough to be missed by nobody."""
    if kind == "llama":
        settings = ModelSettings(name=str(tiny_llama(folder)), targets=("q_proj", "k_proj", "down_proj"), max_length=32)
    elif kind == "bert":
        targets = ("query", "intermediate.dense", "pooler.dense")
        settings = ModelSettings(name=str(tiny_bert(folder)), task="classification", targets=targets, max_length=32)
    else:
        settings = ModelSettings(name=str(tiny_gpt2(folder)), targets=("c_attn", "mlp.c_proj"), max_length=32)
    model = load(replace(settings, **changes), rank=2, labels=["no", "yes"], device="cpu")
    adapter, rng = model.read(), np.random.default_rng(1)
    layers = {n: replace(f, b=rng.normal(0, 0.2, f.b.shape).astype(np.float32)) for n, f in adapter.layers.items()}
    model.write(Adapter(layers, adapter.heads))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[0] = 50 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoraModel:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def llama(tmp_path: Path) -> LoraModel:
    return build("llama", tmp_path / "llama")


def examples(model: LoraModel) -> list[Encoded]:
    """Eight texts of unequal length, the lengths in no order; the third is a single token."""
    made = []
    for number, text in enumerate(SENTENCES):
        size = (9, 20, 1, 5, 14, 3, 17, 8)[number]
        ids = tuple(model.tokenizer(text)["input_ids"])[:size]
        made.append(Encoded(ids, ids if model.task == "causal_lm" else number % 2))
    return made


def modules(model: LoraModel) -> dict[str, Any]:
    inside = model.model.base_model.model
    return {name: inside.get_submodule(name) for name in model.read().layers}


def oracle(model: LoraModel, data: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """All activations of all examples, collected without batches or padding, then numpy in float64."""
    read: dict[str, list[np.ndarray]] = {name: [] for name in modules(model)}
    handles = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: read[name].append(
                inputs[0].float().numpy().reshape(-1, inputs[0].shape[-1]).astype(np.float64)
            )
        )
        for name, module in modules(model).items()
    ]
    model.model.eval()
    with torch.no_grad():
        for example in data:
            model.model(input_ids=torch.tensor([example.input_ids]))
    for handle in handles:
        handle.remove()
    return {name: np.sqrt((np.concatenate(rows) ** 2).sum(axis=0)) for name, rows in read.items()}


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], rtol: float = 1e-5) -> None:
    assert list(found) == list(wanted)
    for name, norms in found.items():
        assert norms.dtype == np.float64
        np.testing.assert_allclose(norms, wanted[name], rtol=rtol, atol=rtol * wanted[name].max(), err_msg=name)


def hooks(model: LoraModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.model.modules())


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_norms_are_those_of_unpadded_examples_whatever_the_batch_size(model: LoraModel, size: int) -> None:
    """BERT's pooler reads (batch, n): every row of it counts."""
    data = examples(model)
    found = input_norms(model, data, replace(ONE_THREAD, eval_batch_size=size), samples=100)
    assert_close(found, oracle(model, data))
    for name, factors in model.read().layers.items():
        assert found[name].shape == factors.a.shape[1:]
        assert found[name].min() > 0


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_the_first_samples_are_used_and_no_more(llama: LoraModel, samples: int) -> None:
    data = examples(llama)
    found = input_norms(llama, data, ONE_THREAD, samples=samples)
    assert_close(found, oracle(llama, data[:samples]))
    never = Encoded((10**6,), (10**6,))  # the model would raise
    assert_close(input_norms(llama, [*data[:samples], never], ONE_THREAD, samples=samples), found)


def test_the_adapter_acts(llama: LoraModel) -> None:
    acting = input_norms(llama, examples(llama), ONE_THREAD, samples=8)
    with llama.model.disable_adapter():
        base = input_norms(llama, examples(llama), ONE_THREAD, samples=8)
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(acting[first], base[first])
    assert not np.allclose(acting[last], base[last], rtol=1e-3)


def test_layers_that_read_the_tokens_in_one_row_after_the_other(llama: LoraModel) -> None:
    """As a mixture of experts does: (batch, length, n) comes as (batch * length, n)."""
    wanted = input_norms(llama, examples(llama), ONE_THREAD, samples=8)
    layer, shapes = modules(llama)["model.layers.0.self_attn.q_proj"], []

    def flatten(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        shapes.append(inputs[0].shape[:2])
        return (inputs[0].flatten(0, 1),)

    with (
        layer.register_forward_pre_hook(flatten),
        layer.register_forward_hook(lambda _, inputs, output: output.unflatten(0, shapes[-1])),
    ):
        assert_close(input_norms(llama, examples(llama), ONE_THREAD, samples=8), wanted)
    assert len(shapes) == 3


def test_an_input_that_cannot_be_told_from_padding_is_refused(llama: LoraModel) -> None:
    layer = modules(llama)["model.layers.1.self_attn.k_proj"]
    with (
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].transpose(0, 1),)),
        pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj reads an input of shape \(20, 3, 32\)"),
    ):
        input_norms(llama, examples(llama), ONE_THREAD, samples=8)
    assert hooks(llama) == 0


def test_padding_may_hold_what_is_no_number(llama: LoraModel) -> None:
    """Padding is left out, not multiplied by 0; in a causal model no token reads the padding to its right."""
    data = [Encoded(ids, ids) for ids in ((1, 40, 41), (1, 42, 43, 44, 45))]
    layer = modules(llama)["model.layers.1.mlp.down_proj"]

    def spoil(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = inputs[0].clone()
        if len(x) == 2:
            x[1, 3:] = float("nan")  # the shorter comes second
        return (x,)

    with layer.register_forward_pre_hook(spoil):
        found = input_norms(llama, data, ONE_THREAD, samples=2)
    assert_close(found, oracle(llama, data))


def test_a_model_that_computes_nan_has_norms_of_nan(llama: LoraModel) -> None:
    with torch.no_grad():
        llama.model.get_input_embeddings().weight[40, 3] = float("nan")
    found = input_norms(llama, [Encoded((1, 40, 41), (1, 40, 41))], ONE_THREAD, samples=1)
    assert all(np.isnan(norms).any() for norms in found.values())


def test_bfloat16(tmp_path: Path) -> None:
    half = build("llama", tmp_path / "llama", dtype="bfloat16")
    whole = build("llama", tmp_path / "llama", dtype="float32")
    assert half.autocast is torch.bfloat16
    found = input_norms(half, examples(half), ONE_THREAD, samples=8)
    assert_close(found, input_norms(whole, examples(whole), ONE_THREAD, samples=8), rtol=0.03)
    assert_close(weight_columns(half), weight_columns(whole), rtol=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_is_off(tmp_path: Path, training: bool) -> None:
    dropping = build("llama", tmp_path / "llama", dropout=0.5)
    dropping.model.train(training)
    before = {name: module.training for name, module in dropping.model.named_modules()}
    found = input_norms(dropping, examples(dropping), ONE_THREAD, samples=8)
    assert {name: module.training for name, module in dropping.model.named_modules()} == before
    assert_close(found, oracle(dropping, examples(dropping)))


def test_nothing_of_the_model_changes(model: LoraModel) -> None:
    def state() -> list[tuple[str, np.ndarray, bool]]:
        return [(n, p.detach().clone().numpy(), p.requires_grad) for n, p in model.model.named_parameters()]

    before = state()
    input_norms(model, examples(model), ONE_THREAD, samples=8)
    weight_columns(model)
    for (name, old, trains), (_, new, still) in zip(before, state(), strict=True):
        np.testing.assert_array_equal(old, new, err_msg=name)
        assert trains == still
    assert all(parameter.grad is None for parameter in model.model.parameters())


def before_every_batch(monkeypatch: pytest.MonkeyPatch, look: Callable[[], object]) -> None:
    collate = activations.collate

    def looked(*words: Any) -> Any:
        look()
        return collate(*words)

    monkeypatch.setattr(activations, "collate", looked)


def test_hooks_are_gone_afterwards_also_after_an_exception(llama: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[int] = []
    with monkeypatch.context() as patch:
        before_every_batch(patch, lambda: during.append(hooks(llama)))
        input_norms(llama, examples(llama), ONE_THREAD, samples=8)
    assert during == [6, 6, 6]  # three layers in each of two blocks
    assert hooks(llama) == 0
    llama.model.train()
    unknown = Encoded((1, 10**6), (1, 10**6))
    with pytest.raises(IndexError):
        input_norms(llama, [*examples(llama), unknown], ONE_THREAD, samples=9)
    assert hooks(llama) == 0 and llama.model.training

    def stop() -> None:
        raise KeyboardInterrupt

    before_every_batch(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        input_norms(llama, examples(llama), ONE_THREAD, samples=8)
    assert hooks(llama) == 0 and llama.model.training


def test_no_activation_is_kept(model: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two batches no new tensor of numbers lives that has more than one dimension."""

    def living() -> dict[int, torch.Tensor]:
        return {id(x): x for x in gc.get_objects() if type(x) is torch.Tensor and x.is_floating_point() and x.ndim > 1}

    gc.collect()
    before = living()
    new: list[tuple[int, ...]] = []

    def look() -> None:
        new.extend(tuple(x.shape) for key, x in living().items() if key not in before)

    before_every_batch(monkeypatch, look)
    input_norms(model, examples(model), ONE_THREAD, samples=8)
    new.extend(tuple(x.shape) for key, x in living().items() if key not in before)
    assert new == []


def test_no_data_or_no_samples(llama: LoraModel) -> None:
    with pytest.raises(DataError, match="no calibration example"):
        input_norms(llama, [], ONE_THREAD, samples=8)
    for samples in (0, -1):
        with pytest.raises(ValueError, match=f"samples={samples}"):
            input_norms(llama, examples(llama), ONE_THREAD, samples=samples)


def test_weight_columns_are_sums_over_the_rows_of_the_frozen_weight(model: LoraModel) -> None:
    found, adapter = weight_columns(model), model.read()
    assert list(found) == list(adapter.layers)
    for name, layer in modules(model).items():
        weight = layer.get_base_layer().weight.detach().double().numpy()
        if name.startswith("transformer.h"):  # GPT-2's Conv1D
            weight = weight.T
        m, n = weight.shape
        assert (m, n) == (adapter.layers[name].b.shape[0], adapter.layers[name].a.shape[1])
        assert found[name].dtype == np.float64
        slow = [sum(abs(weight[k, j]) for k in range(m)) for j in range(n)]
        np.testing.assert_allclose(found[name], slow, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "n"),
    [
        ("llama", "model.layers.0.self_attn.k_proj", 32),  # grouped queries: 16 x 32
        ("llama", "model.layers.0.mlp.down_proj", 64),
        ("gpt2", "transformer.h.0.attn.c_attn", 32),
        ("gpt2", "transformer.h.1.mlp.c_proj", 128),
    ],
)
def test_layers_that_are_not_square(kind: str, name: str, n: int, tmp_path: Path) -> None:
    made = build(kind, tmp_path / kind)
    assert weight_columns(made)[name].shape == (n,)
    assert input_norms(made, examples(made), ONE_THREAD, samples=1)[name].shape == (n,)
