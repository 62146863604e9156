"""Who answers with what no honest client sends, and who is excluded for it.

A client is left out of a round for many reasons: its process died, its disk is full, its training diverged, it holds
another mean than the server thought. Only a message that must not be used counts against it, once per round, and not
where two clients contradict each other or where a figure in a report is no number. All rounds of the run count, not
only those in a row: one that alternates would else spoil every second round for ever, and no honest cause sends even
one such message.
"""

from __future__ import annotations

from collections import defaultdict

from ciphertune.errors import CiphertuneError, DisagreementError, FederationError, ReportError, WireError
from ciphertune.federation import Federation, Member
from ciphertune.progress import say
from ciphertune.runs import FAULT, ServerFolder


def check_enough(federation: Federation) -> None:
    """Raise FederationError when clients were excluded and the others are too few for an aggregate."""
    left, minimum = len(federation.admitted), federation.settings.federation.min_contributors
    if federation.excluded and left < minimum:
        raise FederationError(
            f"{left} clients are left, fewer than federation.min_contributors={minimum}: excluded "
            + "; ".join(f"{name}: {why}" for name, why in federation.excluded.items())
        )


class Conduct:
    """The faults of each client."""

    def __init__(self, federation: Federation, folder: ServerFolder) -> None:
        self._federation, self._folder = federation, folder
        self._faults: dict[str, dict[int, str]] = defaultdict(dict)  # client -> round -> why

    def recall(self) -> None:
        """Take up the faults that the run folder holds, of a run that is resumed."""
        for line in self._folder.lasting():
            if line["stage"] == FAULT:
                self._count(line["node"], line["round"], line["reason"])

    def left_out(self, stage: str, round_: int, member: Member, error: CiphertuneError) -> None:
        """Say that a client is left out, and count it when the message was its own fault."""
        say(f"{stage}: left out {member.name}: {error}")
        faulty = isinstance(error, WireError) and not isinstance(error, DisagreementError | ReportError)
        if not faulty or round_ in self._faults[member.name]:
            return
        self._folder.line(round_, FAULT, member.name, reason=str(error))
        if self._count(member.name, round_, str(error)):
            say(f"excluded {member.name} from the run: {self._federation.excluded[member.name]}")

    def _count(self, name: str, round_: int, reason: str) -> bool:
        """Whether this fault excludes the client."""
        faults, most = self._faults[name], self._federation.settings.federation.exclude_after
        faults[round_] = reason
        if not most or len(faults) < most or name in self._federation.excluded:
            return False
        why = "; ".join(f"round {r + 1}: {text}" for r, text in sorted(faults.items()))
        self._federation.excluded[name] = f"unusable messages in {len(faults)} rounds (federation.exclude_after): {why}"
        return True
