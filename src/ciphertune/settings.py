"""Settings: one frozen dataclass per group of `conf/`, composed by Hydra, checked here, digested for the handshake."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from ciphertune.crypto.params import CkksParams, PackedParams, smallest_modulus
from ciphertune.errors import SettingsError
from ciphertune.plain import build

# What only the party itself needs to know; two parties may differ in it and still work together.
_LOCAL = ("runs_dir", "name", "resume", "record_server_view", "record_updates", "log")


@dataclass(frozen=True)
class MethodSettings:
    """A method is a tuple of names (`conf/method/`)."""

    name: str = "sealed"
    share: str = "alternate"  # both | alternate | b_only | none
    select: str = "all"  # none | all | negotiated | dropped | entries: which part of the update is secret
    aggregate: str = "separate"  # separate | product | stack
    fit_rank: str = "nested"  # nested | pad | svd | merge
    weighting: str = "samples"  # samples | norm: what a client's part in a mean is weighted by
    rate_factor: float = 1.0  # times training.learning_rate; a factor that moves alone takes larger steps
    rank_cap: int = (
        0  # product: largest rank of an aggregate; 0: twice the largest of a client, or that if all is clear
    )
    first_score: str = (
        "wanda_weight"  # negotiated: what columns are scored by before round 1 (SCORES in sensitivity.py)
    )
    score: str = "wanda_adapter"  # negotiated: and later
    renegotiate_every: int = 0  # rounds; 0: never
    calibration_samples: int = 128  # examples that the activations are measured on
    fraction: float = 0.1  # entries: share of the entries to encrypt
    prune: str = "none"  # none | own | agreed: whose mask prunes the factors
    prune_start: float = 0.2  # share of the entries that is pruned at first, and in the end
    prune_target: float = 0.5
    prune_from: float = 40.0  # round (from 0) of the first pruning, and of the last rate
    prune_until: float = 200.0
    prune_schedule: str = "scaled"  # fixed | scaled: rounds as above, or the same course over the rounds of this run
    prune_mean: str = "all"  # own: all | kept: a pruned entry counts as zero in the mean, or does not count
    noise: str = "none"  # none | gaussian: each client clips its update and adds noise to it
    clip: float = 1.0  # gaussian: largest L2 norm of a client's update, heads included
    noise_multiplier: float = 1.0  # gaussian: standard deviation of the noise per entry, in units of `clip`
    epsilon: float = 0.0  # gaussian: above 0 the noise multiplier follows from this target over all rounds
    delta: float = 1e-5  # gaussian: of the (epsilon, delta) guarantee

    @property
    def negotiates(self) -> bool:
        """Whether the clients negotiate columns, to encrypt them or to leave them out."""
        return self.select in ("negotiated", "dropped")

    @property
    def common(self) -> bool:
        """Whether all clients hold the same components, those that are shared, and each trains its own first ones.

        With its own ones alone, a client of small rank would learn to make up for those that it lacks.
        """
        return self.fit_rank == "nested" and self.share != "none"


@dataclass(frozen=True)
class ModelSettings:
    """The base model and the shape of the adapter (`conf/model/`)."""

    name: str = "embedded"  # embedded | a folder | a hub id
    task: str = "causal_lm"  # causal_lm | classification
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # module name endings, or the single word all-linear
    rank: int = 8  # the reference rank that alpha refers to; a client's own rank is in the federation group
    alpha: float = 16.0  # scale = alpha / rank, the same for clients of every rank
    scaling: str = "common"  # common | own: scale = alpha / (the client's own rank), as PEFT has it
    dropout: float = 0.0
    max_length: int = 128  # tokens
    dtype: str = "auto"  # auto (bfloat16 where the device has it) | float32 | bfloat16
    release: str = "bfloat16"  # bfloat16 | float32: what the finished adapter is rounded to (SECURITY.md says why)
    attention: str = "auto"  # auto (transformers' choice) | eager | sdpa
    quantization: str = "none"  # none | 4bit | 8bit: of the frozen base; needs a CUDA GPU and bitsandbytes
    gradient_checkpointing: bool = False  # less memory for a third more time: compute each block again, backwards


@dataclass(frozen=True)
class DataSettings:
    """Where a client's text comes from (`conf/data/`)."""

    source: str = "embedded"  # embedded | jsonl | hf
    path: str = ""  # jsonl: a file, may contain {client}; a node's own data-path wins
    heldout_path: str = ""  # jsonl: held-out file, may contain {client}; empty: a share of the client's own lines
    heldout_fraction: float = 0.1
    labels: tuple[str, ...] = ()  # classification: every label, in the order of the model's outputs
    dataset: str = ""  # hf: name on the hub
    subset: str = ""  # hf
    split: str = "train"  # hf
    partition: str = "none"  # none | iid | dirichlet | natural: how one file or data set is divided among clients
    partition_by: str = "label"  # dirichlet: the label column; natural: the id column
    dirichlet_alpha: float = 0.3
    max_train: int = 0  # examples per client, 0 = all
    max_heldout: int = 0
    seed: int = 0  # of the partition


