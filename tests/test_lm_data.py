from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ciphertune.errors import DataError
from ciphertune.lm.data import ClientData, load_client_data
from ciphertune.settings import DataSettings, ModelSettings
from tests.tiny import SENTENCES, tiny_tokenizer, write_lines

CAUSAL = ModelSettings(max_length=32)
CLASSES = ModelSettings(task="classification", max_length=32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer("llama")


def load(path: Path | str, tokenizer: Any, model: ModelSettings = CAUSAL, client: int = 0, **data: Any) -> ClientData:
    settings = DataSettings(**{"source": "jsonl", "path": str(path), "heldout_fraction": 0.0, **data})
    return load_client_data(settings, model, tokenizer, client=client, clients=4)


def test_a_text_is_an_example_between_bos_and_eos(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": text} for text in SENTENCES]
    found = load(write_lines(tmp_path / "d.jsonl", rows), tokenizer, replace(CAUSAL, max_length=64))
    assert len(found.train) == 8
    texts = {tokenizer.decode(example.input_ids[1:-1]) for example in found.train}
    assert texts == set(SENTENCES)
    for example in found.train:
        assert example.input_ids[0] == 1
        assert example.input_ids[-1] == 2
        assert example.labels == example.input_ids


def test_blocks_of_a_long_text_lose_no_token(tmp_path: Path, tokenizer: Any) -> None:
    rests = set()
    for extra, length in product(range(3), range(8, 64, 3)):
        text = " ".join([*SENTENCES, *["the"] * extra])
        whole = (1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2)
        path = write_lines(tmp_path / "d.jsonl", [{"text": text}])
        blocks = [e.input_ids for e in load(path, tokenizer, replace(CAUSAL, max_length=length)).train]
        joined = tuple(token for block in blocks for token in block)
        left = len(whole) % length
        rests.add(left)
        assert joined == whole[: len(joined)]
        assert len(whole) - len(joined) == (left if left < 8 else 0)  # only a last block below 8 tokens is dropped
        assert [len(block) for block in blocks[:-1]] == [length] * (len(blocks) - 1)
    assert rests >= {7, 8}


def test_a_short_text_is_kept_although_a_short_last_block_is_not(tmp_path: Path, tokenizer: Any) -> None:
    found = load(write_lines(tmp_path / "d.jsonl", [{"text": "key"}]), tokenizer)
    assert 3 <= len(found.train[0].input_ids) < 8


def test_only_the_response_has_loss(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"instruction": "say it", "response": "the key"},
        {"instruction": "say it", "input": "loud", "output": "the key"},
        {"instruction": "say it", "input": "", "output": "the key", "text": "say it the key"},
    ]
    found = load(write_lines(tmp_path / "d.jsonl", rows), tokenizer, replace(CAUSAL, max_length=64))

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    plain = (1, *ids("Instruction:\nsay it\n\nResponse:\n"))
    longer = (1, *ids("Instruction:\nsay it\n\nInput:\nloud\n\nResponse:\n"))
    response = (*ids("the key"), 2)
    wanted = {(p + response, (-100,) * len(p) + response) for p in (plain, longer)}
    assert {(e.input_ids, e.labels) for e in found.train} == wanted
    assert len(found.train) == 3


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    chat = tiny_tokenizer("llama")
    chat.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = [{"instruction": "say it", "input": "loud", "response": "the key"}]
    example = load(write_lines(tmp_path / "d.jsonl", rows), chat, replace(CAUSAL, max_length=64)).train[0]
    assert chat.decode(example.input_ids) == "[user]say it\n\nloud</s>[assistant]the key</s>"
    assert isinstance(example.labels, tuple)
    scored = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    assert chat.decode(scored) == "the key</s>"
    assert example.labels[-len(scored) :] == tuple(scored)


def test_a_chat_template_that_fails_is_one_line(tmp_path: Path) -> None:
    chat = tiny_tokenizer("llama")
    chat.chat_template = "{{ raise_exception('only systems') }}"
    path = write_lines(tmp_path / "d.jsonl", [{"instruction": "say it", "response": "the key"}])
    with pytest.raises(DataError, match=r"chat template cannot format.*only systems"):
        load(path, chat)


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"instruction": " ".join(SENTENCES), "response": "no"},
        {"instruction": "say it", "response": ""},
        {"instruction": "a", "response": " ".join(SENTENCES)},
    ]
    found = load(write_lines(tmp_path / "d.jsonl", rows), tokenizer)
    assert len(found.train) == 1
    assert len(found.train[0].input_ids) == 32
    assert "1 training and 0 held-out" in found.description
    assert "2 lines without a usable token dropped" in found.description


