"""Every way in which Bedrock fails: the exceptions of its service model, and streams that break in the middle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlens.testing import frames
from qlens.testing.bedrock import answer, failure, stream, streamed
from qlens.testing.service_model import service_model
from qlens.testing.upstreams import Scripted

OPERATIONS = ("Converse", "ConverseStream", "InvokeModel", "CountTokens")


def exceptions(operation: str) -> dict[str, int]:
    """The exceptions with which an operation is documented to fail, with their status."""
    model = service_model("bedrock-runtime").operation_model(operation)
    return {shape.name: shape.metadata["error"]["httpStatusCode"] for shape in model.error_shapes}


def exceptions_in_stream(operation: str = "ConverseStream") -> dict[str, int]:
    """The exceptions that may end a stream, by their names there, with the status that they would have before it."""
    events = service_model("bedrock-runtime").operation_model(operation).get_event_stream_output()
    return {
        name: shape.metadata["error"]["httpStatusCode"]
        for name, shape in events.members.items()
        if shape.metadata.get("exception")
    }


def instead_of_an_answer(operation: str, message: str = "as documented") -> dict[str, Scripted]:
    """Each exception of an operation as a scripted answer."""
    return {name: failure(name, message, status=status) for name, status in exceptions(operation).items()}


def broken_streams(told: Mapping[str, Any] | None = None) -> dict[str, Scripted]:
    """Streams of an answer, by default of a text, that begin well and do not come to their end.

    Each has its messageStart and a piece of text before what is wrong; `gap` keeps them apart on the wire.
    """
    whole = streamed(told or answer({"text": "Hello"}))
    begun, rest = whole[:2], whole[2:]
    flawed = {
        **{name: [frames.exception(name, "as documented")] for name in exceptions_in_stream()},
        "an exception after the answer": [*rest[:-1], frames.exception("internalServerException", "late")],
        "an exception that is not documented": [frames.exception("somethingNewException", "new")],
        "an error without a model": [frames.error("InternalFailure", "failed")],
        "a wrong checksum": [_flipped(rest[0], -1), *rest[1:]],
        "a wrong checksum of a beginning": [_flipped(rest[0], 8), *rest[1:]],
        "a changed payload": [_flipped(rest[0], len(rest[0]) // 2), *rest[1:]],
        "an impossible length": [b"\x7f\xff\xff\xff" + rest[0][4:], *rest[1:]],
        "a message of an unknown type": [frames.frame({":message-type": "rumour"}, b"{}"), *rest],
        "an event that is not JSON": [frames.frame({":message-type": "event", ":event-type": "metadata"}, b"{")],
        "an end between two frames": [],
        "an end inside a frame": [rest[0][:-3]],
        "an end inside a beginning": [rest[0][:5]],
    }
    return {name: stream([*begun, *events], gap=0.01) for name, events in flawed.items()}


def _flipped(frame: bytes, at: int) -> bytes:
    changed = bytearray(frame)
    changed[at] ^= 1
    return bytes(changed)
