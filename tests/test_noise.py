"""What a client's saved adapter is rounded to, against the error that decryption really made."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Lab
from flwr.app import Message
from safetensors.numpy import load_file
from tiny import SENTENCES, write_lines

from ciphertune import exchange, flower, product, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum
from ciphertune.columns import slots
from ciphertune.noise import Noise, after, released
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.ranks import Contributor, reparameterise
from ciphertune.wire import Session
from tests import she_lora_cases
from tests.oracle import Matrix, adapter_of, encrypted, largest, mean_of_kept, plan_of
from tests.she_lora_cases import CKKS, RANKS, SHE_LORA, ProductRound, blank


def power_below(value: float) -> float:
    return float(2.0 ** math.floor(math.log2(value)))


def multiples(values: Matrix, step: float) -> bool:
    return bool((np.rint(values / step) * step == values).all())


def saved(run: Path, client: str) -> dict[str, Matrix]:
    found = load_file(run / "clients" / client / "adapter/adapter_model.safetensors")
    names = ((".lora_A.weight", ".a"), (".lora_B.weight", ".b"), ("base_model.model.", ""))
    out = {}
    for key, value in found.items():
        for was, now in names:
            key = key.replace(was, now)
        out[key] = value.astype(np.float64)
    return out


def absent(round_: int, *nodes: int) -> Any:
    """These nodes' updates of one round are lost."""

    def tamper(reply: Message, source: int) -> Message:
        if source in nodes and reply.metadata.message_type == "train" and reply.metadata.group_id == str(round_):
            gone = {"error": "OSError", "line": "disk full", "name": f"client-{source - 100}", "simulated": True}
            reply.content = flower.pack(gone)
        return reply

    return tamper


def decryption_error(run: Path, client: str, round_: int, factor: str, who: dict[str, int]) -> Matrix:
    """Of a factor's mean as a client received it, from what the clients sent: rank by rank over those that have it."""
    received = load_file(run / f"clients/{client}/round_{round_:04d}/received.safetensors")
    sent = {name: load_file(run / f"clients/{name}/round_{round_:04d}/update.safetensors") for name in who}
    errors = []
    for key in (k for k in received if k.endswith(f".{factor}")):
        rows = {n: (s[key] if factor == "a" else s[key].T).astype(np.float64) for n, s in sent.items()}
        found = received[key] if factor == "a" else received[key].T
        for k, row in enumerate(found):
            have = [n for n in who if len(rows[n]) > k]
            mean = sum(who[n] * rows[n][k] for n in have) / sum(who[n] for n in have)
            errors.append(row - mean)
    return np.concatenate(errors)


def test_a_factor_that_came_in_an_uneven_round_stays_rounded_to_that_rounds_noise(lab: Lab) -> None:
    """B comes in round 0 from clients with a fiftieth of the weight, A in round 1 from all of them."""
    write_lines(lab.folder / "lab-3.jsonl", [{"text": t} for t in SENTENCES[:6] * 100])
    equal = "federation.clients='[{rank:4},{rank:4},{rank:4},{rank:4}]'"
    run = lab(f"method=sealed record_updates=true {equal}", tamper=absent(0, 102, 103))
    weights = {"client-0": 6, "client-1": 8, "client-2": 10, "client-3": 600}
    few = {name: weights[name] for name in ("client-0", "client-1")}
    coarse = decryption_error(run, "client-0", 0, "b", few).std()
    fine = decryption_error(run, "client-0", 1, "a", weights).std()
    assert coarse > 10 * fine
    for name in weights:
        kept = saved(run, name)
        rows_b = np.concatenate([v.ravel() for k, v in kept.items() if k.endswith(".b")])
        rows_a = np.concatenate([v.ravel() for k, v in kept.items() if k.endswith(".a")])
        assert multiples(rows_b, power_below(256 * coarse)) and rows_b.any()
        assert multiples(rows_a, power_below(256 * fine)) and not multiples(rows_a, power_below(256 * coarse))


