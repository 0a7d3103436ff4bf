"""Exact prices."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import NO_USAGE, Call, Cost, StartupError, Target, Usage, picos, usd
from qlens.cli import main
from qlens.config import convert, read
from qlens.config.yaml import load
from qlens.operations import OPERATIONS
from qlens.testing import Scripted, running, upstream
from qlens_plugins.cost.prices import Prices, PricesConfig
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow

CONFIG = Path(__file__).parents[3] / "config"
MINI = "{model: gpt-4o-mini, input: 0.15, cached_input: 0.075, output: 0.60, date: 2026-11-24}"


def call_bound_to(bound: Usage = NO_USAGE) -> Call:
    async def nothing() -> bytes:
        return b""

    return Call(
        id="c", operation=OPERATIONS[0], path="/", path_params={}, query={}, headers={}, peer=None, credential=None,
        started=0, wall_ns=0, deadline=0, reader=nothing, bound=bound,
    )  # fmt: skip


def prices(*rows: str, more: str = "") -> Prices:
    """The plugin, from rows as they stand in YAML."""
    text = "table:\n" + "".join(f"  - {row}\n" for row in rows) + more
    document = load(text, source="qlens.yaml", env={})
    assert not document.faults
    return Prices(convert(document.root, PricesConfig, "prices", folder=Path("/")), "prices")


def cost_of(plugin: Prices, usage: Usage, model: str = "gpt-4o-mini", provider: str = "azure") -> Cost | None:
    return plugin.price(call_bound_to(), Target(provider, model, "public"), usage)


def row_used(plugin: Prices, model: str, provider: str = "azure") -> str | None:
    cost = cost_of(plugin, Usage(input=1), model, provider)
    return cost.price_id if cost else None


# --- arithmetic --------------------------------------------------------------------------------

VECTORS = {
    "gpt-4o-mini": ("0.00000855", "0.00018", "0.00000075"),
    "gpt-5-mini": ("0.00002625", "0.0004", "0.00000225"),
    "gpt-6-luna": ("0.0000069", "0.00013", "0.0000006"),
    "nova-micro": ("0.000001995", "0.000042", "0.000000175"),
    "haiku-4-5": ("0.000069", "0.0013", "0.000006"),
    "sonnet-4-5": ("0.000207", "0.0039", "0.000018"),
}


@pytest.mark.parametrize(("model", "texts"), VECTORS.items())
def test_a_call_costs_what_the_price_list_says_to_the_last_digit(model: str, texts: tuple[str, ...]) -> None:
    plugin = prices(
        MINI,
        "{model: gpt-5-mini, input: 0.25, output: 2}",
        "{model: gpt-6-luna, input: 0.1, output: 0.5}",
        "{model: nova-micro, input: 0.035, output: 0.14}",
        "{model: haiku-4-5, input: 1, output: 5}",
        "{model: sonnet-4-5, input: 3, output: 15}",
    )
    for (prompt, completion), text in zip(((9, 12), (800, 100), (1, 1)), texts, strict=True):
        cost = cost_of(plugin, Usage(input=prompt, output=completion, source="provider"), model)
        assert cost is not None
        assert cost.picos is not None
        assert usd(cost.picos) == text


def test_800_in_and_100_out_on_gpt_4o_mini_are_180_million_picodollars() -> None:
    assert cost_of(prices(MINI), Usage(input=800, output=100, source="provider")) == Cost(
        180_000_000, "exact", "*/gpt-4o-mini@2026-11-24", (("input", 800, 150_000), ("output", 100, 600_000))
    )


def test_cached_tokens_are_priced_once_at_their_own_price() -> None:
    cost = cost_of(prices(MINI), Usage(input=600, cached_input=400, output=100, source="provider"))
    assert cost is not None
    assert cost.picos == 180_000_000
    assert cost.lines == (("input", 600, 150_000), ("cached_input", 400, 75_000), ("output", 100, 600_000))


amounts = st.decimals(min_value=0, max_value=1000, places=6, allow_nan=False, allow_infinity=False)
counts = st.integers(min_value=0, max_value=10**7)


@given(
    st.fixed_dictionaries(dict.fromkeys(BUCKETS, amounts)),
    st.fixed_dictionaries(dict.fromkeys(BUCKETS, counts)),
)
def test_every_bucket_is_priced_once_and_the_lines_add_up(each: dict[str, Decimal], used: dict[str, int]) -> None:
    plugin = Prices(PricesConfig(table=(PriceRow(model="m", **each),)), "prices")  # type: ignore[arg-type]
    cost = cost_of(plugin, Usage(**used, source="provider"), "m")  # type: ignore[arg-type]
    assert cost is not None
    assert cost.picos == sum(quantity * price for _, quantity, price in cost.lines)
    assert {name: quantity for name, quantity, _ in cost.lines} == {name: used[name] for name in used if used[name]}
    assert Decimal(cost.picos) / 10**12 == sum(used[name] * each[name] for name in used) / 10**6


def test_meters_are_priced_by_the_unit() -> None:
    plugin = prices("{model: stable-image-ultra, meters: {images: 0.14, seconds: 0.000000000001}}")
    cost = cost_of(plugin, Usage(meters={"images": 3, "seconds": 2}, source="provider"), "stable-image-ultra")
    assert cost is not None
    assert cost.picos == 3 * picos(Decimal("0.14")) + 2
    assert cost.lines == (("images", 3, 140_000_000_000), ("seconds", 2, 1))


# --- what a row does not say -------------------------------------------------------------------


def test_prompt_tokens_without_a_price_of_their_own_cost_what_input_costs() -> None:
    cost = cost_of(
        prices("{model: m, input: 2, output: 8}"), Usage(cached_input=1, cache_write_5m=10, cache_write_1h=100), "m"
    )
    assert cost is not None
    assert cost.lines == (
        ("cached_input", 1, 2_000_000),
        ("cache_write_5m", 10, 2_000_000),
        ("cache_write_1h", 100, 2_000_000),
    )


def test_both_lives_of_a_cache_entry_have_their_own_price() -> None:
    plugin = prices("{model: sonnet, input: 3, cached_input: 0.3, cache_write_5m: 3.75, cache_write_1h: 6, output: 15}")
    cost = cost_of(plugin, Usage(input=1, cached_input=1, cache_write_5m=1, cache_write_1h=1, output=1), "sonnet")
    assert cost is not None
    assert cost.picos == 3_000_000 + 300_000 + 3_750_000 + 6_000_000 + 15_000_000


def test_reasoning_without_a_price_costs_what_output_costs() -> None:
    cost = cost_of(prices("{model: m, input: 2, output: 8}"), Usage(output=1, reasoning=10), "m")
    assert cost is not None
    assert cost.picos == 11 * 8_000_000


@pytest.mark.parametrize(
    "usage", [Usage(audio_in=1), Usage(audio_out=1), Usage(meters={"images": 1}), Usage(output=1, input=1)]
)
def test_what_has_no_price_makes_the_call_unpriced_and_not_free(usage: Usage) -> None:
    assert cost_of(prices("{model: m, input: 2}"), usage, "m") is None


def test_image_tokens_without_a_price_cost_what_texts_do() -> None:
    usage = Usage(input=1, meters={"image_tokens": 10, "cached_image_tokens": 100}, source="provider")
    cost = cost_of(prices("{model: m, input: 2, cached_input: 1}"), usage, "m")
    assert cost is not None
    assert (cost.picos, cost.state) == (11 * 2_000_000 + 100_000_000, "exact")


@pytest.mark.parametrize(
    ("meters", "amount", "state"),
    [("{}", 2_000_000, "estimated"), ("{web_searches: 0.01}", 30_002_000_000, "exact")],
)
def test_searches_without_a_price_leave_the_tokens_priced_and_the_cost_a_guess(
    meters: str, amount: int, state: str
) -> None:
    usage = Usage(input=1, meters={"web_searches": 3}, source="provider")
    cost = cost_of(prices(f"{{model: m, input: 2, meters: {meters}}}"), usage, "m")
    assert cost is not None
    assert (cost.picos, cost.state) == (amount, state)


def test_what_has_no_price_and_was_not_used_does_not_matter() -> None:
    cost = cost_of(prices("{model: embed, input: 0.02}"), Usage(input=8, meters={"images": 0}), "embed")
    assert cost is not None
    assert cost.picos == 160_000


def test_an_explicit_zero_is_a_price() -> None:
    cost = cost_of(prices("{model: local, input: 0, output: 0}"), Usage(input=5, output=7, source="provider"), "local")
    assert cost == Cost(0, "exact", "*/local", (("input", 5, 0), ("output", 7, 0)))


# --- which row ---------------------------------------------------------------------------------


def test_the_most_specific_row_wins_wherever_it_stands() -> None:
    plugin = prices(
        "{model: '*', input: 1}",
        "{model: gpt*, input: 1}",
        "{model: gpt-4o*, input: 1}",
        "{model: gpt-4o*, provider: azure, input: 1}",
        "{model: gpt-4o, input: 1}",
        "{model: gpt-4o, provider: azure, input: 1}",
    )
    assert row_used(plugin, "gpt-4o") == "azure/gpt-4o"
    assert row_used(plugin, "gpt-4o", "openai") == "*/gpt-4o"
    assert row_used(plugin, "gpt-4o-audio") == "azure/gpt-4o*"
    assert row_used(plugin, "gpt-4o-audio", "openai") == "*/gpt-4o*"
    assert row_used(plugin, "gpt-5") == "*/gpt*"
    assert row_used(plugin, "o3") == "*/*"


def test_an_exact_name_for_all_providers_beats_a_prefix_for_this_one() -> None:
    plugin = prices("{model: gpt-4o*, provider: azure, input: 1}", "{model: gpt-4o, input: 1}")
    assert row_used(plugin, "gpt-4o") == "*/gpt-4o"


def test_a_name_is_no_prefix() -> None:
    plugin = prices("{model: gpt-4o, input: 1}", "{model: gpt-5*, provider: openai, input: 1}")
    assert row_used(plugin, "gpt-4o-mini") is None
    assert row_used(plugin, "gpt-5", "azure") is None


def test_the_base_model_is_priced_and_not_the_name_of_the_deployment() -> None:
    plugin = prices("{model: gpt-4o, input: 2.5}", "{model: prod-eu, input: 1}")
    target = Target("azure", "prod-eu", "public", base_model="gpt-4o")
    cost = plugin.price(call_bound_to(), target, Usage(input=1))
    assert cost is not None
    assert cost.picos == 2_500_000


def test_endless_names_behind_a_wildcard_do_not_fill_the_memory() -> None:
    plugin = prices("{model: gpt*, input: 1}")
    for n in range(5000):
        assert row_used(plugin, f"gpt-{n}") == "*/gpt*"
        assert row_used(plugin, f"llama-{n}") is None
    assert len(plugin.book.known) <= 1024


def test_a_long_prompt_pays_the_upper_price_for_all_of_it() -> None:
    plugin = prices(
        "{model: sol, input: 4, cached_input: 0.4, output: 20}",
        "{model: sol, above_prompt_tokens: 272000, input: 8, cached_input: 0.8, output: 30}",
    )
    at = cost_of(plugin, Usage(input=272_000, output=1), "sol")
    over = cost_of(plugin, Usage(input=272_000, cached_input=1, output=1), "sol")
    assert at is not None
    assert over is not None
    assert at.picos == 272_000 * 4_000_000 + 20_000_000
    assert over.picos == 272_000 * 8_000_000 + 800_000 + 30_000_000
    assert over.price_id == "*/sol>272000"


# --- how sure ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "state"),
    [("provider", "exact"), ("estimated", "estimated"), ("partial", "estimated"), ("none", "estimated")],
)
def test_a_cost_is_exact_when_the_provider_counted(source: str, state: str) -> None:
    cost = cost_of(prices(MINI), Usage(input=1, source=source))  # type: ignore[arg-type]
    assert cost is not None
    assert cost.state == state


@pytest.mark.parametrize(
    ("tier", "each", "state", "price_id"),
    [
        (None, 4_000_000, "exact", "*/sol"),
        ("default", 4_000_000, "exact", "*/sol"),
        ("priority", 8_000_000, "exact", "*/sol:priority"),
        ("flex", 2_000_000, "exact", "*/sol:flex"),
        ("scale", 4_000_000, "estimated", "*/sol"),
    ],
)
def test_a_service_tier_has_its_factor_and_an_unknown_one_is_a_guess(
    tier: str | None, each: int, state: str, price_id: str
) -> None:
    plugin = prices("{model: sol, input: 4, output: 20, tiers: {priority: 2, flex: 0.5}}")
    cost = cost_of(plugin, Usage(input=1, source="provider", tier=tier), "sol")
    assert cost == Cost(each, state, price_id, (("input", 1, each),))  # type: ignore[arg-type]


used = st.builds(
    Usage,
    **{name: st.integers(0, 1000) for name in ("input", "cached_input", "cache_write_5m", "cache_write_1h")},
    output=st.integers(0, 1000),
    reasoning=st.integers(0, 1000),
    tier=st.sampled_from([None, "flex", "priority", "scale"]),
    source=st.just("provider"),
)


@given(used)
def test_no_call_costs_more_than_its_bound(usage: Usage) -> None:
    plugin = prices(
        "{model: m, input: 4, cached_input: 0.4, cache_write_5m: 5, cache_write_1h: 8, output: 20, reasoning: 25, "
        "tiers: {priority: 2, flex: 0.5}}",
        "{model: m, above_prompt_tokens: 1000, input: 3, output: 30}",
    )
    target = Target("azure", "m", "public")
    bound = Usage(input=usage.prompt, output=usage.completion, source="estimated")
    most, cost = plugin.price(call_bound_to(bound), target, bound), plugin.price(call_bound_to(bound), target, usage)
    assert most is not None
    assert cost is not None
    assert most.state == "estimated"
    assert (cost.picos or 0) <= (most.picos or 0)


def test_what_a_call_can_cost_is_worked_out_once_and_only_when_somebody_asks() -> None:
    asked = []

    def pricing(call: Call) -> Cost:
        asked.append(call.id)
        return Cost(7, "estimated")

    call = call_bound_to()
    assert call.bound_cost.picos is None
    call = call_bound_to()
    call.pricing = pricing
    assert not asked
    assert (call.bound_cost.picos, call.bound_cost.picos) == (7, 7)
    assert asked == ["c"]


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{model: m, input: 0.1234567}", "more than 6 decimals"),
        ("{model: m, input: -1}", "negative"),
        ("{model: m, input: abc}", "expected a decimal number"),
        ("{model: m, meters: {images: 0.0000000000001}}", "finer than a picodollar"),
        ("{model: m, meters: {output: 1}}", "per million tokens"),
        ("{model: m, input: 0.000001, tiers: {flex: 0.5}}", "fraction of a picodollar"),
        ("{model: m, input: 1, tiers: {flex: -1}}", "0 or more"),
        ("{model: m, input: 1, inptu: 1}", 'did you mean "input"'),
        ("{model: m}", "no price"),
        ("{input: 1}", '"model" is missing'),
    ],
)
def test_a_faulty_row_is_refused_with_its_place(row: str, message: str) -> None:
    with pytest.raises(StartupError, match=message) as error:
        prices(MINI, row)
    assert "table[1]" in str(error.value)


def test_two_rows_for_one_model_are_refused() -> None:
    with pytest.raises(StartupError, match="2 rows for model gpt-4o-mini of provider \\*; leave one"):
        prices(MINI, MINI)


def test_the_rows_in_the_example_file_are_rows() -> None:
    text = (CONFIG / "prices.yaml").read_text()
    examples = text.replace("#  - {", "  - {").partition("table:")[0]
    rows = [line.strip().removeprefix("- ") for line in examples.splitlines() if line.startswith("  - {")]
    plugin = prices(*rows)
    assert len(plugin.book.rows) == 6
    assert row_used(Prices(PricesConfig(file=CONFIG / "prices.yaml"), "prices"), "anything", "echo") == "echo/*"


# --- over HTTP ---------------------------------------------------------------------------------

ECHO = """
pipeline:
  auth: [{plugin: anonymous}]
  cost: [{plugin: prices, %s}]
