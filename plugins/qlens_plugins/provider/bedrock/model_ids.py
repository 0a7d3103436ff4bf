"""Reads the ids of Bedrock's models: plain ids, inference profiles of regions, ARNs."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import quote

from attrs import frozen

# us.anthropic..., apac.amazon..., us-gov.meta..., global.openai...: a profile that spans regions.
_PROFILE = re.compile(r"(?P<profile>[a-z]{2,6}(?:-[a-z]{2,4})?)\.(?P<model>[a-z0-9-]+\..+)")
_ARN = re.compile(
    r"arn:aws(-[a-z-]+)?:(?P<service>bedrock|sagemaker):(?P<region>[a-z0-9-]*):(?P<account>\d*):(?P<kind>[a-z-]+)/(?P<name>\S+)"
)
# The ARNs whose name is the name of a model; all others hide it.
_TELLING = {"foundation-model", "inference-profile"}
_MOST_IDS = 4096


@frozen
class ModelId:
    """An id as Bedrock takes it."""

    text: str
    segment: str
    """The same as one segment of a path: an ARN's colons and slashes are escaped as well."""
    base: str
    """The id of the model itself, without profile and ARN: anthropic.claude-..., or what the operator says it is."""
    profile: str | None
    """The profile's prefix: us, eu, apac, global, ..."""
    region: str | None
    """The region that an ARN names."""
    hidden: bool
    """Whether the id alone does not say which model it is."""

    @property
    def shown(self) -> str:
        """What clients see as the model of an answer; an ARN has the account's number in it."""
        return self.base if self.text.startswith("arn:") else self.text


@lru_cache(maxsize=_MOST_IDS)
def read(text: str, base_model: str | None = None) -> ModelId:
    """Read an id; `base_model` wins over what it says itself."""
    arn = _ARN.fullmatch(text)
    name = arn["name"] if arn else text
    telling = arn is None or arn["kind"] in _TELLING
    found = _PROFILE.fullmatch(name)
    profile, model = (found["profile"], found["model"]) if found else (None, name)
    if base_model is not None:
        inner = _PROFILE.fullmatch(base_model)
        model = inner["model"] if inner else base_model
    return ModelId(
        text=text,
        segment=quote(text, safe=""),
        base=model,
        profile=profile,
        region=(arn["region"] or None) if arn else None,
        hidden=not telling and base_model is None,
    )


def fault(text: str, base_model: str | None, region: str | None) -> str | None:
    """What is wrong with a target's id, for the operator; None if nothing is."""
    model = read(text, base_model)
    if text.startswith("arn:") and not _ARN.fullmatch(text):
        return f"{text!r} is no ARN of Bedrock: arn:aws:bedrock:REGION:ACCOUNT:KIND/NAME"
    if model.hidden:
        return f"{text!r} does not say which model it is: set base_model, say anthropic.claude-sonnet-4-5-20250929-v1:0"
    if model.region and region and model.region != region:
        return f"{text!r} is in the region {model.region}, the provider in {region}: set the provider's region"
    return None
