"""Authentication by what a trusted proxy says: it has checked the client, by its certificate say, and names it.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from attrs import define, field, frozen
from attrs.validators import and_, matches_re, min_len, optional

from qlens import Call, Caller, Unauthenticated, hookimpl

MOST_CHARACTERS = 256
"""A longer name is refused."""

_HEADER = matches_re(r"[A-Za-z0-9-]+")
_PLACE = re.compile(r"\{(\w+)\}")
_PLACES = ("tenant", "subject", "project")
# An element's pairs: a value in quotes may hold any of the separators, and quotes behind a backslash.
_PAIR = re.compile(r'\s*([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^,;"]*)([,;]|\Z)')
_ATTRIBUTE = re.compile(r"\s*([A-Za-z][A-Za-z0-9.-]*)\s*=((?:[^,+\\]|\\.)*)([,+]|\Z)")
_ESCAPED = re.compile(rb"\\([0-9A-Fa-f]{2}|.)", re.DOTALL)


def _networks(_config: object, _attribute: object, value: tuple[str, ...]) -> None:
    for each in value:
        try:
            network = ip_network(each)
        except ValueError as error:
            raise ValueError(f"{each!r} is no network such as 10.1.0.0/16 or fd00::/8: {error}") from None
        if network.prefixlen == 0:
            raise ValueError(f"{each!r} is everybody, who could then be anybody: name the proxies' own networks")


def _pattern(_config: object, _attribute: object, value: str) -> None:
    places = _PLACE.findall(value)
    for needed in ("tenant", "subject"):
        if needed not in places:
            raise ValueError(f"must say where the {needed} stands: spiffe://example.com/ns/{{tenant}}/sa/{{subject}}")
    if len(set(places)) < len(places) or not set(places) <= set(_PLACES):
        raise ValueError("may have {tenant}, {subject} and {project}, each once")


def _one_source(config: TrustedHeaderConfig, _attribute: object, _value: object) -> None:
    given = sum(each is not None for each in (config.headers, config.certificate_uri, config.certificate_subject))
    if given != 1:
        raise ValueError("set one of headers, certificate_uri and certificate_subject: it says who calls")


def _mapped(config: TrustedHeaderConfig, _attribute: object, value: Mapping[str, str]) -> None:
    if value and config.roles_header is None:
        raise ValueError("roles_header must say which header has the keys of roles")


@frozen
class Headers:
    """A header for each thing."""

    tenant: str = field(validator=_HEADER)
    """The header with the tenant."""
    subject: str = field(validator=_HEADER)
    """The header that says who calls."""
    project: str | None = field(default=None, validator=optional(_HEADER))
    """The header with a part of the tenant; it may be missing in a call."""


@frozen
class CertificateSubject:
    """Attributes of a certificate's subject, such as `CN=search,OU=team,O=acme`."""

    tenant: str = field(default="O", validator=min_len(1))
    """The attribute that names the tenant."""
    subject: str = field(default="CN", validator=min_len(1))
    """The attribute that says who calls."""
    project: str | None = None
    """The attribute that names a part of the tenant; it may be missing."""


@frozen
class TrustedHeaderConfig:
    """Knows callers by headers that a trusted proxy sets, from its networks alone."""

    proxies: tuple[str, ...] = field(validator=and_(min_len(1), _networks))
    """The networks of the proxies. Whoever connects from there is believed: they must take these headers out of what
    clients send."""
    headers: Headers | None = None
    """Who calls, in headers of the proxy's own."""
    certificate_uri: str | None = field(default=None, validator=optional(_pattern))
    """Who calls, in the URI of the client's certificate: `spiffe://example.com/ns/{tenant}/sa/{subject}`. Each place
    stands for what is there up to the next slash."""
    certificate_subject: CertificateSubject | None = None
    """Who calls, in the subject of the client's certificate."""
    certificate_header: str = field(default="x-forwarded-client-cert", validator=[_HEADER, _one_source])
    """The header with the client's certificate, as Envoy writes it."""
    roles_header: str | None = field(default=None, validator=optional(_HEADER))
    """The header with roles or groups, with commas or blanks between them."""
    roles: Mapping[str, str] = field(factory=dict, validator=_mapped)
    """Which role a value of `roles_header` gives: `{gateway-admins: admin}`. Values that are not listed give none."""
    default_roles: tuple[str, ...] = ("member",)
    """The roles of everybody the proxy names."""


