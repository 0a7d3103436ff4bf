"""Which model a line of a provider's bill is about: bills have names of their own for models.

A name is taken apart into letters, digits and the date of a snapshot, without what says nothing about the model: words
for input and output, kinds of deployment, service tiers and units in a bill; profile, vendor and version in an id of
Bedrock. Two names are of one model when letters and digits are equal, and the dates where both have one. What fits no
model, or several, is for the operator to map: a wrong guess would make two wrong sums look right.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

if TYPE_CHECKING:
    from attrs import Attribute

_DATE = re.compile(r"(?<!\d)20\d\d-?(0[1-9]|1[0-2])-?([0-2]\d|3[01])(?!\d)")
_MONTH_AND_DAY = re.compile(r"(?<![\d.])(0[1-9]|1[0-2])([0-2]\d|3[01])(?![\d.])")
_ZERO = re.compile(r"(?<=\d)\.0(?!\d)")
_VERSION = re.compile(r"-(v1|v?\d+:\d+(:\w+)?)$")
_VENDOR = re.compile(r"^[a-z0-9]+\.(?=[a-z])")
_PROFILE = re.compile(r"^(us|eu|apac|global|us-gov|jp|au|ca|sa|me|af|il|mx)\.(?=[a-z0-9]+\.)")
_INSTRUCT = re.compile(r"\binstruct\b")

_AWS_REGION = re.compile(r"^[A-Z]{2,5}\d{0,2}-")
_AWS_DIRECTION = re.compile(r"-(mantle-)?(input|output|cache-read|cache-write)-")
EDITION = " (Amazon Bedrock Edition)"
"""What the marketplace puts behind the name of a model."""
_BILLED_AS = {"titan-embed-text-v2": "TitanEmbeddingV2-Text"}
"""What AWS calls models of its own whose ids are made of other words."""
_AZURE_DIRECTIONS = {
    *("inp", "inpt", "input", "out", "outp", "outpt", "output", "opt"),
    *("cached", "cchd", "ccchd", "cd", "cache"),
}
_AZURE_PLACES = {"glbl", "gl", "global", "regnl", "rgnl", "regional", "dz", "dzn", "dzone", "datazone", "data", "zone"}
_AZURE_TIERS = {"std", "standard", "batch", "pp", "prty", "priority", "flex", "shortco", "longco"}
_AZURE_WORDS = _AZURE_DIRECTIONS | _AZURE_PLACES | _AZURE_TIERS | {"token", "tokens", "1k", "1m"}
"""What a meter's name says beside the model. Not `aud`, `rt` or `img`: those models have prices of their own."""
_AZURE_NAMES = {"embedding ada": "text-embedding-ada-002"}
"""Models that meters call otherwise."""
_OPENAI_TIERS = {"batch", "default", "fast", "flex", "priority", "scale", "standard"}
_OPENAI_KINDS = re.compile(r" (text|image|audio)$")


@frozen
class Name:
    """A model's name, taken apart."""

    letters: str
    digits: str
    snapshot: str | None = None
    """Month and day, `0806`."""

    @classmethod
    def of(cls, text: str) -> Name:
        """Take a text apart."""
        text, snapshot = _INSTRUCT.sub("", text.lower()), None
        if found := _DATE.search(text) or _MONTH_AND_DAY.search(text):
            snapshot = found[1] + found[2]
            text = text[: found.start()] + " " + text[found.end() :]
        text = _ZERO.sub("", text)
        return cls("".join(filter(str.isalpha, text)), "".join(filter(str.isdecimal, text)), snapshot)

    def fits(self, other: Name) -> bool:
        """Whether both may be of one model."""
        return (self.letters, self.digits) == (other.letters, other.digits) and (
            None in (self.snapshot, other.snapshot) or self.snapshot == other.snapshot
        )


@frozen
class Meter:
    """What a line of a bill charges for."""

    name: str
    """As the bill has it: a meter's name, a usage type, a line item."""
    about: str = ""
    """What the bill says beside it that tells which model is meant: a product, a sub-category."""
    resource: str = ""


def azure_name(meter: Meter) -> Name | None:
    """`gpt 4o 1120 cached Inp glbl Tokens` is `gpt 4o 1120`; `5.4 inp Gl Tokens` of `Azure OpenAI GPT5` is GPT 5.4."""
    words = [word for word in re.split(r"[\s_-]+", meter.name) if word.lower() not in _AZURE_WORDS]
    text = " ".join(words)
    text = _AZURE_NAMES.get(text.lower(), text)
    return Name.of(f"gpt {text}" if text[:1].isdecimal() and "gpt" in meter.about.lower() else text) if words else None


