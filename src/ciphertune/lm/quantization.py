"""Base models in 4 or 8 bits, through bitsandbytes: QLoRA's NF4 (arXiv 2305.14314, section 3), LLM.int8() (2208.07339).

Only the linear layers of the frozen base are quantized. The output layer, the heads and the adapter are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from ciphertune.errors import ModelError


def check(quantization: str, device: torch.device) -> None:
    """Raise ModelError when `device` cannot hold a base model in `quantization` (none | 4bit | 8bit)."""
    if quantization == "none":
        return
    if device.type != "cuda":
        remedy = "use model.quantization=none"
        if torch.cuda.is_available():
            remedy = f"start the node with device=auto or device=cuda, or {remedy}"
        raise ModelError(
            f"model.quantization={quantization} needs a CUDA GPU: this node's device is {device}; {remedy}"
        )
    if not is_bitsandbytes_available():  # false as well when it is older than transformers wants
        raise ModelError(
            f"model.quantization={quantization} needs bitsandbytes: pip install 'ciphertune[quantized]', "
            "or use model.quantization=none"
        )


def options(quantization: str, dtype: torch.dtype, keep: Sequence[str] = ()) -> dict[str, Any]:
    """What `from_pretrained` must be told besides; nothing for "none".

    dtype: of the values that the linear layers compute with.  keep: names of modules to leave as they are; where there
    are none, transformers leaves the output layer and what is tied to it.
    """
    if quantization == "none":
        return {}
    kept = list(keep) or None
    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,  # of 4 bits too, whatever its name says
    )
    return {"quantization_config": config}


def is_quantized(layer: Any) -> bool:
    """Whether a linear layer's weights are packed codes: no numbers that could be added to."""
    return bool(get_bnb_param_type(layer.weight))


def size(layer: Any) -> tuple[int, int]:
    """(m, n): outputs and inputs of a linear layer; a quantized weight's own shape does not tell."""
    if isinstance(layer, Conv1D):  # stores (n, m)
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    return int(layer.out_features), int(layer.in_features)


def weight(layer: Any) -> torch.Tensor:
    """The weights (m, n) of a linear layer, a new tensor where they are quantized."""
    if is_quantized(layer):
        values: torch.Tensor = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
        return values.detach()
    stored: torch.Tensor = layer.weight.detach()
    return stored.T if isinstance(layer, Conv1D) else stored
