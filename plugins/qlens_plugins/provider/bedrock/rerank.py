"""Rerank by InvokeModel: Cohere and Amazon, who write nearly the same."""

from __future__ import annotations

from typing import Any

import orjson

from qlens import Reply, UpstreamInvalid, Usage
from qlens_plugins.provider.bedrock.exchange import ToldBy, Wire
from qlens_plugins.provider.bedrock.invoke import invoked
from qlens_plugins.provider.bedrock.model_ids import ModelId

Block = dict[str, Any]

_COHERE_API = 2
_DOCUMENTS_PER_QUERY = 100


async def rerank(wire: Wire, model: ModelId, body: Block) -> Reply:
    """Answer a rerank call; AWS bills it by queries, of up to 100 documents each."""
    documents = [_text(document) for document in body["documents"]]
    asked: Block = {"query": body["query"], "documents": documents}
    if body.get("top_n"):
        asked["top_n"] = min(body["top_n"], len(documents))
    if model.base.startswith("cohere."):
        asked["api_version"] = _COHERE_API
        if body.get("max_tokens_per_doc"):
            asked["max_tokens_per_doc"] = body["max_tokens_per_doc"]
    answer = await invoked(wire, model, asked)
    ranked = answer.body.get("results")
    with ToldBy(answer.request_id):
        results = [_result(each, documents, bool(body.get("return_documents"))) for each in ranked or ()]
        if not results:
            raise UpstreamInvalid("The provider's answer has no results.")
    queries = -(-len(documents) // _DOCUMENTS_PER_QUERY)
    content = {
        "id": answer.request_id or "rerank",
        "model": model.shown,
        "results": results,
        "meta": {"billed_units": {"search_units": queries}},
    }
    return Reply(
        body=orjson.dumps(content),
        dialect="rerank",
        usage=Usage(meters={"queries": queries}, source="provider"),
        complete=True,
        upstream_id=answer.request_id,
    )


def _text(document: str | Block) -> str:
    if isinstance(document, str):
        return document
    text = document.get("text")
    return text if isinstance(text, str) else orjson.dumps(document).decode()


def _result(given: Block, documents: list[str], returned: bool) -> Block:
    index = given["index"]
    result = {"index": index, "relevance_score": given["relevance_score"]}
    return {**result, "document": {"text": documents[index]}} if returned else result
