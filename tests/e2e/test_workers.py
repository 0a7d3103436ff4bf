"""Several workers behind one address, as an operator meets them: killed, stopped, reloaded, looked at."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from attrs import define, field
from e2e.serving import WAIT_SECONDS, Served, changed, receipts, run_qlens, serving, started, until

CALLERS = 6
"""How many threads call at a time; each call has a connection of its own, so that all workers get some."""

HOUSE = '''
import os
import time
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import define, field, frozen

from qlens import Endpoint, Reply, StartupError, hookimpl


@frozen
class HouseConfig:
    """A house of its own."""

    word: str = "first"
    """What it says."""


@define(eq=False)
class House:
    """Shows its worker to operators, and fails where a file says so."""

    config: HouseConfig
    name: str
    worker: int = field(default=-1, init=False)

    Config = HouseConfig

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway):
        self_destruct = Path(__file__).with_name(f"fail-{gateway.worker}")
        if self_destruct.exists():
            self_destruct.unlink()
            raise StartupError(f"the house of worker {gateway.worker} is on fire")
        stuck = Path(__file__).with_name(f"stuck-{gateway.worker}")
        if stuck.exists():
            stuck.unlink()
            time.sleep(3600)
        self.worker = gateway.worker
        yield

    @hookimpl
    def endpoints(self):
        async def mirror(call):
            body = await call.read()

            async def pieces():
                for start in range(0, len(body), 100_000):
                    yield body[start : start + 100_000]

            return Reply(headers={"content-type": "application/octet-stream"}, chunks=pieces())

        async def whole(call):
            return Reply(body=b'{"worker": %d, "query": "%s"}' % (self.worker, call.query["q"].encode()))

        yield Endpoint("POST", "/admin/mirror", "operator", mirror, "admin")
        yield Endpoint("GET", "/admin/whole", "viewer", whole, "admin")
'''

LIMIT = {
    "plugin": "token_bucket",
    "store": {"kind": "memory", "per_worker": True},
    "limits": [{"per": "tenant", "requests_per_minute": 1_000_000}],
}


def two_workers(server: Mapping[str, Any] | None = None, pipeline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Changes to config/qlens.yaml: two workers, and no cache between them and a call."""
    return {
        "server": {"workers": 2, **(server or {})},
        "pipeline": {"rate_limit": [LIMIT], "cache": [], **(pipeline or {})},
    }


@contextmanager
def housed(folder: Path, changes: Mapping[str, Any]) -> Iterator[Served]:
    """Run a gateway with the house beside its configuration."""
    (folder / "house.py").write_text(HOUSE)
    with serving(folder, changes=changes) as served:
        yield served


HOUSED = {"guard": [{"plugin": "house:House", "word": "first"}]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers; operators reach them from elsewhere, too."""
    changes = two_workers({"admin": {"host": "0.0.0.0"}, "max_body_bytes": 4_000_000}, HOUSED)
    with housed(tmp_path_factory.mktemp("pair"), changes) as served:
        yield served


@pytest.fixture(scope="module")
def member(pair: Served) -> str:
    """A key that opens nothing of an operator's."""
    return pair.qlens("keys", "create", "--tenant", "acme").stdout.strip()


def ask(served: Served, model: str = "gpt-4o-mini", content: str = "Who is there?") -> int:
    """The status of one chat call on a connection of its own."""
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    headers = {"authorization": f"Bearer {served.key}", "content-type": "application/json"}
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=WAIT_SECONDS)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def admin(served: Served, path: str, method: str = "GET", key: str | None = "", **options: Any) -> httpx2.Response:
    """One request of an operator; with the demo key, another one, or None."""
    headers = {} if key is None else {"authorization": f"Bearer {key or served.key}"}
    url = served.admin_url + path
    return httpx2.request(method, url, headers=headers, timeout=WAIT_SECONDS, verify=False, **options)


def health(served: Served) -> dict[str, Any]:
    """What /admin/health says."""
    found: dict[str, Any] = admin(served, "/admin/health").json()
    return found


def states(served: Served) -> list[str]:
    """The state of each worker; none when no worker answers."""
    return [worker["state"] for worker in health(served).get("workers", ())]


