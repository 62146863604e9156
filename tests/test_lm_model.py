from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertForSequenceClassification

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import ModelError
from ciphertune.lm.model import LoraModel, load
from ciphertune.settings import ModelSettings
from tests.tiny import tiny_bert, tiny_classifier, tiny_llama

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return ModelSettings(name=str(tiny_llama(tmp_path_factory.mktemp("llama"))), max_length=32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tiny_bert(tmp_path_factory.mktemp("bert"))
    return ModelSettings(name=str(folder), task="classification", targets=("query", "value"), max_length=32)


def scrambled(adapter: Adapter, seed: int = 5) -> Adapter:
    """The same names and shapes, other numbers."""
    draw = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            draw.normal(0, 0.2, f.a.shape).astype(np.float32),
            draw.normal(0, 0.2, f.b.shape).astype(np.float32),
            f.scale,
        )
        for name, f in adapter.layers.items()
    }
    heads = {name: draw.normal(0, 0.2, h.shape).astype(np.float32) for name, h in adapter.heads.items()}
    return Adapter(layers, heads)


def assert_same(one: Adapter, other: Adapter) -> None:
    assert list(one.layers) == list(other.layers)
    assert list(one.heads) == list(other.heads)
    for name, factors in one.layers.items():
        np.testing.assert_array_equal(factors.a, other.layers[name].a)
        np.testing.assert_array_equal(factors.b, other.layers[name].b)
    for name, head in one.heads.items():
        np.testing.assert_array_equal(head, other.heads[name])


def logits(model: LoraModel) -> torch.Tensor:
    model.model.eval()
    with torch.no_grad():
        return model.model(input_ids=IDS).logits


def test_layers_are_named_by_their_path_in_the_base_model(llama: ModelSettings) -> None:
    adapter = load(llama, rank=3, device="cpu").read()
    assert list(adapter.layers) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    q, v = adapter.layers["model.layers.0.self_attn.q_proj"], adapter.layers["model.layers.0.self_attn.v_proj"]
    assert (q.a.shape, q.b.shape) == ((3, 32), (32, 3))
    assert (v.a.shape, v.b.shape) == ((3, 32), (16, 3))
    assert q.a.dtype == q.b.dtype == np.float32
    assert not adapter.heads


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_scale_is_the_same_at_every_rank(llama: ModelSettings, rank: int) -> None:
    model = load(replace(llama, rank=8, alpha=20.0), rank=rank, device="cpu")
    layer = model.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(2.5, rel=1e-12)
    assert {f.scale for f in model.read().layers.values()} == {2.5}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_write_is_the_inverse_of_read(kind: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(kind), rank=4, labels=["no", "yes"], device="cpu")
    before = logits(model)
    wanted = scrambled(model.read())
    model.write(wanted)
    assert_same(model.read(), wanted)
    assert not torch.allclose(logits(model), before, atol=1e-4)


def test_read_returns_copies(llama: ModelSettings) -> None:
    model = load(llama, rank=2, device="cpu")
    first = model.read()
    kept = copy.deepcopy({name: f.a for name, f in first.layers.items()})
    model.write(scrambled(first))
    for name, factors in first.layers.items():
        np.testing.assert_array_equal(factors.a, kept[name])


def test_forward_is_base_plus_scaled_product(llama: ModelSettings) -> None:
    model = load(replace(llama, alpha=12.0), rank=4, device="cpu")
    model.write(scrambled(model.read()))
    layer = model.model.base_model.model.model.layers[1].self_attn.v_proj
    x = np.random.default_rng(0).normal(size=(5, 32))
    factors = model.read().layers["model.layers.1.self_attn.v_proj"]
    weight = layer.base_layer.weight.detach().double().numpy()
    wanted = x @ (weight + 1.5 * factors.b.astype(np.float64) @ factors.a.astype(np.float64)).T
    with torch.no_grad():
        found = layer(torch.from_numpy(x).float()).double().numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(wanted - x @ weight.T).max() > 0.1  # the adapter's part is not negligible


def test_initial_adapters_are_nested_across_ranks_and_independent_of_torch(llama: ModelSettings) -> None:
    torch.manual_seed(1)
    large = load(llama, rank=8, device="cpu", seed=7).read()
    torch.manual_seed(2)
    small = load(llama, rank=4, device="cpu", seed=7).read()
    other = load(llama, rank=4, device="cpu", seed=8).read()
    for name, factors in small.layers.items():
        np.testing.assert_array_equal(factors.a, large.layers[name].a[:4])
        assert not factors.b.any()
        assert not np.array_equal(factors.a, other.layers[name].a)
        assert len(np.unique(factors.a)) > 120  # no row or layer repeats another
        assert 0.9 / np.sqrt(32) < factors.a.max() <= 1 / np.sqrt(32)
        assert -1 / np.sqrt(32) <= factors.a.min() < -0.9 / np.sqrt(32)
    q = [f.a for name, f in small.layers.items() if name.endswith("q_proj")]
    assert not np.array_equal(q[0], q[1])


def test_new_heads_are_the_same_on_every_client(bert: ModelSettings) -> None:
    torch.manual_seed(1)
    one = load(bert, rank=2, labels=["a", "b", "c"], device="cpu", seed=3).read()
    torch.manual_seed(2)
    two = load(bert, rank=4, labels=["a", "b", "c"], device="cpu", seed=3).read()
    three = load(bert, rank=4, labels=["a", "b", "c"], device="cpu", seed=4).read()
    assert {name: head.shape for name, head in one.heads.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }
    np.testing.assert_array_equal(one.heads["classifier.weight"], two.heads["classifier.weight"])
    assert not np.array_equal(one.heads["classifier.weight"], three.heads["classifier.weight"])
    assert 0.01 < one.heads["classifier.weight"].std() < 0.03
    assert not one.heads["classifier.bias"].any()


