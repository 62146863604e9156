"""What large models need: quantized bases, recomputed activations, bfloat16 weights, and never a second copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONF
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from benchmarks import large
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import ModelError, SettingsError
from ciphertune.lm import activations, base, quantization
from ciphertune.lm.batches import collate, loss_sum
from ciphertune.lm.data import Encoded
from ciphertune.lm.evaluate import evaluate
from ciphertune.lm.model import LoraModel, load
from ciphertune.lm.train import train
from ciphertune.settings import ModelSettings, TrainingSettings, compose
from tests.tiny import tiny_bert, tiny_classifier, tiny_llama

FAST = TrainingSettings(steps=10, batch_size=2, learning_rate=1e-3, threads=1)
TEXTS = [Encoded(tuple(range(1, 20)), tuple(range(1, 20))), Encoded(tuple(range(30, 45)), tuple(range(30, 45)))]
CLASSES = [Encoded(tuple(range(1, 20)), 0), Encoded(tuple(range(30, 45)), 1)]
LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    return ModelSettings(name=str(folder), targets=("all-linear",), max_length=32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tiny_bert(tmp_path_factory.mktemp("bert"), pooler=False)
    return ModelSettings(name=str(folder), task="classification", targets=("all-linear",), max_length=32)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    """One whose folder has a head."""
    folder = tiny_classifier(tmp_path_factory.mktemp("classifier"))
    return ModelSettings(name=str(folder), task="classification", targets=("all-linear",), max_length=32)


def data_of(settings: ModelSettings) -> list[Encoded]:
    return TEXTS if settings.task == "causal_lm" else CLASSES


# --- quantization: who may ask for it, and what is asked of transformers ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has one CUDA device with bfloat16, and bitsandbytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification, base.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", fail)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.usefixtures("nothing_loads")
def test_without_a_gpu_quantization_is_refused_before_anything_is_loaded(
    llama: ModelSettings, bits: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError) as caught:
        load(replace(llama, quantization=bits), rank=2, device=device)
    assert str(caught.value) == (
        f"model.quantization={bits} needs a CUDA GPU: this node's device is cpu; use model.quantization=none"
    )


@pytest.mark.usefixtures("gpu", "nothing_loads")
def test_a_node_told_to_use_its_cpu_learns_that_it_has_a_gpu(llama: ModelSettings) -> None:
    with pytest.raises(
        ModelError, match=r"device is cpu; start the node with device=auto or device=cuda, or use model"
    ):
        load(replace(llama, quantization="4bit"), rank=2, device="cpu")


def test_mps_is_no_cuda_gpu() -> None:
    with pytest.raises(ModelError, match="this node's device is mps"):
        quantization.check("8bit", torch.device("mps"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.usefixtures("gpu", "nothing_loads")
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    llama: ModelSettings, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError) as caught:
        load(replace(llama, quantization=bits), rank=2)
    assert f"model.quantization={bits} needs bitsandbytes" in str(caught.value)
    assert "pip install 'ciphertune[quantized]'" in str(caught.value)


def test_nothing_is_asked_of_a_node_without_quantization() -> None:
    for device in ("cpu", "cuda", "mps"):
        quantization.check("none", torch.device(device))
    assert quantization.options("none", torch.bfloat16) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=5bit"], "model.quantization='5bit' is not one of: none, 4bit, 8bit"),
        (["model.attention=flash"], "model.attention='flash' is not one of: auto, eager, sdpa"),
        (["model.gradient_checkpointing=often"], "model.gradient_checkpointing='often'"),
        (["method=flora", "model.quantization=4bit"], "model.quantization=4bit with method.aggregate=stack"),
        (["method=flora", "model=large"], "quantized weights cannot be added to"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        compose(CONF, overrides)
    assert "\n" not in str(caught.value)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `from_pretrained` is asked for, while the answer is the plain model on the CPU."""
    found: list[dict[str, Any]] = []
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        real = kind.from_pretrained

        def fake(where: str, *, real: Callable[..., Any] = real, **asked: Any) -> Any:
            found.append(asked)
            plain = {k: v for k, v in asked.items() if k not in ("quantization_config", "device_map")}
            return real(where, **plain)

        monkeypatch.setattr(kind, "from_pretrained", fake)
    return found


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("dtype", "computes"), [("auto", torch.bfloat16), ("float32", torch.float32)])
@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_four_bits_are_asked_for_as_qlora_has_them(
    llama: ModelSettings, calls: list[dict[str, Any]], dtype: str, computes: torch.dtype, device: str
) -> None:
    load(replace(llama, quantization="4bit", dtype=dtype), rank=2, device=device)
    (asked,) = calls
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype is asked["dtype"] is computes
    assert config.llm_int8_skip_modules is None  # transformers leaves out the output layer
    assert asked["device_map"] == {"": "cuda" if device == "auto" else device}
    assert asked["trust_remote_code"] is False


