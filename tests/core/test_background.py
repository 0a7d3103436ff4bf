"""Threads whose work may wait: they give way to the event loop."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from qlens.background import LOWER, background_thread
from qlens.testing import running

EVERYTHING = """
server: {admin: {port: 0}, port: 0, access_log: access.log}
pipeline:
  auth: [{plugin: anonymous}]
  cost: [{plugin: ledger, url: "sqlite:///ledger.db"}]
providers: {echo: {plugin: echo}}
models: {m: {targets: [{provider: echo, model: m}]}}
"""


def priority(thread: threading.Thread) -> int:
    assert thread.native_id is not None
    return os.getpriority(os.PRIO_PROCESS, thread.native_id)


def test_its_priority_is_lower_and_nobody_elses() -> None:
    before = priority(threading.main_thread())
    seen: list[int] = []

    def work() -> None:
        seen.append(priority(threading.current_thread()))
        if len(seen) < 2:
            another = background_thread(work, "another")
            another.start()
            another.join(10)

    thread = background_thread(work, "some")
    thread.start()
    thread.join(10)
    assert (thread.name, thread.daemon) == ("some", True)
    assert seen == [min(before + LOWER, 19)] * 2
    assert priority(threading.main_thread()) == before


def test_where_it_must_not_be_lowered_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbidden)
    done = threading.Event()
    background_thread(done.set, "some").start()
    assert done.wait(10)


async def test_what_writes_for_a_gateway_gives_way_to_its_event_loop(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    async with running(EVERYTHING):
        writers = {thread.name: priority(thread) for thread in threading.enumerate() if thread not in others}
        here = priority(threading.main_thread())
    found = {name: lower - here for name, lower in writers.items() if name.startswith("qlens-")}
    assert found == {"qlens-ledger": LOWER, "qlens-spool": LOWER, "qlens-access": LOWER}
