"""What a URL of a PostgreSQL database says, and how it is shown; needs no extra."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

POSTGRES = ("postgresql", "postgres")
POSTGRES_FORM = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(:\d+)?")


def is_postgres(url: str) -> bool:
    """Whether a URL is PostgreSQL's, by its scheme."""
    return url.partition(":")[0] in POSTGRES


def check_postgres_url(url: str) -> None:
    """Raise ValueError for a URL of PostgreSQL that means no database; a password in it is not repeated."""
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2].split(",")
    # What a password does not hide ends up in a host's place, or behind it: there it would be shown.
    if parts.fragment or "@" in parts.path or not parts.path.strip("/") or not all(map(_HOST.fullmatch, hosts)):
        raise ValueError(
            f"names no host and database; write {POSTGRES_FORM}, with %40 for @, %2F for /, %3F for ? and %23 for # "
            "in a password"
        )
    if {"password", "passfile"} & {name for name, _ in parse_qsl(parts.query)}:
        raise ValueError(f"a password belongs before the host: {POSTGRES_FORM}")


def postgres_name(url: str) -> str:
    """Where a database is, without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
