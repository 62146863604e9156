"""What a client really trained on, and how much of it an attack read. Only the scoring sees this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from ciphertune.audit.recovery import Recovered
from ciphertune.errors import DataError
from ciphertune.lm.cache import load_data
from ciphertune.lm.data import ClientData
from ciphertune.lm.train import batch_seed, batches
from ciphertune.settings import Settings

Text = tuple[int, ...]  # token ids of one example

_DECOYS = 5  # draws of texts that the client never had


@dataclass(frozen=True)
class Score:
    """How much of the text an attack read, each 0 to 1. chance: the recall against texts the client never had."""

    recall: float  # share of the distinct tokens, special ones left out
    rouge1: float  # F1
    rouge2: float
    chance: float


def data_of(clients: Path, node: str, run: int) -> ClientData:
    """A client's encoded examples, from its folder. Raises DataError."""
    path = clients / node / "state" / "data.safetensors"
    found = load_data(path, run=run)
    if found is None:
        raise DataError(f"{path} does not hold {node}'s examples of this run: without them an attack cannot be scored")
    return found


def trained_on(settings: Settings, node: str, round_: int, data: ClientData) -> list[Text]:
    """The examples of a client's batches in a round, each once."""
    training = settings.training
    order = batches(data.train, training, batch_seed(settings.seed, node, round_))
    rows = [i for _ in range(training.steps * training.accumulation) for i in next(order)]
    return [data.train[i].input_ids for i in dict.fromkeys(rows)]


class Scorer:
    """Scores what attacks recover from one client."""

    def __init__(self, tokenizer: Any, data: ClientData) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._special = {int(i) for i in tokenizer.all_special_ids}
        self._rouge = RougeScorer(["rouge1", "rouge2"])

    def score(self, found: Recovered, texts: Sequence[Text]) -> Score:
        """Against the texts of one or more rounds."""
        rouge = self._rouge.score(self._words([t for text in texts for t in text]), self._words(found.tokens))
        decoys = [self._recall(found, texts) for texts in self._never_had(texts)]
        return Score(
            self._recall(found, texts),
            float(rouge["rouge1"].fmeasure),
            float(rouge["rouge2"].fmeasure),
            float(np.mean(decoys)) if decoys else 0.0,
        )

    def _recall(self, found: Recovered, texts: Sequence[Text]) -> float:
        true = {t for text in texts for t in text} - self._special
        return len(true & found.set) / len(true) if true else 0.0

    def _never_had(self, texts: Sequence[Text]) -> list[list[Text]]:
        """Held-out texts, as many as the real ones, drawn anew for each."""
        pool = [e.input_ids for e in self._data.heldout]
        count, generator = min(len(texts), len(pool)), np.random.default_rng(0)
        return [
            [pool[i] for i in generator.choice(len(pool), count, replace=False)] for _ in range(_DECOYS if count else 0)
        ]

    def _words(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([t for t in tokens if t not in self._special]))
