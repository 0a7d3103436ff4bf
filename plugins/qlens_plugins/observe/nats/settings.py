"""What the file may say about NATS."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from attrs import Attribute, field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, le, matches_re, min_len, optional

from qlens import Secret
from qlens_plugins.observe.nats.credentials import seed_of

_TOKENS = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"


def _server(owner: object, attribute: Attribute[Any], value: str) -> None:
    try:
        url = urlsplit(value)
        fine = url.scheme in {"nats", "tls"} and url.hostname and url.port != 0
        fine = fine and not (url.path or url.query or url.fragment)
    except ValueError:
        fine = False
    if not fine:
        raise ValueError("this is no server of NATS; write it like nats://nats-1:4222, or tls://... for TLS alone")
    if "@" in url.netloc:
        # Not shown: it may be a password.
        raise ValueError("a server's address has no user in it: write `user` and `password`, or `token`")


def _seed(owner: object, attribute: Attribute[Any], value: Secret | None) -> None:
    if value is not None:
        seed_of(value.reveal())


@frozen
class Tls:
    """How servers are trusted, and who the gateway is to them."""

    ca_file: Path | None = None
    """Certificates of the authorities that are trusted, in PEM; without it the system's."""
    cert_file: Path | None = None
    """The gateway's own certificate and those above it, in PEM, for servers that ask for one."""
    key_file: Path | None = None
    """Its key, if it is not in the same file."""

    def __attrs_post_init__(self) -> None:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("`key_file` belongs to a `cert_file`")


@frozen
class Stream:
    """The stream that keeps the events. Whoever made it decides what it is like: one that is there is not changed."""

    name: str = field(default="QLENS", validator=matches_re("[A-Za-z0-9_-]{1,255}"))
    """What it is called."""
    create: bool = False
    """Make it where there is none, with what stands below."""
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    """What it keeps: all within its limits, what some consumer has not taken, or what none has."""
    max_age_days: float = field(default=30, validator=ge(0))
    """How long it keeps events; 0: for good."""
    max_bytes: int | None = field(default=None, validator=optional(gt(0)))
    """How much it keeps; then the oldest go."""
    replicas: int = field(default=1, validator=[ge(1), le(5)])
    """On how many servers of a cluster it is."""
    duplicate_seconds: float = field(default=120, validator=gt(0))
    """For how long it knows the ids of events, and keeps none twice."""

    def __attrs_post_init__(self) -> None:
        if self.max_age_days and self.duplicate_seconds > self.max_age_days * 86_400:
            raise ValueError("`duplicate_seconds` must not be more than `max_age_days`")


@frozen
class NatsConfig:
    """Sends events to a stream of NATS JetStream, each at least once, from an outbox on disk."""

    servers: tuple[str, ...] = field(validator=and_(min_len(1), deep_iterable(_server)))
    """Where NATS is: `nats://HOST:PORT`, or `tls://HOST:PORT` for TLS or nothing; one of them is taken at random."""
    user: str | None = None
    """Who the gateway is to NATS, with `password`."""
    password: Secret | None = None
    """The user's password."""
    token: Secret | None = None
    """Or a token."""
    nkey: Secret | None = field(default=None, validator=_seed)
    """Or the seed of an NKey: `SU...`."""
    credentials: Path | None = None
    """Or a file of credentials (`.creds`), which is read anew for each connection."""
    tls: Tls | None = None
    """How servers are trusted; with it there is TLS or no connection."""
    stream: Stream = field(factory=Stream)
    """Where the events go."""
    subject_prefix: str = field(default="qlens", validator=matches_re(_TOKENS))
    """What subjects begin with: the receipt of a call of the tenant `acme` is `qlens.receipt.acme`."""
    source: str = field(default="/qlens", validator=matches_re(r"[!-~]+"))
    """Which gateway the events come from, as a URI-reference: the attribute `source` of CloudEvents."""
    events: tuple[str, ...] | None = None
    """The types of events that are sent, as `qlens.receipt` or `qlens.key.*`; none: all."""
    tenants: tuple[str, ...] | None = None
    """The tenants whose events are sent; a pattern may end in `*`. None: all, and those of no tenant."""
    spool: Path | None = None
    """Folder for what is not sent yet, on a disk of this machine, and for this plugin alone; without it `NAME.outbox`
    beside the YAML file, by the plugin's name."""
    spool_bytes: int = field(default=256 * 1024 * 1024, validator=ge(1))
    """Most bytes that may wait in a process' part of it, where a receipt takes about 1,200; what comes then is lost,
    which is counted and said."""
    in_flight: int = field(default=256, validator=[ge(1), le(10_000)])
    """How many events may be on their way without an acknowledgement."""
    ack_seconds: float = field(default=5, validator=gt(0))
    """How long an acknowledgement may take; then the event is sent again, under the same id."""
    close_seconds: float = field(default=5, validator=[ge(0), le(25)])
    """How long a shutdown waits for the last events to be sent. What is left is sent after the next start."""

    def __attrs_post_init__(self) -> None:
        if (self.user is None) is not (self.password is None):
            raise ValueError("`user` and `password` belong together")
        ways = (self.user, self.token, self.nkey, self.credentials)
        if sum(way is not None for way in ways) > 1:
            raise ValueError(
                "`user`, `token`, `nkey` and `credentials` are four ways to say who the gateway is: choose one"
            )
