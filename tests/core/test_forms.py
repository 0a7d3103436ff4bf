"""Forms through the front door: read into fields and spooled files, sent again as often as needed, then gone."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import resource
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from yamls import config, probe

from qlens import Reply, Target
from qlens.spool import MEMORY_BYTES, Spool
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream, error

PATH = "/v1/audio/transcriptions"
MODEL = "any-model"
FIELDS = {"model": MODEL}
LARGE = os.urandom(MEMORY_BYTES * 3 + 17)
RETRY = {"route": [{"plugin": "retry", "attempts": 3, "backoff_seconds": 0}]}
BOUNDARY = {"content-type": "multipart/form-data; boundary=xyz"}


def _yaml(stages: Mapping[str, Any], *urls: str, **server: Any) -> str:
    providers = {f"up{place}": {"plugin": "openai", "base_url": url} for place, url in enumerate(urls)}
    targets = [{"provider": name, "model": "real-model"} for name in providers]
    return config(stages, providers, {MODEL: {"targets": targets}}, **server)


@asynccontextmanager
async def _gateway(stages: Mapping[str, Any] | None = None, **server: Any) -> AsyncIterator[tuple[Running, Any]]:
    async with upstream() as up, running(_yaml(stages or {}, up.url, **server)) as gateway:
        yield gateway, up


def _open_spools() -> list[str]:
    """The files that this process has open in the folder for temporary files, named or not."""
    gc.collect()
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [link for link in links if link.startswith(tempfile.gettempdir()) and "(deleted)" in link]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.glob("qlens-*[!y]")) == []
    assert _open_spools() == []


def _file_of(up: FakeUpstream, place: int = -1) -> bytes:
    return up.requests[place].form[-1].content


@pytest.mark.parametrize("content", [b"", b"x", b"\r\n--", LARGE[:MEMORY_BYTES], LARGE], ids=len)
async def test_a_file_of_any_size_arrives_byte_for_byte(content: bytes) -> None:
    async with _gateway() as (gateway, up):
        answer = await gateway.post_form(PATH, FIELDS, {"file": content})
        assert answer.status == 200
        assert _file_of(up) == content
        assert int(up.requests[0].headers["content-length"]) == len(up.requests[0].content)


async def test_a_large_file_is_on_disk_while_the_call_runs_and_gone_after_it() -> None:
    async with _gateway() as (gateway, up):
        up.script(Scripted(hang=True))
        asking = asyncio.create_task(gateway.post_form(PATH, FIELDS, {"file": LARGE}))
        await up.arrived(1)
        assert len(_open_spools()) == 1
        asking.cancel()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        assert _open_spools() == []


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_a_retry_sends_the_whole_file_again(content: bytes) -> None:
    async with _gateway(RETRY) as (gateway, up):
        up.script(error(503, "busy"), error(503, "busy"))
        assert (await gateway.post_form(PATH, FIELDS, {"file": content})).status == 200
        assert [_file_of(up, place) for place in range(3)] == [content] * 3
        boundaries = {request.headers["content-type"] for request in up.requests}
        assert len(boundaries) == 3  # each of its own, which no client can know


async def test_another_target_gets_the_whole_file() -> None:
    async with upstream() as down, upstream() as up, running(_yaml({}, down.url, up.url)) as gateway:
        down.script(error(500, "broken"))
        assert (await gateway.post_form(PATH, FIELDS, {"file": LARGE})).status == 200
        assert _file_of(up) == LARGE


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_a_connection_that_died_idle_costs_no_attempt(content: bytes) -> None:
    async with _gateway({"route": [{"plugin": "puppets:Puppet", "name": "puppet"}]}) as (gateway, up):
        assert (await gateway.post_form(PATH, FIELDS, {"file": b"first"})).status == 200

        def too_late(target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Awaitable[Reply]:
            up.hang_up()
            return proceed(target)

        gateway.plugin("route", "puppet").does["wrap_send"] = too_late
        assert (await gateway.post_form(PATH, FIELDS, {"file": content})).status == 200
        assert _file_of(up) == content
        receipts = await gateway.settled(2)
        assert len(receipts[1].attempts) == 1
        assert up.connections == 2


async def test_an_upload_that_is_abandoned_leaves_nothing() -> None:
    async with _gateway() as (gateway, up):
        host, port = gateway.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {BOUNDARY['content-type']}\r\n"
        part = '--xyz\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        writer.write(f"{head}content-length: 9000000\r\n\r\n{part}".encode() + LARGE)
        await writer.drain()
        async with asyncio.timeout(30):
            while not _open_spools():
                await asyncio.sleep(0.01)
        writer.close()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        assert _open_spools() == []
        assert not up.requests


async def test_a_form_is_bounded_like_every_body() -> None:
    async with _gateway(max_body_bytes=100_000) as (gateway, up):
        told = await gateway.post_form(PATH, FIELDS, {"file": bytes(100_001)})
        assert told.status == 413

        async def pieces() -> AsyncIterator[bytes]:
            yield b'--xyz\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(20):
                yield bytes(10_000)

        async with gateway.session.post(gateway.url + PATH, data=pieces(), headers=BOUNDARY) as untold:
            assert untold.status == 413
        assert not up.requests


def _part(headers: str, content: str) -> str:
    return f"--xyz\r\n{headers}\r\n\r\n{content}\r\n"


_MODEL = _part('content-disposition: form-data; name="model"', MODEL)
_FILE = _part('content-disposition: form-data; name="file"; filename="a"', "x")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("", None),
        ("--xyz--\r\n", "file"),
        ("no form at all", None),
        ("--xyz\r\nbad header: x\r\n\r\nx\r\n--xyz--\r\n", None),
        ("--xyz and more\r\n\r\n", None),
        ("x" * 5000, None),
        ("x" * 5000 + "\r\n" + _MODEL + _FILE + "--xyz--\r\n", None),
        ("not a line" + _MODEL + "--xy--\r\n", None),
        (_MODEL + _FILE, None),
        (_part("content-type: text/plain", "x") + "--xyz--\r\n", None),
        (_part('content-disposition: attachment; name="model"', "x") + "--xyz--\r\n", None),
        (_MODEL + "--xyz--\r\n", "file"),
        (_FILE + "--xyz--\r\n", "model"),
        (_MODEL + _FILE + _FILE + "--xyz--\r\n", "file"),
        (_MODEL + _FILE + _FILE.replace('"file"', '"other"') + "--xyz--\r\n", "other"),
        (_MODEL.replace(MODEL, "\udcff") + _FILE + "--xyz--\r\n", None),
        (_MODEL * 129 + "--xyz--\r\n", None),
        (_MODEL.replace(MODEL, "x" * (1024 * 1024 + 1)) + _FILE + "--xyz--\r\n", None),
        (_MODEL + _FILE + _part('content-disposition: form-data; name="temperature"', "hot") + "--xyz--\r\n",
         "temperature"),
        (_MODEL + _FILE + _MODEL.replace('"model"', '"model[]"') + "--xyz--\r\n", "model"),
        (_MODEL + _FILE + _part('content-disposition: form-data; name="stream"', "maybe") + "--xyz--\r\n", "stream"),
    ],
)  # fmt: skip
async def test_a_form_that_is_wrong_is_openais_400(
    body: str, param: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with _gateway() as (gateway, up):
        raw = body.encode("utf-8", "surrogateescape")
        answer = await gateway.request("POST", PATH, body=raw, headers=BOUNDARY)
        told = answer.json()["error"]
        assert (answer.status, told["type"], told["param"]) == (400, "invalid_request_error", param)
        assert not up.requests
        assert not [record for record in caplog.records if record.name.startswith("python_multipart")]


@pytest.mark.parametrize("step", [1, 7, 10**6])
@pytest.mark.parametrize(
    "preamble", ["", "\r\n", "A message in several parts.\r\n", "--xy\r\na --xyz in a line\r\n", "x" * 4096 + "\r\n"]
)
async def test_what_stands_in_front_of_the_first_part_is_skipped(preamble: str, step: int) -> None:
    whole = f"{preamble}{_MODEL}{_FILE}--xyz--\r\n".encode()

    async def pieces() -> AsyncIterator[bytes]:
        for place in range(0, len(whole), step):
            yield whole[place : place + step]

    async with _gateway() as (gateway, up):
        async with gateway.session.post(gateway.url + PATH, data=pieces(), headers=BOUNDARY) as answer:
            assert answer.status == 200
        assert [part.content for part in up.requests[0].form] == [b"real-model", b"x"]


@pytest.mark.parametrize(
    ("media", "status"),
    [("application/json", 415), ("multipart/form-data", 400), ("multipart/form-data; boundary=", 400), ("", 415)],
)
async def test_another_content_type_is_refused(media: str, status: int) -> None:
    async with _gateway() as (gateway, _):
        answer = await gateway.request("POST", PATH, body=b"{}", headers={"content-type": media})
        assert answer.status == status


async def test_what_a_client_writes_in_names_breaks_no_form() -> None:
    async with _gateway() as (gateway, up):
        evil = _FILE.replace('"a"', r'"a\"; name=\"model"')
        answer = await gateway.request("POST", PATH, body=(_MODEL + evil + "--xyz--\r\n").encode(), headers=BOUNDARY)
        assert answer.status == 200
        assert [(part.name, part.filename) for part in up.requests[0].form] == [
            ("model", None),
            ("file", "a%22; name=%22model"),
        ]
        assert up.requests[0].fields == {"model": "real-model"}


async def test_a_cache_does_not_take_one_file_for_another() -> None:
    async with _gateway({"cache": [{"plugin": "exact"}]}) as (gateway, up):
        for content in (b"one", b"two", b"one"):
            answer = await gateway.post_form(PATH, FIELDS, {"file": content})
            assert answer.headers["x-qlens-cache"] == "off"
        assert [_file_of(up, place) for place in range(3)] == [b"one", b"two", b"one"]


async def test_a_guard_sees_and_changes_the_fields_and_the_transcript() -> None:
    rules = [{"name": "place", "words": ["upstream"], "action": "redact"}]
    async with _gateway({"guard": [{"plugin": "pattern", "rules": rules}]}) as (gateway, up):
        for form in ("json", "text"):
            fields = {**FIELDS, "prompt": "about the upstream", "response_format": form}
            answer = await gateway.post_form(PATH, fields, {"file": b"x"})
            assert "upstream" not in answer.text
            assert "Hello" in answer.text
            assert "upstream" not in up.requests[-1].fields["prompt"]


async def test_a_plugin_reads_a_file_as_often_as_it_wants() -> None:
    files = {"reads.py": _READS}
    async with upstream() as up:
        stages = {"guard": [{"plugin": "reads:Reads", "name": "reads"}]}
        async with running(_yaml(stages, up.url), files=files) as gateway:
            await gateway.post_form(PATH, FIELDS, {"file": LARGE})
            seen = gateway.plugin("guard", "reads").seen
            assert seen == [("file", "file.bin", len(LARGE), hashlib.sha256(LARGE).hexdigest())] * 2


_READS = """
from hashlib import sha256
from attrs import define, field
from qlens import hookimpl