def test_texts_to_classify(tmp_path: Path) -> None:
    bert = tiny_tokenizer("bert")
    rows = [
        {"text": "the key", "label": "yes"},
        {"text": "rain", "label": 0},
        {"text": " ".join(SENTENCES), "label": 1},
    ]
    found = load(write_lines(tmp_path / "d.jsonl", rows), bert, CLASSES, labels=("no", "yes"))
    by_text = {bert.decode(e.input_ids, skip_special_tokens=True)[:7]: e for e in found.train}
    assert {text: e.labels for text, e in by_text.items()} == {"the key": 1, "rain": 0, "the lab": 1}
    for example in found.train:
        assert example.input_ids[0] == 1
        assert example.input_ids[-1] == 2
    assert len(by_text["the lab"].input_ids) == 32


def test_a_number_that_is_a_label_name_is_never_a_place(tmp_path: Path) -> None:
    rows = [{"text": f"text {label}", "label": label} for label in (1, 2, "3")]
    path = write_lines(tmp_path / "d.jsonl", rows)
    bert = tiny_tokenizer("bert")
    found = load(path, bert, CLASSES, labels=("1", "2", "3"))
    assert sorted(e.labels for e in found.train) == [0, 1, 2]
    with pytest.raises(DataError, match=r"d.jsonl:1: unknown label 1; known \(data.labels\): 0, 2, 3"):
        load(path, bert, CLASSES, labels=("0", "2", "3"))


