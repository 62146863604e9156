"""Rows of a data file -> checked lines -> token ids. No torch here: a client starts anew for every message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ciphertune.errors import DataError

IGNORED = -100  # a token without loss, as in torch's cross entropy
_SHORTEST_BLOCK = 8  # tokens; what a cut leaves over at the end of a long text is worth no example of its own


@dataclass(frozen=True)
class Encoded:
    """One example. Causal: `labels` has one entry per token, IGNORED where no loss; classification: the class."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | int


@dataclass(frozen=True)
class Row:
    """A JSON object and where it came from, for messages."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A checked row: a plain text, a response to a prompt (instruction, input), or a text of a class."""

    text: str
    prompt: tuple[str, str] | None = None
    label: int = -1


def read_jsonl(path: Path, setting: str = "data.path") -> list[Row]:
    """Every line of a file of JSON objects; blank lines are skipped. setting: what named the file, for messages.

    Raises DataError with the file and line when the file is absent or empty or a line is not an object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"data file {path} {reason}: check {setting}") from None
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); want one JSON object per line") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: want a JSON object, found {type(values).__name__}")
        rows.append(Row(where, values))
    if not rows:
        raise DataError(f"data file {path} is empty: want one JSON object per line")
    return rows


def check_rows(rows: Iterable[Row], task: str, labels: Sequence[str]) -> list[Line]:
    """The lines that `rows` hold for `task`. Raises DataError at the first row that does not fit."""
    if task == "classification":
        return [Line(_string(row, "text"), label=_label(row, labels)) for row in rows]
    return [_causal_line(row) for row in rows]


def encode(lines: Sequence[Line], tokenizer: Any, max_length: int) -> tuple[list[Encoded], int]:
    """Examples of at most `max_length` tokens, in order, and the number of lines that gave none.

    A text is ``bos text eos`` (where the tokenizer has them); a longer one is cut into consecutive blocks. A prompt
    gives no loss, only its response does. A text to classify is cut at the end.
    """
    tokenizer_calls = {"add_special_tokens": False, "verbose": False}
    if lines and lines[0].label >= 0:
        kept = [line for line in lines if line.text.strip()]
        ids = _ids(tokenizer, [line.text for line in kept], truncation=True, max_length=max_length)
        examples = [Encoded(tuple(row), line.label) for row, line in zip(ids, kept, strict=True)]
        return examples, len(lines) - len(kept)
    pairs = [_sides(line, tokenizer) for line in lines]
    befores = _ids(tokenizer, [before for before, _ in pairs], **tokenizer_calls)
    afters = _ids(tokenizer, [after for _, after in pairs], **tokenizer_calls)
    examples, dropped = [], 0
    for line, before, after in zip(lines, befores, afters, strict=True):
        made = _causal_examples(line, before, after, tokenizer, max_length)
        examples.extend(made)
        dropped += not made
    return examples, dropped


def _causal_line(row: Row) -> Line:
    response = next((key for key in ("response", "output") if key in row.values), "")
    if "instruction" in row.values and response:
        extra = _string(row, "input") if row.values.get("input") is not None else ""
        return Line(_string(row, response), (_string(row, "instruction"), extra))
    if "text" in row.values:
        return Line(_string(row, "text"))
    found = ", ".join(map(repr, row.values)) or "none"
    raise DataError(f"{row.where}: want the key 'text', or 'instruction' and 'response'; found: {found}")


def _string(row: Row, key: str) -> str:
    if key not in row.values:
        found = ", ".join(map(repr, row.values)) or "none"
        raise DataError(f"{row.where}: want the keys 'text' and 'label'; found: {found}")
    value = row.values[key]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {key!r} is {type(value).__name__}, want a string")
    return value


def _label(row: Row, labels: Sequence[str]) -> int:
    """A label's place in `labels`, by name; an integer is also taken as the place itself when no name is a number."""
    if "label" not in row.values:
        _string(row, "label")
    value = row.values["label"]
    if str(value) in labels:
        return labels.index(str(value))
    places = type(value) is int and not any(name.lstrip("-").isdigit() for name in labels)
    if places and 0 <= value < len(labels):
        return int(value)
    raise DataError(f"{row.where}: unknown label {value!r}; known (data.labels): {', '.join(labels)}")


def _sides(line: Line, tokenizer: Any) -> tuple[str, str]:
    """Text without loss, text with loss. A prompt follows the tokenizer's chat template where it has one."""
    if line.prompt is None:
        return "", line.text
    instruction, extra = line.prompt
    if getattr(tokenizer, "chat_template", None):
        return _chat_sides(f"{instruction}\n\n{extra}" if extra else instruction, line.text, tokenizer)
    middle = f"Input:\n{extra}\n\n" if extra else ""
    return f"Instruction:\n{instruction}\n\n{middle}Response:\n", line.text


def _chat_sides(question: str, answer: str, tokenizer: Any) -> tuple[str, str]:
    user = {"role": "user", "content": question}
    assistant = {"role": "assistant", "content": answer}
    try:
        before = str(tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template([user, assistant], tokenize=False))
    except Exception as error:  # a template may raise anything
        raise DataError(f"the tokenizer's chat template cannot format a question and its answer: {error}") from None
    if whole.startswith(before):
        return before, whole[len(before) :]
    return before, answer + (
        tokenizer.eos_token or ""
    )  # the template opens an answer in another way than it writes one


def _causal_examples(line: Line, before: list[int], after: list[int], tokenizer: Any, max_length: int) -> list[Encoded]:
    templated = line.prompt is not None and bool(getattr(tokenizer, "chat_template", None))
    first = [] if templated or tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    last = [] if templated or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if not after or not line.text.strip():
        return []
    if line.prompt is not None:
        prompt, response = [*first, *before], [*after, *last]
        ids = tuple([*prompt, *response][:max_length])
        labels = tuple([*[IGNORED] * len(prompt), *response][:max_length])
        return [Encoded(ids, labels)] if len(ids) > len(prompt) else []
    ids = (*first, *after, *last)
    blocks = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    if len(blocks) > 1 and len(blocks[-1]) < _SHORTEST_BLOCK:
        del blocks[-1]
    return [Encoded(block, block) for block in blocks if len(block) > 1]


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    return list(tokenizer(texts, **options)["input_ids"]) if texts else []
