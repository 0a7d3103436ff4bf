"""Keys in a database, as operators and clients meet them: several gateways and workers, killed at any moment."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from attrs import define
from e2e.serving import Served, serving
from ledgers import Place, PostgresPlace, SqlitePlace
from openai import OpenAI

from qlens.testing.postgres import postgres_server

if TYPE_CHECKING:
    from _pytest.fixtures import SubRequest

WITHIN_SECONDS = 5
"""How fast a revoked key must be refused everywhere."""


@define
class Said:
    """What the admin API answered."""

    status: int
    body: Any


def admin(served: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Said:
    """Ask the admin API with the demo key, which is an admin's."""
    connection = http.client.HTTPConnection(served.admin_url.removeprefix("http://"), timeout=10)
    try:
        sent = {"authorization": f"Bearer {served.key}", **(headers or {})}
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        return Said(answer.status, json.loads(answer.read()))
    finally:
        connection.close()


def status(served: Served, key: str) -> int:
    """What a call is answered, on a connection of its own."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def store(url: str) -> dict[str, Any]:
    """What a gateway needs to keep its keys in a database."""
    keys = {"plugin": "key_store", "url": url}
    demo = {"plugin": "api_keys", "file": "keys.yaml", "demo_key_file": "demo.key"}
    return {"pipeline": {"auth": [demo, keys], "cost": [{"plugin": "ledger", "url": url}]}}


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def place(request: SubRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "sqlite":
        yield SqlitePlace(tmp_path_factory.mktemp("shared") / "qlens.db")
        return
    with postgres_server() as server:
        yield PostgresPlace(server, server.new_database())


@pytest.fixture(scope="module")
def replicas(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    """A gateway of two workers and one of one, on one database."""
    with ExitStack() as running:
        pair = store(place.url) | {"server": {"workers": 2}}
        pair["pipeline"] |= {"rate_limit": [], "cache": []}
        folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
        one = running.enter_context(serving(folders[0], changes=pair))
        two = running.enter_context(serving(folders[1], changes=store(place.url)))
        yield one, two


def test_a_key_works_everywhere_at_once_and_is_refused_everywhere_within_seconds(
    replicas: tuple[Served, Served],
) -> None:
    one, two = replicas
    key = admin(one, "POST", "/admin/keys", {"tenant": "acme"}).body
    # Connections are spread over the workers: both are met.
    assert {status(served, key["key"]) for served in (*[one] * 12, two)} == {200}
    assert admin(two, "DELETE", f"/admin/keys/{key['id']}").status == 200
    revoked = time.monotonic()
    assert status(two, key["key"]) == 401
    while {status(one, key["key"]) for _ in range(12)} != {401}:
        assert time.monotonic() - revoked < WITHIN_SECONDS
    assert admin(one, "PATCH", f"/admin/keys/{key['id']}", {"name": "x"}).status == 409


def test_a_disabled_tenant_is_refused_everywhere_within_seconds(replicas: tuple[Served, Served]) -> None:
    one, two = replicas
    key = admin(one, "POST", "/admin/keys", {"tenant": "globex"}).body["key"]
    assert admin(one, "POST", "/admin/tenants", {"name": "globex", "disabled": True}).status == 200
    disabled = time.monotonic()
    while {status(served, key) for served in (*[one] * 12, two)} != {401}:
        assert time.monotonic() - disabled < WITHIN_SECONDS


def test_the_audit_log_knows_who_asked_through_the_supervisor(replicas: tuple[Served, Served]) -> None:
    one, _ = replicas
    forged = {"x-qlens-peer": "203.0.113.7"}
    key = admin(one, "POST", "/admin/keys", {"tenant": "acme"}, forged).body
    (entry,) = admin(one, "GET", f"/admin/audit?object={key['id']}").body["data"]
    assert (entry["actor"]["peer"], entry["actor"]["subject"]) == ("127.0.0.1", "demo")
    found = one.qlens("audit", "--verify")
    assert (found.returncode, "each as it was written" in found.stdout) == (0, True), found.stderr


def test_openais_sdk_works_with_a_key_and_sees_what_the_key_may_use(replicas: tuple[Served, Served]) -> None:
    one, two = replicas
    body = {"tenant": "acme", "models": ["gpt-4o-mini"]}
    key = admin(two, "POST", "/admin/keys", body).body["key"]
    for served in (one, two):
        with OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as sdk:
            assert [model.id for model in sdk.models.list()] == ["gpt-4o-mini"]
            answer = sdk.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}])
            assert answer.choices[0].message.content
            with pytest.raises(openai.NotFoundError):
                sdk.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hello"}])
        with (
            OpenAI(base_url=f"{served.url}/v1", api_key=key + "x", max_retries=0) as sdk,
            pytest.raises(openai.AuthenticationError),
        ):
            sdk.models.list()


def test_whatever_was_answered_survives_a_kill_and_nothing_is_there_by_half(place: Place, tmp_path: Path) -> None:
    before = {row["id"] for row in place.rows("SELECT id FROM keys")}
    shown: list[dict[str, Any]] = []
    with serving(tmp_path, changes=store(place.url)) as served:
        served.leaves_with = -signal.SIGKILL

        def create() -> None:
            for place in range(10_000):
                try:
                    answer = admin(served, "POST", "/admin/keys", {"tenant": "acme", "name": f"n{place}"})
                except (OSError, http.client.HTTPException):
                    return
                assert answer.status == 200
                shown.append(answer.body)

        threads = [threading.Thread(target=create) for _ in range(4)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + 60
        while len(shown) < 40 and time.monotonic() < ends:
            time.sleep(0.01)
        served.told_to_stop = True
        served.process.kill()
        for thread in threads:
            thread.join()
    assert len(shown) >= 40
    if isinstance(place, SqlitePlace):
        assert place.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    kept = {row["id"] for row in place.rows("SELECT id FROM keys")} - before
    noted = {row["object"] for row in place.rows("SELECT object FROM audit WHERE action = 'keys.create'")} - before
    assert kept == noted  # a key and its entry, or neither
    assert place.rows("SELECT change AS n FROM key_state") == place.rows("SELECT count(*) AS n FROM audit")
    assert {key["id"] for key in shown} <= kept
    with serving(tmp_path, changes=store(place.url)) as served:
        assert status(served, shown[0]["key"]) == status(served, shown[-1]["key"]) == 200
        assert served.qlens("audit", "--verify").returncode == 0
