"""The strict converter: which value fits which field, and what a fault says."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import field, frozen
from attrs.validators import and_, ge, in_, le, matches_re, min_len, optional
from hypothesis import given
from hypothesis import strategies as st

from qlens import Secret, Url
from qlens.config import convert
from qlens.config.environment import EnvText
from qlens.config.yaml import load
from qlens.errors import ConfigError

FOLDER = Path("/etc/qlens")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Size(enum.StrEnum):
    SMALL = "small"


@frozen
class Memory:
    kind: Literal["memory"]
    max_bytes: int = 1000


@frozen
class Redis:
    kind: Literal["redis", "valkey"]
    url: Url
    password: Secret | None = None


@frozen
class Rule:
    per: Literal["tenant", "key"]
    usd: Decimal
    burst: int | None = None


def _even(_: object, __: object, value: int) -> None:
    if value % 2:
        raise ValueError(f"must be even, and {value} is odd")


def _share(_: object, __: object, value: float) -> None:
    if value > 1:
        raise ValueError(f"{value} is more than all")


def _below_limit(instance: Any, _: object, value: int) -> None:
    if value > instance.limit:
        raise ValueError("must be at most limit")


@frozen
class Everything:
    flag: bool = False
    count: int = 0
    ratio: float = 0.5
    usd: Decimal = Decimal(0)
    text: str = ""
    key: Secret | None = None
    file: Path = Path("keys.yaml")
    url: Url = field(default=Url("sqlite:///qlens.db"))
    mode: Literal["fast", "safe", 3] = "fast"
    colour: Colour = Colour.RED
    level: Level = Level.LOW
    size: Size = Size.SMALL
    maybe: int | None = None
    names: tuple[str, ...] = ()
    prices: Mapping[str, Decimal] = field(factory=dict)
    rules: tuple[Rule, ...] = ()
    store: Memory | Redis = Memory("memory")
    backup: Memory | Redis | None = None
    single: Redis | None = None
    audience: str | tuple[str, ...] = ()
    limit: int | Literal["none"] = "none"
    extra: Mapping[str, Any] = field(factory=dict)
    anything: Any = None
    second: str = field(default="", alias="spare")


@frozen
class Validated:
    port: int = field(default=1, validator=and_(ge(1), le(65535)))
    even: int | None = field(default=None, validator=optional(_even))
    name: str = field(default="a", validator=matches_re("[a-z]+"))
    word: str = field(default="a", validator=in_(("a", "b")))
    names: tuple[str, ...] = field(default=("x",), validator=min_len(1))
    key: Secret = field(default=Secret("x"), validator=lambda *given: _refuse(given[2]))
    limit: int = 10
    part: int = field(default=1, validator=_below_limit)
    share: float = field(default=0.5, validator=_share)


def _refuse(value: object) -> None:
    if value != Secret("x"):
        raise ValueError(f"{value} is no good")


@frozen
class Crossed:
    low: int = 0
    high: int = 10
    names: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must not be above high; {self.low} is")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names must differ, unlike {', '.join(self.names)}")


@frozen
class Required:
    file: Path
    count: int
    inner: Memory


def read(cls: type[Any] = Everything, /, **settings: Any) -> Any:
    return convert(settings, cls, "pipeline.cache[0]", folder=FOLDER)


def faults(value: Any, cls: type[Any] = Everything) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        convert(value, cls, "here", folder=FOLDER)
    return [str(fault) for fault in raised.value.faults]


def fault(cls: type[Any] = Everything, /, **settings: Any) -> str:
    (only,) = faults(settings, cls)
    return only


def env(text: str) -> EnvText:
    return EnvText(text, ("NAME",))


# --- values that fit ---


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("flag", True, True),
        ("count", -3, -3),
        ("ratio", 1, 1.0),
        ("ratio", 1.5, 1.5),
        ("usd", 100, Decimal(100)),
        ("usd", 0.1, Decimal("0.1")),
        ("text", "123", "123"),
        ("key", "sk-example-1", Secret("sk-example-1")),
        ("key", None, None),
        ("mode", "safe", "safe"),
        ("mode", 3, 3),
        ("colour", "blue", Colour.BLUE),
        ("level", 2, Level.HIGH),
        ("size", "small", Size.SMALL),
        ("maybe", None, None),
        ("maybe", 3, 3),
        ("names", ["a", "b"], ("a", "b")),
        ("names", [], ()),
        ("prices", {"a": 1}, {"a": Decimal(1)}),
        ("rules", [{"per": "key", "usd": 5}], (Rule("key", Decimal(5)),)),
        ("store", {"kind": "memory"}, Memory("memory")),
        ("store", {"kind": "valkey", "url": "redis://a"}, Redis("valkey", Url("redis://a"))),
        ("backup", None, None),
        ("backup", {"kind": "memory", "max_bytes": 5}, Memory("memory", 5)),
        ("single", {"kind": "redis", "url": "redis://a"}, Redis("redis", Url("redis://a"))),
        ("audience", "a", "a"),
        ("audience", ["a"], ("a",)),
        ("limit", 3, 3),
        ("limit", "none", "none"),
        ("extra", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        ("anything", [1.5], [1.5]),
    ],
)
def test_a_value_of_the_right_type_is_taken(name: str, value: Any, result: Any) -> None:
    found = getattr(read(**{name: value}), name)
    assert found == result
    assert type(found) is type(result)


def test_a_field_may_have_another_name_in_the_file() -> None:
    assert read(spare="x").second == "x"


def test_a_field_that_is_not_given_takes_its_default() -> None:
    assert read() == attrs.evolve(
        Everything(), file=Path("/etc/qlens/keys.yaml"), url=Url("sqlite:////etc/qlens/qlens.db")
    )


def test_money_takes_the_text_of_the_file() -> None:
    root = load("{usd: 100.10, prices: {a: 1e-7, b: 0.1000}}", source="qlens.yaml", env={}).root
    found = read(**root)
    assert str(found.usd) == "100.10"
    assert [str(price) for price in found.prices.values()] == ["1E-7", "0.1000"]


def test_free_values_become_plain_types() -> None:
    root = load("{extra: {a: 1.5, b: ['${X}'], c: {}}}", source="qlens.yaml", env={"X": "1"}).root
    extra = read(**root).extra
    assert extra == {"a": 1.5, "b": ["1"], "c": {}}
    assert {type(item) for item in (extra, extra["a"], extra["b"], extra["b"][0], extra["c"])} == {
        dict,
        float,
        list,
        str,
    }


# --- values that do not fit ---


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flag", "false", 'found the text "false", expected true or false'),
        ("flag", 1, "found 1, expected true or false"),
        ("flag", None, "found nothing, expected true or false"),
        ("count", True, "found true, expected a whole number"),
        ("count", 60.9, "found 60.9, expected a whole number"),
        ("count", 60.0, "found 60.0, expected a whole number"),
        ("count", "8080", 'found the text "8080", expected a whole number'),
        ("count", [1], "found a list, expected a whole number"),
        ("ratio", False, "found false, expected a number"),
        ("ratio", "1.5", 'found the text "1.5", expected a number'),
        ("ratio", float("inf"), "found a number out of range, expected a number"),
        ("ratio", 10**400, "found a number out of range, expected a number"),
        ("usd", True, "found true, expected a decimal number"),
        ("usd", "100", 'found the text "100", expected a decimal number'),
        ("usd", float("nan"), "expected a decimal number between 1e-30 and 1e18"),
        ("usd", 10**20, "expected a decimal number between 1e-30 and 1e18"),
        ("usd", 1e-300, "found 1e-300, expected a decimal number between 1e-30 and 1e18"),
        ("text", 12, "found 12, expected a text (put it in quotes)"),
        ("text", True, "found true, expected a text (put it in quotes)"),
        ("text", None, "found nothing, expected a text"),
        ("text", {}, "found a mapping, expected a text"),
        ("key", 123456, "found a number, expected a text (put it in quotes)"),
        ("key", "", "found an empty text, expected a secret"),
        ("key", ["sk-example-1"], "found a list, expected secret text or nothing"),
        ("file", "", 'found the text "", expected a path'),
        ("file", "a\0b", "expected a path"),
        ("url", "example.com", 'found the text "example.com", expected a URL such as https://example.com'),
        ("mode", "slow", 'found the text "slow", expected one of: fast, safe, 3'),
        ("mode", "3", "expected one of: fast, safe, 3"),
        ("colour", "RED", "expected one of: red, blue"),
        ("level", True, "found true, expected one of: 1, 2"),
        ("level", 1.0, "found 1.0, expected one of: 1, 2"),
        ("size", "large", "expected one of: small"),
        ("maybe", "x", 'found the text "x", expected a whole number'),
        ("names", "abc", 'found the text "abc", expected a list'),
        ("names", {"a": "b"}, "found a mapping, expected a list"),
        ("names", None, "found nothing, expected a list"),
        ("prices", [["a", 1]], "found a list, expected a mapping"),
        ("prices", "a", 'found the text "a", expected a mapping'),
        ("rules", {}, "found a mapping, expected a list"),
        ("store", "memory", 'found the text "memory", expected mapping'),
        ("store", None, "found nothing, expected mapping"),
        ("store", {}, 'the key "kind" is missing, expected one of: memory, redis, valkey'),
        ("backup", [], "found a list, expected mapping or nothing"),
        ("single", "x", 'found the text "x", expected mapping or nothing'),
        ("audience", 3, "found 3, expected a text (put it in quotes)"),
        ("audience", {}, "found a mapping, expected text or list of text"),
        ("limit", "some", 'found the text "some", expected whole number or `none`'),
        ("extra", "x", 'found the text "x", expected a mapping'),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_would_be_right(name: str, value: Any, message: str) -> None:
    found = fault(**{name: value})
    assert found.startswith(f"here.{name}: ")
    assert found.endswith(message)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"names": ["a", 1]}, "here.names[1]: found 1, expected a text (put it in quotes)"),
        ({"prices": {"a b": "x"}}, 'here.prices."a b": found the text "x", expected a decimal number'),
        (
            {"rules": [{"per": "key", "usd": 1, "burst": "x"}]},
            'here.rules[0].burst: found the text "x", expected a whole',
        ),
        ({"rules": ["x"]}, 'here.rules[0]: found the text "x", expected a mapping'),
        ({"store": {"kind": "disk"}}, 'here.store.kind: found the text "disk", expected one of: memory, redis, valkey'),
        ({"store": {"kind": None}}, "here.store.kind: found nothing, expected one of: memory, redis, valkey"),
        ({"store": {"kind": "redis"}}, 'here.store: the key "url" is missing'),
        ({"store": {"kind": "memory", "url": "x"}}, "here.store.url: unknown key; known keys: kind, max_bytes"),
    ],
)
def test_a_fault_inside_names_the_way_to_it(settings: dict[str, Any], expected: str) -> None:
    assert fault(**settings).startswith(expected)


def test_an_unknown_key_is_refused_with_a_suggestion_and_the_known_ones() -> None:
    assert fault(Memory, kind="memory", max_byte=1) == (
        'here.max_byte: unknown key; did you mean "max_bytes"? known keys: kind, max_bytes'
    )
    assert fault(Memory, kind="memory", zzz=1) == "here.zzz: unknown key; known keys: kind, max_bytes"


def test_a_missing_key_is_named() -> None:
    assert faults({}, Required) == [f'here: the key "{key}" is missing' for key in ("file", "count", "inner")]


def test_all_faults_come_at_once() -> None:
    found = faults(
        {
            "flag": 1,
            "count": "x",
            "names": ["a", 1, 2],
            "rules": [{"per": "nobody"}, {"per": "key", "usd": 1, "brust": 2}],
            "store": {"kind": "redis", "url": "nowhere"},
            "nonsense": 1,
        }
    )
    assert [line.partition(":")[0] for line in found] == [
        "here.flag",
        "here.count",
        "here.names[1]",
        "here.names[2]",
        "here.rules[0].per",
        "here.rules[0]",
        "here.rules[1].brust",
        "here.store.url",
        "here.nonsense",
    ]


@pytest.mark.parametrize("value", [None, [], "x", 3, True])
def test_settings_must_be_a_mapping(value: Any) -> None:
    (only,) = faults(value)
    assert only.startswith("here: found ")
    assert only.endswith(", expected a mapping")


def test_a_long_text_is_shortened() -> None:
    assert len(fault(count="x" * 1000)) < 150


def test_a_password_in_a_text_is_not_shown() -> None:
    found = fault(count="redis://joe:hunter2@cache")
    assert "hunter2" not in found
    assert "redis://***@cache" in found


def test_faults_carry_file_and_line() -> None:
    text = "plugin: x\nrules:\n  - per: key\n    usd: 5\n    burst: no\nstore:\n  kind: redis\nzzz: 1\n"
    root = load(text, source="qlens.yaml", env={}).root.without("plugin")
    with pytest.raises(ConfigError) as raised:
        convert(root, Everything, "qlens.yaml:1 pipeline.cache[0]", folder=FOLDER)
    assert [fault.path for fault in raised.value.faults] == [
        "qlens.yaml:5 pipeline.cache[0].rules[0].burst",
        "qlens.yaml:6 pipeline.cache[0].store",
        "qlens.yaml:8 pipeline.cache[0].zzz",
    ]


# --- paths and URLs ---


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("keys.yaml", "/etc/qlens/keys.yaml"),
        ("./a/../b.yaml", "/etc/qlens/b.yaml"),
        ("../keys.yaml", "/etc/keys.yaml"),
        ("/var/keys.yaml", "/var/keys.yaml"),
    ],
)
def test_a_relative_path_stands_in_the_folder_of_the_file(text: str, path: str) -> None:
    assert read(file=text).file == Path(path)


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/joe")
    assert read(file="~/keys.yaml").file == Path("/home/joe/keys.yaml")
    assert read(url="sqlite:///~/q.db").url == "sqlite:////home/joe/q.db"


def test_an_unknown_home_directory_is_a_fault() -> None:
    assert "home directory is not known" in fault(file="~nobody-of-that-name/keys.yaml")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("sqlite:///qlens.db", "sqlite:////etc/qlens/qlens.db"),
        ("sqlite:///data/q.db?mode=ro", "sqlite:////etc/qlens/data/q.db?mode=ro"),
        ("sqlite:////var/q.db", "sqlite:////var/q.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite://", "sqlite://"),
        ("https://example.com/v1", "https://example.com/v1"),
        ("postgresql://a:1,b:2/db", "postgresql://a:1,b:2/db"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_a_relative_sqlite_file_stands_in_the_folder_of_the_file(text: str, url: str) -> None:
    found = read(url=text).url
    assert isinstance(found, Url)
    assert found == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "//example.com",
        "http://",
        "http://[::1",
        "http://a:99999",
        "http://a:0",
        "http://a b",
        "http://a\n",
        "a:b",
    ],
)
def test_what_is_no_url_is_refused(text: str) -> None:
    assert "expected a URL" in fault(url=text)


# --- texts of the environment ---


@pytest.mark.parametrize(
    ("name", "text", "result"),
    [
        ("flag", "true", True),
        ("flag", "FALSE", False),
        ("count", "8080", 8080),
        ("count", "-0x10", None),
        ("ratio", "1.5", 1.5),
        ("ratio", "2", 2.0),
        ("usd", "100.00", Decimal("100.00")),
        ("text", "8080", "8080"),
        ("text", "null", "null"),
        ("text", "", ""),
        ("key", "12345", Secret("12345")),
        ("mode", "fast", "fast"),
        ("mode", "3", 3),
        ("colour", "red", Colour.RED),
        ("maybe", "5", 5),
        ("limit", "5", 5),
        ("limit", "none", "none"),
        ("audience", "5", "5"),
        ("extra", "x", None),
    ],
)
def test_a_text_of_the_environment_is_typed_by_its_field(name: str, text: str, result: Any) -> None:
    if result is None:
        assert fault(**{name: env(text)}).startswith(f"here.{name}: found a value from ${{NAME}}, expected")
        return
    found = getattr(read(**{name: env(text)}), name)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flag", "yes"),
        ("flag", "1"),
        ("count", "80a"),
        ("count", "1_000"),
        ("count", " 8"),
        ("count", "8.0"),
        ("count", "٣"),
        ("count", ""),
        ("count", "9" * 5000),
        ("ratio", "nan"),
        ("ratio", ".inf"),
        ("usd", "1,5"),
        ("maybe", "null"),
        ("maybe", ""),
        ("names", "[a]"),
        ("store", "{kind: memory}"),
        ("mode", "hunter2"),
        ("url", "hunter2"),
    ],
)
def test_a_text_of_the_environment_that_does_not_fit_is_not_shown(name: str, text: str) -> None:
    found = fault(**{name: env(text)})
    assert "a value from ${NAME}" in found
    assert len(text) < 4 or text not in found


@given(st.integers(-(2**63), 2**63 - 1), st.booleans(), st.text())
def test_what_is_written_into_the_environment_comes_back_out(number: int, truth: bool, text: str) -> None:
    found = read(
        count=env(str(number)), usd=env("1.50"), flag=env(str(truth).lower()), text=env(text), names=[env(text)]
    )
    assert (found.count, found.flag, found.text, found.names) == (number, truth, text, (text,))


# --- validators ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 0}, "here.port: must be >= 1, found 0"),
        ({"port": env("70000")}, "here.port: must be <= 65535, found a value from ${NAME}"),
        ({"even": 3}, "here.even: must be even, and 3 is odd"),
        ({"even": env("34567")}, "here.even: must be even, and a value from ${NAME} is odd"),
        ({"share": env("1e5")}, "here.share: a value from ${NAME} is more than all"),
        ({"names": []}, "here.names: Length of 'names' must be >= 1, found a list"),
        ({"key": "sk-example-9"}, "here.key: *** is no good"),
        ({"part": 11}, "here: must be at most limit"),
        ({"limit": 5, "part": 6}, "here: must be at most limit"),
    ],
)
def test_a_validator_speaks_with_the_path_of_its_field(settings: dict[str, Any], message: str) -> None:
    (only,) = faults(settings, Validated)
    if "names" in settings:
        assert only.startswith("here.names: ")
    else:
        assert only == message


def test_all_validators_of_a_class_are_asked() -> None:
    found = faults({"port": 0, "even": 1, "name": "A", "word": "c", "part": 99}, Validated)
    assert [line.partition(":")[0] for line in found] == ["here.port", "here.even", "here.name", "here.word"]


@pytest.mark.parametrize("name", ["name", "word"])
@pytest.mark.parametrize("text", ["HUNTER2", "A'\nB", "Z"])
def test_a_validator_never_shows_a_text_of_the_environment(name: str, text: str) -> None:
    (only,) = faults({name: env(text)}, Validated)
    assert "a value from ${NAME}" in only
    for form in (text, repr(text)):
        assert form not in only


def test_a_check_of_the_whole_class_speaks_with_the_path_of_the_class() -> None:
    assert fault(Crossed, low=11) == "here: low must not be above high; 11 is"
    assert fault(Crossed, low=env("77777")) == "here: low must not be above high; a value from ${NAME} is"


def test_no_part_of_a_text_of_the_environment_is_left_of_another() -> None:
    found = fault(Crossed, names=[env("hunt"), env("hunter2"), env("hunter2")])
    assert found == f"here: names must differ, unlike {', '.join(['a value from ${NAME}'] * 3)}"


def test_what_a_text_of_the_environment_is_called_is_not_mistaken_for_it() -> None:
    assert fault(Validated, word=env("value")).count("a value from ${NAME}") == 1


def test_a_check_of_the_whole_class_waits_for_sound_fields() -> None:
    assert fault(Crossed, low=11, high="x").startswith("here.high: ")


# --- a variable without a value ---


def unchecked(text: str, cls: type[Any] = Everything) -> Any:
    root = load(text, source="qlens.yaml", env={}, check_env=False).root
    return convert(root, cls, "here", folder=FOLDER)


def test_a_field_of_unknown_text_is_not_checked() -> None:
    names = ("flag", "count", "usd", "mode", "colour", "url", "file", "maybe")
    assert unchecked("\n".join(f"{name}: ${{X}}" for name in names)) == read()


def test_a_required_field_of_unknown_text_keeps_the_text() -> None:
    found = unchecked('{file: "${X}", count: "${X}", inner: {kind: "${X}"}}', Required)
    assert (found.file, found.count) == ("${X}", "${X}")


def test_an_unknown_text_keeps_validators_quiet() -> None:
    assert unchecked('{port: "${X}", name: "${X}", word: "${X}", key: "${X}"}', Validated).port == 1


def test_an_unknown_text_hides_no_other_fault() -> None:
    with pytest.raises(ConfigError) as raised:
        unchecked('{port: "${X}", even: 3, name: "${X}", limit: y}', Validated)
    assert [fault.path for fault in raised.value.faults] == ["qlens.yaml:1 here.even", "qlens.yaml:1 here.limit"]


@pytest.mark.parametrize("text", ['{names: "${X}"}', '{prices: "${X}"}', '{store: "${X}"}', '{rules: ["${X}"]}'])
def test_an_unknown_text_is_never_structure(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        unchecked(text)


@frozen
class Doubled:
    low: int
    double: int = 0

    def __attrs_post_init__(self) -> None:
        if self.low * 2 - self.double > 0:
            raise ValueError("double must be twice low")


def test_a_check_of_the_whole_class_that_needs_an_unknown_text_says_so() -> None:
    with pytest.raises(ConfigError, match=r"qlens.yaml:1 here: cannot be checked while variables are not set"):
        unchecked('{low: "${X}"}', Doubled)


def test_validators_work_again_after_an_unknown_text() -> None:
    unchecked('{port: "${X}"}', Validated)
    with pytest.raises(ValueError, match="must be >= 1"):
        Validated(port=0)


# --- classes that cannot be configured ---


@frozen
class Unreadable:
    names: set[str] = field(factory=set)


@frozen
class Unresolvable:
    name: Nowhere = ""  # type: ignore[name-defined]  # noqa: F821


def test_a_type_that_no_file_can_give_is_a_fault() -> None:
    assert "no setting can be of type set[str]" in fault(Unreadable, names=["a"])


def test_a_type_that_cannot_be_found_is_a_fault() -> None:
    assert "Unresolvable has a field whose type cannot be found" in fault(Unresolvable, name="a")


# --- whatever comes ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.text(max_size=10).map(env),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=15,
)
names = st.sampled_from([str(attribute.alias) for attribute in attrs.fields(Everything)])
likely = st.sampled_from([{"kind": "redis"}, {"kind": "memory"}, {"per": "key", "usd": 1}, ["a"], "a", 1, True])


@given(st.dictionaries(names, anything | likely, max_size=6) | anything)
def test_no_value_raises_anything_but_a_config_error(value: Any) -> None:
    try:
        result = convert(value, Everything, "here", folder=FOLDER)
    except ConfigError as error:
        found = error.faults
    else:
        _untouched_fields_have_their_defaults(result, value)
        return
    assert found
    assert all(fault.path.startswith("here") and fault.message for fault in found)


def _untouched_fields_have_their_defaults(result: Any, value: Any) -> None:
    for attribute in attrs.fields(Everything):
        if attribute.alias not in value:
            assert getattr(result, attribute.name) == getattr(read(), attribute.name)
