"""Find and load a base model and its tokenizer: the package's own, a folder, or a hub id. Never runs a model's code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ciphertune.errors import ModelError
from ciphertune.lm import quantization
from ciphertune.model_folder import TOKENIZER_FILES, resolve
from ciphertune.settings import ModelSettings


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of the model. Raises ModelError when the model or its tokenizer cannot be found or read."""
    where = _reachable(settings.name)
    local = Path(where).is_dir()
    if local and not any((Path(where) / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"model.name={settings.name!r} has no tokenizer: put its files there, e.g. {TOKENIZER_FILES[0]} "
            "(tokenizer.save_pretrained writes them)"
        )
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, tokenizers' own
        raise ModelError(f"the tokenizer of model.name={settings.name!r} cannot be read: {first_line(error)}") from None
    return tokenizer


def load_base(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PreTrainedModel, set[str]]:
    """The base model in `dtype` on `device`, and the names of its parameters that the folder does not hold.

    Every weight goes from the file to the device by itself, converted or quantized on the way: there is never a copy
    of the whole in float32 or in the CPU's memory. For classification the parameters that the folder lacks are the new
    head's, and their values come from torch's generator: the caller must initialise them. Raises ModelError when the
    model cannot be read or does not fit task or length.
    """
    kind: Any = AutoModelForCausalLM
    extra: dict[str, Any] = {"dtype": dtype}
    if settings.attention != "auto":
        extra["attn_implementation"] = settings.attention
    keep: list[str] = []
    if settings.task == "classification":
        kind = AutoModelForSequenceClassification
        names = dict(enumerate(labels))
        extra |= {"id2label": names, "label2id": {v: k for k, v in names.items()}, "ignore_mismatched_sizes": True}
        if settings.quantization != "none":  # a head trains, so it stays in floats: look which modules are heads
            keep = sorted(heads(*_pretrained(settings, kind, torch.device("meta"), extra)))
    extra |= quantization.options(settings.quantization, dtype, keep)
    model, new = _pretrained(settings, kind, device, extra)
    if new and settings.task == "causal_lm":
        raise ModelError(
            f"model.name={settings.name!r} has no weights for {sorted(new)[0]}: it is not a causal language model; "
            "give another model or set model.task=classification"
        )
    _check_length(settings, model, tokenizer)
    model.config.use_cache = False
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_id(tokenizer)  # a decoder with a classification head looks for it
    return model, new


def new_modules(base: PreTrainedModel, new: set[str]) -> set[str]:
    """The largest modules with only `new` parameters: they must travel with the adapter, since no folder has them."""
    found: set[str] = set()
    for name, module in base.named_modules():
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()] if name else []
        if inside and new.issuperset(inside) and not any(name.startswith(f"{owner}.") for owner in found):
            found.add(name)
    return found


def heads(base: PreTrainedModel, new: set[str]) -> set[str]:
    """The modules of a classifier that train as a whole: those of `new` parameters, and those that PEFT adds itself."""
    return new_modules(base, new) | {
        name for name, _ in base.named_modules() if name.split(".")[-1] in ("classifier", "score")
    }


def pick_device(name: str) -> torch.device:
    """The torch device for auto | cpu | cuda | cuda:N | mps. Raises ModelError when this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device={name!r} is not a device: use auto, cpu, cuda, cuda:N or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise ModelError(f"device={name!r} is not on this machine: use device=auto or device=cpu")
    return device


def pick_autocast(dtype: str, device: torch.device) -> torch.dtype | None:
    """The type to compute in: bfloat16, or None for plain float32. "auto" takes bfloat16 where CUDA has it."""
    if dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return None


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with; padding is masked, so any will do where the tokenizer has none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _reachable(name: str) -> str:
    """`resolve`; of a hub id the config.json is fetched first, so that an unreachable hub is reported once, early."""
    where = resolve(name)
    if not Path(where).is_dir():
        from huggingface_hub import hf_hub_download

        logger = logging.getLogger("huggingface_hub.utils._http")
        level = logger.level
        logger.setLevel(logging.ERROR)  # one line per attempt otherwise
        try:
            hf_hub_download(where, "config.json")
        except Exception as error:  # not found, gated, no connection, bad id: no common base class
            raise ModelError(
                f"model.name={name!r} is neither a folder here nor a hub model that can be reached "
                f"({type(error).__name__}): give an existing folder, or download the model to one first"
            ) from None
        finally:
            logger.setLevel(level)
    return where


def _check_length(settings: ModelSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    limits = [getattr(model.config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    limit = min((int(x) for x in limits if x), default=settings.max_length)
    if settings.max_length > limit:
        raise ModelError(
            f"model.max_length={settings.max_length} is more than model.name={settings.name!r} can read: "
            f"set model.max_length={limit} or less"
        )


def _pretrained(
    settings: ModelSettings, kind: Any, device: torch.device, extra: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """A model of `kind` on `device` and the names of its new parameters; on "meta" none is read."""
    where = _reachable(settings.name)
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                where,
                device_map={"": str(device)},
                local_files_only=Path(where).is_dir(),
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
    except Exception as error:  # as of a tokenizer, and safetensors' own
        raise ModelError(f"model.name={settings.name!r} cannot be loaded: {first_line(error)}") from None
    return model, set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of the head's missing weights: it is meant to be new."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
