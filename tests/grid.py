"""An in-process Grid: it calls the real ClientApp for each message and sends every message through its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # private: isolated in this file

from client_app.app import app

Tamper = Callable[[Message, int], Message]


def through_bytes(records: RecordDict) -> RecordDict:
    data = recorddict_to_proto(records).SerializeToString()
    return recorddict_from_proto(RecordDictProto.FromString(data))


class LocalGrid(Grid):
    """`nodes`: node id -> node config. `tamper`: what a hostile client or network makes of a reply.

    `outgoing`: a message type, and what a hostile server makes of such a message.
    """

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
        self.replies: dict[str, Message] = {}
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
            context = Context(self.run_id, node, self.nodes[node], RecordDict(), self.run_config)
            try:
                reply = app(message, context)
                reply.content = through_bytes(reply.content)
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=message)
            self.answered.append((node, reply))
            self.replies[message_id] = self.tamper(reply, node) if self.tamper else reply
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def simulated(count: int) -> dict[int, dict[str, Any]]:
    """Node configs as Flower's simulation gives them."""
    return {100 + k: {"partition-id": k, "num-partitions": count} for k in range(count)}
