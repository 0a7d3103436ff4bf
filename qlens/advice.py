"""What is no fault of a configuration and may surprise whoever runs it: said by `qlens check` and at start-up."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlens.call import Model
from qlens.registry import Registration

_NO_TEXT = re.compile("audio|dall-e|embed|image|moderation|rerank|transcribe|tts|whisper", re.IGNORECASE)
"""How models are called that generate no text. Nothing else tells it, and nothing but a warning hangs on it."""


def warnings(registration: Registration) -> Iterator[str]:
    """Everything worth a warning."""
    asking = [
        hook.plugin for hook in registration.hooks.admit if hook.bounded or getattr(hook.owner, "wants_bound", False)
    ]
    unlimited = [name for name, model in registration.models.items() if _is_unlimited(model)]
    if asking and unlimited:
        yield (
            f"no max_output_tokens at {', '.join(f'models.{name}' for name in unlimited)}: {' and '.join(asking)} must "
            "know how much a call can generate, so their calls are answered 400 when they do not say max_tokens "
            "themselves, and so are calls of models with such a fallback; give the models max_output_tokens"
        )


def _is_unlimited(model: Model) -> bool:
    if model.max_output_tokens is not None:
        return False
    names = [name for target in model.candidates for name in (target.base_model, target.model)]
    return not any(_NO_TEXT.search(name or "") for name in (model.name, *names))
