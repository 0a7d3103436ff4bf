"""From a chat completion, whole or in chunks, to a response and its events."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import orjson
from attrs import define, field, frozen

from qlens.bridges.responses_over_chat import thoughts
from qlens.dialects import Body, chat, chunks
from qlens.dialects.response_events import CALLS, PARTS, Item, Part, Place, Writer
from qlens.errors import UpstreamInvalid
from qlens.provider_errors import error_from
from qlens.usage import from_openai

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is incomplete, by chat's finish reason; with any other it is complete."""
_HEAD = ("id", "created", "model", "service_tier")
# What a response repeats of its request, with what OpenAI says where nothing was asked for.
_REPEATED = {
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": 1.0,
    "top_logprobs": 0,
    "top_p": 1.0,
    "user": None,
}


def answered(body: Body, asked: Body) -> Body:
    """A chat completion as a response; `asked` is the client's request body."""
    answer = Answer(asked)
    # By the way of a stream, so that both say the same.
    for chunk in chat.explode(body):
        for _ in answer.read(chunk):
            pass
    for _ in answer.finished():
        pass
    if not answer.begun:
        raise UpstreamInvalid("The provider's answer has no choices.")
    return answer.response


@define(eq=False)
class Answer:
    """One response that is being made of the chunks of a chat completion."""

    asked: Body
    """The client's request body."""
    response: Body = field(init=False, factory=dict)
    """As it is in the end."""
    begun: bool = field(init=False, default=False)
    finish: str | None = field(init=False, default=None)
    """Set once the model has stopped."""
    over: bool = field(init=False, default=False)
    """Whether the last event was made."""
    _writer: Writer = field(init=False, factory=Writer)
    _head: Body = field(init=False, factory=dict)
    """What chat's chunks say of the whole answer."""
    _usage: Body | None = field(init=False, default=None)
    _ids: _Ids = field(init=False)
    _output: list[Item] = field(init=False, factory=list)
    _saying: _Saying | None = field(init=False, default=None)
    """The message or the reasoning that is open: one at a time."""
    _calls: dict[int, _Call] = field(init=False, factory=dict)
    """By chat's index."""
    _notes: list[Any] = field(init=False, factory=list)
    """Annotations that came before the text they belong to."""

    # --- chunks in, events out -----------------------------------------------------------------

    def read(self, chunk: Body) -> Iterator[Body]:
        """The events that a chunk becomes; raises the error that it carries instead."""
        if chunk.get("error"):
            raise error_from(chunk)
        self._head = {**self._head, **{name: chunk[name] for name in _HEAD if chunk.get(name)}}
        if type(chunk.get("usage")) is dict:
            self._usage = chunks.larger(self._usage, chunk["usage"])
        # One choice was asked for.
        for _, index, choice in chunks.choices_of(chunk):
            if index == 0:
                yield from self._choice(choice)

    def _choice(self, choice: dict[str, Any]) -> Iterator[Body]:
        if not self.begun:
            yield from self._begin()
        delta = choice.get("delta")
        if type(delta) is dict:
            logprobs = choice.get("logprobs")
            yield from self._thought(delta)
            yield from self._said(delta, logprobs if type(logprobs) is dict else {})
            yield from self._called(delta.get("tool_calls"))
        reason = choice.get("finish_reason")
        if type(reason) is str:
            self.finish = self.finish or reason

    def finished(self) -> Iterator[Body]:
        """The events an answer ends with; none when it never began, or has ended."""
        if not self.begun or self.over:
            return
        self.over = True
        reason = _INCOMPLETE.get(self.finish or "")
        if reason is None and not any(item["type"] != "reasoning" for item in self._output):
            # A model that says nothing has still said it.
            yield from self._say("output_text", "")
        yield from self._end_all("incomplete" if reason else "completed")
        self.response = {
            **self._unfinished(),
            "status": "incomplete" if reason else "completed",
            "incomplete_details": {"reason": reason} if reason else None,
            "output": self._output,
            "usage": None if self._usage is None else usage_of(self._usage),
        }
        yield self._writer.ended(self.response)

    # --- the response --------------------------------------------------------------------------

    def _begin(self) -> Iterator[Body]:
        self.begun = True
        created = self._head.get("created")
        self._ids = _Ids.of(self._head.get("id") or orjson.dumps([created, self.asked]).decode())
        yield from self._writer.begun(self._unfinished())

    def _unfinished(self) -> Body:
        asked, created = self.asked, self._head.get("created")
        reasoning, text = asked.get("reasoning") or {}, asked.get("text") or {}
        return {
            "id": self._ids.of_response,
            "object": "response",
            "created_at": created if type(created) is int else 0,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._head.get("model") or asked.get("model"),
            "output": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **reasoning},
            "service_tier": self._head.get("service_tier"),
            "store": False,
            "text": {**text, "format": text.get("format") or {"type": "text"}},
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": [_repeated(tool) for tool in asked.get("tools") or ()],
            "truncation": "disabled",
            "usage": None,
            **{name: default if asked.get(name) is None else asked[name] for name, default in _REPEATED.items()},
            "metadata": asked.get("metadata") or {},
        }

    # --- what is said and thought --------------------------------------------------------------

    def _thought(self, delta: dict[str, Any]) -> Iterator[Body]:
        # The names of DeepSeek and most servers, and of OpenRouter and vLLM; some send the same under both.
        text = delta.get("reasoning_content") or delta.get("reasoning")
        signed = delta.get("thinking_blocks")
        if signed and type(signed) is list:
            yield from self._turn_to("reasoning")
            assert self._saying is not None
            self._saying.signed += signed
        if text and type(text) is str:
            reasoning = self.asked.get("reasoning") or {}
            # A client that reads summaries asks for them; all others read reasoning where open models show it.
            summed_up = reasoning.get("summary") or reasoning.get("generate_summary")
            yield from self._say("summary_text" if summed_up else "reasoning_text", text)

    def _said(self, delta: dict[str, Any], logprobs: dict[str, Any]) -> Iterator[Body]:
        notes = delta.get("annotations")
        self._notes += [_annotation(note) for note in notes if type(note) is dict] if type(notes) is list else []
        spelled = [_spelled(token) for token in logprobs.get("content") or () if type(token) is dict]
        text = _text_of(delta.get("content"))
        if text or spelled:
            yield from self._say("output_text", text, spelled)
        saying = self._saying
        if saying is not None and saying.part is not None and saying.part["type"] == "output_text":
            for note in self._notes:
                yield self._writer.annotated(saying.place, saying.part, len(saying.notes), note)
                saying.notes.append(note)
            self._notes = []
        refusal = delta.get("refusal")
        if refusal and type(refusal) is str:
            yield from self._say("refusal", refusal)

    def _say(self, kind: str, text: str, spelled: list[Any] | None = None) -> Iterator[Body]:
        """More text of a part of this kind, which is opened if it is not."""
        yield from self._turn_to("message" if kind in {"output_text", "refusal"} else "reasoning")
        saying = self._saying
        assert saying is not None
        if saying.part is None or saying.part["type"] != kind:
            yield from self._end_part(saying)
            saying.part = {"type": kind, PARTS[kind].text: ""}
            beside: Part = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
            yield self._writer.part_added(saying.place, {**saying.part, **beside})
        if text or spelled:
            saying.texts.append(text)
            saying.spelled += spelled or ()
            yield self._writer.part_delta(saying.place, saying.part, text, spelled)

    def _turn_to(self, kind: str) -> Iterator[Body]:
        """Have an item of this kind open."""
        if self._saying is not None and self._saying.item["type"] == kind:
            return
        yield from self._end_saying()
        yield from self._end_calls(whole=True)
        index = len(self._output)
        if kind == "message":
            item: Item = {
                "id": self._ids.of_item("msg", index),
                "type": kind,
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
        else:
            item = {"id": self._ids.of_item("rs", index), "type": kind, "summary": []}
        self._saying = _Saying(index, item)
        self._output.append(item)
        yield self._writer.item_added(index, {**item})

    def _end_part(self, saying: _Saying) -> Iterator[Body]:
        if saying.part is None:
            return
        kind = PARTS[saying.part["type"]]
        part = {**saying.part, kind.text: "".join(saying.texts)}
        if part["type"] == "output_text":
            part |= {"annotations": saying.notes, "logprobs": saying.spelled}
        yield from self._writer.part_done(saying.place, part)
        saying.item[kind.place] = [*saying.item.get(kind.place, ()), part]
        saying.part, saying.texts, saying.notes, saying.spelled = None, [], [], []

    def _end_saying(self, status: str = "completed") -> Iterator[Body]:
        saying, self._saying = self._saying, None
        if saying is None:
            return
        yield from self._end_part(saying)
        if saying.signed:
            # Whether or not the client included it: nothing is kept here, so signed thoughts have no other way back.
            saying.item["encrypted_content"] = thoughts.closed(saying.signed)
        if "status" in saying.item:
            saying.item["status"] = status
        yield self._writer.item_done(saying.index, saying.item)

    # --- calls of tools ------------------------------------------------------------------------

    def _called(self, parts: Any) -> Iterator[Body]:
        for part in parts if type(parts) is list else ():
            if type(part) is not dict:
                continue
            call = self._calls.get(self._index_of(part))
            if call is None:
                yield from self._end_saying()
                yield from self._end_calls(whole=True)
                call = self._calls[self._index_of(part)] = _Call()
            yield from self._continue(call, part)

    def _index_of(self, part: dict[str, Any]) -> int:
        index = part.get("index")
        if type(index) is int:
            return index
        # Some servers leave the index out: an id then starts the next call.
        last = max(self._calls, default=-1)
        return last + 1 if part.get("id") or last < 0 else last

    def _continue(self, call: _Call, part: dict[str, Any]) -> Iterator[Body]:
        kind, source = ("custom_tool_call", "custom") if part.get("custom") else ("function_call", "function")
        called = part.get(source)
        called = called if type(called) is dict else {}
        text = called.get("input" if source == "custom" else "arguments")
        text = text if type(text) is str else ""
        name = called.get("name")
        if not call.item and name:
            index = len(self._output)
            call.index, call.item = index, self._call_item(kind, index, part.get("id"), name)
            self._output.append(call.item)
            yield self._writer.item_added(index, {**call.item})
        if not text:
            return
        if call.done or not call.item:
            raise UpstreamInvalid(
                "The provider's answer calls a tool without a name, or goes on after a call is whole."
            )
        call.texts.append(text)
        yield self._writer.call_delta(call.index, call.item, text)

    def _call_item(self, kind: str, index: int, given: Any, name: Any) -> Item:
        prefix = "fc" if kind == "function_call" else "ctc"
        call_id = given if given and type(given) is str else self._ids.of_item("call", index)
        item = {"id": self._ids.of_item(prefix, index), "type": kind, "status": "in_progress", "call_id": call_id}
        return {**item, "name": name, CALLS[kind][0]: ""}

    def _end_calls(self, *, whole: bool, status: str = "completed") -> Iterator[Body]:
        """End the calls that are open; `whole`: only those to which nothing can be added."""
        for call in self._calls.values():
            if call.item and not call.done and (not whole or call.is_whole):
                yield from self._end_call(call, status)

    def _end_call(self, call: _Call, status: str) -> Iterator[Body]:
        call.done = True
        text = "".join(call.texts)
        if call.item["type"] == "function_call" and not text.strip() and status == "completed":
            # A function that takes nothing: what clients parse must be JSON still.
            text += "{}"
            yield self._writer.call_delta(call.index, call.item, "{}")
        call.item[CALLS[call.item["type"]][0]] = text
        call.item["status"] = status
        yield self._writer.call_done(call.index, call.item)
        yield self._writer.item_done(call.index, call.item)

    def _end_all(self, status: str) -> Iterator[Body]:
        """End what is open; of an incomplete answer the last item is what is incomplete."""
        still = [call for call in self._calls.values() if call.item and not call.done]
        yield from self._end_saying("completed" if still else status)
        for call in still:
            yield from self._end_call(call, status if call is still[-1] else "completed")


@define(eq=False)
class _Saying:
    """A message or reasoning that is open."""

    index: int
    item: Item
    part: Part | None = None
    """The part that is open."""
    texts: list[str] = field(factory=list)
    """Its text so far."""
    notes: list[Any] = field(factory=list)
    """Its annotations so far."""
    spelled: list[Any] = field(factory=list)
    """The log probabilities of its tokens so far."""
    signed: list[Any] = field(factory=list)
    """Thoughts with their signatures."""

    @property
    def place(self) -> Place:
        """Of the part that is open."""
        assert self.part is not None
        return Place(self.item["id"], self.index, len(self.item.get(PARTS[self.part["type"]].place) or ()))


@define(eq=False)
class _Call:
    """A call of a tool."""

    index: int = 0
    item: Item = field(factory=dict)
    """Empty until the name of the tool is known."""
    texts: list[str] = field(factory=list)
    done: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether its arguments are JSON, after which nothing can come; of a free text that cannot be told."""
        if self.item["type"] != "function_call":
            return False
        try:
            orjson.loads("".join(self.texts))
        except orjson.JSONDecodeError:
            return False
        return True


@frozen
class _Ids:
    """The ids of a response and its items: always the same for the same answer."""

    digest: str

    @classmethod
    def of(cls, seed: str) -> _Ids:
        """The ids for an answer that chat knows under another one."""
        return cls(blake2b(seed.encode(errors="surrogatepass"), digest_size=20).hexdigest())

    @property
    def of_response(self) -> str:
        return f"resp_{self.digest}"

    def of_item(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self.digest}{index:04x}"


def _repeated(tool: Body) -> Body:
    """A tool as a response repeats it: with every field a function can have."""
    if tool["type"] != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def usage_of(usage: Body) -> Body:
    """Chat's usage as Responses count it, with every count that chat has."""
    read = {"cached_tokens": 0, "cache_write_tokens": 0, **_counts(usage.get("prompt_tokens_details"))}
    thought = {"reasoning_tokens": 0, **_counts(usage.get("completion_tokens_details"))}
    counted = from_openai(usage) if usage.get("completion_tokens") is None else None
    generated = counted.completion if counted is not None else usage.get("completion_tokens") or 0
    said = usage.get("prompt_tokens") or 0, generated
    prompt = _whole(said[0], read, "cached_tokens", "cache_write_tokens", "audio_tokens")
    completion = _whole(said[1], thought, "reasoning_tokens", "audio_tokens")
    total = usage.get("total_tokens") if (prompt, completion) == said else None
    return {
        "input_tokens": prompt,
        "input_tokens_details": read,
        "output_tokens": completion,
        "output_tokens_details": thought,
        "total_tokens": total or prompt + completion,
    }


def _whole(said: int, details: Body, *names: str) -> int:
    """A count with its parts in it: some servers leave out of it what they count apart, as no client expects."""
    parts = sum(details[name] for name in names if type(details.get(name)) is int)
    return said if said >= parts else said + parts


def _counts(details: Any) -> Body:
    return {name: count for name, count in details.items() if count is not None} if type(details) is dict else {}


def _text_of(content: Any) -> str:
    """The text of a delta's content: mostly the content itself; some servers send parts."""
    if type(content) is not list:
        return content if type(content) is str else ""
    texts = (part.get("text") for part in content if type(part) is dict)
    return "".join(text for text in texts if type(text) is str)


def _annotation(note: dict[str, Any]) -> dict[str, Any]:
    """A note in the form of Responses: flat."""
    kind = note.get("type")
    inner = note.get(kind) if type(kind) is str else None
    return {"type": kind, **inner} if type(inner) is dict else note


def _spelled(token: dict[str, Any]) -> dict[str, Any]:
    """A token's log probability in the form of Responses: lists are there, if only empty."""
    others = [{**other, "bytes": other.get("bytes") or []} for other in token.get("top_logprobs") or ()]
    return {**token, "bytes": token.get("bytes") or [], "top_logprobs": others}
