"""From names to hooks: what is refused at start-up, and by which name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pluggy
import pytest
from yamls import config, probe

from qlens import Call, ConfigError, Fault, Receipt, StartupError, hookimpl, hookspecs
from qlens.testing import running

KEYS = "keys: [{id: one, hash: 'sha256:" + "0" * 64 + "', tenant: acme}]"


@pytest.fixture
def authored() -> Iterator[Any]:
    """A module whose attributes are plugin classes, importable as `authored`."""
    module = ModuleType("authored")
    sys.modules["authored"] = module
    yield module
    del sys.modules["authored"]


async def _faults(text: str, **options: Any) -> list[Fault]:
    with pytest.raises(StartupError) as caught:
        async with running(text, **options):
            pass
    return list(caught.value.faults)


async def test_an_unknown_name_lists_what_is_installed() -> None:
    (fault,) = await _faults(config({"cache": [{"plugin": "exakt"}]}))
    assert "pipeline.cache[0]" in fault.path
    assert "'exakt'" in fault.message
    assert "exact" in fault.message.split("installed:")[1]


async def test_every_fault_is_told_at_once() -> None:
    stages = {
        "cache": [{"plugin": "exakt"}],
        "guard": [{"plugin": "no.such.module:Thing"}],
        "cost": [{"plugin": "plugs:None_"}],
    }
    faults = await _faults(config(stages))
    assert len(faults) == 3
    assert "next to the YAML" in str(faults)


async def test_faults_of_the_file_and_of_its_plugins_come_together() -> None:
    stages = {"cache": [{"plugin": "exact", "ttl_secs": 5}], "gaurd": []}
    faults = await _faults(config(stages, port=99999))
    told = "\n".join(map(str, faults))
    assert len(faults) == 3
    assert "ttl_secs" in told
    assert "gaurd" in told
    assert "server.port" in told


async def test_a_plugin_without_settings_refuses_them(authored: Any) -> None:
    class Plain:
        """Does nothing."""

        def __init__(self, config: None, name: str) -> None: ...

    authored.Plain = Plain
    (fault,) = await _faults(config({"observe": [{"plugin": "authored:Plain", "colour": "red"}]}))
    assert "accepts no settings; found colour" in fault.message


def _class(**methods: Any) -> type:
    return type("Made", (), {"__init__": lambda self, config, name: None, **methods})


def _unmarked(self: object, call: Call) -> None: ...


@hookimpl
async def _misspelled(self: object, call: Call) -> None: ...


@hookimpl
def _synchronous(self: object, call: Call) -> None: ...


@hookimpl
async def _curious(self: object, call: Call, weather: str) -> None: ...


@hookimpl
async def _waiting_banner(self: object) -> list[str]:
    return []


_first = pluggy.HookimplMarker("qlens")


@_first(tryfirst=True)
async def _pushy(self: object, call: Call) -> None: ...


@pytest.mark.parametrize(
    ("hook", "function", "says"),
    [
        ("admit", _unmarked, "put @hookimpl above it"),
        ("admitt", _misspelled, "no such hook"),
        ("admit", _synchronous, "must be async"),
        ("banner", _waiting_banner, "must not be async"),
        ("admit", _curious, "takes weather, which the hook does not give; it gives call"),
        ("admit", _pushy, "tryfirst"),
    ],
)
async def test_a_hook_that_would_not_do_what_its_author_meant_is_refused(
    authored: Any, hook: str, function: Any, says: str
) -> None:
    authored.Made = _class(**{hook: function})
    (fault,) = await _faults(config({"rate_limit": [{"plugin": "authored:Made"}]}))
    assert says in fault.message
    assert hook in fault.message
    assert "authored:Made" in fault.message


async def test_an_implementation_may_take_fewer_arguments_than_the_hook_gives(authored: Any) -> None:
    seen = []

    @hookimpl
    async def settle(self: object, receipt: Receipt) -> None:
        seen.append(receipt)

    authored.Brief = _class(settle=settle)
    async with running(config({"observe": [{"plugin": "authored:Brief"}]})) as gateway:
        await gateway.get("/v1/models")
        await gateway.settled(1)
    assert [receipt.operation for receipt in seen] == ["models"]


async def test_pluggy_lists_implementations_in_the_order_of_registration() -> None:
    # The calling order rests on this; pluggy itself calls them last first.
    manager = pluggy.PluginManager("qlens")
    manager.add_hookspecs(hookspecs)

    @hookimpl
    async def admit(self: object, call: Call) -> None: ...

    for name in ("a", "b", "c"):
        manager.register(_class(admit=admit)(None, name), name=name)
    assert [impl.plugin_name for impl in manager.hook.admit.get_hookimpls()] == ["a", "b", "c"]


async def test_a_provider_that_cannot_send_is_refused(authored: Any) -> None:
    authored.Silent = _class()
    (fault,) = await _faults(config({}, {"talker": {"plugin": "authored:Silent"}}))
    assert "does not implement send" in fault.message


async def test_an_endpoint_may_not_take_a_path_of_the_core(authored: Any) -> None:
    from qlens import Endpoint, Reply

    async def answer(call: Call) -> Reply:
        return Reply(body=b"{}")

    @hookimpl
    def endpoints(self: object) -> list[Endpoint]:
        return [Endpoint("POST", "/v1/chat/completions", None, answer)]

    authored.Greedy = _class(endpoints=endpoints)
    (fault,) = await _faults(config({"observe": [{"plugin": "authored:Greedy"}]}))
    assert "POST /v1/chat/completions is taken" in fault.message


async def test_an_endpoint_of_a_plugin_is_served_with_its_parameters_and_its_role(authored: Any) -> None:
    from qlens import Endpoint, Reply

    async def answer(call: Call) -> Reply:
        return Reply(status=201, body=call.path_params["name"].encode() + await call.read())

    @hookimpl
    def endpoints(self: object) -> list[Endpoint]:
        return [
            Endpoint("POST", "/hello/{name}", None, answer),
            Endpoint("POST", "/admin/hello/{name}", "operator", answer, "admin"),
        ]

    authored.Greeter = _class(endpoints=endpoints)
    async with running(config({"observe": [{"plugin": "authored:Greeter"}]})) as gateway:
        answer_ = await gateway.post("/hello/a%20b/c", b"!")
        assert (answer_.status, answer_.body) == (201, b"a b/c!")
        assert (await gateway.post("/admin/hello/x", b"!")).status == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_the_admin_listener_needs_real_auth_off_loopback(host: str) -> None:
    (fault,) = await _faults(config(admin={"host": host}))
    assert fault.path == "server.admin.host"
    assert "api_keys" in fault.message


@pytest.mark.parametrize("place", [0, 1])
async def test_who_needs_no_credential_is_no_more_than_a_member_where_other_machines_reach_operators_paths(
    authored: Any, place: int
) -> None:
    keys: dict[str, Any] = {"plugin": "api_keys", "file": "keys.yaml"}
    authored.Believing = _class(needs_no_credential=True)
    off = {"host": "0.0.0.0", "port": 0}
    believing: list[dict[str, Any]] = [
        {"plugin": "anonymous", "roles": ["member", "admin"]},
        {"plugin": "authored:Believing"},
    ]
    for each in believing:
        auth = [keys]
        auth.insert(place, each)
        (fault,) = await _faults(config({"auth": auth}, admin=off), files={"keys.yaml": KEYS})
        assert fault.path.endswith(f"pipeline.auth[{place}]")
        assert "0.0.0.0" in fault.message
    auth = [keys, {"plugin": "anonymous"}]
    async with running(config({"auth": auth}, admin=off), files={"keys.yaml": KEYS}) as gateway:
        assert (await gateway.get("/admin/whoami")).json()["roles"] == ["member"]
        assert (await gateway.get("/admin/health")).status == 403


async def test_a_demo_key_is_refused_where_other_machines_can_use_it() -> None:
    stages = {"auth": [{"plugin": "api_keys", "file": "keys.yaml", "demo_key_file": "demo.key"}]}
    (fault,) = await _faults(config(stages, host="0.0.0.0"))
    assert "bind to 127.0.0.1" in fault.message


async def test_a_lifespan_that_refuses_names_the_plugin_and_closes_what_was_open() -> None:
    (fault,) = await _faults(config({"guard": [probe("a")], "cost": [probe("b", break_lifespan=True)]}))
    assert "pipeline.cost[0]" in fault.path
    assert "misconfigured" in fault.message


def test_every_hook_is_public_and_says_when_what_and_raising() -> None:
    functions = [n for n, f in inspect.getmembers(hookspecs, inspect.isfunction) if hasattr(f, "qlens_spec")]
    assert sorted(functions) == sorted(hookspecs.__all__)
    with pytest.raises(ConfigError):
        raise ConfigError([Fault("a", "b")])


async def _counts(self: object, call: Call) -> None: ...


@pytest.mark.parametrize("stage", ["rate_limit", "cost"])
async def test_limits_of_one_process_are_refused_for_several_workers(authored: Any, stage: str) -> None:
    authored.Alone = _class(admit=hookimpl(_counts))
    authored.Together = _class(admit=hookimpl(_counts), shares="store")
    authored.Priced = _class()
    entries = [{"plugin": f"authored:{name}"} for name in ("Alone", "Together", "Priced")]
    (fault,) = await _faults(config({stage: entries}, workers=3))
    assert fault.path.endswith(f"pipeline.{stage}[0]")
    assert "3 workers" in fault.message
    assert "server.workers to 1" in fault.message
    async with running(config({stage: entries}, workers=1)):
        pass
    async with running(config({stage: entries[1:]}, workers=3)):
        pass


@pytest.mark.parametrize("stage", ["guard", "cache", "route", "observe"])
async def test_what_is_no_limit_may_be_each_workers_own(authored: Any, stage: str) -> None:
    authored.Alone = _class(admit=hookimpl(_counts))
    async with running(config({stage: [{"plugin": "authored:Alone"}]}, workers=2)):
        pass