@pytest.mark.parametrize(
    ("content", "model", "message"),
    [
        ("", CAUSAL, "d.jsonl is empty"),
        ("\n  \n", CAUSAL, "d.jsonl is empty"),
        ('{"text": "a b c"}\n\n{"text": \n', CAUSAL, "d.jsonl:3: not JSON"),
        ('{"text": "a b c"}\n["a"]\n', CAUSAL, "d.jsonl:2: want a JSON object, found list"),
        ('{"body": "a", "id": 3}\n', CAUSAL, "d.jsonl:1: want the key 'text', or .*found: 'body', 'id'"),
        ('{"instruction": "a"}\n', CAUSAL, "d.jsonl:1: .*'response'; found: 'instruction'"),
        ('{"text": 5}\n', CAUSAL, "d.jsonl:1: 'text' is int, want a string"),
        ('{"instruction": "a", "response": null}\n', CAUSAL, "d.jsonl:1: 'response' is NoneType"),
        ('{"text": "a"}\n', CLASSES, "d.jsonl:1: want the keys 'text' and 'label'; found: 'text'"),
        ('{"label": "no"}\n', CLASSES, "d.jsonl:1: want the keys 'text' and 'label'; found: 'label'"),
        (
            '{"text": "a", "label": "no"}\n{"text": "a", "label": "on"}\n',
            CLASSES,
            "d.jsonl:2: unknown label 'on'; .*: no, yes",
        ),
        ('{"text": "a", "label": 2}\n', CLASSES, "d.jsonl:1: unknown label 2"),
        ('{"text": "a", "label": -1}\n', CLASSES, "d.jsonl:1: unknown label -1"),
        ('{"text": "a", "label": true}\n', CLASSES, "d.jsonl:1: unknown label True"),
        ('{"text": " "}\n', CAUSAL, "d.jsonl: no training example is left for client 0 of 4"),
    ],
)
def test_bad_lines_are_named(content: str, model: ModelSettings, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(path, tokenizer, model, labels=("no", "yes"))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a b"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"d.jsonl:2: not JSON"):
        load(path, tokenizer)


def test_all_lines_are_checked_before_any_is_tokenised(tmp_path: Path) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised")

    good = write_lines(tmp_path / "d.jsonl", [{"text": "a b c"}] * 5)
    bad = write_lines(tmp_path / "h.jsonl", [{"text": "a b c"}] * 5 + [{"body": ""}])
    with pytest.raises(DataError, match=r"h.jsonl:6"):
        load(good, never, heldout_path=str(bad))
    with pytest.raises(DataError, match=r"h.jsonl:6"):
        load(bad, never, max_train=1)


def test_files_that_are_not_there(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist: check data.path"):
        load(tmp_path / "nothing.jsonl", tokenizer)
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path, tokenizer)
    with pytest.raises(DataError, match=r"data.path is empty"):
        load("", tokenizer)
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a b c"}])
    with pytest.raises(DataError, match=r"h-3.jsonl does not exist: check data.heldout_path"):
        load(path, tokenizer, client=3, heldout_path=str(tmp_path / "h-{client}.jsonl"))


def test_every_client_reads_its_own_file(tmp_path: Path, tokenizer: Any) -> None:
    for k in range(4):
        write_lines(tmp_path / f"train-{k}.jsonl", [{"text": f"train {k}"}])
        write_lines(tmp_path / f"held-{k}.jsonl", [{"text": f"held {k}"}])
    found = load(
        tmp_path / "train-{client}.jsonl", tokenizer, client=2, heldout_path=str(tmp_path / "held-{client}.jsonl")
    )
    assert [tokenizer.decode(e.input_ids[1:-1]) for e in found.train] == ["train 2"]
    assert [tokenizer.decode(e.input_ids[1:-1]) for e in found.heldout] == ["held 2"]


def test_a_nodes_own_path_wins(tmp_path: Path, tokenizer: Any) -> None:
    write_lines(tmp_path / "general.jsonl", [{"text": "general"}])
    write_lines(tmp_path / "own-1.jsonl", [{"text": "own"}])
    settings = DataSettings(source="jsonl", path=str(tmp_path / "general.jsonl"), heldout_fraction=0.0)
    own = str(tmp_path / "own-{client}.jsonl")
    found = load_client_data(settings, CAUSAL, tokenizer, client=1, clients=2, path=own)
    assert tokenizer.decode(found.train[0].input_ids[1:-1]) == "own"


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(20, 0.1, 2), (20, 0.5, 10), (3, 0.01, 1), (2, 0.9, 1), (5, 0.0, 0)]
)
def test_a_share_is_held_out(count: int, fraction: float, held: int, tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": f"text {i}"} for i in range(count)])
    found = load(path, tokenizer, heldout_fraction=fraction)
    train, heldout = ([tokenizer.decode(e.input_ids[1:-1]) for e in part] for part in (found.train, found.heldout))
    assert len(heldout) == held
    assert sorted(train + heldout) == sorted(f"text {i}" for i in range(count))
    assert found == load(path, tokenizer, heldout_fraction=fraction)


def test_what_is_held_out_follows_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": f"text {i}"} for i in range(50)])
    one, other = (load(path, tokenizer, heldout_fraction=0.2, seed=seed).heldout for seed in (0, 1))
    assert set(one) != set(other)


def test_caps(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": " ".join(SENTENCES)}] * 10)
    found = load(path, tokenizer, heldout_fraction=0.5, max_train=7, max_heldout=3)
    assert (len(found.train), len(found.heldout)) == (7, 3)


def test_embedded_text_has_a_topic_per_client_and_one_common_held_out_set(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    def topics(count: int) -> tuple[SimpleNamespace, ...]:
        return tuple(SimpleNamespace(name=f"t{k}", train=(f"train {k}",), heldout=(f"held {k}",)) for k in range(count))

    monkeypatch.setitem(sys.modules, "ciphertune.lm.embedded", SimpleNamespace(tuning_topics=topics))
    clients = [load_client_data(DataSettings(), CAUSAL, tokenizer, client=k, clients=3) for k in range(3)]
    for k, found in enumerate(clients):
        assert [tokenizer.decode(e.input_ids[1:-1]) for e in found.train] == [f"train {k}"]
        assert [tokenizer.decode(e.input_ids[1:-1]) for e in found.heldout] == ["held 0", "held 1", "held 2"]
        assert found.description == f"topic t{k}: 1 training and 3 held-out examples"
    with pytest.raises(DataError, match="no labels"):
        load_client_data(DataSettings(), CLASSES, tokenizer, client=0, clients=3)


@pytest.mark.parametrize("client", [-1, 4])
def test_a_client_that_is_not_among_them(client: int, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"client number {client} is not among 4"):
        load("any", tokenizer, client=client)


def test_importing_the_data_module_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'flwr_datasets', 'pandas', 'pyarrow'}"
    code = f"import sys, ciphertune.lm.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