providers: {echo: {plugin: echo}}
models:
  gpt-4o-mini: {max_output_tokens: 1000, targets: [{provider: echo, model: gpt-4o-mini}]}
  deployment: {max_output_tokens: 1000, targets: [{provider: echo, model: prod-eu, base_model: gpt-4o-mini}]}
  unknown: {max_output_tokens: 1000, targets: [{provider: echo, model: unknown}]}
  half: {max_output_tokens: 1000, targets: [{provider: echo, model: gpt-4o-mini}], fallbacks: [unknown]}
"""


def chat(model: str = "gpt-4o-mini", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}


async def test_a_client_is_told_the_exact_cost_the_provider_s_usage_makes() -> None:
    async with upstream() as up:
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "prompt_tokens_details": {"cached_tokens": 400}}
        message = {"role": "assistant", "content": "Hi"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        up.script(Scripted(body={"object": "chat.completion", "choices": choices, "usage": usage}))
        text = f"""
        pipeline: {{auth: [{{plugin: anonymous}}], cost: [{{plugin: prices, table: [{MINI}]}}]}}
        providers: {{up: {{plugin: openai, base_url: "{up.url}", api_key: sk-example}}}}
        models: {{gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: up, model: gpt-4o-mini}}]}}}}
        """
        async with running(text) as gateway:
            answer = await gateway.post("/v1/chat/completions", chat())
            assert answer.headers["x-qlens-cost-usd"] == "0.00018"
            (receipt,) = await gateway.settled(1)
            assert receipt.cost.picos == 180_000_000
            assert receipt.cost.state == "exact"


async def test_a_deployment_s_cost_is_its_base_model_s() -> None:
    async with running(ECHO % f"table: [{MINI}]") as gateway:
        one = await gateway.post("/v1/chat/completions", chat())
        other = await gateway.post("/v1/chat/completions", chat("deployment"))
        assert one.headers["x-qlens-cost-usd"] == other.headers["x-qlens-cost-usd"] != "0"


async def test_a_model_without_a_row_is_unpriced_and_not_free() -> None:
    async with running(ECHO % f"table: [{MINI}]") as gateway:
        answer = await gateway.post("/v1/chat/completions", chat("unknown"))
        assert answer.status == 200
        assert "x-qlens-cost-usd" not in answer.headers
        (receipt,) = await gateway.settled(1)
        assert (receipt.cost.picos, receipt.cost.state) == (None, "unpriced")


async def test_a_strict_table_refuses_what_it_cannot_price() -> None:
    async with running(ECHO % f"strict: true, table: [{MINI}]") as gateway:
        assert (await gateway.post("/v1/chat/completions", chat())).status == 200
        assert (await gateway.get("/v1/models")).status == 200
        for model in ("unknown", "half"):
            answer = await gateway.post("/v1/chat/completions", chat(model))
            assert answer.status == 400
            assert answer.json()["error"]["code"] == "model_unpriced"
            assert answer.json()["error"]["param"] == "model"
        assert [receipt.outcome for receipt in await gateway.settled(4)][2:] == ["rejected", "rejected"]


async def test_a_strict_table_takes_what_has_a_row_though_its_bound_is_unknown() -> None:
    """The client's words bound the tokens of a text, never those of an image."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    async with running(ECHO % f"strict: true, table: [{MINI}]") as gateway:
        answer = await gateway.post("/v1/chat/completions", chat("deployment", messages=messages))
        assert answer.status == 200, answer.text
        assert answer.headers["x-qlens-cost-usd"] != "0"