HEADS = (HeadShape("classifier.weight", (30, 100)),)
WIDE = (LayerShape("wide", 300, 400),)
SAMPLES, TOTAL = (5, 90), 2000


def averaged(plan: Plan, ranks: tuple[int, int]) -> tuple[wire.Message, Session, Adapter, list[Adapter]]:
    """A round of two clients of unequal weight and rank: its aggregate, the adapter it makes, and what they sent."""
    session, secret = encrypted(plan)
    clients, total = [adapter_of(plan, rank, seed) for seed, rank in enumerate(ranks)], SeparateSum(session, 0, TOTAL)
    for sender, (client, samples) in enumerate(zip(clients, SAMPLES, strict=True), 1):
        data = exchange.seal(client, session, secret, round_=0, sender=sender, samples=samples, total=TOTAL)
        total.add(data, sender=sender, who=Contributor(client.rank, samples))
    data = wire.encode(total.release(1), session)
    adapter, message = exchange.unseal(
        data, session, secret, round_=0, rank=max(ranks), base=adapter_of(plan, 8, seed=9)
    )
    return message, session, adapter, clients


def test_noise_is_kept_for_each_component_of_each_factor_until_it_is_replaced() -> None:
    plan = plan_of(layers=WIDE, heads=HEADS)  # B travels in round 0
    message, session, adapter, (low, high) = averaged(plan, (6, 4))
    old = Noise(np.arange(1.0, 9.0), np.arange(11.0, 19.0), 20.0)
    found = Noise.from_json(after(old, message, session, adapter).to_json(), 8)
    assert found.a.tolist() == old.a.tolist() and found.b[6:].tolist() == [17, 18]
    b, light, heavy = adapter.layers["wide"].b, low.layers["wide"].b, high.layers["wide"].b
    error_of_both = (b[:, :4] - (SAMPLES[0] * light[:, :4] + SAMPLES[1] * heavy) / sum(SAMPLES)).std()
    error_of_one = (b[:, 4:6] - light[:, 4:]).std()
    assert error_of_one > 10 * error_of_both
    assert error_of_both < found.b[0] == found.b[3] < 4 * error_of_both
    assert error_of_one < found.b[4] == found.b[5] < 4 * error_of_one
    heads = [
        adapter.heads[n] - (SAMPLES[0] * low.heads[n] + SAMPLES[1] * high.heads[n]) / sum(SAMPLES) for n in low.heads
    ]
    assert heads[0].std() < found.heads < 4 * heads[0].std()
    with pytest.raises(ValueError, match="another rank"):
        Noise.from_json(found.to_json(), 4)


def test_where_only_those_count_that_kept_an_entry_the_noise_is_that_of_the_lightest_client_alone() -> None:
    plan = replace(plan_of(share="both", layers=WIDE), prune="own", prune_mean="kept", schedule=(0.5, 0.5, 0.0, 1.0))
    message, session, adapter, clients = averaged(plan, (8, 8))
    expected = mean_of_kept(clients, SAMPLES, "wide", "a", plan.tiers, 0.5, "kept")
    light, heavy = (largest(c.layers["wide"].a, plan.tiers, 0.5) for c in clients)
    error = (adapter.layers["wide"].a - expected)[light & ~heavy].std()
    found = after(Noise.none(8), message, session, adapter)
    assert error < found.a[0] < 4 * error


# --------------------------------------------------------------------------------------------------------- products


