"""The embedded corpus and the shipped base model: what each promises."""

from __future__ import annotations

import importlib.util
import math
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ciphertune.errors import DataError
from ciphertune.lm import embedded

ROOT = Path(__file__).resolve().parents[1]
BASE = Path(embedded.__file__).resolve().parents[1] / "assets" / "base"
COUNTS = range(1, 17)

FINGERPRINT = """
import hashlib, sys
from ciphertune.lm.embedded import tuning_topics
print(hashlib.sha256(repr([tuning_topics(n) for n in (1, 4, 9)]).encode()).hexdigest())
print(*(name for name in ("torch", "transformers", "tkinter", "imaplib", "_pydecimal") if name in sys.modules))
"""


def paragraphs(passages: Any) -> set[str]:
    """Every paragraph, without regard to spacing, punctuation and case."""
    split = (re.sub(r"\W+", " ", part).strip().lower() for text in passages for part in re.split(r"\n\s*\n", text))
    return {part for part in split if part}


def pieces(topics: tuple[embedded.Topic, ...]) -> list[str]:
    return [passage for topic in topics for passage in (*topic.train, *topic.heldout)]


@pytest.fixture(scope="module")
def pretraining() -> list[str]:
    return list(embedded.pretraining_text())


@pytest.fixture
def fresh() -> Iterator[None]:
    """For a test that changes what the library seems to hold: nothing is remembered before or after."""

    def forget() -> None:
        embedded._passages.cache_clear()
        embedded._sources.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize("count", COUNTS)
def test_every_count_of_clients_gets_named_text_to_train_on_and_to_hold_out(count: int) -> None:
    topics = embedded.tuning_topics(count)
    assert len(topics) == count
    assert len({topic.name for topic in topics}) == count
    assert all(len(topic.train) >= 50 and topic.heldout for topic in topics)


