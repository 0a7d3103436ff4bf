"""Sealed ids of objects that providers keep for clients: each says who keeps the object, and is good for one tenant."""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import field, frozen

from qlens.config import Secret

if TYPE_CHECKING:
    from qlens.config import Config
    from qlens.registry import Instance

Kind = Literal["response", "file", "batch", "conversation", "vector_store"]

PREFIXES: Mapping[str, str] = {
    "response": "resp_",
    "file": "file-",
    "batch": "batch_",
    "conversation": "conv_",
    "vector_store": "vs_",
}
"""How the ids of each kind begin: SDKs and people look at it."""
MOST_CHARS = 512
"""No sealed id is longer."""

_MAC_BYTES = 16
_ROUNDS = 20_000
_LEAST_CHARS = 16
"""A shorter secret could be guessed from an id."""
_SEAL, _MARK = b"qlens object id 1", b"qlens tenant mark 1"
_CONTENT = "qlens-sealed-1."
"""How encrypted content begins whose provider is named in front of it."""


@frozen
class Origin:
    """Who keeps an object, and what it is called there."""

    provider: str
    model: str
    """The name that a response's maker asked for; empty for all else, which belongs to no model."""
    id: str
    """The provider's own."""


@frozen
class Kept:
    """The objects that one call names, all of one provider."""

    provider: str
    given: Mapping[str, str] = field(hash=False)
    """The ids as the client gave them, by the provider's own."""


@frozen
class ObjectIds:
    """Seals ids and opens them again; without a store, so that replicas that have the same secrets agree.

    A sealed id names its origin in the clear, behind a code that only the holder of the key can make, for one kind of
    object and one tenant: what was altered, invented or made for somebody else opens to nothing.
    """

    _own: Mapping[str, bytes] = field(factory=dict, repr=False)
    """The key of each provider that has secrets of its own."""
    _master: bytes | None = field(default=None, repr=False)
    """What `server.id_key` makes the keys of all providers from."""

    @classmethod
    def of(cls, config: Config, providers: Mapping[str, Instance]) -> ObjectIds:
        """Keys made of `server.id_key`, or else those of each provider, that keeps objects, of its own secrets."""
        if config.server.id_key is not None:
            return cls(master=_stretched([config.server.id_key.reveal()]))
        secrets = {name: sorted(_secrets(instance.config)) for name, instance in providers.items()}
        return cls({name: _stretched([name, *found]) for name, found in secrets.items() if found})

    def keeps(self, provider: str) -> bool:
        """Whether ids of this provider's objects can be sealed."""
        return self._key(provider) is not None

    def seal(self, kind: str, tenant: str, origin: Origin) -> str:
        """The id as clients see it; the provider's own, which nobody can use here, when it cannot be sealed."""
        key = self._key(origin.provider)
        if key is None:
            return origin.id
        content = b"\0".join(map(_bytes, (origin.provider, origin.model, origin.id)))
        sealed = PREFIXES[kind] + _written(_code(key, kind, tenant, content) + content)
        return sealed if len(sealed) <= MOST_CHARS else origin.id

    def open(self, kind: str, tenant: str, given: str) -> Origin | None:
        """Where the object with this id is; None for an id that was not sealed here for this tenant."""
        prefix = PREFIXES[kind]
        packed = _read(given[len(prefix) :]) if given.startswith(prefix) and len(given) <= MOST_CHARS else None
        if packed is None:
            return None
        code, content = packed[:_MAC_BYTES], packed[_MAC_BYTES:]
        try:
            parts = content.decode().split("\0")
        except UnicodeDecodeError:
            return None
        key = self._key(parts[0])
        if len(parts) != 3 or key is None or not hmac.compare_digest(code, _code(key, kind, tenant, content)):
            return None
        return Origin(*parts)

    def seal_content(self, tenant: str, provider: str, content: str) -> str:
        """What a provider has encrypted for itself, with its name in front: nobody else can read it.

        A provider without a key is named all the same, so that the content finds its way back; what is in it, it
        guards itself.
        """
        named, sealed = _bytes(provider), _bytes(content)
        code = _code(self._key(provider) or b"", "content", tenant, named + b"\0" + sealed)
        return f"{_CONTENT}{_written(code + named)}.{content}"

    def open_content(self, tenant: str, given: str) -> tuple[str, str] | None:
        """Who has encrypted a content, and the content as it was; None for what was not sealed here for this tenant."""
        written, _, content = given[len(_CONTENT) :].partition(".")
        packed = _read(written) if is_sealed(given) and len(written) <= MOST_CHARS else None
        if packed is None:
            return None
        code, named = packed[:_MAC_BYTES], packed[_MAC_BYTES:]
        try:
            provider = named.decode()
        except UnicodeDecodeError:
            return None
        expected = _code(self._key(provider) or b"", "content", tenant, named + b"\0" + _bytes(content))
        return (provider, content) if hmac.compare_digest(code, expected) else None

    def mark(self, provider: str, tenant: str) -> str | None:
        """A short text that tells the objects of a tenant from those of others in a provider's lists; None: no key."""
        key = self._key(provider)
        return None if key is None else hmac.digest(key, _MARK + _bytes(tenant), "sha256")[:10].hex()

    def _key(self, provider: str) -> bytes | None:
        if self._master is not None:
            return hmac.digest(self._master, _bytes(provider), "sha256")
        return self._own.get(provider)


def is_sealed(content: str) -> bool:
    """Whether encrypted content looks as if it was sealed by a gateway, be it this one or not."""
    return content.startswith(_CONTENT)


def _code(key: bytes, kind: str, tenant: str, content: bytes) -> bytes:
    whose = _bytes(tenant)
    message = b"\0".join((_SEAL, kind.encode(), len(whose).to_bytes(4, "big") + whose + content))
    return hmac.digest(key, message, "sha256")[:_MAC_BYTES]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _written(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def _read(text: str) -> bytes | None:
    """What was written; None for what nobody wrote, another spelling of the same bytes included."""
    try:
        content = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    return content if _written(content) == text else None


def _stretched(secrets: list[str]) -> bytes:
    # Clients see what is made with it: a weak secret must be slow to guess.
    return hashlib.pbkdf2_hmac("sha256", "\0".join(secrets).encode(), _SEAL, _ROUNDS)


def _secrets(value: Any) -> Iterator[str]:
    """The secrets in a plugin's settings that can seal ids: not those of fields that say they do not last."""
    if isinstance(value, Secret):
        if len(value.reveal()) >= _LEAST_CHARS:
            yield value.reveal()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _secrets(each)
    elif isinstance(value, tuple):
        for each in value:
            yield from _secrets(each)
    elif attrs.has(type(value)):
        for each in attrs.fields(type(value)):
            if each.metadata.get("lasting", True):
                yield from _secrets(getattr(value, each.name))
