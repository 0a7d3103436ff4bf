"""Counts tokens by a model's own vocabulary where that is on this machine: for calls whose provider does not count.

The vocabularies are OpenAI's, read by tiktoken (extra `tokens`) from the folder that TIKTOKEN_CACHE_DIR names, in files
called as tiktoken calls them there. Nothing is fetched: without that folder, and for other families' models, a count
is an estimate by size.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import lru_cache
from pathlib import Path

from qlens.call import Call

log = logging.getLogger("qlens")

FOLDER = "TIKTOKEN_CACHE_DIR"
MOST_COUNTED = 32 * 1024
"""Of longer texts the beginning is counted, which takes a few milliseconds, and the rest is taken to be alike."""

# The file of each vocabulary (the SHA-1 of its address at OpenAI) and its SHA-256. tiktoken itself would delete a file
# with another sum, and fetch it.
_O200K = (
    "fb374d419588a4632f3f557e76b4b70aebbca790",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
)
_CL100K = (
    "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
)
_FILES: Mapping[str, tuple[str, str]] = {"o200k_base": _O200K, "o200k_harmony": _O200K, "cl100k_base": _CL100K}

Encode = Callable[[str], Sized]
_loaded: dict[str, Encode] = {}
"""By the name of the vocabulary. Of the process: they never change, and one is tens of megabytes."""


def load(models: Iterable[str]) -> None:
    """Read the vocabularies of these models, where there are any; takes half a second for each, so not on the loop."""
    for name in {name for model in models if (name := _name_of(model)) is not None} - _loaded.keys():
        if not _is_there(name):
            continue
        import tiktoken

        _loaded[name] = tiktoken.get_encoding(name).encode_ordinary
        log.info("tokens of %s are counted by its vocabulary", name)


def estimated_input(call: Call) -> int:
    """What a call's input is likely to count at the target that it was sent to last."""
    encode = encoder(call)
    if encode is None:
        return call.estimated_input
    text = "\n".join(text for _, text in call.texts())
    by_size = -(-len(text.encode(errors="replace")) // 3)
    # All else (images, tools, what stands around each message) is in the estimate by size.
    return max(0, call.estimated_input - by_size) + _counted(encode, text)


def estimated_output(call: Call, text: str) -> int | None:
    """What a text that a target wrote is likely to count; None without its vocabulary."""
    encode = encoder(call)
    return None if encode is None else _counted(encode, text)


def _counted(encode: Encode, text: str) -> int:
    tokens = len(encode(text[:MOST_COUNTED]))
    return tokens if len(text) <= MOST_COUNTED else -(-tokens * len(text) // MOST_COUNTED)


def encoder(call: Call) -> Encode | None:
    """The vocabulary of the target that a call was sent to last; None where it is not on this machine."""
    if not _loaded or not call.attempts:
        return None
    target = call.attempts[-1].target
    name = _name_of(target.base_model or target.model)
    return None if name is None else _loaded.get(name)


@lru_cache(maxsize=1024)
def _name_of(model: str) -> str | None:
    """The vocabulary of a model; None when it is not known, or there is no tiktoken."""
    if not os.environ.get(FOLDER):
        return None
    try:
        import tiktoken

        return tiktoken.encoding_name_for_model(model)
    except (ImportError, KeyError):
        return None


def _is_there(name: str) -> bool:
    found = _FILES.get(name)
    if found is None:
        return False
    file, sum_ = Path(os.environ[FOLDER]) / found[0], found[1]
    try:
        content = file.read_bytes()
    except OSError as error:
        log.warning("no vocabulary %s, its tokens are estimated by size: %s: %s", name, file, error.strerror)
        return False
    if hashlib.sha256(content).hexdigest() != sum_:
        log.warning("no vocabulary %s, its tokens are estimated by size: %s is damaged", name, file)
        return False
    return True