@define(eq=False)
class Reads:
    config: object
    name: str
    seen: list = field(factory=list)

    @hookimpl
    async def wrap_call(self, call, proceed):
        for _ in range(2):
            (file,) = call.files
            self.seen.append((file.name, file.filename, file.size, sha256(await file.read()).hexdigest()))
        return await proceed()
"""


async def test_one_who_is_refused_uploads_nothing() -> None:
    async with _gateway({"auth": [probe("nobody")]}) as (gateway, _):
        answer = await gateway.post_form(PATH, FIELDS, {"file": b"x"})
        assert answer.status == 401
        assert not gateway.receipts


async def test_a_hundred_megabytes_take_no_memory() -> None:
    size, piece = 100 * 1024 * 1024, bytes(64 * 1024)
    counted = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal counted
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [int(line.split()[1]) for line in head.lower().splitlines() if line.startswith(b"content-length")]
        while counted < length:
            counted += len(await reader.read(256 * 1024))
        body = b'{"text": "heard"}'
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()
        writer.close()

    async def form() -> AsyncIterator[bytes]:
        yield _MODEL.encode() + b'--xyz\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(size // len(piece)):
            yield piece
        yield b"\r\n--xyz--\r\n"

    async with await asyncio.start_server(count, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with running(_yaml({}, url, max_body_bytes=size + 1024 * 1024)) as gateway:
            await gateway.get("/v1/models")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            async with gateway.session.post(gateway.url + PATH, data=form(), headers=BOUNDARY) as answer:
                assert (answer.status, await answer.json()) == (200, {"text": "heard"})
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert counted > size
    assert grown < 32 * 1024  # kilobytes


# --- the spool itself --------------------------------------------------------------------------


async def test_a_spool_is_read_from_anywhere() -> None:
    spool = Spool()
    for start in range(0, len(LARGE), 100_000):
        await spool.write(LARGE[start : start + 100_000])
    await spool.end()
    for start, size in ((0, len(LARGE)), (5, 0), (MEMORY_BYTES - 3, 7), (len(LARGE) - 1, 1)):
        found = b"".join([piece async for piece in spool.pieces(start, size)])
        assert found == LARGE[start : start + size]
    spool.close()
    spool.close()
    with pytest.raises(Exception, match="cannot be kept"):
        [piece async for piece in spool.pieces(0, 1)]


async def test_a_spool_that_is_closed_while_a_thread_writes_closes_its_file_afterwards() -> None:
    spool = Spool()
    writing = asyncio.create_task(spool.write(LARGE))
    await asyncio.sleep(0)
    spool.close()
    await asyncio.gather(writing, return_exceptions=True)
    assert _open_spools() == []


async def test_no_room_on_the_disk_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    async with _gateway() as (gateway, _):
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        answer = await gateway.post_form(PATH, FIELDS, {"file": LARGE})
        assert (answer.status, answer.json()["error"]["type"]) == (503, "server_error")
