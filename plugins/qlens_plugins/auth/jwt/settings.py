"""The settings of the plugin `jwt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from attrs import field, frozen
from attrs.validators import and_, ge, le, min_len, optional

from qlens import Secret, http_url
from qlens_plugins.auth.jwt.keys import HASH_BYTES, fits_hmac, from_pem

if TYPE_CHECKING:
    from attrs import Attribute

Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512"
]
DISCOVERY = "/.well-known/openid-configuration"


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def safe_url(config: object, attribute: Attribute[str], value: str) -> None:
    """Check that what comes from a URL comes from whom it names: by https, or from this machine."""
    http_url(config, attribute, value)
    if not value.startswith("https://") and not is_loopback(value):
        raise ValueError("must begin with https://: whoever can change what is read there lets anybody in")


def _named(name: str, check: Callable[..., object], *arguments: object) -> None:
    """Check what is known only when all settings are there, and then say which one is meant."""
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _issuer(config: JwtConfig, attribute: Attribute[str], value: str) -> None:
    if not value:
        raise ValueError("must not be empty")
    if config.discovers:
        _named("issuer", safe_url, config, attribute, value)


def _audience(_config: object, _attribute: object, value: str | tuple[str, ...]) -> None:
    if not value or not all(value):
        raise ValueError("must name the audience that tokens for this gateway have")


def _algorithms(config: JwtConfig, _attribute: object, value: tuple[Algorithm, ...] | None) -> None:
    if value is not None and not value:
        raise ValueError("must name an algorithm")
    for algorithm in config.accepted:
        if (algorithm in HASH_BYTES) != (config.secret is not None):
            needs = "needs `secret`" if config.secret is None else "cannot be used with `secret`, which is for HS alone"
            raise ValueError(f"algorithms: {algorithm} {needs}")


def _one_key(config: JwtConfig, _attribute: object, _value: object) -> None:
    given = [name for name in ("jwks_url", "public_key", "public_key_file", "secret") if getattr(config, name)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} each say which key signs: set one of them")


def _public_key(config: JwtConfig, _attribute: object, value: str | None) -> None:
    if value is not None:
        _named("public_key", from_pem, value.encode(), config.accepted)


def _secret(config: JwtConfig, _attribute: object, value: Secret | None) -> None:
    if value is not None:
        _named("secret", fits_hmac, value.reveal().encode(), config.accepted)


def _mapped(config: JwtConfig, _attribute: object, value: Mapping[str, str]) -> None:
    if value and config.roles_claim is None:
        raise ValueError("roles_claim must say which claim has these values")


@frozen
class JwtConfig:
    """Knows callers by the JSON Web Tokens of one issuer."""

    issuer: str = field(validator=_issuer)
    """Who makes the tokens: their `iss`, letter by letter. Without a key below, its keys are found by OpenID Connect
    discovery."""
    audience: str | tuple[str, ...] = field(validator=_audience)
    """Whom tokens are for: one of these must be in their `aud`."""
    tenant_claim: str = field(validator=min_len(1))
    """The claim that names the tenant. Like all claims here, it may be a path: `realm_access.roles`."""
    jwks_url: str | None = field(default=None, validator=optional(safe_url))
    """Where the issuer's key set is, for an issuer without discovery."""
    public_key: str | None = field(default=None, repr=False, validator=_public_key)
    """The one key that signs, as PEM."""
    public_key_file: Path | None = None
    """A file with that PEM, which is read again every `refresh_seconds`."""
    secret: Secret | None = field(default=None, validator=[_one_key, _secret])
    """The key that issuer and gateway share, for HS256, HS384 and HS512: as many random bytes as the hash has."""
    algorithms: tuple[Algorithm, ...] | None = field(default=None, validator=_algorithms)
    """The algorithms that are accepted, whatever a token says: RS256 if it is not set, with `secret` HS256."""
    leeway_seconds: float = field(default=30, validator=and_(ge(0), le(60)))
    """How far the issuer's clock may differ from the gateway's."""
    subject_claim: str = field(default="sub", validator=min_len(1))
    """The claim that says who calls; a token without it is refused."""
    project_claim: str | None = None
    """The claim that names a part of the tenant."""
    roles_claim: str | None = None
    """The claim with roles, groups or scopes: a list, or a text with blanks between them."""
    roles: Mapping[str, str] = field(factory=dict, validator=_mapped)
    """Which role a value of `roles_claim` gives: `{gateway-admins: admin}`. Values that are not listed give none."""
    default_roles: tuple[str, ...] = ("member",)
    """The roles of everybody with a valid token."""
    models_claim: str | None = None
    """The claim with the models, or patterns such as `gpt-4o*`, that the caller may use; a token without it gives none.
    If this is not set, all."""
    tag_claims: Mapping[str, str] = field(factory=dict)
    """Tags that are kept with every receipt, each with its claim: `{team: department}`."""
    refresh_seconds: float = field(default=600, validator=ge(1))
    """How often keys are fetched anew, in the background; also how long a key that was withdrawn may be accepted."""

    @property
    def discovers(self) -> bool:
        """Whether the issuer says itself where its keys are."""
        return not (self.jwks_url or self.public_key or self.public_key_file or self.secret)

    @property
    def accepted(self) -> tuple[str, ...]:
        """The algorithms in use."""
        return self.algorithms or (("HS256",) if self.secret is not None else ("RS256",))

    @property
    def audiences(self) -> frozenset[str]:
        """The audiences in use."""
        return frozenset((self.audience,) if isinstance(self.audience, str) else self.audience)

    def same(self, other: JwtConfig, names: tuple[str, ...]) -> bool:
        """Whether these settings, and the algorithms, are the same in both."""
        mine: Any = [self.accepted, *(getattr(self, name) for name in names)]
        return bool(mine == [other.accepted, *(getattr(other, name) for name in names)])