@dataclass(frozen=True)
class CryptoSettings:
    """The backend and its parameters (`conf/crypto/`)."""

    backend: str = "ckks"  # clear | ckks | ckks_packed | bfv_packed
    poly_modulus_degree: int = 4096
    coeff_mod_bits: tuple[int, ...] = (54, 20)
    scale_bits: int = 40
    bound: float = 64.0  # largest absolute value of an update that is accepted
    coefficient_bits: int = 0  # log2 of the scale of plaintext factors; above 0 only where a method multiplies
    precision: str = "float32"  # of what travels in the clear: float32 | float64
    modulus_bits: int = 40  # packed: of the one prime; 0: the smallest that keeps `wanted_error`
    wanted_error: float = 1e-4  # packed: largest error of a mean, where modulus_bits is 0
    max_updates: int = 1000  # packed: most updates in one sum
    plain_bits: int = 0  # bfv_packed: of the plaintext modulus

    @property
    def packed(self) -> bool:
        """Whether the backend is one of the packed ones, which only add."""
        return self.backend.endswith("_packed")


@dataclass(frozen=True)
class ClientSettings:
    """Defaults of one client for simulation; a real node's `--node-config` wins."""

    rank: int = 8
    budget: float = 0.0125  # share of A's columns to encrypt, where the method selects columns
    data_path: str = ""
    key_file: str = ""
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps


@dataclass(frozen=True)
class FederationSettings:
    """Who takes part and how long (`conf/federation/`)."""

    rounds: int = 8
    fraction: float = 1.0  # share of the available clients asked per round
    min_clients: int = 2  # wait for this many before the first round
    min_contributors: int = 2  # an aggregate of fewer is never released
    exclude_after: int = 3  # rounds with an unusable message before a client is excluded; 0: never
    max_norm: float = 0.0  # L2 norm of an update, its factors and heads; 0: none. The server checks what it can read
    max_mean_norm: float = 10.0  # times that of its own update a client takes of a mean; 0: any
    wait_timeout: float = 600.0  # seconds to wait for min_clients
    round_timeout: float = 3600.0  # seconds to wait for the replies of a round
    evaluate_every: int = 1  # rounds; the clients also evaluate before the first and after the last
    compare_local: bool = True  # every client also trains alone, for the final table
    clients: tuple[ClientSettings, ...] = field(default_factory=lambda: (ClientSettings(),) * 4)

    def evaluates(self, round_: int) -> bool:
        """Whether the clients measure the last mean before they train in this round."""
        return round_ % self.evaluate_every == 0


