"""InvokeModel: one body as the model wants it, and its answer."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import frozen

from qlens import CallError, UpstreamInvalid
from qlens_plugins.provider.bedrock.converse import dumped
from qlens_plugins.provider.bedrock.exchange import Wire, request_id_of
from qlens_plugins.provider.bedrock.model_ids import ModelId


@frozen
class Invoked:
    """What a model answered."""

    body: dict[str, Any]
    request_id: str | None


async def invoked(wire: Wire, model: ModelId, body: dict[str, Any]) -> Invoked:
    """Send a body to a model; raises UpstreamInvalid for an answer that is no JSON object."""
    answer = await wire.post(f"/model/{model.segment}/invoke", dumped(body), "application/json")
    request_id = request_id_of(answer)
    try:
        parsed = orjson.loads(await answer.read())
        if isinstance(parsed, dict):
            return Invoked(parsed, request_id)
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's answer is not valid JSON.") from None
    except CallError as error:
        error.upstream_id = request_id
        raise
    finally:
        await answer.close()