async def test_a_second_table_prices_what_a_strict_one_does_not_know() -> None:
    more = "{plugin: prices, name: more, table: [{model: unknown, input: 1, output: 1}]"
    text = ECHO % f"strict: true, table: [{MINI}]}}, {more}"
    async with running(text) as gateway:
        answer = await gateway.post("/v1/chat/completions", chat("unknown"))
        assert answer.headers["x-qlens-cost-usd"] != "0"


async def test_a_row_of_the_configuration_replaces_the_file_s() -> None:
    table = "{table: [{model: gpt-4o-mini, input: 9, output: 9}, {model: unknown, input: 1, output: 1}]}"
    async with running(ECHO % f"file: prices.yaml, table: [{MINI}]", files={"prices.yaml": table}) as gateway:
        plugin = gateway.plugin("cost", "prices")
        assert row_used(plugin, "gpt-4o-mini") == "*/gpt-4o-mini@2026-11-24"
        assert row_used(plugin, "unknown") == "*/unknown"


async def test_a_changed_file_is_read_again_and_a_faulty_one_is_not_taken() -> None:
    first = "{table: [{model: gpt-4o-mini, input: 1, output: 1, date: one}]}"
    async with running(ECHO % "file: prices.yaml, reload_seconds: 0.02", files={"prices.yaml": first}) as gateway:
        plugin, file = gateway.plugin("cost", "prices"), gateway.folder / "prices.yaml"
        assert row_used(plugin, "gpt-4o-mini") == "*/gpt-4o-mini@one"
        assert plugin.health().ok

        file.write_text("{table: [{model: gpt-4o-mini, input: oops}]}")
        async with asyncio.timeout(5):
            while plugin.health().ok:
                await asyncio.sleep(0.01)
        assert "table[0].input" in plugin.health().detail
        assert row_used(plugin, "gpt-4o-mini") == "*/gpt-4o-mini@one"

        file.write_text(first.replace("one", "two"))
        async with asyncio.timeout(5):
            while row_used(plugin, "gpt-4o-mini") != "*/gpt-4o-mini@two":
                await asyncio.sleep(0.01)
        assert plugin.health().ok