def aws_name(meter: Meter) -> Name | None:
    """`USE1-NovaLite-input-tokens` is `NovaLite`; a model of the marketplace is the product's name."""
    if meter.about.endswith(EDITION):
        return Name.of(meter.about.removesuffix(EDITION))
    text = _AWS_REGION.sub("", meter.name)
    found = _AWS_DIRECTION.search(text)
    return Name.of(text[: found.start()]) if found else None


def openai_name(meter: Meter) -> Name | None:
    """`gpt-4o-2024-08-06, cached input` is `gpt-4o-2024-08-06`, `flex | gpt-image-1 text, input` is `gpt-image-1`."""
    tier, bar, rest = meter.name.partition(" | ")
    model, comma, _ = (rest if bar and tier.lower() in _OPENAI_TIERS else meter.name).partition(", ")
    return Name.of(_OPENAI_KINDS.sub("", model)) if comma else None


def model_names(text: str) -> tuple[Name, ...]:
    """What a provider's name for a model may be in its bill: with the vendor and without."""
    text = text.rpartition("/")[2] if text.startswith("arn:") else text
    if text.startswith("ft:"):
        text = "ft-" + text.split(":")[1]
    text = _PROFILE.sub("", text.lower())
    billed = _BILLED_AS.get(_VENDOR.sub("", text).partition(":")[0])
    text = _VERSION.sub("", text)
    names = (*(() if billed is None else (billed,)), _VENDOR.sub("", text), text)
    return tuple(dict.fromkeys(map(Name.of, names)))


# --- the operator's own ------------------------------------------------------------------------


def _one_of_both(mapped: Mapped, attribute: Attribute[Any], ignore: bool) -> None:
    is_told = mapped.model is not None or mapped.provider is not None
    if ignore == is_told:
        raise ValueError(
            f"say of the meter {mapped.meter!r} the `model` it is for or the `provider` it is from, "
            "or else `ignore: true`"
        )


@frozen
class Mapped:
    """What the operator says of some lines."""

    meter: str
    """Which: a pattern with `*` and `?` for the meter's name, upper and lower case alike."""
    resource: str = "*"
    """And for the resource (Azure, AWS) or project (OpenAI)."""
    model: str | None = None
    """The model they are for, as the ledger has it: a target's `base_model` or its `model`."""
    provider: str | None = None
    """The provider they are from: it tells deployments of one model apart. Entries without it say nothing of that."""
    ignore: bool = field(default=False, validator=_one_of_both)
    """They are not about calls of this gateway."""

    def fits(self, meter: Meter) -> bool:
        """Whether a line is one of them."""
        return fnmatchcase(meter.name.lower(), self.meter.lower()) and fnmatchcase(
            meter.resource.lower(), self.resource.lower()
        )


@frozen
class Map:
    """A file with what the operator says; the first entry that fits counts."""

    meters: tuple[Mapped, ...]
    """The entries."""


# --- finding -----------------------------------------------------------------------------------


@frozen
class Unmatched:
    """No model, or several."""

    candidates: tuple[str, ...] = ()


@frozen
class Ignored:
    """The operator says that it is about something else."""


NAMES = {"azure": azure_name, "aws": aws_name, "openai": openai_name}
"""By the kind of bill, what takes the name out of a meter."""


@define
class Matcher:
    """Finds the models that meters are about."""

    kind: str
    rules: tuple[Mapped, ...]
    _models: dict[Name, str] = field(factory=dict, init=False)
    """What models are shown as, by their names without vendor."""
    _names: dict[str, tuple[Name, ...]] = field(factory=dict, init=False)
    _found: dict[Meter, str | Unmatched | Ignored] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for rule in self.rules:
            if rule.model is not None:
                self.model(rule.model)

    def model(self, name: str) -> str:
        """A model of the ledger: what it is shown as; those that a bill cannot tell apart are one."""
        names = model_names(name)
        shown = self._models.setdefault(names[0], _short(name))
        self._names.setdefault(shown, names)
        return shown

    def find(self, meter: Meter) -> str | Unmatched | Ignored:
        """The model that a line is about; all models must be known before."""
        if meter not in self._found:
            self._found[meter] = self._look_for(meter)
        return self._found[meter]

    def _look_for(self, meter: Meter) -> str | Unmatched | Ignored:
        for rule in self.rules:
            if (rule.ignore or rule.model is not None) and rule.fits(meter):
                return Ignored() if rule.model is None else self.model(rule.model)
        name = NAMES[self.kind](meter)
        fitting = [] if name is None else self._fitting(name)
        return fitting[0] if len(fitting) == 1 else Unmatched(tuple(fitting))

    def _fitting(self, name: Name) -> list[str]:
        return [shown for shown, names in self._names.items() if any(name.fits(known) for known in names)]


def _short(name: str) -> str:
    """Without the region: Bedrock's profiles of one model are one model in its bill."""
    return _PROFILE.sub("", name.rpartition("/")[2] if name.startswith("arn:") else name)
