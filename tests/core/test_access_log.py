"""The access log: a line for each request, none lost to rotation or a full disk, and no secret in any."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from listeners import listening
from yamls import CHAT, HELLO, STREAM, config, targets

from qlens import ConfigError, StartupError
from qlens.access_log import FLUSH_SECONDS, Access, AccessLog
from qlens.testing import Running, running
from qlens.testing.realtime import KEY as REALTIME_KEY
from qlens.testing.realtime import realtime

MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("echo")}}
ECHO = {"echo": {"plugin": "echo"}}
KEYS = {"auth": [{"plugin": "api_keys", "file": "keys.yaml"}]}
KEY = "sk-example-" + "k" * 40


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def until(count: int, file: Path) -> list[dict[str, Any]]:
    """The lines of a file, once there are so many."""
    async with asyncio.timeout(10):
        while not file.exists() or file.read_text().count("\n") < count:
            await asyncio.sleep(0.02)
    return lines(file)


def logged(file: Path, pipeline: dict[str, Any] | None = None, **more: Any) -> str:
    return config(pipeline, ECHO, MODELS, access_log=str(file), **more)


async def test_each_request_has_a_line_with_who_asked_for_what_and_how_it_ended(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with running(logged(file)) as gateway:
        answers = [await gateway.post(CHAT, HELLO), await gateway.post(CHAT, STREAM)]
        answers += [await gateway.post("/v1/nothing?key=sk-example-query", HELLO), await gateway.get("/v1/models")]
        answers.append(await gateway.post(CHAT, {**HELLO, "model": "unknown"}))
        found = await until(5, file)
    assert [(line["method"], line["path"], line["status"]) for line in found] == [
        ("POST", CHAT, 200),
        ("POST", CHAT, 200),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/models", 200),
        ("POST", CHAT, 404),
    ]
    assert [line["id"] for line in found] == [answer.headers["x-request-id"] for answer in answers]
    assert [line.get("model") for line in found] == ["gpt-4o-mini", "gpt-4o-mini", None, None, None]
    assert [line.get("tenant") for line in found] == ["anonymous", "anonymous", None, "anonymous", "anonymous"]
    assert {line["client"] for line in found} == {"127.0.0.1"}
    assert all(line["duration_ms"] >= 0 for line in found)
    assert all(line["time"].startswith("20") and line["time"].endswith("+00:00") for line in found)


async def test_what_a_client_says_is_not_in_it(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with running(logged(file)) as gateway:
        headers = {"authorization": f"Bearer {KEY}", "x-api-key": KEY, "user-agent": "agent-canary", "cookie": KEY}
        await gateway.post(f"{CHAT}?api-key={KEY}", {**HELLO, "model": "model-canary"}, headers=headers)
        await until(1, file)
    assert not [word for word in (KEY, "canary", "Hello there") if word in file.read_text()]


async def test_a_refused_key_and_a_client_that_left_have_a_line_too(tmp_path: Path) -> None:
    file = tmp_path / "access.log"

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(silent) as port:
        up = {"up": {"plugin": "openai", "base_url": f"http://127.0.0.1:{port}/v1"}}
        models = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("up")}}
        yaml = config(None, up, models, access_log=str(file))
        async with running(yaml) as gateway:
            asking = asyncio.create_task(gateway.post(CHAT, HELLO))
            await asyncio.sleep(0.2)
            asking.cancel()
            (line,) = await until(1, file)
    assert (line["status"], line["tenant"]) == (499, "anonymous")

    other = tmp_path / "other.log"
    async with running(logged(other, KEYS), files={"keys.yaml": "keys: []\n"}) as gateway:
        await gateway.post(CHAT, HELLO, headers={"authorization": f"Bearer {KEY}"})
        (line,) = await until(1, other)
    assert line["status"] == 401
    assert "tenant" not in line


async def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    file, old = tmp_path / "access.log", tmp_path / "access.log.1"
    async with running(logged(file)) as gateway:
        await gateway.post(CHAT, HELLO)
        await until(1, file)
        file.rename(old)
        await gateway.post(CHAT, HELLO)
        await until(1, file)
    assert (len(lines(old)), len(lines(file))) == (1, 1)


async def test_what_waits_is_written_when_the_gateway_stops(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with running(logged(file)) as gateway:
        for _ in range(3):
            await gateway.post(CHAT, HELLO)
    assert len(lines(file)) == 3


@pytest.mark.parametrize("place", [".", "missing/access.log"], ids=["a folder", "in no folder"])
async def test_a_file_that_cannot_be_written_is_named_at_the_start(tmp_path: Path, place: str) -> None:
    with pytest.raises(StartupError, match=r"server\.access_log: .* cannot be written"):
        async with running(logged(tmp_path / place)):
            pass


async def test_a_reload_keeps_the_log(tmp_path: Path) -> None:
    async with running(logged(tmp_path / "access.log")) as gateway:
        with pytest.raises(ConfigError, match=r"server\.access_log: cannot change"):
            await gateway.reload(logged(tmp_path / "other.log"))


def _access(number: int) -> Access:
    return Access(number, str(number), None, "POST", CHAT, 200, 0.0, None, None, None)


def test_while_the_disk_takes_nothing_lines_wait_and_each_is_written_once(tmp_path: Path) -> None:
    lost: list[float] = []
    file = tmp_path / "access.log"
    log = AccessLog(file, lost.append)
    log.open()
    file.rename(tmp_path / "moved")
    file.mkdir()  # in its place nothing can be written
    for number in range(500):
        log.note(_access(number))
    time.sleep(2 * FLUSH_SECONDS)
    file.rmdir()
    log.close()
    assert [int(line["id"]) for line in lines(file)] == list(range(500))
    assert not lost


def test_lines_that_are_lost_are_counted(tmp_path: Path) -> None:
    lost: list[float] = []
    file = tmp_path / "access.log"
    log = AccessLog(file, lost.append)
    log.open()
    file.rename(tmp_path / "moved")
    file.mkdir()
    for number in range(300):
        log.note(_access(number))
    log.close()
    assert sum(lost) == 300


async def _raw(gateway: Running, request: bytes) -> bytes:
    """What a request is answered that is written as it is."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def test_what_is_not_http_has_a_line_with_its_id_and_status(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with running(logged(file)) as gateway:
        answers = [
            await _raw(gateway, b"GARBAGE\r\n\r\n"),
            await _raw(gateway, b"GET / HTTP/1.1\r\nhost: x\r\nauthorization: " + b"k" * 9_000 + b"\r\n\r\n"),
        ]
        found = await until(2, file)
    assert [line["status"] for line in found] == [400, 431]
    for line, answer in zip(found, answers, strict=True):
        assert f"x-request-id: {line['id']}\r\n".encode() in answer
        assert line["client"] == "127.0.0.1"
        assert {"method", "path"}.isdisjoint(line)


