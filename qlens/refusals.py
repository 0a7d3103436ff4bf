"""Tells operators in the log what only they can mend: a key that a provider refuses, a model that it does not know."""

from __future__ import annotations

import logging
import time

from attrs import define, field

from qlens.call import Target
from qlens.errors import CallError, UpstreamAuth, UpstreamModelMissing

log = logging.getLogger("qlens")

TOLD_SECONDS = 60
"""How long nothing more is said of what was said: every call may meet it."""


@define(eq=False)
class Refusals:
    """When each refusal was told last, by target; targets are the configuration's, so they are few."""

    _told: dict[tuple[str, str, str | None], float] = field(factory=dict, init=False)

    def note(self, target: Target, error: CallError) -> None:
        """Tell of an attempt's error if it is the configuration's fault."""
        what = self._fault(target, error)
        key, now = (target.provider, target.public, error.code), time.monotonic()
        if what is None or now - self._told.get(key, -TOLD_SECONDS) < TOLD_SECONDS:
            return
        self._told[key] = now
        # Objects and paths of a provider are asked for by no model's name.
        asked = f", asked for `{target.public}`," if target.public else ""
        log.warning("the provider %s%s %s (%s)", target.provider, asked, what, error.code)

    @staticmethod
    def _fault(target: Target, error: CallError) -> str | None:
        if isinstance(error, UpstreamAuth):
            return "refuses the gateway's credential: give it a valid one under `providers:`"
        # Behind a wildcard the client names the model.
        if isinstance(error, UpstreamModelMissing) and target.public and not target.public.endswith("*"):
            return f"does not know the model `{target.model}`: mend the entry under `models:`"
        return None