async def test_a_file_that_is_being_written_prices_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.followed_files.STILL_SECONDS", 1)
    lines = ["table:\n", f"- {MINI}\n", "- {model: unknown, input: 1, output: 1, date: DAY}\n"]
    first = "".join(lines).replace("DAY", "one")
    async with running(ECHO % "file: prices.yaml, reload_seconds: 0.02", files={"prices.yaml": first}) as gateway:
        plugin = gateway.plugin("cost", "prices")
        with (gateway.folder / "prices.yaml").open("w") as file:
            for line in lines:
                await asyncio.sleep(0.1)
                assert row_used(plugin, "unknown") == "*/unknown@one"
                file.write(line.replace("DAY", "two"))
                file.flush()
        async with asyncio.timeout(10):
            while (used := row_used(plugin, "unknown")) != "*/unknown@two":
                assert used == "*/unknown@one"
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("files", [{}, {"prices.yaml": "table: [{model: m, input: x}]"}, {"prices.yaml": "- 1"}])
async def test_a_faulty_file_stops_the_start_and_is_named(files: dict[str, str]) -> None:
    with pytest.raises(StartupError, match=r"prices\.yaml"):
        async with running(ECHO % "file: prices.yaml", files=files):
            pass


# --- the command -------------------------------------------------------------------------------