@pytest.mark.usefixtures("gpu")
def test_eight_bits_are_llm_int8(llama: ModelSettings, calls: list[dict[str, Any]]) -> None:
    load(replace(llama, quantization="8bit"), rank=2)
    config = calls[0]["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (False, True)
    assert config.quantization_method() == "llm_int8"
    assert config.llm_int8_has_fp16_weight is False  # or there would be a second copy


@pytest.mark.usefixtures("gpu")
def test_a_head_is_never_quantized(bert: ModelSettings, classifier: ModelSettings, calls: list[dict[str, Any]]) -> None:
    """It trains. Which modules are heads depends on what the folder holds: the first call reads no weight."""
    load(replace(bert, quantization="4bit"), rank=2, labels=LABELS)
    assert [asked["device_map"] for asked in calls] == [{"": "meta"}, {"": "cuda"}]
    assert "quantization_config" not in calls[0]
    assert calls[1]["quantization_config"].llm_int8_skip_modules == ["bert.pooler", "classifier"]
    load(replace(classifier, quantization="4bit"), rank=2, labels=LABELS)
    assert calls[3]["quantization_config"].llm_int8_skip_modules == ["classifier"]


@pytest.mark.usefixtures("calls")
def test_without_quantization_nothing_new_is_asked(
    llama: ModelSettings, bert: ModelSettings, calls: list[dict[str, Any]]
) -> None:
    load(llama, rank=2, device="cpu")
    load(bert, rank=2, labels=LABELS, device="cpu")
    assert [asked["device_map"] for asked in calls] == [{"": "cpu"}] * 2
    assert all("quantization_config" not in asked for asked in calls)


class Params4bit(torch.nn.Parameter):
    """bitsandbytes' parameter as the rest of the world sees it: codes in a column, and a class of this name."""


def test_nothing_can_be_merged_into_codes(llama: ModelSettings) -> None:
    model = load(llama, rank=2, device="cpu")
    name, layer = next(iter(model._layers()))
    change = np.ones(quantization.size(layer.get_base_layer()), np.float32)
    model.add_to_base({name: change})
    codes = Params4bit(torch.zeros(change.size // 2, 1, dtype=torch.uint8), requires_grad=False)
    layer.get_base_layer().weight = codes
    with pytest.raises(ModelError, match=f"layer {name}: it is quantized"):
        model.add_to_base({name: change})
    assert not codes.any()


# --- bitsandbytes itself, where it is installed: its CPU kernels do the same arithmetic as those of a GPU ---


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    """Rows of 64, the size of bitsandbytes' blocks."""
    pytest.importorskip("bitsandbytes", reason="the extra [quantized] is not installed")
    folder = tiny_llama(tmp_path_factory.mktemp("wide"), hidden=64)
    return ModelSettings(name=str(folder), targets=("all-linear",), max_length=32)


def really(settings: ModelSettings, bits: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> LoraModel:
    monkeypatch.setattr(quantization, "check", lambda *_: None)
    # for inference some CPUs pack weights in a way that no gradient passes; CUDA does not
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return load(replace(settings, quantization=bits, **changes), rank=4, labels=LABELS, device="cpu")


@pytest.mark.parametrize(("bits", "share"), [("4bit", 0.16), ("8bit", 1 / 254)])
def test_quantized_weights_are_those_of_the_folder(
    wide: ModelSettings, bits: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by at most half the widest gap between two codes, in units of the largest value of a block or row."""
    quantized, plain = really(wide, bits, monkeypatch), load(wide, rank=4, device="cpu")
    columns = activations.weight_columns(quantized)
    for (name, layer), (_, wanted) in zip(quantized._layers(), plain._layers(), strict=True):
        assert quantization.is_quantized(layer.get_base_layer())
        found, true = quantization.weight(layer.get_base_layer()).float(), wanted.get_base_layer().weight.detach()
        assert quantization.size(layer.get_base_layer()) == tuple(true.shape) == tuple(found.shape)
        blocks = true.reshape(-1, 64) if bits == "4bit" else true
        most = blocks.abs().amax(1, keepdim=True).expand_as(blocks).reshape(true.shape)
        assert ((found - true).abs() <= share * most * 1.1).all()  # scales are rounded too
        np.testing.assert_allclose(columns[name], found.abs().sum(0), rtol=1e-4)
    assert not quantization.is_quantized(quantized.model.base_model.model.lm_head)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_trains_on_a_quantized_base(
    wide: ModelSettings, bits: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on a plain model with the dequantized weights."""
    model = really(wide, bits, monkeypatch, gradient_checkpointing=checkpointing)
    plain = load(wide, rank=4, device="cpu")
    with torch.no_grad():
        for (_, layer), (_, true) in zip(model._layers(), plain._layers(), strict=True):
            true.get_base_layer().weight.copy_(quantization.weight(layer.get_base_layer()))
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    evaluate(model, TEXTS, FAST)  # in inference mode, which must leave nothing behind
    results = [train(m, TEXTS, FAST, seed=0) for m in (model, plain)]
    np.testing.assert_allclose(results[0].losses, results[1].losses, rtol=1e-3)
    assert results[0].losses[-1] < results[0].losses[0]
    for one, two in zip(model.read().layers.values(), plain.read().layers.values(), strict=True):
        assert cosine(one.b, two.b) > 0.97
    model.write(model.read())
    with pytest.raises(ModelError, match="quantized"):
        model.add_to_base({name: f.delta().astype(np.float32) for name, f in model.read().layers.items()})


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_heads_train_on_a_quantized_base(
    wide: ModelSettings, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bert(tmp_path / "bert", hidden=64, pooler=False)
    settings = replace(wide, name=str(folder), task="classification")
    model = really(settings, bits, monkeypatch)
    plain = load(settings, rank=4, labels=LABELS, device="cpu")
    assert list(model.read().heads) == list(plain.read().heads)
    for name, head in plain.read().heads.items():
        np.testing.assert_array_equal(model.read().heads[name], head)
    before = model.read().heads
    train(model, CLASSES, replace(FAST, steps=2), seed=0)
    assert all(not np.array_equal(before[name], head) for name, head in model.read().heads.items())
    model.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


# --- recomputed activations ---


def cosine(one: Any, two: Any) -> float:
    one, two = np.ravel(one).astype(np.float64), np.ravel(two).astype(np.float64)
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


def gradients(model: LoraModel, data: list[Encoded]) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """The gradient of each trained parameter, and the bytes that the forward pass keeps for the backward pass."""
    draw = np.random.default_rng(3)
    layers = {  # B = 0 would hide the gradient of A
        name: LoraFactors(f.a, draw.normal(0, 0.1, f.b.shape).astype(np.float32), f.scale)
        for name, f in model.read().layers.items()
    }
    model.write(Adapter(layers, model.read().heads))
    model.model.train()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed, _ = loss_sum(model, collate(data, model))
    summed.backward()
    return {name: p.grad.numpy().copy() for name, p in model.trainable().items()}, sum(kept.values())


def test_attention_is_computed_as_the_settings_say_and_changes_no_gradient(llama: ModelSettings) -> None:
    models = [load(replace(llama, attention=kind), rank=4, device="cpu") for kind in ("auto", "eager", "sdpa")]
    assert [m.model.config._attn_implementation for m in models] == ["sdpa", "eager", "sdpa"]
    (wanted, _), (found, _) = (gradients(model, data_of(llama)) for model in models[:2])
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-6, rtol=1e-4)
        assert gradient.any()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_changes_no_gradient_and_keeps_less(
    kind: str, dropout: float, request: pytest.FixtureRequest
) -> None:
    settings = replace(request.getfixturevalue(kind), dropout=dropout)
    data = data_of(settings)
    models = [
        load(replace(settings, gradient_checkpointing=on), rank=4, labels=LABELS, device="cpu") for on in (False, True)
    ]
    (wanted, much), (found, less) = (gradients(model, data) for model in models)
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-6, rtol=1e-5)
        assert gradient.any()
    weights = sum(p.numel() * p.element_size() for p in models[0].model.parameters())
    assert less < 0.6 * much, f"{less} of {much} bytes are still kept, of which {weights} at most are weights"
    assert models[1].model.config.use_cache is False


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_with_recomputing_ends_where_it_ends_without(kind: str, request: pytest.FixtureRequest) -> None:
    settings = request.getfixturevalue(kind)
    ends = []
    for on in (False, True):
        model = load(replace(settings, gradient_checkpointing=on), rank=4, labels=LABELS, device="cpu")
        before = evaluate(model, data_of(settings), FAST).loss  # works in inference mode
        model.freeze("a")
        result = train(model, data_of(settings), FAST, seed=0)
        ends.append((before, result.losses, model.read()))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-6)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)
    for name, factors in ends[0][2].layers.items():
        np.testing.assert_allclose(ends[1][2].layers[name].b, factors.b, atol=1e-5)


def test_a_model_that_cannot_recompute_is_named(llama: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"activations again: set model\.gradient_checkpointing=false"):
        load(replace(llama, gradient_checkpointing=True), rank=2, device="cpu")


# --- bfloat16, and one copy of the base ---


def weights(model: LoraModel) -> dict[str, torch.nn.Parameter]:
    """The base's parameters."""
    trained = {id(p) for p in model.trainable().values()}
    return {name: p for name, p in model.model.named_parameters() if id(p) not in trained}


def size(parameters: dict[str, torch.nn.Parameter]) -> int:
    return sum(p.untyped_storage().nbytes() for p in {id(p): p for p in parameters.values()}.values())


def nbytes(adapter: Adapter) -> int:
    return sum(f.a.nbytes + f.b.nbytes for f in adapter.layers.values()) + sum(h.nbytes for h in adapter.heads.values())


def test_a_base_in_bfloat16_takes_half_the_memory(llama: ModelSettings) -> None:
    wide, half = (load(replace(llama, dtype=dtype), rank=4, device="cpu") for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in weights(half).values()} == {torch.bfloat16}
    assert {p.dtype for p in half.trainable().values()} == {torch.float32}
    assert 2 * size(weights(half)) == size(weights(wide))
    assert size(half.trainable()) == size(wide.trainable()) == nbytes(half.read())


def test_an_adapter_on_bfloat16_weights_trains_like_one_on_float32(llama: ModelSettings) -> None:
    """bfloat16 has 8 bits of precision, so updates agree to about a hundredth, and by chance alone not at all."""
    updates = []
    for dtype in ("float32", "bfloat16"):
        model = load(replace(llama, dtype=dtype), rank=4, device="cpu")
        losses = train(model, TEXTS, FAST, seed=0).losses
        updates.append((losses, np.concatenate([f.delta().ravel() for f in model.read().layers.values()])))
    np.testing.assert_allclose(updates[0][0], updates[1][0], rtol=5e-3)
    assert cosine(updates[0][1], updates[1][1]) > 0.995
    assert not np.array_equal(updates[0][1], updates[1][1])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_all_clients_start_alike_whatever_their_bases_type(kind: str, request: pytest.FixtureRequest) -> None:
    """New heads too: a GPU's bfloat16 and a CPU's float32 meet in one run, and their first adapters are compared."""
    settings = request.getfixturevalue(kind)
    one, two = (
        load(replace(settings, dtype=dtype), rank=2, labels=LABELS, device="cpu").read()
        for dtype in ("float32", "bfloat16")
    )
    for name, factors in one.layers.items():
        np.testing.assert_array_equal(factors.a, two.layers[name].a)
    assert list(one.heads) == list(two.heads)
    for name, head in one.heads.items():
        np.testing.assert_array_equal(head, two.heads[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_base_stays_where_it_is(kind: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Read, written, trained and measured: no weight of the base is replaced, changed or handed out."""
    settings = replace(request.getfixturevalue(kind), dtype=dtype, gradient_checkpointing=True)
    model = load(settings, rank=4, labels=LABELS, device="cpu")
    everything = dict(model.model.named_parameters())
    places = {name: (id(p), p.data_ptr(), p.dtype) for name, p in everything.items()}
    values = {name: p.detach().clone() for name, p in weights(model).items()}
    adapter = model.read()
    model.write(adapter)
    train(model, data_of(settings), replace(FAST, steps=2), seed=0)
    evaluate(model, data_of(settings), FAST)
    trained = model.read()
    model.write(adapter)
    assert {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.model.named_parameters()} == places
    assert all(torch.equal(p, values[name]) for name, p in weights(model).items())
    assert all(p.grad is None for p in weights(model).values())
    for found in (adapter, trained):
        assert nbytes(found) == size(model.trainable())  # the adapter and nothing else
        arrays = [x for f in found.layers.values() for x in (f.a, f.b)] + list(found.heads.values())
        assert not {x.ctypes.data for x in arrays} & {p.data_ptr() for p in everything.values()}


def test_write_takes_arrays_as_they_come_and_keeps_none(llama: ModelSettings) -> None:
    """Read-only (from a safetensors file), float64 (from a mean), transposed, contiguous: none is changed later."""
    model = load(llama, rank=4, device="cpu")
    draw = np.random.default_rng(0)
    wanted = {
        name: (draw.normal(size=f.a.shape).astype(np.float32), draw.normal(size=f.b.shape).astype(np.float32))
        for name, f in model.read().layers.items()
    }

    def dressed(number: int, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        kinds = (x.copy(), x.astype(np.float64), np.asfortranarray(x), x[::-1].copy()[::-1])
        found = kinds[number % 4]
        found.setflags(write=number % 3 == 0)
        return found

    given = {n: LoraFactors(dressed(i, a), dressed(i + 1, b), 2.0) for i, (n, (a, b)) in enumerate(wanted.items())}
    model.write(Adapter(given, {}))
    train(model, TEXTS, replace(FAST, steps=1), seed=0)
    for name, (a, b) in wanted.items():
        np.testing.assert_array_equal(given[name].a, a)
        np.testing.assert_array_equal(given[name].b, b)
    model.write(Adapter(given, {}))
    for name, factors in model.read().layers.items():
        np.testing.assert_array_equal(factors.a, wanted[name][0])
        np.testing.assert_array_equal(factors.b, wanted[name][1])


class Watch(TorchDispatchMode):
    """Shapes of the float32 tensors of `least` entries or more that are made, outside the meta device."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.dtype is torch.float32 and x.device.type != "meta":
                self.seen |= {tuple(x.shape)} if x.numel() >= self.least else set()
        return result


def test_a_bfloat16_checkpoint_is_loaded_without_a_float32_copy(
    llama: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads do is not seen
    stored = AutoModelForCausalLM.from_pretrained(llama.name, dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path)
    for file in Path(llama.name).glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = replace(llama, name=str(tmp_path), dtype="bfloat16", targets=("q_proj", "v_proj"))
    with Watch(32 * 16) as seen:  # the smallest matrix of the base; an adapter's are of 4 x 32
        model = load(settings, rank=4, device="cpu")
    assert not seen.seen
    for name, value in stored.state_dict().items():
        found = model.model.base_model.model.get_parameter(
            name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")
        )
        assert torch.equal(found, value)
    with Watch(32 * 16) as seen:  # and this is what it looks like where there is one
        load(replace(settings, dtype="float32"), rank=4, device="cpu")
    assert (300, 32) in seen.seen


# --- the benchmark ---

TINY = "--hidden 32 --layers 2 --intermediate 64 --heads 4 --rank 4 --length 8 --vocabulary 300 --steps 2 --batch 2"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_measures_a_round(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large.main([*TINY.split(), "--dtype", dtype, "--device", "cpu", "--out", str(tmp_path / "large.json")])
    found = json.loads((tmp_path / "large.json").read_text())
    stages = {"build", "adapt", "train", "read", "seal", "server", "unseal", "write"}
    assert set(found["seconds"]) == stages | {"send", "receive"}
    assert set(found["peak_rss_bytes"]) == stages and min(found["peak_rss_bytes"].values()) > 10**7
    # 2 blocks of q, k, v, o (32 x 32), gate, up, down (32 x 64) and two norms; embedding, output, last norm
    parameters = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 2 * 300 * 32 + 32
    assert found["bytes"]["base"] == parameters * {"float32": 4, "bfloat16": 2}[dtype]
    assert found["bytes"]["adapter"] == 2 * 2 * 4 * (32 + 32) * 4  # two layers of q and v, rank 4, float32
    assert found["values_sealed"] == 2 * 2 * 4 * 32  # one of the two factors
    assert 0 < found["largest_error_of_the_mean"] < 1e-4
    assert np.isfinite(found["losses"]).all() and len(found["losses"]) == 2
    assert found["about"]["versions"]["torch"] == torch.__version__
    assert "one round" in capsys.readouterr().out


def test_the_benchmark_asks_for_a_gpu_where_it_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.quantization=4bit needs a CUDA GPU"):
        large.main([*TINY.split(), "--quantization", "4bit", "--device", "cpu", "--out", str(tmp_path / "x.json")])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_benchmark_quantizes(bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra [quantized] is not installed")
    monkeypatch.setattr(quantization, "check", lambda *_: None)
    words = [*TINY.split(), "--hidden", "64", "--device", "cpu", "--quantization", bits]
    large.main([*words, "--out", str(tmp_path / "large.json")])
    found = json.loads((tmp_path / "large.json").read_text())
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 64)
    other = 4 * (2 * 2 * 64 + 2 * 300 * 64 + 64)  # norms, embedding and output stay float32
    assert found["bytes"]["base"] == linear * {"4bit": 1, "8bit": 2}[bits] // 2 + other
