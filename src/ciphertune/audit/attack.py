"""What every attack on updates takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ciphertune.audit.dictionary import Dictionary
from ciphertune.audit.known import Moved
from ciphertune.audit.recovery import Recovered


@dataclass(frozen=True)
class Target:
    """One update: what is known of the layers that read tokens, and the dictionary of those layers."""

    layers: Mapping[str, Moved]
    words: Callable[[], Dictionary]  # made when it is first needed: an attack on nothing needs none
    noise: float  # share of the change that is no combination of tokens: what AdamW makes of a gradient


@dataclass(frozen=True)
class Attempt:
    """What one form of one attack found."""

    name: str
    form: str
    found: Recovered
    note: str = ""


NOTHING = Recovered(())
