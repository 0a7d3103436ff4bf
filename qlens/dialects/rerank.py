"""Rerank, as Cohere, Jina and the servers like them take it (https://docs.cohere.com/reference/rerank)."""

from __future__ import annotations

from qlens.dialects import Body, Ref, fields
from qlens.dialects.plain import Plain, tokens_of
from qlens.dialects.texts import gather
from qlens.usage import Usage

DOCUMENTS_PER_QUERY = 100
"""How many documents are searched for the price of one query."""
_MOST_DOCUMENTS = 1000
_MOST_SEARCHES = 2**31


def _texts(body: Body) -> list[tuple[Ref, str]]:
    found: list[tuple[Ref, str]] = []
    gather(body.get("query"), ("query",), found)
    gather(body.get("documents"), ("documents",), found)
    return found


def _repeated(body: Body) -> list[tuple[Ref, str]]:
    found: list[tuple[Ref, str]] = []
    for name in ("results", "data"):
        gather(body.get(name), (name,), found)
    return found


def queries(documents: int) -> int:
    """How many queries a call with so many documents is billed as."""
    return max(1, -(-documents // DOCUMENTS_PER_QUERY))


def _used(body: Body) -> Usage | None:
    """Cohere counts searches, the others tokens."""
    meta = body.get("meta")
    billed = meta.get("billed_units") if isinstance(meta, dict) else None
    searches = billed.get("search_units") if isinstance(billed, dict) else None
    if isinstance(searches, int | float) and not isinstance(searches, bool) and 0 < searches < _MOST_SEARCHES:
        return Usage(meters={"queries": -int(-searches // 1)}, source="provider")
    said = body.get("usage")
    total = said.get("total_tokens") if isinstance(said, dict) else None
    return tokens_of({"usage": {"prompt_tokens": total}}) if total else None


RERANK = Plain(
    rule=fields.record(
        {
            "documents": fields.array(
                fields.either("a string or an object", {str: fields.text, dict: fields.free_form}),
                of="strings or objects",
                least=1,
                most=_MOST_DOCUMENTS,
            ),
            "max_tokens_per_doc": fields.integer(1, fields.MAX_TOKENS),
            "model": fields.MODEL,
            "query": fields.string(least=1),
            "return_documents": fields.flag,
            "top_n": fields.integer(1, fields.MAX_TOKENS),
        },
        required=("model", "query", "documents"),
    ),
    asked_texts=_texts,
    meters=lambda body: {"queries": queries(len(body["documents"]))},
    used=_used,
    repeated_texts=_repeated,
)
"""Which documents fit a query best."""
