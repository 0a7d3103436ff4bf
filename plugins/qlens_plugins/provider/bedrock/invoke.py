"""InvokeModel: one body as the model wants it, and its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlens import InvalidRequest
from qlens_plugins.provider.bedrock.exchange import Told, Wire, dumped
from qlens_plugins.provider.bedrock.model_ids import ModelId
from qlens_plugins.provider.bedrock.signing import NOTHING

_NAME = re.compile(r"[A-Za-z0-9:/._-]{1,2048}")
_GUARDRAIL = {
    "guardrailIdentifier": "x-amzn-bedrock-guardrailidentifier",
    "guardrailVersion": "x-amzn-bedrock-guardrailversion",
}


async def invoked(wire: Wire, model: ModelId, body: dict[str, Any], own: Mapping[str, str] = NOTHING) -> Told:
    """Send a body to a model; raises UpstreamInvalid for an answer that is no JSON object."""
    return await wire.ask(f"/model/{model.segment}/invoke", dumped(body), own)


def guarded(guardrail: Mapping[str, Any] | None) -> Mapping[str, str]:
    """The headers by which a guardrail is asked for, of what Converse has in its body."""
    if guardrail is None:
        return NOTHING
    # A client may have chosen it: what is no name must not get into a header.
    if not all(_NAME.fullmatch(guardrail[field]) for field in _GUARDRAIL):
        raise InvalidRequest("guardrail must have the id and version of one.", param="guardrail", code="invalid_value")
    return {header: guardrail[field] for field, header in _GUARDRAIL.items()}