@define(eq=False)
class TrustedHeader:
    """Finds the caller in headers, when the other end of the connection is a trusted proxy."""

    config: TrustedHeaderConfig
    name: str
    _trusts: Callable[[str], bool] = field(init=False, repr=False)
    _names: Callable[[Call], Mapping[str, str] | None] = field(init=False, repr=False)

    Config = TrustedHeaderConfig

    def __attrs_post_init__(self) -> None:
        # Addresses are few where only proxies connect, and may be many elsewhere.
        self._trusts = lru_cache(maxsize=1024)(self._is_proxy)
        self._names = self._in_headers if self.config.headers is not None else self._in_certificate

    @hookimpl
    async def authenticate(self, call: Call) -> Caller | None:
        """Believe a proxy; without the header, or from anybody else, the next plugin looks."""
        if call.peer is None or not self._trusts(call.peer):
            return None
        if _is_of_a_page(call.headers):
            return None  # any page in the client's browser can make it call, and the proxy would vouch for it
        found = self._names(call)
        if found is None:
            return None
        return Caller(
            tenant=found["tenant"],
            subject=found["subject"],
            by=self.name,
            project=found.get("project"),
            roles=self._roles(call),
        )

    def _is_proxy(self, peer: str) -> bool:
        try:
            address = ip_address(peer)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in ip_network(network) for network in self.config.proxies)

    def _roles(self, call: Call) -> frozenset[str]:
        roles, header = self.config.roles, self.config.roles_header
        given = None if header is None else _value(call, header)
        values = given.replace(",", " ").split() if given else ()
        return frozenset(self.config.default_roles).union(roles[value] for value in values if value in roles)

    def _in_headers(self, call: Call) -> Mapping[str, str] | None:
        """Who calls, by headers of the proxy's own; None when it has set neither of the two that are needed."""
        names = self.config.headers
        assert names is not None
        tenant, subject = _value(call, names.tenant), _value(call, names.subject)
        if tenant is None and subject is None:
            return None
        project = None if names.project is None else _value(call, names.project)
        return _told(names.tenant, {"tenant": tenant, "subject": subject, "project": project})

    def _in_certificate(self, call: Call) -> Mapping[str, str] | None:
        """Who calls, by the certificate that the proxy has checked; None when there is none."""
        header, config = self.config.certificate_header, self.config
        value = _value(call, header)
        if value is None:
            return None
        certificate = _certificate(value)
        if certificate is None:
            raise _unauthenticated(f"{header} is malformed")
        if config.certificate_uri is not None:
            matching = _expression(config.certificate_uri).fullmatch(certificate.get("uri", ""))
            if matching is None:
                raise _unauthenticated("the URI of the certificate is not one that callers of this gateway have")
            return _told(header, matching.groupdict())
        attributes, wanted = _attributes(certificate.get("subject", "")), config.certificate_subject
        assert wanted is not None
        return _told(header, {place: attributes.get(str(getattr(wanted, place)).upper()) for place in _PLACES})


def _is_of_a_page(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site made a browser ask, or any page one for a WebSocket (Fetch Metadata, 2.3)."""
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") or (
        "origin" in headers and "upgrade" in headers
    )


def _value(call: Call, header: str) -> str | None:
    """A header's value, None when it is missing; raises Unauthenticated when it is there twice: one is the client's."""
    if header not in call.headers:
        return None
    values = [value for name, value in call.headers.items() if name.lower() == header.lower()]
    if len(values) != 1:
        raise _unauthenticated(f"{header} is there {len(values)} times")
    return values[0].strip() or None


def _told(header: str, found: Mapping[str, Any]) -> dict[str, str]:
    """What was found, without what is missing; raises Unauthenticated when it does not say who calls."""
    told = {place: value for place, value in found.items() if value is not None}
    for value in told.values():
        if not value.strip() or len(value) > MOST_CHARACTERS or not value.isprintable():
            raise _unauthenticated(
                f"{header} has a name that is no printable text of up to {MOST_CHARACTERS} characters"
            )
    for needed in ("tenant", "subject"):
        if needed not in told:
            raise _unauthenticated(f"the {needed} is missing")
    return told


def _unauthenticated(reason: str) -> Unauthenticated:
    return Unauthenticated(f"The proxy in front of this gateway does not say who calls: {reason}.")


# --- certificates ------------------------------------------------------------------------------


def _certificate(value: str) -> Mapping[str, str] | None:
    """The pairs of the last element, by lower-case key; None when the header is malformed.

    Every proxy on the way appends an element: only the last one is that of the proxy that is trusted. What stands
    there more than once, as names may, is left out: it does not say which one is meant.
    """
    pairs: dict[str, str] = {}
    twice: set[str] = set()
    at = 0
    while at < len(value):
        found = _PAIR.match(value, at)
        if found is None:
            return None
        key, said, end = found[1].lower(), found[2], found[3]
        twice |= {key} & pairs.keys()
        # What is behind backslashes is the name's own matter: Envoy writes it as it is.
        pairs[key] = said[1:-1] if said.startswith('"') else said.strip()
        at = found.end()
        if end == "," and at < len(value):
            pairs, twice = {}, set()
    return {key: said for key, said in pairs.items() if key not in twice}


def _attributes(name: str) -> Mapping[str, str]:
    """The attributes of a distinguished name (RFC 4514) by upper-case type, those that are there twice left out."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    at = 0
    while at < len(name):
        pair = _ATTRIBUTE.match(name, at)
        if pair is None:
            return {}
        key = pair[1].upper()
        twice |= {key} & found.keys()
        found[key] = _plain(pair[2].strip())
        at = pair.end()
    return {key: said for key, said in found.items() if key not in twice}


def _plain(value: str) -> str:
    """A value without its backslashes: two digits behind one are a byte, anything else is itself (RFC 4514, 2.4)."""
    raw = value.encode("utf-8", "surrogateescape")
    raw = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()) if len(found[1]) == 2 else found[1], raw)
    return raw.decode("utf-8", "surrogateescape")  # what is no text is not printable either, and so refused


@lru_cache(maxsize=64)
def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern with places as a regular expression with groups."""
    parts = _PLACE.split(pattern)  # what stands between, and the names of places, in turn
    return re.compile("".join(f"(?P<{part}>[^/]+)" if n % 2 else re.escape(part) for n, part in enumerate(parts)))