@pytest.mark.parametrize("count", COUNTS)
def test_no_paragraph_is_in_two_topics_nor_both_in_training_and_heldout(count: int) -> None:
    topics = embedded.tuning_topics(count)
    parts = [paragraphs(part) for topic in topics for part in (topic.train, topic.heldout)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(set(pieces(topics))) == len(pieces(topics))


@pytest.mark.parametrize("count", COUNTS[1:])
def test_sizes_are_uneven(count: int) -> None:
    sizes = [len(topic.train) for topic in embedded.tuning_topics(count)]
    assert max(sizes) > 1.4 * min(sizes)


def test_a_passage_is_held_out_in_every_division_or_in_none() -> None:
    def heldout(count: int) -> set[str]:
        return {passage for topic in embedded.tuning_topics(count) for passage in topic.heldout}

    assert heldout(4) == heldout(8) == heldout(16)


def test_heldout_text_is_a_few_hundred_passages_and_none_is_long() -> None:
    topics = embedded.tuning_topics(4)
    assert 100 <= sum(len(topic.heldout) for topic in topics) <= 500
    assert max(map(len, pieces(topics))) <= embedded.PASSAGE_CHARS


def test_pretraining_text_shares_no_paragraph_with_any_topic(pretraining: list[str]) -> None:
    for count in (4, 16):
        assert not paragraphs(pretraining) & paragraphs(pieces(embedded.tuning_topics(count)))


def test_pretraining_text_is_ample_and_in_pieces(pretraining: list[str]) -> None:
    assert sum(map(len, pretraining)) > 1_000_000
    assert max(map(len, pretraining)) <= embedded.DOCUMENT_CHARS


def test_text_is_the_same_in_every_process_and_imports_no_library_it_reads() -> None:
    def run(hash_seed: str) -> str:
        env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-c", FINGERPRINT]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    first, second = run("1"), run("2")
    assert first == second
    assert first.split("\n")[1] == ""


@pytest.mark.parametrize("missing", [{"tkinter", "turtle.py"}, {"_pydecimal.py", "statistics.py", "random.py"}])
def test_a_library_without_some_modules_still_serves_every_client(
    missing: set[str], monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setattr(embedded, "_SKIPPED", embedded._SKIPPED | missing)
    assert [len(embedded.tuning_topics(count)) for count in (1, 4, 8)] == [1, 4, 8]


def test_a_library_without_the_language_reference_still_serves_every_client(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    topics = embedded.tuning_topics(4)
    assert len(topics) == 4
    assert not any("reference" in topic.name for topic in topics)


def test_a_python_without_any_sources_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setattr(embedded, "_library", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="too little text for 4 clients"):
        embedded.tuning_topics(4)
    assert list(embedded.pretraining_text()) == []


def test_too_many_clients_and_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="for 5000 clients"):
        embedded.tuning_topics(5000)
    with pytest.raises(ValueError, match="count=0"):
        embedded.tuning_topics(0)


def test_a_source_file_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "syntax.py").write_text("def (\n# a comment\n")
    (tmp_path / "latin.py").write_bytes(b"'''caf\xe9'''\n")
    assert [embedded._docstrings(path) for path in sorted(tmp_path.iterdir())] == [[], []]
    assert embedded._comments(tmp_path / "syntax.py") == ["a comment"]
    assert embedded._comments(tmp_path / "absent.py") == []


@pytest.fixture(scope="module")
def shipped() -> SimpleNamespace:
    """The shipped model in float32 and its tokenizer, loaded while every connection is refused."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(BASE), torch=torch)


def loss(shipped: SimpleNamespace, passages: list[str]) -> float:
    """Mean cross-entropy, nats per token."""
    batch = shipped.tokenizer(passages, padding=True, truncation=True, max_length=128, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with shipped.torch.no_grad():
        return float(shipped.model(**batch, labels=labels).loss)


def test_shipped_folder_is_small_complete_and_states_its_licence() -> None:
    names = {path.name for path in BASE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 4_500_000
    assert {path.suffix for path in BASE.iterdir()} <= {".json", ".md", ".safetensors", ".jinja"}
    assert re.search("(?i)licence.*PSF.*Apache-2.0", (BASE / "README.md").read_text(), re.DOTALL)


def test_shipped_model_loads_without_a_network_and_fits_its_tokenizer(shipped: SimpleNamespace) -> None:
    config, tokenizer = shipped.model.config, shipped.tokenizer
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config.pad_token_id,
        config.bos_token_id,
        config.eos_token_id,
    )
    assert tokenizer("text")["input_ids"][0] == tokenizer.bos_token_id
    assert all(shipped.torch.isfinite(p).all() for p in shipped.model.parameters())


@pytest.mark.parametrize("text", ["def f(x):\n    return x ** 2\n", "  Grüße, 世界 \t🙂\r\n", "", "a" * 1000])
def test_tokenizer_gives_back_the_text_it_was_given(shipped: SimpleNamespace, text: str) -> None:
    ids = shipped.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert shipped.tokenizer.decode(ids) == text
    assert shipped.tokenizer.unk_token_id not in ids


def test_most_passages_fit_128_tokens(shipped: SimpleNamespace) -> None:
    lengths = [len(ids) for ids in shipped.tokenizer(pieces(embedded.tuning_topics(4)))["input_ids"]]
    assert sum(length <= 128 for length in lengths) > 0.6 * len(lengths)


def test_chat_template_renders_and_marks_what_the_assistant_says(shipped: SimpleNamespace) -> None:
    turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert shipped.tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s>### user\nWhat is 1 + 1?\n\n### assistant\n2</s>\n"
    )
    prompt = shipped.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>### user\nWhat is 1 + 1?\n\n### assistant\n"
    marked = shipped.tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    said = [token for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert shipped.tokenizer.decode(said) == "2</s>"


def test_base_loss_on_heldout_text_is_far_below_guessing_and_leaves_room_to_tune(shipped: SimpleNamespace) -> None:
    for topic in embedded.tuning_topics(4):
        assert 2.0 < loss(shipped, list(topic.heldout[:24])) < 0.65 * math.log(shipped.model.config.vocab_size)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_base_model", ROOT / "scripts" / "make_base_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_making_a_model_twice_with_one_seed_gives_the_same_files(script: ModuleType, tmp_path: Path) -> None:
    import torch

    texts = embedded.tuning_topics(1)[0].train
    for name in ("first", "second"):
        torch.manual_seed(3)
        tokenizer, model = script.make_tokenizer(list(texts)), script.make_model(hidden=32, layers=1, heads=2)
        row = script.encode(tokenizer, list(texts))
        args = SimpleNamespace(steps=3, seed=3, rate=1e-3, muon_rate=0.02, weight_decay=0.0)
        script.train(model, row, row[:512], args)
        script.save(model, tokenizer, tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
