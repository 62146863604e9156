"""What settings may be: choices, ranges, and what contradicts what."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import reduce
from pathlib import PurePath
from typing import Any

from ciphertune.errors import SettingsError
from ciphertune.privacy import noise_multiplier
from ciphertune.sensitivity import SCORES
from ciphertune.settings import CryptoSettings, MethodSettings, Settings, ckks_params, packed_params

CHOICES = {
    "method.share": ("both", "alternate", "b_only", "none"),
    "method.select": ("none", "all", "negotiated", "dropped", "entries"),
    "method.aggregate": ("separate", "product", "stack"),
    "method.fit_rank": ("nested", "pad", "svd", "merge"),
    "method.weighting": ("samples", "norm"),
    "method.prune": ("none", "own", "agreed"),
    "method.prune_schedule": ("fixed", "scaled"),
    "method.prune_mean": ("all", "kept"),
    "method.noise": ("none", "gaussian"),
    "training.schedule": ("constant", "cosine"),
    "method.first_score": SCORES,
    "method.score": SCORES,
    "model.scaling": ("common", "own"),
    "model.task": ("causal_lm", "classification"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.release": ("bfloat16", "float32"),
    "model.attention": ("auto", "eager", "sdpa"),
    "model.quantization": ("none", "4bit", "8bit"),
    "data.source": ("embedded", "jsonl", "hf"),
    "data.partition": ("none", "iid", "dirichlet", "natural"),
    "crypto.backend": ("clear", "ckks", "ckks_packed", "bfv_packed"),
    "crypto.precision": ("float32", "float64"),
    "log": ("", "tensorboard"),
}
# parameters that a backend reads, besides the bound
USED = {
    "clear": (),
    "ckks": ("poly_modulus_degree", "coeff_mod_bits", "scale_bits", "coefficient_bits"),
    "ckks_packed": ("poly_modulus_degree", "modulus_bits", "wanted_error", "max_updates"),
    "bfv_packed": ("poly_modulus_degree", "modulus_bits", "wanted_error", "max_updates", "plain_bits"),
}
# inclusive bounds
RANGES = {
    "method.rank_cap": (0, 4096),
    "method.rate_factor": (1e-3, 1e3),
    "method.fraction": (1e-6, 1.0),
    "method.prune_start": (0.0, 0.999),
    "method.prune_target": (0.0, 0.999),
    "method.prune_from": (0.0, 1e6),
    "method.prune_until": (1e-3, 1e6),
    "method.clip": (1e-6, 1e6),
    "method.noise_multiplier": (1e-3, 1e4),
    "method.epsilon": (0.0, 1e3),
    "method.delta": (1e-12, 0.1),
    "training.learning_rate_end": (0.0, 10.0),
    "method.renegotiate_every": (0, 100_000),
    "method.calibration_samples": (1, 1_000_000),
    "crypto.coefficient_bits": (0, 60),
    "crypto.modulus_bits": (0, 60),
    "crypto.plain_bits": (0, 60),
    "crypto.wanted_error": (1e-15, 1.0),
    "crypto.max_updates": (1, 1_000_000),
    "model.rank": (1, 4096),
    "model.alpha": (1e-6, 1e6),
    "model.dropout": (0.0, 0.9),
    "model.max_length": (8, 1_000_000),
    "data.heldout_fraction": (0.0, 0.9),
    "data.dirichlet_alpha": (1e-3, 1e6),
    "data.max_train": (0, 10**9),
    "data.max_heldout": (0, 10**9),
    "crypto.bound": (1e-6, 1e9),
    "federation.rounds": (1, 100_000),
    "federation.fraction": (1e-6, 1.0),
    "federation.min_clients": (1, 100_000),
    "federation.min_contributors": (1, 100_000),
    "federation.exclude_after": (0, 100_000),
    "federation.max_norm": (0.0, 1e9),
    "federation.max_mean_norm": (0.0, 1e9),
    "federation.evaluate_every": (1, 100_000),
    "federation.wait_timeout": (1.0, 1e7),
    "federation.round_timeout": (1.0, 1e7),
    "training.steps": (1, 1_000_000),
    "training.batch_size": (1, 1_000_000),
    "training.accumulation": (1, 1_000_000),
    "training.learning_rate": (1e-9, 10.0),
    "training.weight_decay": (0.0, 10.0),
    "training.max_grad_norm": (1e-6, 1e9),
    "training.eval_batch_size": (1, 1_000_000),
    "training.threads": (0, 4096),
}


def check(settings: Settings) -> None:
    """Raise SettingsError when a value is outside its choices or range, or two values contradict each other."""
    for dotted, choices in CHOICES.items():
        value = _get(settings, dotted)
        if value not in choices:
            raise SettingsError(f"{dotted}={value!r} is not one of: {', '.join(c or 'nothing' for c in choices)}")
    for dotted, (low, high) in RANGES.items():
        value = _get(settings, dotted)
        if not low <= value <= high:
            raise SettingsError(f"{dotted}={value} is out of range: want {low} to {high}")
    federation, crypto = settings.federation, settings.crypto
    if not federation.clients:
        raise SettingsError("federation.clients is empty: name at least one client")
    for number, client in enumerate(federation.clients):
        if not 1 <= client.rank <= 4096:
            raise SettingsError(f"federation.clients[{number}].rank={client.rank} is out of range: want 1 to 4096")
        if not 0.0 <= client.budget <= 1.0:
            raise SettingsError(f"federation.clients[{number}].budget={client.budget} is out of range: want 0 to 1")
    if federation.min_contributors > federation.min_clients:
        raise SettingsError(
            f"federation.min_contributors={federation.min_contributors} exceeds federation.min_clients="
            f"{federation.min_clients}: no round could be released"
        )
    _check_crypto(crypto)
    most = max(federation.min_clients, len(federation.clients))
    if crypto.packed and most > crypto.max_updates:
        raise SettingsError(
            f"crypto.max_updates={crypto.max_updates} is below the federation's {most} clients: raise it, and with it "
            "crypto.modulus_bits where that is refused"
        )
    _check_method(settings)
    if not settings.model.targets:
        raise SettingsError("model.targets is empty: name linear layers of the model, or [all-linear]")
    if settings.data.source == "jsonl" and not settings.data.heldout_path and not settings.data.heldout_fraction:
        raise SettingsError("there would be no held-out text: set data.heldout_fraction above 0, or data.heldout_path")
    if settings.resume and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", PurePath(settings.resume).name):
        raise SettingsError(f"resume={settings.resume!r} is no run folder: want resume=runs/NAME")
    if settings.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", settings.name):
        raise SettingsError(f"name={settings.name!r}: use letters, digits, '.', '_' and '-', at most 100 of them")
    if settings.model.task == "classification" and settings.data.source == "jsonl" and len(settings.data.labels) < 2:
        raise SettingsError("model.task=classification needs data.labels, e.g. data.labels=[negative,positive]")


def _check_crypto(crypto: CryptoSettings) -> None:
    """Raise SettingsError for parameters that are unsafe, could overflow, or belong to another backend."""
    default = CryptoSettings()
    used = ("backend", "bound", "precision", *USED[crypto.backend])
    for name in (f.name for f in fields(crypto) if f.name not in used):
        if crypto.backend != "clear" and getattr(crypto, name) != getattr(default, name):
            raise SettingsError(
                f"crypto.{name}={getattr(crypto, name)} has no effect with crypto.backend={crypto.backend}, "
                f"which reads {', '.join(USED[crypto.backend])}"
            )
    if crypto.backend == "ckks":
        ckks_params(crypto)
    elif crypto.packed:
        packed_params(crypto)


def _check_method(settings: Settings) -> None:
    """Raise SettingsError for names that make no method together."""
    method, crypto = settings.method, settings.crypto
    nothing_secret = method.select in ("none", "dropped")
    if nothing_secret and crypto.backend != "clear":
        raise SettingsError(
            f"method={method.name} sends everything in the clear: use crypto=clear, not {crypto.backend}"
        )
    fits = {"separate": ("nested", "pad"), "product": ("svd",), "stack": ("merge",)}[method.aggregate]
    if method.fit_rank not in fits or (method.aggregate != "separate" and method.share != "both"):
        raise SettingsError(
            f"method.aggregate={method.aggregate} with method.share={method.share} and method.fit_rank="
            f"{method.fit_rank}: want method.fit_rank={' or '.join(fits)}"
            + ("" if method.aggregate == "separate" else ", and method.share=both")
        )
    selects = {"separate": ("none", "all", "entries"), "product": ("none", "negotiated", "dropped"), "stack": ("none",)}
    if method.select not in selects[method.aggregate]:
        raise SettingsError(
            f"method.select={method.select} with method.aggregate={method.aggregate}: want one of "
            f"{', '.join(selects[method.aggregate])}; to encrypt all of a product's A give every client the budget 1"
        )
    if settings.model.scaling == "own" and method.aggregate == "separate":
        raise SettingsError(
            "model.scaling=own: factors of clients with unequal scales cannot be averaged apart; use "
            "model.scaling=common, or a method with method.aggregate=product"
        )
    if settings.model.quantization != "none" and method.aggregate == "stack":
        raise SettingsError(
            f"model.quantization={settings.model.quantization} with method.aggregate=stack: every round is merged into "
            "the base model, and quantized weights cannot be added to; use model.quantization=none or another method"
        )
    if method.aggregate == "product" and crypto.backend != "clear" and (crypto.packed or not crypto.coefficient_bits):
        raise SettingsError(f"method={method.name} multiplies ciphertexts by plaintexts: use crypto=ckks_product")
    if method.aggregate != "product" and crypto.backend == "ckks" and crypto.coefficient_bits:
        raise SettingsError(
            f"method={method.name} only adds: crypto.coefficient_bits={crypto.coefficient_bits} (crypto=ckks_product) "
            "is for method=she_lora, which sends decrypted values on in the clear: its key must protect nothing else; "
            "use crypto=ckks_packed or crypto=ckks"
        )
    _check_pruning(method)
    if method.prune_mean == "kept" and method.prune == "own" and crypto.bound < 1:
        raise SettingsError(f"method.prune_mean=kept sends weights up to 1: raise crypto.bound={crypto.bound:g} to 1")
    if method.noise == "gaussian":
        z = noise_multiplier(method, settings.federation.rounds)
        if 8 * z * method.clip > crypto.bound:  # of a million entries none is that far out
            raise SettingsError(
                f"noise of {z:.3g} x method.clip={method.clip:g} would exceed crypto.bound={crypto.bound:g}: "
                "lower method.clip, raise method.epsilon or the bound"
            )
    if method.noise != "none" and method.aggregate != "separate":
        raise SettingsError(f"method.noise={method.noise} with method.aggregate={method.aggregate}: want separate")


def _check_pruning(method: MethodSettings) -> None:
    """Raise SettingsError for a schedule that is none, or a method that cannot be pruned."""
    if method.prune_target < method.prune_start:
        raise SettingsError(
            f"method.prune_target={method.prune_target:g} is below method.prune_start={method.prune_start:g}"
        )
    if method.prune_until <= method.prune_from:
        raise SettingsError(
            f"method.prune_until={method.prune_until:g} is not after method.prune_from={method.prune_from:g}: "
            "the rate could not rise in between"
        )
    if method.prune != "none" and (method.select != "all" or method.aggregate != "separate"):
        raise SettingsError(
            f"method.prune={method.prune} with method.select={method.select} and method.aggregate={method.aggregate}: "
            "pruning needs method.select=all and method.aggregate=separate"
        )


def _get(settings: Settings, dotted: str) -> Any:
    return reduce(getattr, dotted.split("."), settings)
