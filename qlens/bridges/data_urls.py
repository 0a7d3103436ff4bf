"""Data URLs, in which chat carries images and files."""

from __future__ import annotations

import re
from base64 import b64decode

from qlens.errors import InvalidRequest

_DATA_URL = re.compile(r"data:(?P<media>[^;,]*)(?P<options>(;[^;,]*)*),", re.IGNORECASE)
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BLANKS = str.maketrans("", "", " \t\r\n")


def read(url: str, param: str) -> tuple[str, str]:
    """The media type and the base64 text of a data URL; raises InvalidRequest for anything else."""
    found = _DATA_URL.match(url)
    if found is None or ";base64" not in found["options"].lower():
        raise InvalidRequest(
            "This must be a data URL in base64: data:TYPE;base64,...", param=param, code="invalid_value"
        )
    return found["media"].strip().lower(), _checked(url[found.end() :], param)


def write(media: str, encoded: str) -> str:
    """A data URL for a base64 text."""
    return f"data:{media};base64,{encoded}"


def decoded(encoded: str, param: str) -> str:
    """The text in a base64 text; raises InvalidRequest when it is none in UTF-8."""
    try:
        return b64decode(encoded).decode()
    except ValueError:
        raise InvalidRequest("This text is not in UTF-8.", param=param, code="invalid_value") from None


def _checked(encoded: str, param: str) -> str:
    text = encoded if encoded.isalnum() else encoded.translate(_BLANKS)
    bare = text.rstrip("=")
    whole = len(text) % 4 == 0 and len(text) - len(bare) <= 2 and bool(bare)
    if not whole or not text.isascii() or bare.encode().translate(None, _BASE64):
        raise InvalidRequest("This is not valid base64.", param=param, code="invalid_base64")
    return text
