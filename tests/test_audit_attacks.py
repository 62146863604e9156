"""The attacks on numbers that are known: synthetic gradients in float64, hand-made views, losses with a known AUROC."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import SENTENCES, tiny_bert, tiny_llama

from ciphertune.audit import b_factor, membership, recovery, span
from ciphertune.audit.attack import Target
from ciphertune.audit.dictionary import dictionary
from ciphertune.audit.known import Moved
from ciphertune.audit.pursuit import Block, Common, span_distances, sparse
from ciphertune.audit.truth import Scorer
from ciphertune.lm import model as lm_model
from ciphertune.settings import ModelSettings

WIDTH, VOCABULARY = 48, 400


class Words:
    """A dictionary of random rows that share a large part, as embeddings do."""

    def __init__(self, places: int = 1, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.tokens, self.places, self.width = np.arange(1000, 1000 + VOCABULARY), places, WIDTH
        self.kept: dict[bytes, Common] = {}
        tokens, where = generator.normal(size=(VOCABULARY, WIDTH)), generator.normal(size=(places, WIDTH))
        self._rows = 3 + tokens[None] + 0.5 * where[:, None]

    def rows(self, place: int, which: np.ndarray | None = None) -> np.ndarray:
        return self._rows[place] if which is None else self._rows[place][which]

    def frames(self):
        return [[], *([(p, 0)] for p in range(self.places))]

    def all_rows(self):
        return ((p, self.rows(p)) for p in range(self.places))

    def sample(self, place: int, count: int, generator: np.random.Generator) -> np.ndarray:
        return self.rows(place, generator.choice(VOCABULARY, count))


def gradient(words: Words, rank: int, count: int, seed: int = 1) -> tuple[np.ndarray, set[int]]:
    """`rank` random combinations, in float64, of `count` rows, and the tokens they were made of."""
    generator = np.random.default_rng(seed)
    picked = generator.choice(VOCABULARY, count, replace=False)
    rows = np.stack([words.rows(int(generator.integers(words.places)))[i] for i in picked])
    return generator.normal(size=(rank, count)) @ rows, {int(words.tokens[i]) for i in picked}


def target(words: Words, *layers: Moved, noise: float = 1e-6) -> Target:
    return Target({str(i): x for i, x in enumerate(layers)}, lambda: words, noise)  # type: ignore[arg-type, return-value]


def layer(a: np.ndarray | None = None, columns: np.ndarray | None = None, **more: np.ndarray) -> Moved:
    return Moved(
        a, np.arange(WIDTH) if columns is None else columns, more.get("projection"), more.get("b"), more.get("start")
    )


def named(attempts) -> dict[str, set[int]]:
    return {a.form: set(a.found.tokens) for a in attempts}


def test_fewer_tokens_than_combinations_are_found_exactly_by_both_forms() -> None:
    for seed in range(5):
        words = Words()
        g, true = gradient(words, rank=8, count=6, seed=seed)
        assert named(span.attack(target(words, layer(g)))) == {"published": true, "adapted": true}


def test_the_published_test_breaks_where_tokens_outnumber_the_combinations_and_the_adapted_one_does_not() -> None:
    words = Words()
    g, true = gradient(words, rank=8, count=14)
    found = named(span.attack(target(words, layer(g))))
    assert found["published"] == set()
    assert len(true & found["adapted"]) >= 13


def test_hidden_columns_break_the_published_test_and_not_the_adapted_one() -> None:
    words = Words()
    g, true = gradient(words, rank=8, count=6)
    shown = np.sort(np.random.default_rng(2).permutation(WIDTH)[:36])  # a quarter is hidden
    found = named(span.attack(target(words, layer(g[:, shown], shown))))
    assert found == {"published": set(), "adapted": true}


def test_layers_that_read_the_same_are_put_together() -> None:
    words = Words()
    g, true = gradient(words, rank=12, count=10)
    alone, both = (named(span.attack(target(words, *x))) for x in ((layer(g[:6]),), (layer(g[:6]), layer(g[6:]))))
    assert both["published"] == true and alone["published"] == set()


def test_a_change_known_only_outside_a_subspace_is_still_looked_up() -> None:
    words = Words()
    g, true = gradient(words, rank=8, count=6)
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, 8)))[0]
    projection = np.eye(WIDTH) - basis @ basis.T
    start = np.random.default_rng(4).normal(size=(8, 8)) @ basis.T  # unknown, but inside the subspace
    found = named(span.attack(target(words, layer((g + start) @ projection, projection=projection))))
    assert found["adapted"] == true


def test_signs_alone_still_give_tokens_away() -> None:
    """What one step of AdamW makes of a gradient."""
    hits = []
    for seed in range(5):
        words = Words()
        g, true = gradient(words, rank=16, count=3, seed=seed)
        found = named(span.attack(target(words, layer(np.sign(g)), noise=1.0)))["adapted"]
        hits.append(len(true & found) / len(true))
    assert np.mean(hits) > 0.8


def test_a_gradient_of_zero_and_a_view_of_nothing_name_no_token() -> None:
    def unused() -> Words:
        raise AssertionError("nothing was to be looked up")

    for layers in ({}, {"x": layer(np.zeros((8, WIDTH)))}):
        attempts = [*span.attack(Target(layers, unused, 1.0)), *b_factor.attack(Target(layers, unused, 1.0))]  # type: ignore[arg-type]
        assert len(attempts) == 3 and not any(a.found.tokens for a in attempts) and all(a.note for a in attempts)


def test_b_alone_gives_away_fewer_tokens_than_its_rank() -> None:
    words, generator = Words(), np.random.default_rng(5)
    start = generator.normal(size=(16, WIDTH))
    picked = generator.choice(VOCABULARY, 5, replace=False)
    change = generator.normal(size=(30, 5)) @ (words.rows(0)[picked] @ start.T)  # sum of d_t (A x_t)^T
    (found,) = b_factor.attack(target(words, layer(b=change, start=start)))
    assert set(found.found.tokens) == {int(words.tokens[i]) for i in picked}


def test_places_order_what_is_found() -> None:
    words = Words(places=6)
    rows = np.stack([words.rows(p)[7 * p + 1] for p in range(6)])
    g = np.random.default_rng(6).normal(size=(10, 6)) @ rows
    found = recovery.look_up([Block(g, lambda r: r)], words, noise=1e-6)  # type: ignore[arg-type]
    assert list(found.tokens) == [1001 + 7 * p for p in range(6)]


def test_many_candidates_are_screened_and_the_true_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_CANDIDATES", 60)
    words = Words(places=2)
    g, true = gradient(words, rank=12, count=8)
    for _ in range(2):  # the second time from what the first one kept
        assert set(recovery.look_up([Block(g, lambda r: r, b"all")], words, noise=1e-6).tokens) == true  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [7, 8, 9])
def test_with_few_columns_left_the_span_names_what_explaining_cannot_tell_apart(count: int) -> None:
    """12 of 48 columns, 8 combinations: of 9 tokens one is known beforehand, by its place in every text."""
    words = Words(places=4)
    for seed in range(4):
        generator = np.random.default_rng(seed)
        picked = [0, *generator.choice(np.arange(1, VOCABULARY), count - 1, replace=False)]
        rows = np.stack([words.rows(k % 4)[i] for k, i in enumerate(picked)])
        shown = np.sort(generator.permutation(WIDTH)[:12])
        g = (generator.normal(size=(8, count)) @ rows)[:, shown]
        found = named(span.attack(target(words, layer(g, shown))))
        assert found["adapted"] == {1000 + int(i) for i in picked}


def test_span_distances_are_those_of_least_squares() -> None:
    generator = np.random.default_rng(7)
    g, rows = generator.normal(size=(5, WIDTH)), generator.normal(size=(20, WIDTH))
    for row, distance in zip(rows, span_distances(g, rows), strict=True):
        rest = np.linalg.lstsq(g.T, row, rcond=None)[1]
        assert distance == pytest.approx(np.sqrt(rest[0] / (row @ row)), abs=1e-9)
    assert span_distances(g, g).max() < 1e-6


def test_sparse_recovery_of_nothing_is_nothing() -> None:
    assert not sparse([], np.ones((3, 4)), noise=1.0).any()
    assert not sparse([Block(np.zeros((2, 4)), lambda r: r)], np.ones((3, 4)), noise=1.0).any()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_dictionary_is_what_the_first_layers_read_in_a_real_text(kind: str, tmp_path: Path) -> None:
    llama = kind == "llama"
    folder = tiny_llama(tmp_path) if llama else tiny_bert(tmp_path)
    settings = ModelSettings(
        name=str(folder),
        task="causal_lm" if llama else "classification",
        targets=("q_proj", "v_proj") if llama else ("query", "value"),
        dtype="float32",
        max_length=32,
    )
    model = lm_model.load(settings, rank=4, labels=() if llama else ("no", "yes"), device="cpu")
    words = dictionary(model, 12)
    assert len(words.layers) == 2 and ".0." in words.layers[0] and words.places == (1 if llama else 12)
    read: list[torch.Tensor] = []
    hook = dict(model._layers())[words.layers[1]].register_forward_pre_hook(lambda _, x: read.append(x[0].detach()))
    ids = model.tokenizer(SENTENCES[3], return_tensors="pt")["input_ids"][:, :10]
    model.model(input_ids=ids)
    hook.remove()
    for place in range(ids.shape[1]):
        row = words.rows(0 if llama else place)[np.flatnonzero(words.tokens == int(ids[0, place]))[0]]
        np.testing.assert_allclose(row, read[0][0, place].numpy(), atol=1e-5)


def test_an_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(8)
    members, others = np.round(generator.normal(0, 1, 40), 1), np.round(generator.normal(0.7, 1, 30), 1)
    pairs = [(m < o) + 0.5 * (m == o) for m, o in product(members, others)]
    assert membership.auroc(members, others) == pytest.approx(np.mean(pairs))
    low, high = membership.interval(members, others)
    assert 0.5 < low < np.mean(pairs) < high < 0.9
    same = generator.normal(size=400)
    low, high = membership.interval(same[:200], same[200:])
    assert low < 0.5 < high and high - low < 0.13


def test_true_positives_are_counted_at_no_more_than_one_percent_of_false_ones() -> None:
    others, members = np.arange(200.0), np.array([-1.0, 0.5, 1.5, 2.5, 50])
    assert membership.tpr_at(members, others, 0.01) == 0.6  # below the third smallest: two others of 200
    assert membership.tpr_at(others, others, 0.01) == 0.01
    assert membership.tpr_at(members, others[:50], 0.01) == 0.2  # of 50 others none may be taken


def test_scores_count_distinct_tokens_and_chance_is_the_score_on_texts_never_had(tmp_path: Path) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    encode = [tuple(tokenizer(s)["input_ids"]) for s in SENTENCES]
    data = SimpleNamespace(heldout=[SimpleNamespace(input_ids=x) for x in encode[4:]])
    scorer = Scorer(tokenizer, data)  # type: ignore[arg-type]
    whole = scorer.score(recovery.Recovered(encode[0]), [encode[0]])
    assert whole.recall == whole.rouge1 == whole.rouge2 == 1.0
    assert whole.chance == pytest.approx(
        np.mean([len(set(encode[0]) & (set(x) - {0, 1, 2})) / len(set(x) - {0, 1, 2}) for x in encode[4:]]), abs=0.15
    )
    half = encode[0][: len(encode[0]) // 2]
    true = set(encode[0]) - {0, 1, 2}
    assert scorer.score(recovery.Recovered(half), [encode[0]]).recall == len(set(half) & true) / len(true)
    assert scorer.score(recovery.Recovered(()), [encode[0]]).recall == 0.0