def test_the_command_shows_which_targets_have_no_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(ECHO % f"table: [{MINI}]")
    assert main(["prices", "-c", str(tmp_path / "qlens.yaml")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["*", "gpt-4o-mini", "0.15", "0.075", "-", "-", "0.60", "-", "-", "-", "2026-11-24"] in lines
    assert ["deployment", "echo/prod-eu", "(gpt-4o-mini)", "*/gpt-4o-mini@2026-11-24"] in lines
    assert ["unknown", "echo/unknown", "UNPRICED"] in lines


def test_the_command_gives_prices_as_text_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = "{model: sol, input: 4, tiers: {flex: 0.5}, meters: {images: 0.14}, above_prompt_tokens: 9}"
    (tmp_path / "qlens.yaml").write_text(ECHO % f"table: [{MINI}, {table}]")
    assert main(["prices", "--json", "-c", str(tmp_path / "qlens.yaml")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["input"] == "0.15"
    assert found["rows"][1]["tiers"] == {"flex": "0.5"}
    assert found["rows"][1]["above_prompt_tokens"] == 9
    rows = {target["model"]: (target["target"], target["base_model"], target["rows"]) for target in found["targets"]}
    assert rows["unknown"] == ("unknown", None, None)
    assert rows["deployment"] == ("prod-eu", "gpt-4o-mini", ["*/gpt-4o-mini@2026-11-24"])


def test_explain_says_which_row_and_how_the_bound_comes_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.yaml").write_text(f"table: [{MINI}]")
    (tmp_path / "qlens.yaml").write_text(ECHO % "file: prices.yaml")
    (tmp_path / "body.json").write_text(json.dumps(chat("half", max_tokens=100)))
    assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json")]) == 0
    out = capsys.readouterr().out
    assert "echo/gpt-4o-mini: row */gpt-4o-mini@2026-11-24, at most" in out
    assert "100 output x 0.0000006 = " in out


def test_the_default_configuration_prices_all_it_serves() -> None:
    config = read(CONFIG / "qlens.yaml")
    (entry,) = (entry for entry in config.pipeline["cost"] if entry.plugin == "prices")
    plugin = Prices(convert(entry.settings, PricesConfig, "prices", folder=CONFIG), "prices")
    for model in config.models.values():
        for target in model.targets:
            assert row_used(plugin, target.base_model or target.model.replace("*", "echo"), target.provider), target
