"""Where texts stand in a body, and how long they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlens.dialects import Fixed, Ref, Strand

MESSAGE_TOKENS = 16
"""More than any chat template puts around one message or tool."""

# What a model does not read as text, or what nobody may rewrite without breaking the body. Everything else counts as
# text, so that a field which a provider invents tomorrow does not slip past a guard.
OPAQUE = frozenset(
    {
        "cache_control",
        "data",
        "detail",
        "encrypted_content",
        "extra_content",
        "file_data",
        "file_id",
        "filename",
        "format",
        "id",
        "image_url",
        "name",
        "prompt_cache_breakpoint",
        "role",
        "signature",
        "thought_signature",
        "tool_call_id",
        "type",
        "url",
    }
)

_DESCRIBES = frozenset({"$comment", "description", "instructions", "server_description", "title"})
"""What is told in words of a tool, a parameter or a form of answer: it may be told in others."""
_NAMING = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""The parts of a JSON schema whose keys are names."""
_SET_UP = frozenset(
    {
        *("$ref", "$schema", "authorization", "background", "cache_control", "connector_id", "container", "effort"),
        *("environment", "file_ids", "headers", "image_url", "input_fidelity", "mode", "model", "moderation"),
        *("output_format", "quality", "require_approval", "search_context_size", "server_url", "size", "syntax"),
        *("type", "vector_store_ids"),
    }
)
"""What says how a tool is run, and no model reads."""

UNKNOWN = "unknown"
"""The kind of what this API is not known to have: nobody can say how much a model reads there."""
HOSTED_TOOLS = "hosted_tools"
"""The kind of tools that the provider runs: they cost beside tokens, or bring in texts of any length."""


def size(text: str) -> int:
    """The bytes of a text in UTF-8, which is the most tokens that a byte-level tokenizer can make of it."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def leaves(node: Any, strand: Strand, ref: Ref) -> Iterator[tuple[Strand, Ref, str]]:
    """Find the texts below a node of a message or a delta.

    A strand names list items by their own `index`, so that it stays the same from event to event.
    """
    if type(node) is str:
        yield strand, ref, node
    elif type(node) is dict:
        for key, child in node.items():
            if child is not None and key not in OPAQUE:
                yield from leaves(child, (*strand, key), (*ref, key))
    elif type(node) is list:
        for position, child in enumerate(node):
            name = child.get("index", position) if type(child) is dict else position
            yield from leaves(child, (*strand, name if type(name) is int else position), (*ref, position))


def gather(node: Any, ref: Ref, found: list[tuple[Ref, str]], opaque: frozenset[str] = OPAQUE) -> None:
    """Add the texts below a node of a message, which stands at `ref`, to those that were found: `leaves` in a call."""
    if type(node) is dict:
        for key, child in node.items():
            if child is None or key in opaque:
                continue
            if type(child) is str:
                found.append(((*ref, key), child))
            else:
                gather(child, (*ref, key), found, opaque)
    elif type(node) is list:
        for position, child in enumerate(node):
            gather(child, (*ref, position), found, opaque)
    elif type(node) is str:
        found.append((ref, node))


def describe(node: Any, ref: Ref, found: list[tuple[Ref, str]], *, names: bool = False) -> None:
    """Add what a model reads of tools or of the form its answer is to have: descriptions, and Fixed all else.

    `names` says that the keys of this node are names.
    """
    if type(node) is dict:
        for key, child in node.items():
            if names:
                found.append((Fixed((*ref, key)), key))
            elif key in _SET_UP:
                continue
            if type(child) is str:
                found.append(((*ref, key) if key in _DESCRIBES else Fixed((*ref, key)), child))
            elif type(child) is dict or type(child) is list:
                describe(child, (*ref, key), found, names=key in _NAMING and not names)
    elif type(node) is list:
        for position, child in enumerate(node):
            if type(child) is str:
                found.append((Fixed((*ref, position)), child))
            else:
                describe(child, (*ref, position), found)


def named(node: Any, ref: Ref, found: list[tuple[Ref, str]]) -> None:
    """Add the name that this object has, where it has one."""
    if type(node) is dict and type(name := node.get("name")) is str:
        found.append((Fixed((*ref, "name")), name))


def only(body: Any, ref: Ref, start: int, text: str) -> Any:
    """A copy of what stands at the first `start` steps of a ref, with nothing in it but this text at the ref.

    List items keep their `index` and `type`, which say where the text belongs.
    """
    nodes = [body]
    for step in ref[:-1]:
        nodes.append(nodes[-1][step])
    node: Any = text
    for parent, step in zip(reversed(nodes[start:]), reversed(ref[start:]), strict=True):
        if type(step) is int:
            node = [node]
        else:
            node = {**{name: parent[name] for name in ("index", "type") if name in parent}, step: node}
    return node


def prompts(body: dict[str, Any], field: str) -> list[tuple[Ref, str]]:
    """The texts of a field that holds a text, texts, or tokens."""
    value = body.get(field)
    if type(value) is str:
        return [((field,), value)]
    if type(value) is not list:
        return []
    return [((field, index), item) for index, item in enumerate(value) if type(item) is str]


def has_tokens(value: Any) -> bool:
    """Whether such a field holds tokens."""
    return type(value) is list and bool(value) and type(value[0]) is not str


def prompts_bound(value: Any) -> tuple[int, int]:
    """The most tokens of such a field, and an estimate; token arrays are counted exactly."""
    if type(value) is str:
        return size(value) + MESSAGE_TOKENS, -(-size(value) // 3) + 1
    if type(value) is int:
        return 1, 1
    if type(value) is not list:
        return 0, 0
    if value and type(value[0]) is int:
        return len(value), len(value)
    bounds = [prompts_bound(item) for item in value]
    return sum(hard for hard, _ in bounds), sum(estimate for _, estimate in bounds)
