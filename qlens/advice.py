"""What is no fault of a configuration and may surprise whoever runs it: said by `qlens check` and at start-up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from attrs import fields, has

from qlens.call import Model
from qlens.patterns import fits
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
    if not registration.hooks.authenticate:
        yield "pipeline.auth: no plugin says who calls, so every call is answered 401; name one, as api_keys or jwt"
    yield from _matching_nothing(registration)


def _matching_nothing(registration: Registration) -> Iterator[str]:
    """Rules that are narrowed to models or providers that are not there: they never apply, as a limit with a typo."""
    known = {"model": list(registration.models), "provider": list(registration.providers)}
    for instance in registration.instances:
        for match in _matches(instance.config):
            for kind, names in known.items():
                patterns = getattr(match, kind, None)
                # A plugin of others may mean something else by these names.
                for pattern in patterns if isinstance(patterns, tuple) else ():
                    # Both may end in `*`: one of them stands for what the other is.
                    if isinstance(pattern, str) and not (
                        fits(pattern, names) or any(fits(name, (pattern,)) for name in names)
                    ):
                        near = get_close_matches(pattern, names, 1)
                        hint = f"; did you mean {near[0]!r}?" if near else ""
                        yield f"{instance.entry.path}: match: no {kind} is called {pattern!r}: this never applies{hint}"


def _matches(config: object) -> Iterator[object]:
    """The values of all fields `match` in a plugin's configuration."""
    cls = type(config)
    if isinstance(config, Mapping):
        parts: Sequence[tuple[str, object]] = [("", value) for value in config.values()]
    elif isinstance(config, Sequence) and not isinstance(config, str | bytes):
        parts = [("", value) for value in config]
    elif has(cls):
        parts = [(each.name, getattr(config, each.name)) for each in fields(cls)]
    else:
        return
    for name, value in parts:
        if name == "match":
            yield value
        else:
            yield from _matches(value)


def _is_unlimited(model: Model) -> bool:
    if model.max_output_tokens is not None:
        return False
    names = [name for target in model.candidates for name in (target.base_model, target.model)]
    return not any(_NO_TEXT.search(name or "") for name in (model.name, *names))
