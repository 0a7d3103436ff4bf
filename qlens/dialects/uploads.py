"""OpenAI's uploads of files (https://platform.openai.com/docs/api-reference/files/create)."""

from __future__ import annotations

from qlens.dialects import fields
from qlens.dialects.plain import Plain

UPLOADS = Plain(
    rule=fields.record({"model": fields.MODEL, "purpose": fields.text}, required=("purpose",)), files={"file": 1}
)
"""A form with one file; `model` is for the gateway and says whose provider is to keep it."""
