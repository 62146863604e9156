"""An in-process Grid: it calls the real ClientApp for each message and sends every message through its bytes.

Replies travel as they do between Flower's processes: as objects (message, records, arrays, chunks of arrays), each of
bytes that name the others by their SHA-256. Whoever sends a reply decides all of these bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar
from unittest.mock import patch

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid

# private: isolated in this file
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid, InMemoryGrid

from client_app.app import app

Objects = dict[str, bytes]  # object id -> content, the message's last
Wire = list[Objects]  # the replies to one message
# what a hostile client or network makes of a reply: of the message, or of its objects on the way, perhaps of several
Tamper = Callable[[Message, int], Message | Wire]
SUPERLINK = 1  # its node id
UNAVAILABLE = 1  # any code
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 4242, 1  # a test may make messages before a grid


def through_bytes(records: RecordDict) -> RecordDict:
    data = recorddict_to_proto(records).SerializeToString()
    return recorddict_from_proto(RecordDictProto.FromString(data))


def objects_of(message: Message) -> Objects:
    """A message as Flower's HttpGrid sends it."""
    return {name: found.deflate() for name, found in get_all_nested_objects(message).items()}


def message_of(objects: Objects) -> Message:
    """What Flower's HttpGrid makes of it, errors included."""
    name = list(objects)[-1]
    message = inflate_object_from_contents(name, dict(objects))
    message.metadata.__dict__["_message_id"] = name
    return message  # type: ignore[return-value]


def set_metadata(message: Message, **fields: Any) -> Message:
    """The message with fields of its metadata replaced."""
    message.metadata.__dict__.update({f"_{name}": value for name, value in fields.items()})
    return message


class _InProcess(Grid):
    """`nodes`: node id -> node config. `tamper`: what a hostile client or network makes of a reply.

    `outgoing`: a message type, and what a hostile server makes of such a message.
    """

    simulation: ClassVar[bool]  # whether Flower's simulation engine runs the nodes of which it makes the settings

    def __init__(
        self,
        nodes: dict[int, dict[str, Any]],
        run_config: dict[str, Any],
        tamper: Tamper | None = None,
        outgoing: tuple[str, Callable[[Message], None]] | None = None,
        run_id: int = 4242,
    ) -> None:
        self.nodes, self.run_config, self.tamper = dict(nodes), run_config, tamper
        self.run_id = run_id
        self.replies: dict[str, Wire] = {}
        self.messages: dict[str, Message] = {}
        self.sent: list[tuple[int, Message]] = []
        self.answered: list[tuple[int, Message]] = []
        self.outgoing = outgoing
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self.run_id, 1

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = message_id
            node = message.metadata.dst_node_id
            self.sent.append((node, message))
            if self.outgoing and message.metadata.message_type == self.outgoing[0]:
                self.outgoing[1](message)
            message.content = through_bytes(message.content)
            config = self.nodes[node]
            context = Context(self.run_id, node, config, RecordDict(), self.run_config)
            engine = self.simulation and set(config) == {"partition-id", "num-partitions"}
            try:
                with patch("client_app.app.in_simulation", return_value=engine):
                    reply = app(message, context)
                reply.content = through_bytes(reply.content)
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=message)
            self.answered.append((node, reply))
            found = self.tamper(reply, node) if self.tamper else reply
            self.replies[message_id] = found if isinstance(found, list) else [objects_of(found)]
            self.messages[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages; of one that was answered already the SuperLink says that it is gone."""
        found: list[Message] = []
        for i in message_ids:
            if i in self.replies:
                found += [message_of(objects) for objects in self.replies.pop(i)]
            else:
                gone = Message(Error(UNAVAILABLE, "Message Unavailable"), reply_to=self.messages[i])
                found.append(set_metadata(gone, src_node_id=SUPERLINK))
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


class LocalGrid(_InProcess, InMemoryGrid):
    """Flower's grid of a simulation; nodes with settings of their own in it do as real ones."""

    simulation = True


class DeployedGrid(_InProcess, HttpGrid):
    """Flower's grid between machines."""

    simulation = False


def simulated(count: int) -> dict[int, dict[str, Any]]:
    """Node configs as Flower's simulation gives them."""
    return {100 + k: {"partition-id": k, "num-partitions": count} for k in range(count)}
