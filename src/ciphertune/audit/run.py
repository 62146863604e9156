"""`ciphertune audit`: every attack on everything the server of a run got. Read this first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from ciphertune.audit import b_factor, metadata, span
from ciphertune.audit.attack import Attempt, Target
from ciphertune.audit.dictionary import Dictionary, dictionary
from ciphertune.audit.known import moved
from ciphertune.audit.membership import Membership, infer
from ciphertune.audit.recovery import Recovered
from ciphertune.audit.report import Report, Row, judge
from ciphertune.audit.truth import Score, Scorer, Text, data_of, trained_on
from ciphertune.audit.view import Seen, View, read_view
from ciphertune.errors import ModelError, StateError
from ciphertune.lm import model as lm_model
from ciphertune.runs import read_values

ADAMW_NOISE = 1.0  # as strong as the signal: AdamW divides every entry of a gradient by its own size
ATTACKS = (span.attack, b_factor.attack)

Tick = Callable[[float, str], None]  # share done, what is being done


def audit(
    folder: Path,
    *,
    clients: Path | None = None,
    max_recall: float | None = None,
    node: str = "",
    tick: Tick = lambda _, __: None,
) -> Report:
    """Attack `server_view/` of a run folder, and the finished adapter where there is one.

    clients: the clients' folders, which only the scoring reads; by default the run's own.  node: attack this client
    only. Raises CiphertuneError.
    """
    found = read_view(folder)
    auditor = Auditor(found, clients or folder / "clients", tick)
    rows = list(auditor.rows(node))
    return judge(found, rows, auditor.membership(), metadata.facts(found), max_recall)


class Auditor:
    """The attacks on one view; the public model is loaded once, and only when something can be read."""

    def __init__(self, view: View, clients: Path, tick: Tick) -> None:
        self.view, self.clients, self.tick = view, clients, tick

    def rows(self, node: str = "") -> Iterator[Row]:
        """Every attack on every update, and on all updates of a client together."""
        together: dict[tuple[str, str, str], list[tuple[Recovered, list[Text]]]] = defaultdict(list)
        chosen = [s for s in self.view.seen if node in ("", s.node)]
        for number, one in enumerate(chosen):
            self.tick(number / len(chosen), f"round {one.round + 1}, {one.node}")
            texts = self._texts(one)
            for attempt in self._attempts(one):
                yield self._row(one, attempt, self._score(one, attempt.found, texts), one.round)
                together[one.node, attempt.name, attempt.form].append((attempt.found, texts))
        for (who, name, form), found in together.items():
            one = next(s for s in chosen if s.node == who)
            if len(found) > 1 and any(f.tokens for f, _ in found):
                every = Recovered(tuple(dict.fromkeys(t for f, _ in found for t in f.tokens)))
                score = self._score(one, every, [t for _, texts in found for t in texts])
                yield self._row(one, Attempt(name, form, every, "all rounds together"), score, None)

    def membership(self) -> Membership | None:
        """Of the client with the most examples whose finished adapter lies in its folder; None where none does."""
        nodes = sorted({s.node: s.message.contributors[0].samples for s in self.view.seen}.items(), key=lambda x: -x[1])
        merged = self.view.settings.method.fit_rank == "merge"  # there the adapter is not all that was learned
        for node, _ in [] if merged else nodes:
            adapter = self.clients / node / "adapter"
            if (adapter / "adapter_model.safetensors").is_file():
                data = data_of(self.clients, node, self.view.seen[0].link.run)
                if not data.heldout:
                    return None
                self.tick(1.0, f"membership, {node}")
                model = self._load(adapter_rank(adapter))
                return infer(model, adapter, data, self.view.settings.training)
        return None

    @cached_property
    def _model(self) -> lm_model.LoraModel:
        return self._load(max(s.message.rank for s in self.view.seen))

    def _load(self, rank: int) -> lm_model.LoraModel:
        settings = self.view.settings
        return lm_model.load(settings.model, rank=rank, labels=settings.data.labels, seed=settings.seed)

    @cached_property
    def _words(self) -> Dictionary:
        return dictionary(self._model, self.view.settings.model.max_length)

    def _attempts(self, one: Seen) -> Iterator[Attempt]:
        layers = moved(self.view, one, self._model.read(), self._words.layers) if one.layers else {}
        target = Target(layers, lambda: self._words, ADAMW_NOISE)
        for attack in ATTACKS:
            yield from attack(target)

    def _texts(self, one: Seen) -> list[Text]:
        """What the client trained on; nothing where its folder is elsewhere and nothing could be read anyway."""
        if not one.layers and not (self.clients / one.node).is_dir():
            return []
        data = data_of(self.clients, one.node, one.link.run)
        return trained_on(self.view.settings, one.node, one.round, data)

    def _score(self, one: Seen, found: Recovered, texts: list[Text]) -> Score:
        if not found.tokens:
            return Score(0.0, 0.0, 0.0, 0.0)
        scorer = Scorer(self._model.tokenizer, data_of(self.clients, one.node, one.link.run))
        return scorer.score(found, texts)

    def _row(self, one: Seen, attempt: Attempt, score: Score, round_: int | None) -> Row:
        training = self.view.settings.training
        return Row(
            attempt.name,
            attempt.form,
            round_,
            one.node,
            training.batch_size * training.accumulation,
            score.recall,
            score.rouge1,
            score.rouge2,
            score.chance,
            attempt.note,
        )


def adapter_rank(folder: Path) -> int:
    """The rank of a PEFT folder. Raises ModelError."""
    path = folder / "adapter_config.json"
    try:
        return int(read_values(path)["r"])
    except (StateError, KeyError, TypeError, ValueError):
        raise ModelError(f"{path} is absent or damaged: put it back from a copy, or move the folder away") from None
