"""Frozen objects that are made by one dict: no other than those that attrs makes."""

from __future__ import annotations

import copy
import pickle

import pytest
from attrs import evolve, field, frozen
from attrs.exceptions import FrozenInstanceError

from qlens.filled import filled


@filled
@frozen(slots=False)
class Point:
    x: int
    y: int = 2
    names: dict[str, int] = field(factory=dict, hash=False)
    _own: str = "mine"


def test_it_is_made_as_attrs_makes_it() -> None:
    point = Point(1, names={"a": 1}, own="yours")
    assert repr(point) == "Point(x=1, y=2, names={'a': 1}, _own='yours')"
    assert point == Point(1, 2, {"a": 1}, "yours") != Point(1)
    assert hash(Point(1)) == hash(Point(1, 2))
    assert evolve(Point(1), x=5, own="other") == Point(5, own="other")
    assert pickle.loads(pickle.dumps(point)) == copy.deepcopy(point) == point


def test_what_a_factory_makes_is_not_shared() -> None:
    assert Point(1).names == {}
    assert Point(1).names is not Point(1).names


def test_it_is_frozen_and_takes_no_other_fields() -> None:
    with pytest.raises(FrozenInstanceError):
        Point(1).x = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"Point.__init__\(\) missing 1 required positional argument: 'x'"):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Point(1, z=3)  # type: ignore[call-arg]