async def test_a_path_is_written_as_it_came_and_without_what_stands_in_front_of_it(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with running(logged(file)) as gateway:
        await _raw(gateway, b"GET http://x/v1/nothing?a=b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await _raw(gateway, b"GET /v1/%0A%ff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        found = await until(2, file)
    assert [(line["path"], line["status"]) for line in found] == [("/v1/nothing", 404), ("/v1/%0A%ff", 404)]


async def test_operators_and_sessions_have_lines_too(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with realtime() as up:
        providers = {"up": {"plugin": "openai", "base_url": up.url, "api_key": REALTIME_KEY}}
        models = {"voice": {"targets": [{"provider": "up", "model": "gpt-realtime"}]}}
        async with running(config(None, providers, models, access_log=str(file))) as gateway:
            async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=voice") as socket:
                await socket.receive_str(timeout=5)
            await until(1, file)
            await gateway.get("/metrics")
            found = await until(2, file)
    assert [(line["path"], line["status"], line.get("model")) for line in found] == [
        ("/v1/realtime", 101, "voice"),
        ("/metrics", 200, None),
    ]


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "qlens-access"]


async def test_no_thread_outlives_the_gateway_or_a_start_that_fails(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    async with running(logged(file)):
        assert len(_threads()) == 1
    missing = {"tls": {"ca_file": str(tmp_path / "missing.pem")}}
    with pytest.raises(StartupError, match="missing"):
        async with running(logged(file, network=missing)):
            pass
    assert not _threads()


async def test_gateways_of_one_process_write_each_their_own(tmp_path: Path) -> None:
    files = [tmp_path / "one.log", tmp_path / "two.log"]
    async with running(logged(files[0])) as one, running(logged(files[1])) as two:
        await one.post(CHAT, HELLO)
        await two.get("/v1/models")
    assert [[line["path"] for line in lines(file)] for file in files] == [[CHAT], ["/v1/models"]]


def test_a_name_that_is_no_unicode_keeps_no_other_line_from_being_written(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    log = AccessLog(file, lambda _: None)
    log.open()
    log.note(_access(1)._replace(tenant="\ud800x", path="/\udcff"))
    log.note(_access(2))
    log.close()
    assert [(line["id"], line["path"], line["status"], line.get("tenant")) for line in lines(file)] == [
        ("1", "/?", 200, "?x"),
        ("2", CHAT, 200, None),
    ]


_WRITER = """
import sys
from qlens.access_log import STANDARD_OUTPUT, Access, AccessLog
log = AccessLog(STANDARD_OUTPUT, print)
log.open()
for number in range(2000):
    log.note(Access(number, sys.argv[1], None, "GET", "/" + "y" * 200, 200, 0.0, None, None, None))
log.close()
"""


def test_processes_that_share_a_pipe_write_whole_lines() -> None:
    reading, writing = os.pipe()
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(each)], stdout=writing) for each in range(3)]
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        written = b""
        while piece := pipe.read(5_000):
            written += piece
            time.sleep(0)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert Counter(json.loads(line)["id"] for line in written.splitlines()) == {"0": 2000, "1": 2000, "2": 2000}
