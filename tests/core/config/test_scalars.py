"""Secret and Url: what they show and what they do not."""

from __future__ import annotations

import copy
import json
import pickle

import orjson
import pytest
from attrs import asdict, frozen

from qlens import Secret, Url


@frozen
class Holder:
    key: Secret


SECRET = Secret("sk-example-123456")


@pytest.mark.parametrize("shown", [str(SECRET), repr(SECRET), f"{SECRET}", f"{SECRET:>3}", f"{SECRET!r}"])
def test_a_secret_shows_stars(shown: str) -> None:
    assert shown == "***"


def test_a_secret_stays_hidden_in_what_holds_it() -> None:
    holder = Holder(SECRET)
    assert repr(holder) == "Holder(key=***)"
    assert "123456" not in f"{asdict(holder)} {[SECRET]} {vars(Secret)}"


def test_a_secret_can_be_revealed() -> None:
    assert SECRET.reveal() == "sk-example-123456"


def test_secrets_are_equal_by_value() -> None:
    twin = Secret("sk-example-123456")
    assert twin == SECRET
    assert hash(SECRET) == hash(twin)
    assert Secret("other") != SECRET
    assert SECRET.__eq__("sk-example-123456") is NotImplemented


@pytest.mark.parametrize("dump", [pickle.dumps, json.dumps, orjson.dumps])
def test_a_secret_is_not_serialised_by_accident(dump: object) -> None:
    assert callable(dump)
    with pytest.raises(TypeError):
        dump(SECRET)


def test_a_secret_can_be_copied() -> None:
    assert copy.deepcopy(Holder(SECRET)) == copy.copy(Holder(SECRET)) == Holder(SECRET)


def test_the_repr_of_a_url_hides_its_password() -> None:
    url = Url("redis://:hunter2@cache:6379/0")
    assert repr(url) == "'redis://***@cache:6379/0'"
    assert url == "redis://:hunter2@cache:6379/0"
