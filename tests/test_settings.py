"""Settings: every shipped choice composes, and every mistake gets one line that names it and the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONF

from ciphertune.checks import check
from ciphertune.errors import SettingsError
from ciphertune.run_config import settings_of
from ciphertune.settings import Settings, TrainingSettings, compose

CHOICES = [
    f"{folder.name}={file.stem}"
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
    for file in folder.glob("*.yaml")
]
NEEDS = {
    "model=classifier": ["data=jsonl", "data.labels=[no,yes]"],
    "crypto=ckks_product": ["method=she_lora"],
}


def line(*overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        compose(CONF, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_choice_composes(choice: str) -> None:
    assert isinstance(compose(CONF, [choice, *NEEDS.get(choice, [])]), Settings)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_says_in_its_header_how_to_run_it(choice: str) -> None:
    group, name = choice.split("=")
    head = (CONF / group / f"{name}.yaml").read_text().split("\n")[:2]
    assert any(text.startswith("# ciphertune run ") and choice in text for text in head)


def test_the_default_is_four_clients_of_unequal_rank_with_everything_encrypted() -> None:
    settings = compose(CONF)
    assert (settings.method.name, settings.method.select, settings.crypto.backend) == ("sealed", "all", "ckks_packed")
    assert [c.rank for c in settings.federation.clients] == [2, 4, 8, 8]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("federation.round=3", ("unknown setting federation.round", "did you mean federation.rounds?")),
        ("modle.rank=3", ("unknown setting modle", "did you mean model?")),
        ("nosuch=3", ("unknown setting nosuch", "training")),
        ("method=seald", ("unknown method=seald", "did you mean sealed?", "fedavg", "full_he")),
        ("experiment=nosuch", ("unknown experiment=nosuch", "smoke")),
        ("model.rank=eight", ("model.rank='eight'", "want int")),
        ("model.rank=true", ("model.rank=True", "want int")),
        ("model.rank=0", ("model.rank=0", "1 to 4096")),
        ("training.learning_rate=nan", ("training.learning_rate=nan", "out of range")),
        ("method.share=half", ("method.share='half'", "both, alternate, b_only, none")),
        ("model.targets=q_proj", ("model.targets='q_proj'", "want a list")),
        ("federation.clients=[{rank:4},{rank:0}]", ("federation.clients[1].rank=0",)),
        ("federation.clients=[{rank:4,budget:1.5}]", ("federation.clients[0].budget=1.5", "0 to 1")),
        ("federation.clients=[{rank:4,budget:nan}]", ("federation.clients[0].budget=nan", "0 to 1")),
        ("federation.clients=[]", ("federation.clients is empty",)),
        ("method.aggregate=mean", ("method.aggregate='mean'", "separate, product, stack")),
        ("method.first_score=wanda", ("method.first_score='wanda'", "wanda_weight")),
        ("method.renegotiate_every=-1", ("method.renegotiate_every=-1", "0 to 100000")),
        ("method.rank_cap=4097", ("method.rank_cap=4097", "0 to 4096")),
        ("crypto.coefficient_bits=61", ("crypto.coefficient_bits=61", "0 to 60")),
        ("model.scaling=each", ("model.scaling='each'", "common, own")),
        ("federation.min_contributors=9", ("min_contributors=9 exceeds federation.min_clients=4",)),
        ("method=full_he crypto=ckks crypto.coeff_mod_bits=[54,55]", ("add up to 109", "106", "128-bit")),
        ("method=full_he crypto=ckks crypto.scale_bits=52", ("could wrap around",)),
        (
            "crypto.scale_bits=52",
            ("crypto.scale_bits=52 has no effect", "=ckks_packed", "modulus_bits"),
        ),
        ("crypto.max_updates=3", ("crypto.max_updates=3 is below the federation's 4 clients", "raise it")),
        ("crypto.modulus_bits=61", ("crypto.modulus_bits=61 is out of range",)),
        ("crypto.poly_modulus_degree=2048 crypto.modulus_bits=54", ("crypto.modulus_bits=54", "24 to 53", "128-bit")),
        (
            "crypto.modulus_bits=0 crypto.wanted_error=1e-13",
            ("crypto.wanted_error=1e-13 cannot", "1000 updates"),
        ),
        ("name=a/b", ("name='a/b'",)),
        ("'unclosed", ("bad override",)),
    ],
)
def test_a_bad_override_gets_one_line_that_names_it(override: str, parts: tuple[str, ...]) -> None:
    text = line(*(override.split() if not override.startswith("'") else ["data.path=x", "model.rank=${nosuch}"]))
    for part in parts if not override.startswith("'") else ("bad override", "nosuch"):
        assert part in text


def test_an_unclosed_quote_in_the_one_string_is_named() -> None:
    with pytest.raises(SettingsError, match="No closing quotation"):
        compose(CONF, "data.path='x")


@pytest.mark.parametrize("words", [("method=fedavg", "crypto=ckks"), ("method=flexlora", "crypto=ckks_product")])
def test_a_clear_method_refuses_an_encrypting_backend(words: tuple[str, ...]) -> None:
    assert "sends everything in the clear: use crypto=clear, not ckks" in line(*words)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # the fit, the factors that travel and the rule of aggregation are one choice
        (("method=sealed", "method.fit_rank=svd"), ("aggregate=separate", "share=alternate", "fit_rank=svd")),
        (("method=full_he", "method.fit_rank=svd"), ("aggregate=separate", "share=both", "fit_rank=svd")),
        (("method=fedavg", "method.aggregate=product"), ("aggregate=product", "share=both", "fit_rank=nested")),
        (("method=flexlora", "method.aggregate=separate"), ("aggregate=separate", "share=both", "fit_rank=svd")),
        (("method=flexlora", "method.fit_rank=pad"), ("aggregate=product", "share=both", "fit_rank=pad")),
        (("method=she_lora", "method.fit_rank=nested"), ("aggregate=product", "share=both", "fit_rank=nested")),
        (("method=she_lora", "method.share=alternate"), ("aggregate=product", "share=alternate", "fit_rank=svd")),
        (("method=she_lora", "method.share=b_only"), ("share=b_only", "want", "and method.share=both")),
        # columns are negotiated for a product and for nothing else
        (("method=full_he", "method.select=negotiated"), ("select=negotiated with method.aggregate=separate",)),
        (("method=she_lora", "method.select=all"), ("select=all with method.aggregate=product", "the budget 1")),
        (("method=flexlora", "method.select=all"), ("select=all with method.aggregate=product",)),
        # scales of their own
        (
            ("method=sealed", "model.scaling=own"),
            ("model.scaling=own", "use model.scaling=common", "aggregate=product"),
        ),
        (("method=fedavg", "model.scaling=own"), ("cannot be averaged apart",)),
        # parameters that only add
        (("method=she_lora", "crypto=ckks"), ("method=she_lora multiplies", "use crypto=ckks_product")),
        (("method=she_lora", "crypto=ckks_8192"), ("use crypto=ckks_product",)),
        (("method=she_lora", "crypto.coefficient_bits=0"), ("use crypto=ckks_product",)),
        # a key of SHE-LoRA, which the server sees decrypted values of, for a method that trusts its key
        (("method=sealed", "crypto=ckks_product"), ("method=sealed only adds", "for method=she_lora", "ckks_packed")),
        (("method=full_he", "crypto=ckks", "crypto.coefficient_bits=4"), ("crypto.coefficient_bits=4",)),
        (("method=maskcrypt", "crypto=ckks_product"), ("method=maskcrypt only adds",)),
    ],
    ids=" ".join,
)
def test_names_that_make_no_method_together_are_refused_by_what_contradicts(
    words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    text = line(*words)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "words",
    [
        ("method=she_lora", "crypto=clear"),
        ("method=she_lora", "model.scaling=own"),
        ("method=flexlora", "model.scaling=own"),
        ("method=flexlora", "method.select=negotiated"),
        ("method=sealed", "crypto=clear"),
    ],
    ids=" ".join,
)
def test_names_that_do_make_a_method_together_are_accepted(words: tuple[str, ...]) -> None:
    compose(CONF, words)


def test_a_method_chooses_its_crypto_and_the_command_line_wins() -> None:
    assert compose(CONF, ["method=fedavg"]).crypto.backend == "clear"
    assert compose(CONF, ["method=full_he"]).crypto.poly_modulus_degree == 8192
    assert compose(CONF, ["method=full_he", "crypto=ckks"]).crypto.poly_modulus_degree == 4096
    assert compose(CONF, ["method=she_lora"]).crypto.coefficient_bits == 34
    assert compose(CONF, ["method=flexlora"]).crypto.backend == "clear"


def test_a_path_with_spaces_braces_and_quotes_arrives_as_written() -> None:
    path = "/data/a lab's {client}=1.jsonl"
    assert compose(CONF, [f"data.path={path}"]).data.path == path


def test_labels_that_look_like_numbers_are_text() -> None:
    assert compose(CONF, ["data.labels=[0,1]"]).data.labels == ("0", "1")


def test_the_digest_covers_what_parties_must_agree_on_and_not_where_files_go() -> None:
    settings = Settings()
    assert replace(settings, runs_dir="/elsewhere", name="x", record_updates=True).digest() == settings.digest()
    assert replace(settings, seed=1).digest() != settings.digest()
    assert replace(settings, method=replace(settings.method, select="none")).digest() != settings.digest()


def test_flowers_own_number_of_rounds_wins() -> None:
    config = {"overrides": "federation.rounds=3", "num-server-rounds": 5, "runs-dir": ""}
    assert settings_of(CONF, config).federation.rounds == 5


def test_the_dataclass_defaults_are_valid() -> None:
    check(Settings())


def test_a_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no config\.yaml in"):
        compose(tmp_path)


@pytest.mark.parametrize("rounds", [2, 3, 20])
def test_the_cosine_schedule_is_torchs(rounds: int) -> None:
    training = TrainingSettings(learning_rate=3e-3, learning_rate_end=2e-4, schedule="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=rounds - 1, eta_min=2e-4)
    for round_ in range(rounds):
        assert training.rate(round_, rounds) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert training.rate(0, 1) == 3e-3
    assert replace(training, schedule="constant").rate(7, rounds) == 3e-3
