"""The plugin `trusted_header`: whom it believes, and what a certificate's header says."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens import MODELS, config
from yamls import CHAT, HELLO

from qlens import Caller, StartupError
from qlens.testing import Response, Running, check_plugin, running
from qlens_plugins.auth.trusted_header import TrustedHeader, _attributes, _certificate

HEADERS = {"tenant": "x-tenant", "subject": "x-user", "project": "x-project"}
ALICE = {"x-tenant": "acme", "x-user": "alice"}
WHO = ("x-tenant: acme", "x-user: alice")
KEY = "sk-example-Zb1yQ0cW8mT5rL2vX7nK4hJ9dF6gS3aP"
KEYS = f"keys: [{{id: one, hash: 'sha256:{hashlib.sha256(KEY.encode()).hexdigest()}', tenant: other}}]"
SPIFFE = "spiffe://example.com/ns/{tenant}/sa/{subject}"


def entry(**settings: Any) -> dict[str, Any]:
    """The plugin's entry; without settings it believes this machine's headers."""
    usual = {"plugin": "trusted_header", "proxies": ["127.0.0.0/8"], "headers": HEADERS}
    return {name: value for name, value in {**usual, **settings}.items() if value is not None}


def certificates(**settings: Any) -> str:
    """A configuration that believes certificates."""
    return config(entry(headers=None, **settings))


async def caller_of(gateway: Running, headers: dict[str, str], **more: Any) -> Caller:
    before = len(gateway.receipts)
    answer = await gateway.post(CHAT, HELLO, headers=headers, **more)
    assert answer.status == 200, answer.text
    return (await gateway.settled(before + 1))[-1].caller


async def status(gateway: Running, headers: dict[str, str], **more: Any) -> int:
    return (await gateway.get(MODELS, headers=headers, **more)).status


async def told(gateway: Running, local: str, *lines: str, target: str = MODELS, who: tuple[str, ...] = WHO) -> bytes:
    """The status that a request gets from this address, written as it is."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(local, 0))
    writer.write(
        "\r\n".join([f"GET {target} HTTP/1.1", *lines, *who, "connection: close", "", ""]).encode(
            "utf-8", "surrogateescape"
        )
    )
    answer = await reader.read()
    writer.close()
    return answer.split(b" ")[1]


def error(answer: Response) -> tuple[int, str]:
    body = answer.json()["error"]
    assert (body["type"], body["param"]) == ("invalid_request_error", None)
    return answer.status, body["message"]


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("auth", TrustedHeader)


# --- whom it believes ---------------------------------------------------------------------------


async def test_headers_of_a_proxy_tell_who_calls() -> None:
    settings = {"roles_header": "X-Groups", "roles": {"ops": "admin"}}
    async with running(config(entry(**settings))) as gateway:
        caller = await caller_of(gateway, {**ALICE, "X-Project": "rocket", "x-groups": "member, admin,ops"})
        roles = frozenset({"member", "admin"})
        assert caller == Caller("acme", "alice", "trusted_header", project="rocket", roles=roles)
        assert (await caller_of(gateway, {**ALICE, "x-groups": "admin viewer"})).roles == {"member"}
        assert await status(gateway, {"x-user": "alice", "x-tenant": ""}) == 401
        assert (await gateway.get("/admin/health", headers={**ALICE, "x-groups": "ops"})).status == 200
        assert (await gateway.get("/admin/health", headers={**ALICE, "x-groups": "admin"})).status == 403


@pytest.mark.parametrize("proxies", [["10.0.0.0/8"], ["127.0.0.2/32", "::/1"], ["fd00::/8", "126.0.0.0/8"]])
async def test_from_anybody_else_the_headers_are_nothing(proxies: list[str]) -> None:
    async with running(config(entry(proxies=proxies))) as gateway:
        for headers in (ALICE, {**ALICE, "x-forwarded-for": "10.0.0.1", "forwarded": "for=10.0.0.1"}):
            answer = await gateway.get(MODELS, headers=headers)
            assert error(answer) == (401, error(await gateway.get(MODELS))[1])
    async with running(config(entry(proxies=proxies), {"plugin": "anonymous"})) as gateway:
        assert (await caller_of(gateway, ALICE)).tenant == "anonymous"