def processes(served: Served) -> dict[int, int]:
    """The process of each worker."""
    return {worker["worker"]: worker["process"] for worker in health(served)["workers"] if "process" in worker}


def metric(served: Served, name: str) -> float:
    """A metric's sum over its labels."""
    lines = admin(served, "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition(" ")[0].partition("{")[0] == name)


def gone(process: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@define(eq=False)
class Load:
    """Threads that call on and on, and what came of it."""

    served: Served
    statuses: Counter[int] = field(factory=Counter)
    broken: list[Exception] = field(factory=list)
    stop: threading.Event = field(factory=threading.Event)
    lock: threading.Lock = field(factory=threading.Lock)

    @property
    def done(self) -> int:
        """How many calls were answered."""
        return self.statuses.total()

    def run(self) -> None:
        """Call until told to stop, or nobody is there any more."""
        while not self.stop.is_set():
            try:
                status = ask(self.served)
            except ConnectionRefusedError:
                assert self.served.told_to_stop
                return
            except (OSError, http.client.HTTPException) as error:
                with self.lock:
                    self.broken.append(error)
            else:
                with self.lock:
                    self.statuses[status] += 1


@contextmanager
def loaded(served: Served) -> Iterator[Load]:
    """Keep calling meanwhile."""
    load = Load(served)
    threads = [threading.Thread(target=load.run) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: load.done > 2 * CALLERS, "calls")
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()


# --- two that serve ----------------------------------------------------------------------------


def test_it_says_once_that_it_is_ready_when_all_are(pair: Served) -> None:
    until(lambda: "for clients" in pair.output, "the line")
    assert pair.output.count("for clients") == 1
    assert "2 workers" in pair.output
    assert pair.output.count("API key") == 1


def test_both_workers_serve_and_the_metrics_are_those_of_all_calls(pair: Served) -> None:
    before = metric(pair, "qlens_calls_total")
    words = " ".join(str(number) for number in range(15))
    callers = [threading.Thread(target=ask, args=(pair, "echo-slow", words)) for _ in range(16)]
    for caller in callers:
        caller.start()
    until(lambda: all(worker.get("running") for worker in health(pair)["workers"]), "calls at both workers")
    for caller in callers:
        caller.join()
    assert metric(pair, "qlens_calls_total") - before == 16
    assert metric(pair, "qlens_call_seconds_count") == metric(pair, "qlens_calls_total")
    assert metric(pair, "qlens_calls_running") == 0
    assert metric(pair, "qlens_workers_ready") == 2


def test_health_shows_each_worker_and_all_together(pair: Served) -> None:
    found = health(pair)
    assert found["ready"] is True
    assert [(worker["worker"], worker["state"]) for worker in found["workers"]] == [(0, "ready"), (1, "ready")]
    assert {worker["config"] for worker in found["workers"]} == {found["config"]}
    assert found["plugins"]["auth.api_keys"]["ok"] is True
    assert admin(pair, "/readyz", key=None).json() == {"status": "ready", "workers": {"ready": 2, "wanted": 2}}
    assert admin(pair, "/healthz", key=None).json() == {"status": "ok"}
    assert pair.get("/readyz")[0] == 200


@pytest.mark.parametrize("path", ["/metrics", "/admin/health", "/admin/whole?q=1"])
def test_operators_need_the_same_roles_as_with_one_worker(pair: Served, member: str, path: str) -> None:
    refused = admin(pair, path, key=None)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "invalid_request_error")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert admin(pair, path, key="sk-example-wrong").json()["error"]["code"] == "invalid_api_key"
    until(lambda: admin(pair, path, key=member).status_code == 403, "a key without the role")
    assert admin(pair, path).status_code == 200


def test_other_paths_are_answered_by_a_worker(pair: Served) -> None:
    found = admin(pair, "/admin/whole?q=a%20b")
    assert found.json()["worker"] in {0, 1}
    assert found.json()["query"] == "a b"
    assert admin(pair, "/admin/nothing").json()["error"]["code"] == "unknown_url"
    assert admin(pair, "/metrics", "DELETE").status_code == 405
    assert admin(pair, "/admin/whole?q=1", "HEAD").status_code == 405


def test_bodies_pass_both_ways_and_are_bounded_by_the_worker(pair: Served) -> None:
    sent = os.urandom(3_000_000)
    assert admin(pair, "/admin/mirror", "POST", content=sent).content == sent
    pieces = (sent[start : start + 50_000] for start in range(0, len(sent), 50_000))
    assert admin(pair, "/admin/mirror", "POST", content=pieces).content == sent
    assert admin(pair, "/admin/mirror", "POST", content=b"").content == b""
    assert admin(pair, "/admin/mirror", "POST", content=bytes(4_000_001)).status_code == 413


def test_body_is_asked_for_only_when_the_caller_may_send_it(pair: Served) -> None:
    host, port = pair.admin_url.removeprefix("http://").split(":")
    for key, expected in ((pair.key, b"HTTP/1.1 100 Continue\r\n\r\n"), ("sk-example-wrong", b"HTTP/1.1 401 ")):
        with socket.create_connection((host, int(port)), WAIT_SECONDS) as client:
            client.sendall(
                f"POST /admin/mirror HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
                "expect: 100-continue\r\ncontent-length: 4\r\n\r\n".encode()
            )
            assert client.recv(len(expected), socket.MSG_WAITALL) == expected


def test_lines_of_the_log_name_their_worker(pair: Served, member: str) -> None:
    assert member  # made while the gateway ran: each worker says that it has read the file
    until(lambda: all(f"worker {n}: api_keys: read" in pair.output for n in (0, 1)), "both workers' lines")


# --- the end of one ----------------------------------------------------------------------------


def test_a_killed_worker_is_back_and_the_counters_never_go_backwards(tmp_path: Path) -> None:
    with serving(tmp_path, changes=two_workers()) as served, loaded(served) as load:
        victim = processes(served)[1]
        shown = [metric(served, "qlens_calls_total")]

        def back() -> bool:
            shown.append(metric(served, "qlens_calls_total"))
            return "worker 1 serves again" in served.output

        os.kill(victim, signal.SIGKILL)
        until(back, "the next one")
        so_far = load.done
        until(lambda: load.done > so_far + 5 * CALLERS, "calls after it")
        shown.append(metric(served, "qlens_calls_total"))
        assert health(served)["ready"] is True
        assert shown == sorted(shown)
        assert processes(served)[1] != victim
        assert metric(served, "qlens_worker_restarts_total") == 1
        assert f"worker 1: process {victim} ended: killed by SIGKILL; the next one starts at once" in served.output
        # Only what the killed one had in hand is lost: others wait at its socket for the next one.
        assert len(load.broken) <= CALLERS
        assert set(load.statuses) == {200}


def test_a_worker_that_hangs_is_seen_and_does_not_keep_the_gateway_from_stopping(tmp_path: Path) -> None:
    with serving(tmp_path, changes=two_workers({"drain_seconds": 0})) as served:
        ask(served)
        known = metric(served, "qlens_calls_total")
        victim = processes(served)[0]
        os.kill(victim, signal.SIGSTOP)
        # On a busy machine the other one, too, can be slow to answer for a moment.
        until(lambda: states(served) == ["silent", "ready"], "one silent worker beside a ready one")
        assert metric(served, "qlens_calls_total") == known
        served.signal(signal.SIGTERM)
        assert served.process.wait(WAIT_SECONDS) == 0
        assert "hangs and is killed" in served.output


QUICK = """
import sys
from qlens.__main__ import main
from qlens.workers import crew
crew.POLL_SECONDS, crew.WELL_SECONDS, crew.HUNG_SECONDS, crew.START_SECONDS = 0.2, 1.0, 5.0, 15.0
sys.exit(main())
"""


@contextmanager
def impatient(folder: Path, pipeline: Mapping[str, Any] | None = None) -> Iterator[Served]:
    """Run a gateway that soon takes a worker for hung."""
    config = folder / "qlens.yaml"
    config.write_text(changed(two_workers({"drain_seconds": 0}, pipeline)))
    with started([sys.executable, "-c", QUICK, "serve", str(config)], folder, {}) as served:
        yield served


def test_a_worker_that_hangs_before_it_serves_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "house.py").write_text(HOUSE)
    with impatient(tmp_path, HOUSED) as served:
        stuck = tmp_path / "stuck-0"
        stuck.touch()
        os.kill(processes(served)[0], signal.SIGKILL)
        until(lambda: not stuck.exists(), "a successor that hangs")
        victim = processes(served)[0]
        until(lambda: gone(victim), "the end of the worker that hangs")
        assert f"worker 0, process {victim}, hangs and is killed" in served.output
        until(lambda: admin(served, "/readyz").status_code == 200, "a gateway that is ready again")


def test_a_worker_that_hangs_is_not_ready_and_then_replaced(tmp_path: Path) -> None:
    with impatient(tmp_path) as served:
        victim = processes(served)[0]
        os.kill(victim, signal.SIGSTOP)
        until(lambda: admin(served, "/readyz").status_code == 503, "a gateway that is not ready")
        assert not gone(victim)
        until(lambda: metric(served, "qlens_workers_ready") == 1, "one worker that is not ready")
        until(lambda: gone(victim), "the end of the worker that hangs")
        until(lambda: admin(served, "/readyz").status_code == 200, "a gateway that is ready again")
        assert processes(served)[0] != victim
        assert f"worker 0, process {victim}, hangs and is killed" in served.output


def test_workers_end_by_themselves_when_the_supervisor_was_killed(tmp_path: Path) -> None:
    with serving(tmp_path, changes=two_workers()) as served:
        workers = list(processes(served).values())
        answers: list[int] = []
        words = " ".join(str(number) for number in range(10))
        caller = threading.Thread(target=lambda: answers.append(ask(served, "echo-slow", words)))
        caller.start()
        until(lambda: metric(served, "qlens_calls_running") == 1, "the call")
        served.leaves_with = -signal.SIGKILL
        served.process.kill()
        caller.join()
        assert answers == [200]
        until(lambda: all(gone(process) for process in workers), "the end of the workers")
        assert receipts(served, "--model", "echo-slow")[0]["calls"] == 1


def test_each_pinned_worker_has_a_cpu_of_its_own_with_all_its_threads(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    with serving(tmp_path, changes=two_workers({"pin_workers": True})) as served:
        assert ask(served) == 200
        workers = processes(served)
        assert len(workers) == 2
        for number, process in workers.items():
            threads = {int(thread.name) for thread in Path(f"/proc/{process}/task").iterdir()}
            assert len(threads) > 1
            assert {tuple(os.sched_getaffinity(thread)) for thread in threads} == {(allowed[number % len(allowed)],)}
        assert os.sched_getaffinity(served.process.pid) == set(allowed)
        served.config.write_text(changed(two_workers({"pin_workers": False})))
        served.signal(signal.SIGHUP)
        until(lambda: "server.pin_workers: cannot change" in served.output, "the refusal")


# --- stop and reload ---------------------------------------------------------------------------


def test_stop_under_load_loses_no_call(tmp_path: Path) -> None:
    with serving(tmp_path, changes=two_workers()) as served:
        with loaded(served) as load:
            served.signal(signal.SIGTERM)
            assert served.process.wait(WAIT_SECONDS) == 0
        assert set(load.statuses) <= {200, 503}
        # All that was answered is accounted for, by all workers in one ledger.
        assert sum(row["calls"] for row in receipts(served)) == load.statuses[200]
        assert not list(Path("/proc").glob(f"*/task/{served.process.pid}"))


def test_reload_reaches_all_and_a_bad_file_none(tmp_path: Path) -> None:
    extra = {"models": {"brand-new": {"max_output_tokens": 10, "targets": [{"provider": "echo", "model": "new"}]}}}
    with serving(tmp_path, changes=two_workers()) as served:
        with loaded(served) as load:
            before = health(served)["config"]
            served.config.write_text(changed(two_workers() | extra))
            served.signal(signal.SIGHUP)
            until(lambda: "loaded configuration" in served.output, "the reload")
            after = health(served)
            assert {worker["config"] for worker in after["workers"]} == {after["config"]} != {before}
            assert {ask(served, "brand-new") for _ in range(12)} == {200}

            served.config.write_text(changed(two_workers(pipeline={"cache": [{"plugin": "exactly"}]})))
            served.signal(signal.SIGHUP)
            until(lambda: "exactly" in served.output, "the fault")
            served.config.write_text(changed(two_workers({"workers": 3})))
            served.signal(signal.SIGHUP)
            until(lambda: "server.workers" in served.output, "the fault")
            for fault in ("'exactly'", "server.workers"):
                assert served.output.count(fault) == 1
            assert {worker["config"] for worker in health(served)["workers"]} == {after["config"]}

            # A worker that is started now gets what the others have, not what the file says.
            os.kill(processes(served)[0], signal.SIGKILL)
            until(lambda: "worker 0 serves again" in served.output, "the next one")
            assert {worker["config"] for worker in health(served)["workers"]} == {after["config"]}
        assert set(load.statuses) == {200}


def test_a_worker_that_cannot_change_as_the_others_did_is_replaced(tmp_path: Path) -> None:
    with housed(tmp_path, two_workers(pipeline=HOUSED)) as served, loaded(served) as load:
        old = processes(served)
        (tmp_path / "fail-1").touch()
        second = {"guard": [{"plugin": "house:House", "word": "second"}]}
        served.config.write_text(changed(two_workers(pipeline=second)))
        served.signal(signal.SIGHUP)
        until(lambda: "worker 1 serves again" in served.output, "the next one")
        assert "worker 1 cannot change as the others did: " in served.output
        assert "the house of worker 1 is on fire" in served.output
        new = health(served)
        assert len({worker["config"] for worker in new["workers"] if worker["state"] == "ready"}) == 1
        assert processes(served)[0] == old[0]
        assert set(load.statuses) == {200}
        assert not load.broken


# --- the start ---------------------------------------------------------------------------------


def test_limits_that_only_one_process_knows_are_refused_with_the_way_out(tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(changed({"server": {"workers": 2}}))
    for command in ("check", "serve"):
        result = run_qlens(command, str(config))
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert "pipeline.rate_limit[0]" in line
        assert "store: {kind: memory, per_worker: true}" in line


def test_a_limit_per_worker_admits_the_limit_in_sum(tmp_path: Path) -> None:
    limit = LIMIT | {"limits": [{"per": "tenant", "requests_per_minute": 60}]}
    with serving(tmp_path, changes=two_workers(pipeline={"rate_limit": [limit]})) as served:
        began = time.monotonic()
        statuses = Counter(ask(served) for _ in range(150))
        refilled = time.monotonic() - began + 2  # one a second, and what each worker rounds up
        assert set(statuses) == {200, 429}
        assert 60 <= statuses[200] <= 60 + refilled


def test_faults_of_the_start_are_told_once(tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    cost = [{"plugin": "ledger", "url": "sqlite:///nowhere/qlens.db"}]
    config.write_text(changed(two_workers(pipeline={"cost": cost})))
    result = run_qlens("serve", str(config), env={"QLENS_PORT": "0", "QLENS_ADMIN_PORT": "0"})
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("qlens: ")
    assert "pipeline.cost[0]" in line
    assert "does not exist" in line


def test_workers_that_end_before_they_are_ready_end_the_gateway(tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text("import os\nos._exit(7)\n")
    config = tmp_path / "qlens.yaml"
    config.write_text(changed(two_workers(pipeline={"guard": [{"plugin": "crash:Crash"}]})))
    result = run_qlens("serve", str(config), env={"QLENS_PORT": "0", "QLENS_ADMIN_PORT": "0"})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("qlens: worker 0: process ")
    assert "exit code 7 before it was ready" in result.stderr


def test_port_of_another_gateway_is_not_shared_with_it(pair: Served, tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(changed(two_workers()))
    port = pair.url.rpartition(":")[2]
    result = run_qlens("serve", str(config), env={"QLENS_PORT": port, "QLENS_ADMIN_PORT": "0"})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert port in line


def test_one_worker_is_one_process(served: Served) -> None:
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    assert children == ""
