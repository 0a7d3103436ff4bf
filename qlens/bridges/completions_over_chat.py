"""Legacy completions on a provider that speaks chat only: one prompt, put to the model as a user's message."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from attrs import define, field, frozen

from qlens import sse
from qlens.bridges.counts import Heard
from qlens.dialects import Body, chunks, fields
from qlens.errors import NotOffered
from qlens.usage import Usage

_OBJECT = "text_completion"
_SAID_ALIKE = frozenset({*fields.SAMPLING, "model"}) - {"stream_options"}
"""What both APIs call the same."""
_NEUTRAL = {"best_of": 1, "echo": False, "logprobs": None, "suffix": None}
"""What chat does not have, with the value that asks for nothing."""


@frozen
class CompletionsOverChat:
    """Asks chat for what a client of completions wants."""

    def request(self, body: Body) -> Body:
        """The body of a chat call; raises InvalidRequest, with the client's own param, for what chat does not have."""
        sent: Body = {"messages": [{"role": "user", "content": _prompt(body)}]}
        for name, value in body.items():
            if name in _SAID_ALIKE or name == "max_tokens":
                sent[name] = orjson.loads(orjson.dumps(value))
            elif name in _NEUTRAL:
                if value is not None and value != _NEUTRAL[name]:
                    raise _unsupported(name)
            elif name not in {"prompt", "stream_options"}:
                raise _unsupported(name[:64])
        if body.get("stream"):
            sent["stream_options"] = {"include_usage": True}
        return sent

    def answer(self, body: Body, asked: Body) -> Body:
        """A chat completion as a completion."""
        answer = {**_head(body), "choices": list(_whole(body))}
        return {**answer, "usage": body["usage"]} if body.get("usage") else answer

    def stream(self, asked: Body) -> _Stream:
        """The state of one stream."""
        return _Stream()


@define(eq=False)
class _Stream:
    _heard: Heard = field(factory=Heard, init=False)
    _over: bool = field(default=False, init=False)

    @property
    def used(self) -> Usage | None:
        return self._heard.used

    def feed(self, event: bytes) -> bytes:
        """A chunk of a chat as one of a completion; what has no text, such as the role, becomes nothing."""
        data = sse.data(event)
        if data is None:
            return event
        if data.startswith(b"[DONE]"):
            self._over = True
            return sse.DONE
        payload = sse.parsed(data)
        if payload.get("error"):
            return event
        self._heard.hear(payload)
        choices = list(_deltas(payload))
        if not choices and not payload.get("usage"):
            return b""
        told = {**_head(payload), "choices": choices}
        return sse.write({**told, "usage": payload["usage"]} if payload.get("usage") else told)

    def end(self) -> bytes:
        """Nothing: whether the answer is whole is for others to judge."""
        return b""


def bridge() -> CompletionsOverChat:
    """The bridge; it has no state."""
    return CompletionsOverChat()


def _prompt(body: Body) -> str:
    prompt = body.get("prompt")
    if type(prompt) is list and len(prompt) == 1:
        prompt = prompt[0]
    if type(prompt) is not str:
        # Several prompts would be several chats, and tokens mean nothing to another model.
        raise NotOffered(
            "takes one text, neither several nor tokens.",
            lead="Unsupported value: 'prompt'. ",
            param="prompt",
            code="unsupported_value",
        )
    return prompt


def _unsupported(name: str) -> NotOffered:
    return NotOffered(
        "has no equal of it.",
        lead=f"Unsupported parameter: '{name}'. ",
        param=name,
        code="unsupported_parameter",
    )


def _head(body: Body) -> Body:
    """What a completion says of itself: the same as a chat, but for the tier, which this API does not know."""
    told = chunks.head(body, _OBJECT)
    told.pop("service_tier", None)
    return told


def _whole(body: Body) -> Iterator[chunks.Choice]:
    for _, index, choice in chunks.choices_of(body):
        message = choice.get("message")
        text = message.get("content") or message.get("refusal") if type(message) is dict else None
        yield _choice(choice, index, text)


def _deltas(event: Body) -> Iterator[chunks.Choice]:
    for _, index, choice in chunks.choices_of(event):
        delta = choice.get("delta")
        text = delta.get("content") or delta.get("refusal") if type(delta) is dict else None
        if text or choice.get("finish_reason"):
            yield _choice(choice, index, text)


def _choice(choice: chunks.Choice, index: int, text: object) -> chunks.Choice:
    more = chunks.choice_extras(choice)
    told = text if type(text) is str else ""
    return {"text": told, "index": index, "logprobs": None, **more, "finish_reason": choice.get("finish_reason")}