async def test_the_other_end_of_the_connection_counts_and_nothing_that_a_request_says() -> None:
    async with running(config(entry(proxies=["127.0.0.7"]))) as gateway:
        assert await told(gateway, "127.0.0.7", "host: x") == b"200"
        said = [f"{name}: 127.0.0.7" for name in ("x-real-ip", "x-forwarded-for", "x-qlens-peer", "via")]
        for host in ("127.0.0.7", "127.0.0.7/?", "x@127.0.0.7", "localhost"):
            for target in (MODELS, f"http://127.0.0.7{MODELS}", f"{MODELS}?peer=127.0.0.7"):
                status = await told(gateway, "127.0.0.8", f"host: {host}", *said, target=target)
                assert status in {b"401", b"400"}
        for target in (f"http://evil.example{MODELS}", MODELS):
            assert await told(gateway, "127.0.0.7", "host: evil.example", target=target) == b"200"


async def test_the_plugin_that_is_listed_first_decides() -> None:
    keys = {"plugin": "api_keys", "file": "keys.yaml"}
    async with running(config(entry(), keys), files={"keys.yaml": KEYS}) as gateway:
        assert (await caller_of(gateway, ALICE, key="sk-example-whatever")).tenant == "acme"
        assert (await caller_of(gateway, {}, key=KEY)).tenant == "other"
        assert await status(gateway, {}, key="sk-example-whatever") == 401


async def test_a_header_that_is_there_twice_is_refused_since_one_is_the_clients() -> None:
    async with running(config(entry(roles_header="x-groups"))) as gateway:
        all_of_them = (*WHO, "x-project: p", "x-groups: g")
        assert await told(gateway, "127.0.0.1", "host: x", who=all_of_them) == b"200"
        for name in ("x-tenant", "X-User", "x-project", "X-GROUPS"):
            for order in ((f"{name}: evil", *all_of_them), (*all_of_them, f"{name}: evil"), (f"{name}:", *all_of_them)):
                assert await told(gateway, "127.0.0.1", "host: x", who=order) == b"401"
        assert await status(gateway, {"x-tenant": "acme"}) == 401
        assert await status(gateway, {"x-user": "alice"}) == 401


async def test_a_name_that_is_none_is_refused() -> None:
    async with running(config(entry())) as gateway:
        for value in ("", " ", "x" * 257, "a\tb", "a\x7fb", "a\u202eb", "\udcff"):
            who = (f"x-tenant: {value}", "x-user: alice")
            assert await told(gateway, "127.0.0.1", "host: x", who=who) in {b"400", b"401"}, value


async def test_a_page_of_another_site_asks_for_nothing_in_somebodys_name() -> None:
    async with running(config(entry())) as gateway:
        for site, expected in (("cross-site", 401), ("same-site", 401), ("same-origin", 200), ("none", 200)):
            assert await status(gateway, {**ALICE, "sec-fetch-site": site}) == expected, site


async def test_a_page_in_a_browser_opens_no_session_in_somebodys_name() -> None:
    async with running(config(entry())) as gateway:
        url = f"{gateway.url}/v1/realtime?model=gpt-4o-mini"
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await gateway.session.ws_connect(url, headers=ALICE, origin="https://evil.example")
        assert caught.value.status == 401
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await gateway.session.ws_connect(url, headers=ALICE)
        assert caught.value.status != 401  # there is no provider of sessions here


# --- certificates -------------------------------------------------------------------------------

CERTIFICATE = (
    "By=spiffe://example.com/ns/gateway/sa/qlens;Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688;"
    'Subject="CN=search,OU=rocket,O=Acme\\, Inc.";URI=spiffe://example.com/ns/acme/sa/search;DNS=search.acme;DNS=search'
)


async def test_envoys_header_tells_who_calls_by_uri() -> None:
    async with running(certificates(certificate_uri=SPIFFE)) as gateway:
        caller = await caller_of(gateway, {"x-forwarded-client-cert": CERTIFICATE})
        assert (caller.tenant, caller.subject, caller.project) == ("acme", "search", None)


async def test_envoys_header_tells_who_calls_by_subject() -> None:
    subject = {"project": "OU"}
    async with running(certificates(certificate_subject=subject, certificate_header="X-Client-Cert")) as gateway:
        caller = await caller_of(gateway, {"x-client-cert": CERTIFICATE})
        assert (caller.tenant, caller.subject, caller.project) == ("Acme, Inc.", "search", "rocket")
        assert await status(gateway, {"x-forwarded-client-cert": CERTIFICATE}) == 401
        assert await status(gateway, {"x-client-cert": 'Subject="CN=search"'}) == 401
        assert await status(gateway, {"x-client-cert": "Hash=00"}) == 401
        assert await status(gateway, {"x-client-cert": 'Subject="CN=search,O=\\20"'}) == 401  # a blank, written out


