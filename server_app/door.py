"""Who comes in: greeting the nodes, waiting for enough of them, taking in those that come later or come back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from ciphertune import flower
from ciphertune.errors import CiphertuneError, FederationError, FormatError
from ciphertune.federation import Federation, Member
from ciphertune.hello import Hello, parse_hello
from ciphertune.progress import printable, say
from ciphertune.settings import Settings
from ciphertune.versions import code_digest
from server_app.conduct import check_enough
from server_app.mail import exchange, open_reply

# A node that has not answered its greeting by then does not hold up the others: loading a model takes a while.
_GREETING_SECONDS = 180.0
_MOST_TEXT = 1 << 22  # characters of a greeting: it names every layer


class Door:
    """Greets nodes and admits them to the federation."""

    def __init__(self, settings: Settings, federation: Federation) -> None:
        self.settings, self.federation = settings, federation
        self._seen: set[int] = set()  # nodes that were greeted
        self._simulated = False
        self._refusals: list[tuple[str, str]] = []  # who, why
        self._told = 0  # of these

    def greeting(self) -> dict[str, Any]:
        """What every message to a client begins with: a client under other settings or code refuses it."""
        return {"settings": self.settings.digest().hex(), "code": code_digest(), "run": self.federation.run}

    def gather(self, grid: Grid) -> None:
        """Wait until enough clients have joined that can work together, then make the plan. Raises FederationError when
        they do not.

        A run that is resumed has its plan, and can do without those that stay away.
        """
        federation = self.settings.federation
        resumed = self.federation.settled
        least = federation.min_contributors if resumed else federation.min_clients
        deadline = time.monotonic() + federation.wait_timeout
        wanted = federation.min_clients
        if resumed:  # no more than there were, without the excluded
            wanted = max(least, min(wanted, len(self.federation.admitted)))
        hellos: list[Hello] = []
        said = ""
        while True:
            hellos = self._still_there(grid, hellos) + self._greet(grid, deadline)
            fitting = self.federation.fitting(hellos)
            if len(fitting) >= wanted:
                break
            state = f"{len(fitting)} of at least {wanted} clients (federation.min_clients) have joined"
            if time.monotonic() > deadline or self._simulated:
                if len(hellos) >= least:  # if they do not fit, the reasons are said below
                    break
                raise FederationError("; ".join([state, *self._reasons()]))
            if len(hellos) > len(fitting):
                state += f", {len(hellos) - len(fitting)} others do not agree with them"
            self._say_refusals()  # the operator can mend it while the others wait
            if state != said:
                said = state
                say(f"waiting up to {federation.wait_timeout:.0f} s: {state} ({', '.join(h.name for h in fitting)})")
            time.sleep(1.0)
        for hello, reason in self.federation.settle(hellos):
            self._refused(hello, reason)
        nodes = {hello.node_id for hello in hellos}
        members = [m for m in self.federation.members if m.hello.node_id in nodes]
        if len(members) < least:
            name = "min_contributors" if resumed else "min_clients"
            state = f"{len(members)} clients can work together, federation.{name}={least}"
            raise FederationError("; ".join([state, *self._reasons()]))
        self._say_refusals()
        for member in members:
            say(f"  {member.name}: rank {member.hello.rank}, {member.hello.samples} examples")

    def greet_new(self, grid: Grid) -> None:
        """Take in clients that come later, or come back on a new node, under the plan as it is."""
        self._refusals.clear()
        self._told = 0
        for hello in self._greet(grid, time.monotonic() + _GREETING_SECONDS):
            try:
                member = self.federation.admit(hello, set(grid.get_node_ids()))
                say(f"  {member.name} joins: rank {hello.rank}, {hello.samples} examples")
            except CiphertuneError as error:
                self._refused(hello, str(error))
        self._say_refusals()

    def _refused(self, hello: Hello, reason: str) -> None:
        """Write it down. A member's new node is asked again next round: its old one may only seem to be there."""
        self._refusals.append((hello.name, reason))
        same = any((m.name, m.hello.identity) == (hello.name, hello.identity) for m in self.federation.admitted)
        if same and not hello.simulated:
            self._seen.discard(hello.node_id)

    def _still_there(self, grid: Grid, hellos: list[Hello]) -> list[Hello]:
        """Those whose nodes are connected; one that comes back is greeted again."""
        nodes = set(grid.get_node_ids()) if hellos else set()
        self._seen -= {h.node_id for h in hellos if h.node_id not in nodes}
        return [h for h in hellos if h.node_id in nodes]

    def online(self, grid: Grid) -> list[Member]:
        """The members whose nodes are connected, without the excluded."""
        nodes = set(grid.get_node_ids())
        return [m for m in self.federation.admitted if m.hello.node_id in nodes]

    def wait_for_enough(self, grid: Grid) -> list[Member]:
        """The members that are connected, once they are enough for an aggregate.

        Raises FederationError when they are not within `wait_timeout` seconds, and at once when so many were excluded
        that it is no use to wait.
        """
        federation = self.settings.federation
        check_enough(self.federation)
        deadline = time.monotonic() + federation.wait_timeout
        said = False
        while len(found := self.online(grid)) < federation.min_contributors and time.monotonic() < deadline:
            if not said:
                say(f"waiting up to {federation.wait_timeout:.0f} s: only {len(found)} clients are connected")
                said = True
            time.sleep(1.0)
            self.greet_new(grid)
        if len(found) < federation.min_contributors:
            names = ", ".join(m.name for m in found) or "nobody"
            raise FederationError(
                f"after {federation.wait_timeout:.0f} s {len(found)} clients are connected ({names}), fewer than "
                f"federation.min_contributors={federation.min_contributors}"
            )
        return found

    def _greet(self, grid: Grid, deadline: float) -> list[Hello]:
        """Greet the nodes not seen before. Simulated nodes play several clients where there are too few nodes."""
        nodes = [n for n in grid.get_node_ids() if n not in self._seen]
        if not nodes:
            return []
        self._seen.update(nodes)
        timeout = max(1.0, min(_GREETING_SECONDS, deadline - time.monotonic()))
        hellos, self._simulated = self._join(grid, [(node, None) for node in nodes], timeout)
        if self._simulated:
            wanted = range(len(nodes), len(self.settings.federation.clients))
            hellos += self._join(grid, [(nodes[k % len(nodes)], k) for k in wanted], timeout)[0]
        return sorted(hellos, key=lambda h: h.name)

    def _join(self, grid: Grid, whom: Sequence[tuple[int, int | None]], timeout: float) -> tuple[list[Hello], bool]:
        """The greetings of (node, client) pairs, and whether all of them say that they are simulated."""
        hellos, simulated = [], []
        messages = [Message(flower.pack({**self.greeting(), "client": c}), node, "query.join") for node, c in whom]
        for index, reply in exchange(grid, messages, timeout):
            node, client = whom[index]
            name = f"node {node % (1 << 32):08x}"
            try:
                values = {} if reply.has_error() else flower.unpack(reply.content, most=_MOST_TEXT)[0]
                name = printable(values["name"][:64]) if isinstance(values.get("name"), str) else name
                claims = values.get("simulated") is True
                # that is the grid of Flower's simulation, where nobody waits: on another such a node could end the run
                simulated.append(claims and isinstance(grid, InMemoryGrid))
                if claims and not simulated[-1]:
                    raise FormatError("it says that it is simulated, and this run is between machines")
                hellos.append(parse_hello(open_reply(reply, most=_MOST_TEXT)[0], node, client))
            except CiphertuneError as error:
                self._refusals.append((name, printable(str(error))))
        return hellos, bool(simulated) and all(simulated)

    def _say_refusals(self) -> None:
        """Those that were not said yet."""
        for reason in self._reasons(self._told):
            say(f"left out {reason}")
        self._told = len(self._refusals)

    def _reasons(self, first: int = 0) -> list[str]:
        """One text per reason, with everybody it applies to."""
        grouped: dict[str, list[str]] = {}
        for who, why in self._refusals[first:]:
            grouped.setdefault(why, []).append(who)
        return [f"{', '.join(sorted(who))}: {why}" for why, who in grouped.items()]