def test_an_encoder_without_pooler_gets_one_that_travels_with_the_adapter(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert", pooler=False)
    settings = ModelSettings(name=str(folder), task="classification", targets=("all-linear",), max_length=32)
    adapter = load(settings, rank=2, labels=["no", "yes"], device="cpu").read()
    assert set(adapter.heads) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert not [name for name in adapter.layers if "pooler" in name or "classifier" in name]
    assert len(adapter.layers) == 12  # six linear layers in each of two blocks


def test_a_head_that_the_folder_has_is_kept_and_one_of_another_size_replaced(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path / "classifier", labels=2)
    stored = BertForSequenceClassification.from_pretrained(folder).classifier.weight.detach().numpy()
    settings = ModelSettings(name=str(folder), task="classification", targets=("query",), max_length=32)
    kept = load(settings, rank=2, labels=["no", "yes"], device="cpu").read()
    np.testing.assert_array_equal(kept.heads["classifier.weight"], stored)
    replaced = [load(settings, rank=2, labels=["a", "b", "c"], device="cpu").read() for _ in range(2)]
    assert replaced[0].heads["classifier.weight"].shape == (3, 32)
    np.testing.assert_array_equal(replaced[0].heads["classifier.weight"], replaced[1].heads["classifier.weight"])


@pytest.mark.parametrize("padding", [0, None])
def test_a_decoder_can_classify(padding: int | None, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", padding=padding)
    settings = ModelSettings(name=str(folder), task="classification", max_length=32)
    model = load(settings, rank=2, labels=["no", "yes"], device="cpu")
    assert list(model.read().heads) == ["score.weight"]
    padded = torch.tensor([[1, 40, 41, 0, 0]])
    with torch.no_grad():
        short = model.model(input_ids=padded[:, :3], attention_mask=torch.ones(1, 3)).logits
        long = model.model(input_ids=padded, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)  # the last token that is no padding decides


@pytest.mark.parametrize("task", ["causal_lm", "classification", "no pooler"])
def test_a_saved_adapter_gives_the_same_logits_on_the_plain_base(task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if task == "causal_lm":
        folder = tiny_llama(tmp_path / "base")
        settings = ModelSettings(name=str(folder), targets=("all-linear",), max_length=32)
    else:
        folder = tiny_bert(tmp_path / "base", pooler=task == "classification")
        settings = ModelSettings(name=str(folder), task="classification", targets=("query",), max_length=32)
    model = load(settings, rank=3, labels=["no", "yes"], device="cpu")
    model.write(scrambled(model.read()))
    model.save(tmp_path / "adapter")
    torch.manual_seed(99)  # so that a part that was not saved would differ
    if task == "causal_lm":
        plain = AutoModelForCausalLM.from_pretrained(folder)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, logits(model), atol=1e-6, rtol=1e-6)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_what_trains_is_float32_whatever_the_base_is(bert: ModelSettings) -> None:
    model = load(replace(bert, dtype="bfloat16"), rank=2, labels=["no", "yes"], device="cpu")
    assert model.autocast is torch.bfloat16
    assert {parameter.dtype for parameter in model.trainable().values()} == {torch.float32}
    embedding = model.model.base_model.model.bert.embeddings.word_embeddings.weight
    assert embedding.dtype is torch.bfloat16
    assert load(bert, rank=2, labels=["no", "yes"], device="cpu").autocast is None


def test_only_the_adapter_trains(bert: ModelSettings) -> None:
    model = load(bert, rank=2, labels=["no", "yes"], device="cpu")
    by_torch = {id(p) for p in model.model.parameters() if p.requires_grad}
    assert by_torch == {id(p) for p in model.trainable().values()}
    model.freeze("a")
    assert {n.split(".")[-1] for n in model.trainable()} == {"lora_B", "weight", "bias"}
    model.freeze("b")
    assert {n.split(".")[-1] for n in model.trainable()} == {"lora_A", "weight", "bias"}
    with pytest.raises(ValueError, match="'c'"):
        model.freeze("c")


def test_write_refuses_an_adapter_of_another_model(llama: ModelSettings) -> None:
    model = load(llama, rank=4, device="cpu")
    fits = model.read()
    first = next(iter(fits.layers))
    less = {name: f for name, f in fits.layers.items() if name != first}
    more = {**fits.layers, "model.layers.9.self_attn.q_proj": fits.layers[first]}
    longer = {**fits.layers, first: LoraFactors(np.zeros((5, 32)), np.zeros((32, 5)), 2.0)}
    scaled = {**fits.layers, first: replace(fits.layers[first], scale=3.0)}
    for layers, message in [
        (less, f"no layer {first}"),
        (more, "model.layers.9.self_attn.q_proj"),
        (longer, r"shape \(5, 32\), this model wants \(4, 32\)"),
        (scaled, "scale 3.0"),
    ]:
        with pytest.raises(ModelError, match=message):
            model.write(Adapter(layers, {}))
    with pytest.raises(ModelError, match="classifier"):
        model.write(Adapter(fits.layers, {"classifier.weight": np.zeros((2, 2))}))
    assert_same(model.read(), fits)


def test_write_refuses_missing_heads(bert: ModelSettings) -> None:
    model = load(bert, rank=4, labels=["no", "yes"], device="cpu")
    with pytest.raises(ModelError, match="classifier"):
        model.write(Adapter(model.read().layers, {}))


def test_all_linear_leaves_the_output_layer_alone(llama: ModelSettings) -> None:
    layers = load(replace(llama, targets=("all-linear",)), rank=2, device="cpu").read().layers
    assert len(layers) == 14
    assert not [name for name in layers if "lm_head" in name]
