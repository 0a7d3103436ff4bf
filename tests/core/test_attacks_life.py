"""Start, reload and stop with plugins that hang, raise or cancel at the wrong moment."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from puppets import Puppet, Resident
from yamls import CHAT, HELLO, STREAM, config, targets

from qlens import Health, Reply, StartupError
from qlens.registry import is_loopback
from qlens.testing import running

PUPPET = {"plugin": "puppets:Puppet", "name": "puppet"}


def _residents(**closing: str) -> dict[str, Any]:
    stages = ("rate_limit", "guard", "observe")
    return {
        stage: [{"plugin": "puppets:Resident", "name": stage, "closing": closing.get(stage, "")}] for stage in stages
    }


async def _starts(stages: dict[str, Any]) -> None:
    async with running(config(stages)):
        pass


@pytest.mark.parametrize("how", ["raise", "cancel", "hang"])
async def test_a_lifespan_that_does_not_close_well_keeps_no_other_from_closing(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.gateway.CLOSE_SECONDS", 0.1)
    async with running(config(_residents(observe=how, guard=how))) as gateway:
        residents: list[Resident] = [gateway.plugin(stage, stage) for stage in ("rate_limit", "guard", "observe")]
        assert (await gateway.post(CHAT, HELLO)).status == 200
    assert [resident.events for resident in residents] == [["open", "close"]] * 3


@pytest.mark.parametrize("how", ["raise", "cancel", "hang"])
async def test_a_lifespan_that_does_not_close_well_after_a_reload_is_forgotten(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.gateway.CLOSE_SECONDS", 0.1)
    async with running(config(_residents(observe=how, guard=how))) as gateway:
        first: Resident = gateway.plugin("rate_limit", "rate_limit")
        await gateway.reload(config())
        for _ in range(100):
            if "close" in first.events:
                break
            await asyncio.sleep(0.01)
        assert first.events == ["open", "close"]
        assert (await gateway.post(CHAT, HELLO)).status == 200


@pytest.mark.parametrize("how", ["raise", "cancel", "hang"])
async def test_a_lifespan_that_does_not_open_is_a_fault_and_the_present_configuration_stays(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.gateway.OPEN_SECONDS", 0.2)
    bad = {**_residents(), "cost": [{"plugin": "puppets:Resident", "name": "bad", "opening": how}]}
    with pytest.raises(StartupError, match="puppets:Resident"):
        await asyncio.wait_for(_starts(bad), 5)
    async with running(config({"guard": [PUPPET]})) as gateway:
        with pytest.raises(StartupError, match="puppets:Resident"):
            await asyncio.wait_for(gateway.reload(config({"guard": [PUPPET], **bad})), 5)
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await gateway.reload(config({"guard": [PUPPET], **_residents()}))
        assert (await gateway.post(CHAT, HELLO)).status == 200


async def test_while_a_reload_opens_the_present_configuration_answers_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlens.gateway.OPEN_SECONDS", 0.4)
    bad = {"cost": [{"plugin": "puppets:Resident", "name": "bad", "opening": "hang"}]}
    async with running(config({"guard": [PUPPET]})) as gateway:
        gateway.plugin("guard", "puppet").does["health"] = lambda: Health(True, "still me")
        loading = asyncio.create_task(gateway.reload(config(bad)))
        await asyncio.sleep(0.1)
        assert (await gateway.get("/readyz")).json()["plugins"]["guard.puppet"]["detail"] == "still me"
        with pytest.raises(StartupError):
            await loading


async def test_an_adopt_that_raises_refuses_the_reload() -> None:
    async with running(config(_residents())) as gateway:

        def adopt(*_: object) -> None:
            raise RuntimeError("no")

        resident = gateway.plugin("guard", "guard")
        resident.adopting = adopt
        with pytest.raises(StartupError, match="adopt"):
            await gateway.reload(config(_residents(guard="raise")))
        assert gateway.plugin("guard", "guard") is resident
        assert (await gateway.post(CHAT, HELLO)).status == 200


@pytest.mark.parametrize(
    "health",
    [None, 5, Health("yes", object()), Health(True, "\ud800")],  # type: ignore[arg-type]
    ids=["nothing", "number", "wrong types", "surrogate"],
)
async def test_nonsense_from_health_is_shown_as_unhealthy(health: Any) -> None:
    async with running(config({"guard": [PUPPET]})) as gateway:
        gateway.plugin("guard", "puppet").does["health"] = lambda: health
        answer = await gateway.get("/readyz")
        assert answer.status == 200
        assert answer.json()["plugins"]["guard.puppet"]["ok"] is False


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_a_settle_that_hangs_does_not_keep_the_gateway_from_stopping(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.gateway.SETTLE_SECONDS", 0.2)
    stages = {**_residents(), "rate_limit": [PUPPET], "guard": [PUPPET]}

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        async with running(config(stages, drain_seconds=0.1)) as gateway:
            hanging: Puppet = gateway.plugin("rate_limit", "puppet")
            after: Puppet = gateway.plugin("guard", "puppet")
            resident: Resident = gateway.plugin("observe", "observe")
            hanging.does["settle"] = hang
            asking = asyncio.create_task(gateway.post(CHAT, body))
            while not hanging.settled:
                await asyncio.sleep(0.01)
        await asyncio.gather(asking, return_exceptions=True)
    assert len(hanging.settled) == len(after.settled) == 1
    assert after.held == set()
    assert resident.events == ["open", "close"]


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("127.example.com", False),
        ("127.0.0.1.example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_only_addresses_of_this_machine_are_taken_for_it(host: str, here: bool) -> None:
    assert is_loopback(host) is here


BROKEN = {
    "a syntax error": "def (",
    "an error at import": "1 / 0",
    "an error in the constructor": "class Broken:\n    def __init__(self, *_):\n        raise KeyError('no')\n",
    "an exit": "import sys\nsys.exit(3)",
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
async def test_a_plugin_that_cannot_be_loaded_is_a_fault_at_its_place(code: str) -> None:
    name = f"broken_{abs(hash(code))}"
    with pytest.raises(StartupError, match=r"pipeline.guard\[0\].*" + name):
        async with running(config({"guard": [{"plugin": f"{name}:Broken"}]}), files={f"{name}.py": code}):
            pass


async def test_an_order_to_stop_ends_a_start_that_hangs(tmp_path: Path) -> None:
    hanging = {"guard": [{"plugin": "puppets:Resident", "opening": "hang"}]}
    file = tmp_path / "qlens.yaml"
    file.write_text(config(hanging, port=0, admin={"port": 0}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "faulthandler", "-m", "qlens", "serve", str(file),
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = await asyncio.wait_for(process.stderr.readuntil(b"hangs\n"), 30)
        process.send_signal(signal.SIGTERM)
        out, err = await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    assert b"Traceback" not in said + err
    assert out == b""


async def test_reloads_at_once_follow_one_another_and_the_last_wins() -> None:
    texts = [config({"guard": [{**PUPPET, "name": f"puppet{n}"}]}) for n in range(5)]
    async with running(texts[0]) as gateway:
        await asyncio.gather(*(gateway.reload(text) for text in texts))
        assert gateway.plugin("guard", "puppet4")
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await asyncio.wait_for(gateway.gateway.settled(), 5)
        assert len(gateway.gateway._lifespans) == len(gateway.gateway.registration.instances)


async def test_a_reload_while_draining_takes_effect_for_nobody_and_hurts_nobody() -> None:
    talker = {"talker": {"plugin": "plugs:Talker", "stall": True}}
    async with running(config({"guard": [PUPPET]}, talker)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")
        asking = asyncio.create_task(gateway.post(CHAT, STREAM))
        await gateway.plugin("provider", "talker").hanging.wait()
        stopping = asyncio.create_task(gateway.server.stop(0.3))
        await asyncio.sleep(0.05)
        await gateway.reload(config())
        answer = await asking
        await stopping
        assert answer.events()[-1]["error"]["code"] == "shutting_down"
    assert len(puppet.settled) == 1
    assert puppet.held == set()


async def test_idle_connections_do_not_hold_up_the_end() -> None:
    async with running(config()) as gateway:
        for _ in range(5):
            assert (await gateway.get("/healthz")).status == 200
        host, port = gateway.url.removeprefix("http://").split(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        silent[0][1].write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        await asyncio.sleep(0.05)
        await asyncio.wait_for(gateway.server.stop(30), 5)
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()


async def test_a_client_that_reads_nothing_does_not_hold_up_the_end() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 100_000 + b'"}}]}\n\n'

    models = {"gpt-4o-mini": {"targets": targets("speaker")}}
    stages, providers = {"guard": [PUPPET]}, {"speaker": {"plugin": "puppets:Speaker"}}
    async with running(config(stages, providers, models)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")
        gateway.plugin("provider", "speaker").answer = lambda *_: Reply(chunks=endless())
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        raw = orjson.dumps(STREAM)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        while not puppet.held:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await asyncio.wait_for(gateway.server.stop(0.1), 10)
        writer.transport.abort()
        assert reader is not None
    (receipt,) = puppet.settled
    assert (receipt.outcome, receipt.error, puppet.held) == ("failed", "shutting_down", set())