@dataclass(frozen=True)
class TrainingSettings:
    """Local training (`conf/training/`)."""

    steps: int = 20  # optimizer steps per round
    batch_size: int = 8
    accumulation: int = 1  # batches per optimizer step
    group_by_length: bool = False  # batches of texts of like length: little padding
    learning_rate: float = 1e-3
    learning_rate_end: float = 0.0  # cosine: of the last round
    schedule: str = "constant"  # constant | cosine: of the learning rate over the rounds
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_batch_size: int = 32
    threads: int = 0  # CPU threads; 0: one for a small model, else torch's own choice

    def rate(self, round_: int, rounds: int) -> float:
        """The learning rate of a round: half a cosine from `learning_rate` in the first to `learning_rate_end`."""
        if self.schedule == "constant" or rounds < 2:
            return self.learning_rate
        course = (1 + math.cos(math.pi * min(1.0, round_ / (rounds - 1)))) / 2
        return self.learning_rate_end + (self.learning_rate - self.learning_rate_end) * course


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    method: MethodSettings = MethodSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    crypto: CryptoSettings = CryptoSettings()
    federation: FederationSettings = FederationSettings()
    training: TrainingSettings = TrainingSettings()
    name: str = ""  # of the run folder; empty: from the method and Flower's run id
    resume: str = ""  # run folder of an earlier run to go on with
    seed: int = 0
    runs_dir: str = ""  # empty: $CIPHERTUNE_HOME/runs, by default ~/.ciphertune/runs
    record_server_view: bool = False
    record_updates: bool = False
    log: str = ""  # empty | tensorboard: where the server writes figures beside rounds.jsonl

    def digest(self) -> bytes:
        """16 bytes over everything that all parties must agree on."""
        shared = self.shared()
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).digest()[:16]

    @property
    def most_held(self) -> int:
        """The most components that a client has to hold, whatever the ranks of the others (method.fit_rank=nested)."""
        return 8 * max(self.model.rank, *(c.rank for c in self.federation.clients), 1)

    def shared(self) -> dict[str, Any]:
        """What all parties must agree on, as nested plain values."""
        return {k: v for k, v in asdict(self).items() if k not in _LOCAL}


def compose(conf_dir: Path, overrides: str | Sequence[str] = ()) -> Settings:
    """Compose `conf_dir`/config.yaml with Hydra overrides (a list, or one string split as a shell would).

    Raises SettingsError with one line that names the offending key or value and the valid ones.
    """
    import shlex

    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    if not (conf_dir / "config.yaml").is_file():
        raise SettingsError(f"no config.yaml in {conf_dir}: give the folder that holds the configuration groups")
    try:
        words = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
        words = [_checked(word, conf_dir) for word in words]
        with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"):
            composed = hydra_compose("config", overrides=words)
        container = OmegaConf.to_container(composed, resolve=True)
    except SettingsError:
        raise
    except Exception as error:  # Hydra and OmegaConf have no common base class
        raise SettingsError("bad override: " + " ".join(str(error).split())[:300]) from None
    return from_dict(cast(dict[str, Any], container))


def from_dict(values: dict[str, Any]) -> Settings:
    """Settings from nested plain values. Raises SettingsError for an unknown key, a wrong type, choice or range."""
    from ciphertune.checks import check

    settings = build(Settings, values)
    check(settings)
    return settings


def ckks_params(crypto: CryptoSettings) -> CkksParams:
    """The parameters that the settings ask for. Raises SettingsError when they are unsafe or could overflow."""
    return CkksParams(
        crypto.poly_modulus_degree, crypto.coeff_mod_bits, crypto.scale_bits, crypto.bound, crypto.coefficient_bits
    )


def packed_params(crypto: CryptoSettings) -> PackedParams:
    """The parameters of a packed backend. Raises SettingsError when they are unsafe, could overflow, or there are none
    of the wanted precision.
    """
    scheme, degree = crypto.backend.removesuffix("_packed"), crypto.poly_modulus_degree
    bits = crypto.modulus_bits or smallest_modulus(
        scheme, degree, crypto.bound, crypto.max_updates, crypto.wanted_error, crypto.plain_bits
    )
    return PackedParams(scheme, degree, bits, crypto.bound, crypto.max_updates, crypto.plain_bits)


def _checked(word: str, conf_dir: Path) -> str:
    """One override: a choice must exist; any other key is let through, `build` reports the unknown ones."""
    key, _, choice = word.partition("=")
    if not (conf_dir / key).is_dir():
        if key.startswith("~") or not key.strip("+"):
            raise SettingsError(f"bad override {word!r}: write group=choice or group.key=value")
        return _quoted(word if key.startswith("+") else f"++{word}")
    valid = sorted(p.stem for p in (conf_dir / key).glob("*.yaml"))
    if choice not in (*valid, "null"):
        near = get_close_matches(choice, valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise SettingsError(f"unknown {key}={choice}{hint} Valid: {', '.join(valid)}")
    return word


def _quoted(word: str) -> str:
    """Quote a value that Hydra's grammar cannot read bare, such as a path with a space or with {client} in it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
        return word
    except HydraException:
        key, _, value = word.partition("=")
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