async def test_of_several_proxies_the_last_one_is_believed() -> None:
    forged = "Hash=00;URI=spiffe://example.com/ns/victim/sa/admin"
    async with running(certificates(certificate_uri=SPIFFE)) as gateway:
        for value in (f"{forged},{CERTIFICATE}", f'{forged};Cert="x,y;\\"URI=z",{CERTIFICATE}'):
            assert (await caller_of(gateway, {"x-forwarded-client-cert": value})).tenant == "acme"
        lines = (f"x-forwarded-client-cert: {forged}", f"x-forwarded-client-cert: {CERTIFICATE}")
        assert await told(gateway, "127.0.0.1", "host: x", who=lines) == b"401"


NOBODYS = (
    "",
    "URI",
    "URI=",
    "=x",
    "URI=spiffe://example.com/ns/acme/sa/search;",
    'URI="spiffe://example.com/ns/acme/sa/search',
    "URI=spiffe://example.com/ns/acme/sa/search;URI=spiffe://example.com/ns/other/sa/search",
    "URI=spiffe://example.com/ns/acme/sa/search/more",
    "URI=spiffe://example.com/ns/acme/sa/",
    "URI=spiffe://example.com/ns//sa/search",
    "URI=spiffe://example.org/ns/acme/sa/search",
    "URI=spiffe://exampleXcom/ns/acme/sa/search",
    "URI=xspiffe://example.com/ns/acme/sa/search",
    "By=spiffe://example.com/ns/acme/sa/search",
    "URI=spiffe://example.com/ns/acme/sa/search,Hash=00",
    "key=" + " " * 7000 + '"',
)


async def test_a_certificate_without_the_one_uri_is_nobodys() -> None:
    async with running(certificates(certificate_uri=SPIFFE)) as gateway:
        for value in NOBODYS:
            expected = 200 if value.endswith("search;") else 401
            assert await status(gateway, {"x-forwarded-client-cert": value}) == expected, value


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("CN=a,O=b", {"CN": "a", "O": "b"}),
        ("CN = a , o=b", {"CN": "a", "O": "b"}),
        (r"O=Acme\, Inc.\+\"x\",CN=a", {"O": 'Acme, Inc.+"x"', "CN": "a"}),
        (r"O=\C3\89t\C3\A9\2C Inc,CN=a", {"O": "Été, Inc", "CN": "a"}),
        (r"CN=a\,O=evil,O=acme", {"CN": "a,O=evil", "O": "acme"}),
        ("O=acme,O=evil,CN=a", {"CN": "a"}),
        ("O=acme+OU=x,CN=a", {"O": "acme", "OU": "x", "CN": "a"}),
        ("O=acme\\", {}),
        ("acme", {}),
        ("2.5.4.10=acme,CN=a", {}),
        ("", {}),
    ],
)
def test_a_distinguished_name_is_read_as_it_was_meant(name: str, attributes: dict[str, str]) -> None:
    assert _attributes(name) == attributes


@given(st.text(max_size=60), st.text('\\",;=+ aCNO', max_size=60))
def test_no_text_at_all_breaks_the_reading(one: str, other: str) -> None:
    for text in (one, other, f'Subject="{other}"', f"O={other}"):
        certificate = _certificate(text)
        assert certificate is None or all(isinstance(value, str) for value in certificate.values())
        assert all(isinstance(value, str) for value in _attributes(text.replace("\ud800", "")).values())


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proxies": []}, "proxies"),
        ({"proxies": ["0.0.0.0/0"]}, "everybody"),
        ({"proxies": ["::/0"]}, "everybody"),
        ({"proxies": ["10.0.0.1/8"]}, "has host bits set"),
        ({"proxies": ["proxy.example.com"]}, "is no network"),
        ({"headers": None}, "set one of headers, certificate_uri and certificate_subject"),
        ({"certificate_uri": SPIFFE}, "set one of headers"),
        ({"headers": {**HEADERS, "tenant": "x tenant"}}, "headers.tenant"),
        ({"headers": None, "certificate_uri": "spiffe://x/{tenant}"}, "where the subject stands"),
        ({"headers": None, "certificate_uri": "spiffe://x/{tenant}/{subject}/{tenant}"}, "each once"),
        ({"headers": None, "certificate_uri": "spiffe://x/{tenant}/{subject}/{role}"}, "each once"),
        ({"roles": {"a": "admin"}}, "roles_header must say"),
    ],
)
async def test_settings_that_would_believe_the_wrong_ones_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError) as caught:
        async with running(config(entry(**settings))):
            pass
    assert message in str(caught.value)
