"""The parts of the supervisor that need no process."""

from __future__ import annotations

import socket
import time

import pytest

from qlens.errors import StartupError
from qlens.server import bind
from qlens.workers.supervisor import PAUSES, STEADY_SECONDS, Slot, shared


def slot(ready_at: float | None = None) -> Slot:
    """A worker's place, whose worker serves since then."""
    made = Slot(0, socket.socket())
    made.listener.close()
    made.ready_at = ready_at
    return made


def test_the_first_end_costs_no_pause_and_those_after_it_more_and_more() -> None:
    dying = slot()
    assert [dying.pause() for _ in range(7)] == [*PAUSES, PAUSES[-1], PAUSES[-1]]
    assert PAUSES[0] == 0
    assert dying.false_starts == 7


def test_who_served_for_long_is_followed_at_once() -> None:
    dying = slot(time.monotonic())
    assert [dying.pause(), dying.pause()] == list(PAUSES[:2])
    dying.ready_at = time.monotonic() - STEADY_SECONDS - 1
    assert dying.pause() == 0
    assert dying.false_starts == 0


def test_shared_sockets_have_one_address_and_the_options_of_a_single_one() -> None:
    options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)]
    with bind("127.0.0.1", 0) as single:
        expected = [single.getsockopt(*option) for option in options]
    sockets = shared("127.0.0.1", 0, 3)
    try:
        assert len({each.getsockname() for each in sockets}) == 1
        for each in sockets:
            each.listen()
            assert [each.getsockopt(*option) for option in options] == expected
        with pytest.raises(StartupError, match="cannot listen on"):
            shared("127.0.0.1", sockets[0].getsockname()[1], 2)
    finally:
        for each in sockets:
            each.close()
