"""What `ciphertune check` looks at on the node's own disk: key, text, model, device. Each gives a fact or an error.

An error's text is the remedy, as everywhere in the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ciphertune.errors import DataError, KeyFileError, ModelError
from ciphertune.model_folder import TOKENIZER_FILES, resolve
from ciphertune.node import NodeSettings
from ciphertune.plan import HeadShape, LayerShape
from ciphertune.scores import size
from ciphertune.settings import Settings
from ciphertune.shapes import is_known, model_shapes

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Node:
    """What is looked at. conf: the app's folder of settings."""

    settings: Settings
    own: NodeSettings
    conf: Path

    @cached_property
    def folder(self) -> Path:
        """Where the model's files are. Raises ModelError when they are not on this machine."""
        return model_folder(self.settings.model.name)

    @cached_property
    def shapes(self) -> tuple[tuple[LayerShape, ...], tuple[HeadShape, ...]]:
        """Layers and heads of the adapter, none where the model's family is not known. Raises SettingsError."""
        if not is_known(str(self.folder)):
            return (), ()
        settings = replace(self.settings.model, name=str(self.folder))
        return model_shapes(settings, len(self.settings.data.labels), [self.own.rank])

    @cached_property
    def texts(self) -> tuple[str, int, int, int]:
        """A name for the data, how many texts there are to train on, how many are held out, and the characters of all.

        A long text gives several examples. Raises DataError.
        """
        from ciphertune.lm.data import client_lines

        part = self.own.part(self.settings.data)
        name, train, heldout = client_lines(
            self.settings.data, self.settings.model, client=part, clients=self.own.clients, path=self.own.data_path
        )
        characters = sum(len(piece) for line in (*train, *heldout) for piece in (line.text, *(line.prompt or ())))
        return name, len(train), len(heldout), characters


def key(node: Node) -> str:
    """The key file: there, private, whole, and made for the run's parameters. Shows its fingerprint.

    Raises KeyFileError.
    """
    from ciphertune.crypto import keys, words
    from ciphertune.presets import params_digest, preset

    crypto = node.settings.crypto
    if crypto.backend == "clear":
        return "none is needed: nothing is encrypted"
    held = keys.load(node.own.key_file)
    if held.params_digest != params_digest(crypto):
        found = preset(held.params_digest, node.conf)
        was = f"crypto={found[0]}" if found else "other parameters"
        raise KeyFileError(
            f"{node.own.key_file} was made for {was}, not for those of this run ({crypto.backend}): "
            "give the overrides of the run, or get a key for them"
        )
    return f"fingerprint {held.fingerprint.hex()}: {words.spoken(held.fingerprint)}"


def data(node: Node) -> str:
    """The text: readable, every line as the task wants it, and how much there is. Raises DataError."""
    name, train, heldout, _ = node.texts
    if not train:
        raise DataError(f"{name}: no example is left to train on: add some, or lower data.heldout_fraction")
    return f"{name}: {train} texts to train on, {heldout} held out"


def model(node: Node) -> str:
    """The model: a folder with configuration, weights and tokenizer, or a hub model that was downloaded before.

    Raises ModelError for one that is absent or incomplete, SettingsError for targets or a rank that do not fit it.
    """
    name, folder = node.settings.model.name, node.folder
    for what, patterns in (("weights", _WEIGHTS), ("tokenizer", TOKENIZER_FILES)):
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise ModelError(f"model.name={name!r} has no {what} in {folder}: copy the whole model there")
    layers, heads = node.shapes
    adapted = (
        f"{len(layers)} layers adapted"
        if layers
        else "its family is not known here, so targets and rank are not checked"
    )
    return f"{name}, {size(sum(p.stat().st_size for p in weights(folder)))} of weights, {adapted}" + (
        ", with a head" if heads else ""
    )


def model_folder(name: str) -> Path:
    """Where the model's files are. Raises ModelError when they are not on this machine."""
    if Path(where := resolve(name)).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(where, "config.json")
    if not isinstance(cached, str):
        raise ModelError(f"model.name={name!r} has not been downloaded on this machine: hf download {name}")
    return Path(cached).parent


def device(node: Node) -> str:
    """The device that trains, and whether this machine has it."""
    from ciphertune.lm.base import pick_device
    from ciphertune.lm.quantization import check as check_quantization

    found = pick_device(node.own.device)
    check_quantization(node.settings.model.quantization, found)
    return str(found)


def weights(folder: Path) -> list[Path]:
    """The files that hold a model's weights."""
    return next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
