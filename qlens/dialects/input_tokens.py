"""OpenAI's question how long a request for a response is.

https://platform.openai.com/docs/api-reference/responses/input-tokens
"""

from __future__ import annotations

from qlens.dialects import Body, fields, responses
from qlens.dialects.plain import Plain
from qlens.errors import InvalidRequest
from qlens.usage import NO_USAGE

INPUT_TOKENS = Plain(
    rule=fields.record(responses.FIELDS, required=("model",)),
    asked_texts=responses.request_texts,
    used=lambda _body: NO_USAGE,  # to count costs nothing
)
"""The same body as that of a response; an answer is one number."""

_KEPT = ("previous_response_id", "conversation", "prompt")


def estimate(body: Body) -> Body:
    """The answer where no provider counts: from the size of all texts, images left out, and marked.

    Raises InvalidRequest for what is not in the body, and kept nowhere.
    """
    for name in _KEPT:
        if body.get(name) is not None:
            raise InvalidRequest(
                f"No provider of the model `{body['model']}` counts input tokens, and what '{name}' names is not here "
                "to be counted: send the items themselves, in 'input'.",
                param=name,
                code="unsupported_operation",
            )
    return {"object": "response.input_tokens", "input_tokens": responses.input_bound(body)[1], "estimated": True}
