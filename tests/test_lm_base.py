"""Every way in which a model cannot be found, loaded or adapted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ciphertune import check_parts, model_folder, shapes
from ciphertune.errors import CiphertuneError, ModelError
from ciphertune.lm.model import load, load_tokenizer
from ciphertune.model_folder import resolve
from ciphertune.settings import ModelSettings
from tests.tiny import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return ModelSettings(name=str(tiny_llama(tmp_path_factory.mktemp("llama"))), max_length=32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tiny_bert(tmp_path_factory.mktemp("bert"))
    return ModelSettings(name=str(folder), task="classification", targets=("query", "value"), max_length=32)


def test_resolve(tmp_path: Path, llama: ModelSettings) -> None:
    assert resolve(llama.name) == llama.name
    assert resolve("someone/some-model") == "someone/some-model"
    embedded = Path(resolve("embedded"))
    assert embedded.parts[-3:] == ("ciphertune", "assets", "base")
    (tmp_path / "file").touch()
    for name, message in [
        ("", "model.name is empty"),
        (str(tmp_path / "nothing"), f"'{tmp_path}/nothing' does not exist"),
        ("./nothing", r"'\./nothing' does not exist"),
        (str(tmp_path), "no config.json"),
        (str(tmp_path / "file"), "is a file"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)


def test_check_plan_and_loader_say_the_same_of_a_folder_that_holds_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = set()
    for look in (resolve, check_parts.model_folder, shapes.is_known):
        with pytest.raises(CiphertuneError) as caught:
            look(str(tmp_path))
        said.add(str(caught.value))
    assert said == {f"model.name='{tmp_path}' has no config.json: give the folder of a transformers model"}
    monkeypatch.setattr(model_folder, "_EMBEDDED", tmp_path / "none")
    for look in (resolve, check_parts.model_folder, shapes.is_known):
        with pytest.raises(CiphertuneError, match=r"missing from this installation .*: install the package anew"):
            look("embedded")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/no-such-model' is neither a folder here nor a hub model") as caught:
        load(ModelSettings(name="nobody/no-such-model"), rank=2)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer") as caught:
        load_tokenizer(ModelSettings(name=str(folder)))
    assert str(folder) in str(caught.value)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer of model.name=.* cannot be read"):
        load_tokenizer(ModelSettings(name=str(folder)))


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(ModelSettings(name=str(folder), max_length=32), rank=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "rank", "message"),
    [
        ({"targets": ("q_prj",)}, 2, "'q_prj' is no linear layer of .*nearest: q_proj"),
        ({"targets": ("q_proj", "embed_tokens")}, 2, "'embed_tokens' is no linear layer"),
        ({"targets": ()}, 2, "model.targets is empty"),
        ({"targets": ("q_proj",)}, 33, r"rank 33 is above the size of layer model.layers.0.self_attn.q_proj \(32\)"),
        ({"targets": ("q_proj", "v_proj")}, 17, r"v_proj \(16\): use a rank of at most 16"),
        ({"targets": ("all-linear",)}, 17, r"k_proj \(16\)"),
        ({"max_length": 65}, 2, "model.max_length=65 .* set model.max_length=64"),
    ],
)
def test_what_does_not_fit_the_model(llama: ModelSettings, change: dict[str, object], rank: int, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(replace(llama, **change), rank=rank, device="cpu")
    assert "\n" not in str(caught.value)


def test_the_largest_rank_that_fits_is_accepted(llama: ModelSettings) -> None:
    assert load(llama, rank=16, device="cpu").read().rank == 16


@pytest.mark.parametrize("labels", [[], ["only"]])
def test_classification_needs_labels(bert: ModelSettings, labels: list[str]) -> None:
    with pytest.raises(ModelError, match="needs two labels"):
        load(bert, rank=2, labels=labels)


def test_an_encoder_is_no_causal_model(bert: ModelSettings) -> None:
    with pytest.raises(ModelError, match=r"not a causal language model.*model.task=classification"):
        load(replace(bert, task="causal_lm"), rank=2, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu"])
def test_a_device_that_is_not_there(llama: ModelSettings, device: str) -> None:
    with pytest.raises(ModelError, match=f"device='{device}'"):
        load(llama, rank=2, device=device)
