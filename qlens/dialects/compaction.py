"""OpenAI's Responses made short: a conversation goes in, and one that says the same in fewer tokens comes out.

https://platform.openai.com/docs/api-reference/responses/compact
"""

from __future__ import annotations

from qlens.dialects import Body, fields, responses

GENERATES = True

_RULE = fields.record(
    {
        **{name: responses.FIELDS[name] for name in ("input", "instructions", "previous_response_id")},
        **{name: responses.FIELDS[name] for name in ("model", "prompt_cache_key", "prompt_cache_retention")},
    },
    required=("model",),
)


def validate(body: Body) -> None:
    """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code."""
    _RULE(body, None)


request_texts = responses.request_texts
input_bound = responses.input_bound
media = responses.media
measured = responses.measured


def output_bound(body: Body) -> tuple[str | None, int | None]:
    """The client cannot limit what the model writes."""
    return None, None


choices = responses.choices
returned = responses.returned


def clamp(body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
    """There is nothing to lower."""
    return output_bound(body)[1]


usage = responses.usage
finish = responses.finish
reply_texts = responses.reply_texts

# --- it has no streams -------------------------------------------------------------------------

event_texts = responses.event_texts
event_ends = responses.event_ends
text_event = responses.text_event
explode = responses.explode
assemble = responses.assemble
