"""What leaves a client of what it trained: all of it, or a clipped and noised release that is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ciphertune.adapter import Adapter
from ciphertune.errors import PlanMismatchError, StateError
from ciphertune.privacy import epsilon, noise_multiplier, protect
from ciphertune.progress import note
from ciphertune.state import count_release, load_state, save_state
from ciphertune.task import Task

if TYPE_CHECKING:
    from ciphertune.client import Client


def protected(client: Client, trained: Adapter, adapter: Adapter, task: Task) -> Adapter:
    """What this client sends of what it trained: clipped and noised where the method says so.

    Asked for a round again, it sends the release that it made the first time: a second one would cost privacy again.
    Raises PlanMismatchError when it has sent as many updates as the noise was made for, whatever the server asks.
    """
    method, rounds = client.settings.method, client.settings.federation.rounds
    if method.noise == "none":
        return trained
    plan = client.plan(task.terms)
    path = client.node.folder / "state" / "released.safetensors"
    try:
        earlier, at, _ = load_state(path, trained, run=client.run)
    except StateError as error:
        raise PlanMismatchError(
            f"{path} is damaged, or the server asks for other components than in an earlier round: this client sends "
            "nothing more in this run, since a second release of one round would cost privacy again"
        ) from error
    if at == task.round:
        note(client.node.name, f"round {at + 1} again: the update that was sent before, with its noise")
        return earlier
    z = noise_multiplier(method, rounds)
    sent = count_release(client.node.folder, client.run)
    if sent > rounds:
        raise PlanMismatchError(f"this client has sent {rounds} updates, all that federation.rounds={rounds} allows")
    text = f"update {sent} of {rounds} with noise {z:.3g} x clip {method.clip:g}"
    note(client.node.name, f"{text}; epsilon {epsilon([z] * sent, method.delta):.3g} (delta {method.delta:g})")
    release = protect(
        trained,
        adapter,
        plan.factors(task.round),
        plan.shared(adapter.rank),
        clip=method.clip,
        noise_multiplier=z,
        generator=np.random.default_rng(),  # from the operating system: noise that follows from a seed hides nothing
    )
    save_state(path, release, run=client.run, round_=task.round)
    return release
