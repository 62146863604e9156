"""`ciphertune plan`: shapes are those of transformers and PEFT, bytes those of messages that are really made."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONF, ROOT
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from ciphertune import exchange, shapes, wire
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.build_client import fresh_part
from ciphertune.calibration import Calibration
from ciphertune.cli import main
from ciphertune.errors import FederationError, SettingsError
from ciphertune.forecast import Forecast, forecast
from ciphertune.plan import HeadShape, LayerShape
from ciphertune.planning import loads, methods_of, settings_of, settle, synthetic
from ciphertune.product import ProductSum
from ciphertune.shapes import head_shapes, layer_shapes
from tests.oracle import truncated

# --- shapes, against transformers and PEFT ----------------------------------------------------------------------------

SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 90}
GROUPED = SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2}
ENCODER = SIZES | {"num_attention_heads": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"head_dim": 16},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16},
    "olmo2": GROUPED | {"pad_token_id": 0},
    "smollm3": GROUPED | {"pad_token_id": 0},
    "bert": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 90},
}
SOME_TARGETS = {"bert": ["query", "value", "dense"], "roberta": ["query", "output.dense"], "gpt2": ["c_attn", "c_proj"]}
TASKS = {"causal_lm": TaskType.CAUSAL_LM, "classification": TaskType.SEQ_CLS}


def model_of(config: PretrainedConfig, task: str) -> Any:
    """The model without any memory for its weights."""
    kind: Any = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        return kind.from_config(config)


def adapted(model: Any, targets: Any, task: str, head: str | None) -> tuple[dict[str, tuple[int, int]], set[Any]]:
    """What PEFT adapts: (m, n) of each layer; and the sizes of the tensors that it trains whole."""
    config = LoraConfig(task_type=TASKS[task], target_modules=targets, r=2, modules_to_save=[head] if head else None)
    modules = dict(get_peft_model(model, config).base_model.model.named_modules())
    layers = {
        name: (x.lora_B["default"].out_features, x.lora_A["default"].in_features)
        for name, x in modules.items()
        if isinstance(x, LoraLayer)
    }
    heads = {
        (f"{name}.{key}", tuple(p.shape))
        for name, x in modules.items()
        if isinstance(x, ModulesToSaveWrapper)
        for key, p in x.modules_to_save["default"].named_parameters()
    }
    return layers, heads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_and_heads_are_those_that_peft_makes(kind: str, task: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **CONFIGS[kind], num_labels=3)
    config.save_pretrained(tmp_path)
    head = None if task == "causal_lm" else "classifier" if "bert" in kind else "score"
    endings = SOME_TARGETS.get(kind.removeprefix("xlm-"), ["q_proj", "v_proj", "mlp.down_proj"])
    for targets in ("all-linear", endings):
        if targets == "all-linear" and head == "classifier" and kind != "bert":
            continue  # PEFT adapts layers inside of that head
        layers, heads = adapted(model_of(config, task), targets, task, head)
        found = layer_shapes(str(tmp_path), [targets] if isinstance(targets, str) else targets, task)
        assert {x.name: (x.m, x.n) for x in found} == layers
        assert [x.name for x in found] == sorted(layers)
        assert {(h.name, h.shape) for h in head_shapes(str(tmp_path), task, 3)} == heads


@pytest.mark.parametrize(
    ("names", "parameters"),  # as the models' publishers count them
    [
        (["Llama-2-7B", "meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-chat-hf", "llama2-7b"], 6_738_415_616),
        (["Llama-2-13B", "meta-llama/Llama-2-13b-hf"], 13_015_864_320),
        (["Llama-3-8B", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B-Instruct"], 8_030_261_248),
        (["Qwen3-4B", "Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Instruct-2507"], 4_022_468_096),
        (["Mistral-7B", "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2"], 7_241_732_096),
        (["mistralai/Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3"], 7_248_023_552),
    ],
)
def test_known_models_have_the_published_number_of_parameters_and_the_layers_of_transformers(
    names: list[str], parameters: int
) -> None:
    values = dict(shapes._read(names[0])._values)
    kind = values.pop("model_type")
    model = model_of(AutoConfig.for_model(kind, **values, tie_word_embeddings=kind == "qwen3"), "causal_lm")
    assert sum(p.numel() for p in model.parameters()) == parameters
    linear = {n: tuple(x.weight.shape) for n, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    for name in names:
        found = layer_shapes(name, ["all-linear"]) + layer_shapes(name, ["lm_head"])
        assert {x.name: (x.m, x.n) for x in found} == linear


def test_embedded_and_a_path_of_a_config_are_read() -> None:
    folder = ROOT / "src/ciphertune/assets/base"
    found = layer_shapes("embedded", ["q_proj", "up_proj"])
    assert found == layer_shapes(str(folder), ["q_proj", "up_proj"])
    assert found == layer_shapes(str(folder / "config.json"), ["q_proj", "up_proj"])
    model = model_of(AutoConfig.from_pretrained(folder), "causal_lm")
    assert {x.name: (x.m, x.n) for x in found} == adapted(model, ["q_proj", "up_proj"], "causal_lm", None)[0]


LLAMA = {"model_type": "llama", "num_attention_heads": 4, **SIZES}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds no keys"),
        ("{}", "model_type None, whose layers are unknown here. Known: llama,"),
        ('{"model_type": "t5"}', "model_type 't5'"),
        ('{"model_type": ["llama"]}', "model_type ['llama']"),
        (json.dumps(LLAMA | {"hidden_size": None}), "has no hidden_size"),
        (json.dumps(LLAMA | {"hidden_size": "48"}), "hidden_size='48' is no number"),
        (json.dumps(LLAMA | {"hidden_size": True}), "hidden_size=True is no number"),
        (json.dumps(LLAMA | {"hidden_size": 10**30}), "hidden_size=1000000"),
        (json.dumps(LLAMA | {"num_hidden_layers": 0}), "num_hidden_layers=0 is no number from 1 to 1000"),
        (json.dumps(LLAMA | {"num_hidden_layers": 10**6}), "num_hidden_layers=1000000 is no number"),
        (json.dumps(LLAMA | {"num_attention_heads": 10**5}), "head_dim=0 is no number"),
        (json.dumps(LLAMA | {"model_type": "mistral"}), "has no num_key_value_heads"),
        (json.dumps(LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2}), "has no head_dim"),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "intermediate_size"}), "has no intermediate_size"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_in_one_line(
    text: str | bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as caught:
        layer_shapes(str(tmp_path), ["q_proj"])
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# --- bytes, against messages that were made ---------------------------------------------------------------------------

LAYERS = (LayerShape("block.q", 96, 64), LayerShape("block.v", 48, 160), LayerShape("wide", 96, 2600))
HEADS = (HeadShape("classifier.bias", (3,)), HeadShape("classifier.weight", (3, 40)))
UNEQUAL = (
    "federation.clients=[{rank:2,budget:0.01},{rank:4,budget:0.1},{rank:8,budget:0.1},{rank:8,budget:0.9},"
    "{rank:12,budget:0.3}]"
)
TIERS = (2, 4, 8)  # two clients reach to 8; of a product no component is left out, up to twice as many
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
ROUNDS = (0, 1, 2)


def exchanged(settings: Any, heads: tuple[HeadShape, ...], round_: int) -> list[tuple[int, int, int, int]]:
    """Bytes up, bytes down, ciphertexts up and down of each client, of messages that are made and read back."""
    link, people = settle(settings, LAYERS, heads)
    part = fresh_part(settings.crypto)
    link = replace(link, key_fingerprint=part.fingerprint)
    if link.plan.budgets:  # other columns, as many
        rng = np.random.default_rng(0)
        columns = [rng.permutation(x.n)[: len(c)] for x, c in zip(LAYERS, link.plan.columns, strict=True)]
        link = replace(link, plan=replace(link.plan, columns=tuple(tuple(c.tolist()) for c in columns)))
    total = sum(c.samples for c in people)
    sum_ = (SeparateSum if link.plan.aggregate == "separate" else ProductSum)(link, round_, total)
    encrypted: list[int] = []
    encrypt, decrypt = part.encrypt, part.decrypt

    def counted(values: Any) -> bytes:
        data = encrypt(values)
        encrypted[-1] += len(data) // part.public.block_bytes
        return data

    def counted_back(body: bytes, count: int, *, terms: int = 1, product: bool = False) -> Any:
        encrypted[-1] += len(body) // part.public.sum_bytes(terms)
        return decrypt(body, count, terms=terms, product=product)

    part.encrypt, part.decrypt = counted, counted_back  # type: ignore[method-assign]
    ups, found = [], []
    mine = [synthetic(link.plan, c.rank, k) for k, c in enumerate(settings.federation.clients)]
    guide = synthetic(link.plan, 12, 99)
    for k, who in enumerate(people):
        encrypted.append(0)
        shared = {"round_": round_, "sender": k + 1, "samples": who.samples, "total": total, "tier": who.tier}
        data = exchange.seal(mine[k], link, part, **shared, guide=truncated(guide, mine[k].rank))
        sum_.add(data, sender=k + 1, who=who)
        ups.append(len(data))
    whole = sum_.release(settings.federation.min_contributors)
    for k, who in enumerate(people):
        held = link.plan.held(who.rank)
        message = cut(whole, link, held)
        data = wire.encode(message, link)
        encrypted.append(0)
        exchange.unseal(data, link, part, round_=round_, rank=message.rank, base=synthetic(link.plan, held, k))
        clear = not part.public.encrypts
        found.append((ups[k], len(data), *((0, 0) if clear else (encrypted[k], encrypted[-1]))))
    return found


@pytest.mark.parametrize("heads", [HEADS, ()], ids=["heads", "no heads"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_and_ciphertexts_are_those_of_messages_that_are_made(method: str, heads: tuple[HeadShape, ...]) -> None:
    settings = settings_of(CONF, [f"method={method}", UNEQUAL, "federation.min_clients=5"])
    link, people = settle(settings, LAYERS, heads)
    assert link.plan.tiers == (TIERS if link.plan.aggregate == "separate" else (*TIERS, 12))
    for round_ in ROUNDS if heads and link.plan.aggregate == "separate" else ROUNDS[:1]:
        found = [(x.up, x.down, x.ciphertexts_up, x.ciphertexts_down) for x in loads(link, people, round_)]
        assert found == exchanged(settings, heads, round_)


@pytest.mark.parametrize(
    "words",
    [
        "method=fedshield method.prune=agreed method.prune_schedule=fixed method.prune_from=0 method.prune_until=4",
        "method=fedshield method.prune_mean=kept method.prune_schedule=fixed method.prune_from=0",
        "method=maskcrypt method.fraction=0.3 crypto=ckks_packed",
        "method=sealed crypto=bfv_packed",
        "method=sealed crypto=clear crypto.precision=float64",
        "method=she_lora crypto=clear",
        "method=she_lora method.rank_cap=5",
    ],
)
def test_bytes_of_other_settings(words: str) -> None:
    settings = settings_of(CONF, [*words.split(), UNEQUAL, "federation.min_clients=5"])
    link, people = settle(settings, LAYERS, HEADS)
    for round_ in (0, 2):
        found = [(x.up, x.down, x.ciphertexts_up, x.ciphertexts_down) for x in loads(link, people, round_)]
        assert found == exchanged(settings, HEADS, round_)


# --- the forecast -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration()


def of(calibration: Calibration, words: str, layers: Sequence[LayerShape], rounds: Sequence[int] = ()) -> Forecast:
    return forecast(settings_of(CONF, words.split()), tuple(layers), (), calibration, rounds)


def wide(count: int, size: int = 256) -> tuple[LayerShape, ...]:
    return tuple(LayerShape(f"{i:03d}", size, size + 64) for i in range(count))


def test_a_forecast_is_the_mean_over_clients_and_rounds(calibration: Calibration) -> None:
    words = "method=sealed federation.rounds=3"
    link, people = settle(settings_of(CONF, words.split()), LAYERS, ())
    by_round = [loads(link, people, r) for r in range(3)]  # B, A, B
    found = of(calibration, words, LAYERS)
    assert found.bytes_up == pytest.approx(np.mean([x.up for one in by_round for x in one]))
    assert found.bytes_down == pytest.approx(np.mean([x.down for one in by_round for x in one]))
    assert found.ciphertexts_up == pytest.approx(np.mean([x.ciphertexts_up for one in by_round for x in one]))
    # in float32: up what a client trains, down what all hold
    both = 4 * sum((rank + 8) * sum(x.m + x.n for x in LAYERS) for rank in (2, 4, 8, 8))
    assert found.over_plaintext == pytest.approx(sum(x.up + x.down for one in by_round for x in one) / 3 / both)
    alone = of(calibration, words, LAYERS, rounds=(1,))
    assert alone.bytes_up == pytest.approx(np.mean([x.up for x in by_round[1]]))


def test_plaintext_is_what_plaintext_is_compared_with(calibration: Calibration) -> None:
    found = of(calibration, "method=fedavg", wide(20))
    assert 1.0 < found.over_plaintext < 1.001  # headers
    assert found.ciphertexts_up == found.ciphertexts_down == 0


@pytest.mark.parametrize("method", [m for m in METHODS if m != "local"])
def test_seconds_and_memory_grow_with_the_model(method: str, calibration: Calibration) -> None:
    words = f"method={method} rank=8 clients=3"
    once, twice = of(calibration, words, wide(600)), of(calibration, words, wide(1200))
    for name, value in asdict(once).items():
        if name.endswith(("seconds", "memory")):
            assert value > 0
            # ciphertexts need not be full, and the first memory costs nothing
            assert 1.2 < asdict(twice)[name] / value < 2.4, name


@pytest.mark.parametrize("method", ["fedavg", "sealed", "full_he"])
def test_memory_is_near_to_what_a_larger_round_takes(method: str, calibration: Calibration) -> None:
    settings = settings_of(CONF, f"method={method} rank=8 clients=2".split())
    layers = wide(40 if method == "full_he" else 400)
    found = of(calibration, f"method={method} rank=8 clients=2", layers, rounds=(0,))
    link, _ = settle(settings, layers, ())
    part = fresh_part(settings.crypto)
    link = replace(link, key_fingerprint=part.fingerprint)
    tracemalloc.start()
    mine = synthetic(link.plan, 8, 0)
    data = exchange.seal(mine, link, part, round_=0, sender=1, samples=1, total=2)
    client = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.client_memory == pytest.approx(client, rel=0.35)
    assert len(data) == found.bytes_up


def test_many_clients_are_not_sampled_one_by_one(calibration: Calibration) -> None:
    before = calibration.seconds
    few, many = (of(calibration, f"method=sealed rank=4 clients={n}", wide(40), (0,)) for n in (4, 400))
    assert calibration.seconds - before < 5
    assert many.add_seconds > 20 * few.add_seconds
    assert many.bytes_down > 1.9 * many.bytes_up  # the seeds of 400 are longer than what they stand for


# --- the command ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", "--app", str(ROOT), *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ["model=Llama-2-7B", "rank=32", "clients=4", "--methods", "fedavg,sealed", "--json", str(out)]
    status, text, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert "Llama-2-7B, 64 layers, 4 clients of rank 32" in text
    written = json.loads(out.read_text())
    assert written["about"]["ranks"] == [32] * 4 and written["about"]["values_per_rank"] == 64 * 8192
    assert [m["method"] for m in written["methods"]] == ["fedavg", "sealed"]
    for method in written["methods"]:
        (line,) = (x for x in text.splitlines() if f" {method['method']} " in x)
        assert f"{method['bytes_up'] / 1e6:.1f} MB" in line and f"{method['over_plaintext']:.2f}" in line


def test_an_override_that_no_method_goes_with_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"rank=0: want a whole number from 1 to 4096"):
        methods_of(CONF, ["rank=0"], None)


def test_methods_that_the_overrides_exclude_are_left_out_with_the_reason() -> None:
    found, refused = methods_of(CONF, ["crypto=ckks_packed"], None)
    assert {s.method.name for s in found} == {"sealed", "full_he", "fedshield", "maskcrypt"}
    assert any(r.startswith("she_lora: ") and "crypto=ckks_product" in r for r in refused)
    assert "local" not in "".join(refused)
    assert [s.method.name for s in methods_of(CONF, ["method=local,sealed"], None)[0]] == ["local", "sealed"]


def test_shorthands_stand_for_overrides() -> None:
    settings = settings_of(CONF, ["model=Llama-2-7B", "rank=3", "clients=6"])
    assert settings.model.name == "Llama-2-7B" and settings.model.targets == ("q_proj", "v_proj")
    assert [c.rank for c in settings.federation.clients] == [3] * 6
    assert [c.budget for c in settings.federation.clients] == [0.00125, 0.01, 0.01, 0.016, 0.00125, 0.01]
    assert settings.federation.min_clients == 6
    assert settings_of(CONF, ["clients=6", "federation.min_clients=5"]).federation.min_clients == 5
    assert settings_of(CONF, ["model=embedded"]).model.targets[1] == "k_proj"  # a file of conf/model
    assert settings_of(CONF, ["model=some folder/{x}"]).model.name == "some folder/{x}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=nothing/Like-It"], "model.name='nothing/Like-It': shapes are known of Llama-2-7B, Llama-2-13B,"),
        (["model=nothing/Like-It"], "give a folder with config.json"),
        (["model=hf"], "model.name is empty"),
        (["model=Llama-2-7B", "model.targets=[q_prj]"], "'q_prj' is no linear layer of model.name='Llama-2-7B'"),
        (["model=Llama-2-7B", "model.targets=[q_prj]"], "did you mean q_proj? There are: down_proj, gate_proj,"),
        (["rank=0"], "rank=0: want a whole number from 1 to 4096"),
        (["rank=5000"], "rank=5000: want"),
        (["rank=-1"], "rank=-1: want"),
        (["rank=1e3"], "rank=1e3: want"),
        (["rank="], "rank=: want"),
        (["rank=170"], "rank 170 is above the size of layer model.layers.0"),
        (["clients=0"], "clients=0: want a whole number from 1 to 1000"),
        (["clients=²"], "clients=²: want"),
        (["clients=" + "9" * 5000], "want a whole number from 1 to 1000"),
        (["clients=1"], "federation.min_contributors=2 exceeds federation.min_clients=1"),
        (["federation.min_clients=9"], "federation.min_clients=9 exceeds the 4 clients"),
        (["model.rnk=3"], "unknown setting model.rnk; did you mean model.rank?"),
        (["--methods", "sealed,fedavgg"], "unknown method=fedavgg; did you mean fedavg?"),
        (["--methods", ""], "unknown method="),
        (["method=sealed", "--methods", "fedavg"], "the methods are given as sealed and as fedavg"),
        (["method=she_lora", "crypto=ckks"], "use crypto=ckks_product"),
        (["model=classifier", "model.name=embedded"], "model.task=classification needs data.labels"),
        (["method=fedavg", "--json", "/no/such/folder/plan.json"], "cannot be written"),
    ],
)
def test_mistakes_are_named_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    given = any(w.startswith(("method", "--methods")) for w in words)
    status, out, err = run(capsys, *words, *([] if given else ["--methods", "sealed"]))
    assert (status, out) == (2, "")
    assert says in err and err.count("\n") == 1


def test_too_few_clients_for_an_aggregate_are_refused() -> None:
    settings = settings_of(CONF, ["clients=2"])
    lonely = replace(settings, federation=replace(settings.federation, min_contributors=3))
    with pytest.raises(FederationError, match=r"fewer than federation\.min_contributors=3"):
        settle(lonely, LAYERS, ())


def test_neither_torch_nor_the_network_is_touched() -> None:
    code = """
import socket, sys
def refuse(*_, **__): raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
from ciphertune.cli import main
assert main(["plan", "model=Qwen/Qwen3-4B", "rank=4", "clients=2", "--methods", "sealed,she_lora"]) == 0
print(sorted({"torch", "transformers", "peft", "flwr", "huggingface_hub"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
