"""InvokeModel: one body as the model wants it, and its answer."""

from __future__ import annotations

from typing import Any

from qlens_plugins.provider.bedrock.exchange import Told, Wire, dumped
from qlens_plugins.provider.bedrock.model_ids import ModelId


async def invoked(wire: Wire, model: ModelId, body: dict[str, Any]) -> Told:
    """Send a body to a model; raises UpstreamInvalid for an answer that is no JSON object."""
    return await wire.ask(f"/model/{model.segment}/invoke", dumped(body))
