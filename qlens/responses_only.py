"""Which models OpenAI and Azure have in Responses only: chat with one of them is a 400 of theirs."""

from __future__ import annotations

import re

# https://platform.openai.com/docs/models: the codex, pro and deep research models of every series; the last two are
# older ones of names of their own. A date may follow, or a size.
_NAME = re.compile(
    r"(o\d+|gpt-\d+(\.\d+)?)(-[\w.]+)*?-(codex|pro|deep-research)(-.*)?|(codex-mini|computer-use-preview)(-.*)?"
)


def speaks_responses_only(model: str) -> bool:
    """Whether this is the name of a model of OpenAI's that has no chat; of other makers' models nothing is known."""
    return _NAME.fullmatch(model.lower()) is not None