def perturbed(adapter: Adapter, seed: int) -> Adapter:
    """Trained a little."""
    rng, layers = np.random.default_rng(seed), {}
    for name, f in adapter.layers.items():
        a, b = f.a * (1 + 0.1 * rng.normal(size=f.a.shape)), f.b * (1 + 0.1 * rng.normal(size=f.b.shape))
        layers[name] = LoraFactors(a, b, f.scale)
    return Adapter(layers, adapter.heads)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> tuple[ProductRound, list[Matrix]]:
    """A round of clients whose factors were fitted to an earlier mean, and the coefficients of its sum, per layer."""
    before, coefficients = ProductRound(SHE_LORA), []
    clients = [perturbed(before.received(blank(before.plan, r, before.plan.scale)), r) for r in RANKS]

    def turned(q: Matrix, c: Matrix, m: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        found = real(q, c, m)
        coefficients.append(found[1])
        return found

    real = product.turned
    monkeypatch.setattr(product, "turned", turned)
    monkeypatch.setattr(she_lora_cases, "adapter_of", lambda plan, rank, seed: clients[seed - 1])
    return ProductRound(CKKS, absent=1000), coefficients


def error_of_m(one: ProductRound, coefficients: list[Matrix]) -> float:
    """Standard deviation of what decryption adds to the entries of M, of the mean."""
    rows = np.stack(exchange._decrypted(one.released, one.session, one.secret)[1:])
    where, errors = slots(one.plan, max(one.tiers)), []
    for i, c in enumerate(coefficients):
        hidden = [one.codes[i].tolist().index(code) for code in where.code[where.layer == i]]
        name = one.plan.layers[i].name
        weighted = [n / one.total * x.layers[name].a[:, hidden] for n, x in zip(one.samples, one.clients, strict=True)]
        truth = c @ np.concatenate(weighted).astype(np.float64)
        errors.append(rows[: len(c), where.layer == i] - truth)
    return float(np.concatenate([e.ravel() for e in errors]).std() / one.share)


def test_the_noise_of_a_product_is_at_least_that_of_its_decryption_and_no_tenfold(
    fitted: tuple[ProductRound, list[Matrix]],
) -> None:
    one, coefficients = fitted
    noise = after(Noise.none(8), one.released, one.session, one.received(blank(one.plan, 8)))
    assert error_of_m(one, coefficients) < noise.a[0] < 10 * error_of_m(one, coefficients)
    assert np.array_equal(noise.a, noise.b) and np.ptp(noise.a) == 0


def test_a_component_fitted_to_a_product_is_rounded_to_its_noise_over_the_root_of_its_singular_value() -> None:
    """Held against what the noise really does to the factors, component by component."""
    rng, sigma, scale = np.random.default_rng(3), 1e-7, 2.0
    q, v = np.linalg.qr(rng.normal(size=(400, 4)))[0], np.linalg.qr(rng.normal(size=(900, 4)))[0].T
    m = np.diag([4.0, 0.3, 0.02, 1e-3]) @ v
    base = LoraFactors(np.zeros((4, 900)), np.zeros((400, 4)), scale)
    exact, noisy = reparameterise(q, m, base), reparameterise(q, m + sigma * rng.normal(size=m.shape), base)
    noise = Noise(np.full(4, sigma), np.full(4, sigma))
    kept = released(Adapter({"x": noisy}, {}), noise, product=True).layers["x"]
    for k in range(4):
        sign = np.sign(exact.a[k] @ noisy.a[k])
        of_a, of_b = (noisy.a[k] - sign * exact.a[k]).std(), (noisy.b[:, k] - sign * exact.b[:, k]).std()
        assert multiples(kept.a[k].astype(np.float64), power_below(256 * of_a))
        assert multiples(kept.b[:, k].astype(np.float64), power_below(256 * of_b))
        # and no coarser than need be: a row's noise is near sigma / root, that of a column below it
        assert np.abs(kept.a[k] - noisy.a[k]).max() < 256 * 1.5 * of_a + np.abs(noisy.a[k]).max() / 256


def test_a_component_that_a_product_did_not_make_keeps_its_noise() -> None:
    one = ProductRound(CKKS)
    found = one.received(blank(one.plan, 8))
    layers = {n: LoraFactors(f.a, f.b * (np.arange(8) != 5), f.scale) for n, f in found.layers.items()}
    noise = after(Noise(np.ones(8), np.ones(8)), one.released, one.session, Adapter(layers, found.heads))
    assert noise.a[5] == 1 and all(noise.a[k] < 1e-6 for k in range(8) if k != 5)
