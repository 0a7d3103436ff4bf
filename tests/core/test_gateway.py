"""Reload: what moves over, what changes, what is refused, and when the old is closed."""

from __future__ import annotations

import asyncio

import pytest
from plugs import Probe, Talker
from yamls import CHAT, HELLO, STREAM, config, probe

from qlens import StartupError
from qlens.testing import running


async def test_an_unchanged_instance_moves_over_and_a_changed_one_adopts() -> None:
    before = config({"guard": [probe("same", tenant="x"), probe("changed", tenant="x"), probe("gone")]})
    after = config({"guard": [probe("new"), probe("same", tenant="x"), probe("changed", tenant="y")]})
    async with running(before) as gateway:
        old: dict[str, Probe] = {name: gateway.plugin("guard", name) for name in ("same", "changed", "gone")}
        await gateway.reload(after)
        assert gateway.plugin("guard", "same") is old["same"]
        changed: Probe = gateway.plugin("guard", "changed")
        assert changed is not old["changed"]
        assert changed.adopted == [old["changed"]]
        await gateway.post(CHAT, HELLO)
        await asyncio.sleep(0.05)
        assert old["gone"].events == ["open", "close"]
        assert old["changed"].events == ["open", "close"]
        assert "close" not in old["same"].events


async def test_a_call_sees_one_configuration_to_its_end_and_the_old_one_closes_after_it() -> None:
    before = config({"guard": [probe("a", tenant="1")]}, {"talker": {"plugin": "plugs:Talker", "stall": True}})
    after = config({"guard": [probe("a", tenant="2")]})
    async with running(before) as gateway:
        talker: Talker = gateway.plugin("provider", "talker")
        old: Probe = gateway.plugin("guard", "a")
        version = gateway.gateway.config.version
        asking = asyncio.create_task(gateway.post(CHAT, STREAM))
        await talker.hanging.wait()
        await gateway.reload(after)
        assert gateway.gateway.config.version != version
        assert (await gateway.post(CHAT, HELLO)).status == 200
        assert "close" not in old.events
        asking.cancel()
        receipts = await gateway.settled(2)
        assert {receipt.config_version for receipt in receipts} == {version, gateway.gateway.config.version}
        for _ in range(100):
            if "close" in old.events:
                break
            await asyncio.sleep(0.01)
        assert old.events[-1] == "close"
        assert old.events[-2] == "settle abandoned"


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ("pipeline: [", "qlens.yaml"),
        (config({"guard": [probe("new", break_lifespan=True)]}), "misconfigured"),
        (config({"guard": [{"plugin": "nothing"}]}), "nothing"),
    ],
    ids=["syntax", "lifespan", "plugin"],
)
async def test_a_bad_configuration_is_refused_and_the_present_one_stays(after: str, says: str) -> None:
    async with running(config({"guard": [probe("a")]})) as gateway:
        old: Probe = gateway.plugin("guard", "a")
        with pytest.raises(StartupError, match=says):
            await gateway.reload(after)
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await gateway.settled(1)
        assert gateway.plugin("guard", "a") is old
        assert "close" not in old.events


async def test_a_reload_that_fails_late_closes_what_it_had_opened() -> None:
    async with running(config()) as gateway:
        opened: list[Probe] = []
        after = config({"guard": [probe("first")], "cost": [probe("second", break_lifespan=True)]})
        with pytest.raises(StartupError) as caught:
            await gateway.reload(after)
        assert "pipeline.cost[0]" in str(caught.value)
        assert opened == []
        assert len(gateway.gateway._lifespans) == len(gateway.gateway.registration.instances)


async def test_calls_that_run_during_many_reloads_all_succeed() -> None:
    texts = [config({"guard": [probe("a", tenant=str(n))]}) for n in range(10)]
    async with running(texts[0]) as gateway:

        async def calls() -> set[int]:
            return {(await gateway.post(CHAT, STREAM)).status for _ in range(30)}

        asking = [asyncio.create_task(calls()) for _ in range(4)]
        for text in texts * 2:
            await gateway.reload(text)
            await asyncio.sleep(0.01)
        assert [await task for task in asking] == [{200}] * 4
        await gateway.gateway.settled()
        assert len(gateway.receipts) == 120


async def test_readyz_tells_when_the_gateway_drains() -> None:
    async with running(config()) as gateway:
        assert (await gateway.get("/readyz")).json()["status"] == "ready"
        gateway.gateway.draining = True
        answer = await gateway.get("/readyz")
        assert (answer.status, answer.json()["status"]) == (503, "draining")
        assert (await gateway.get("/healthz")).status == 200
