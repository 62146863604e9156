"""The negotiation's table: whom to ask which columns they want encrypted, when, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ciphertune.errors import FederationError, FormatError
from ciphertune.federation import Federation, Member
from ciphertune.negotiation import Wish, parse_wish
from ciphertune.progress import say
from ciphertune.settings import Settings
from server_app.mail import MOST_TEXT


class Table:
    """Decides when to negotiate, reads the answers, settles the plan."""

    def __init__(self, settings: Settings, federation: Federation) -> None:
        self._settings, self._federation = settings, federation
        self._silent: set[str] = set()  # asked, and gave no usable answer: they wait for the next regular negotiation

    def due(self, round_: int, online: Sequence[Member]) -> bool:
        """Whether columns are to be negotiated before this round: at first, regularly, or for a larger new budget."""
        method = self._settings.method
        if not method.negotiates:
            return False
        every = method.renegotiate_every
        return (
            not self._federation.session.plan.budgets
            or bool(every and round_ % every == 0)
            or any(not self._federation.covered(m) and m.name not in self._silent for m in online)
        )

    @property
    def most_text(self) -> int:
        """Characters that a readable answer may have: a number of a column and a separator for all columns."""
        return MOST_TEXT + 16 * sum(x.n for x in self._federation.session.plan.layers)

    def wish(self, member: Member, values: dict[str, Any]) -> Wish:
        """What a client answered. Raises FormatError."""
        widths = [x.n for x in self._federation.session.plan.layers]
        return parse_wish(member.name, member.hello.budget, values.get("columns"), widths)

    def settle(self, round_: int, asked: Sequence[Member], wishes: Sequence[Wish]) -> dict[str, Any]:
        """Make the plan, say what each client gets, and return it for the run folder; nothing when the old plan stays.

        Raises FederationError when too few answered and there is no old plan.
        """
        self._silent = {m.name for m in asked} - {w.name for w in wishes}
        try:
            found = self._federation.negotiate(wishes)
        except (FederationError, FormatError) as error:
            if not self._federation.session.plan.budgets:
                raise FederationError(str(error)) from None
            say(f"the columns stay as they are: {error}")
            return {}
        mix = dict(zip(("clients", "common", "sensitivity"), found.mix, strict=True))
        say(f"columns negotiated among {len(wishes)} clients: {', '.join(f'{k} {v:.1f}' for k, v in mix.items())}")
        for wish in sorted(wishes, key=lambda w: w.name):
            say(
                f"  {wish.name}: budget {wish.budget:.3%}, coverage {found.coverage[wish.name]:.0%}, "
                f"risk {found.risk[wish.name]:.0%} (by order)"
            )
        return {"round": round_, "mix": mix, "coverage": dict(found.coverage), "risk": dict(found.risk)}

    def seated(self, online: Sequence[Member]) -> list[Member]:
        """Those whose budget the plan covers; says who has to wait."""
        for member in online:
            if not self._federation.covered(member):
                say(f"left out {member.name}: its budget {member.hello.budget:g} is above all that were negotiated")
        return [m for m in online if self._federation.covered(m)]
