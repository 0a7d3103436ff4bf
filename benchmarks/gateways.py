"""The gateways under test: how each is installed, configured and started."""

from __future__ import annotations

import http.client
import json
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from attrs import define, field, frozen
from e2e.serving import QLENS, changed, clean_env

from benchmarks.processes import Tree
from benchmarks.rig import ROOT, TOOLS, Cores, Fault, Way
from qlens.testing.processes import free_port

START_SECONDS = 60
LEDGER_SECONDS = 30
UPSTREAM_KEY = "sk-example-bench"


@frozen
class Launch:
    """What has to be run."""

    command: Sequence[str]
    config: str
    """As it is printed in the report."""
    env: Mapping[str, str] = field(factory=dict)
    headers: Sequence[str] = ()
    ledger: Path | None = None


@frozen
class Contender:
    """One gateway: `version` is None where it is not installed; `start` writes its configuration into a folder."""

    name: str
    title: str
    version: Callable[[], str | None]
    start: Callable[[Path, int, int], Launch]
    """Takes the folder, the port to listen on, and the port of the mock upstream."""
    missing: str = ""
    """What to do when it is not installed."""
    install: Callable[[], None] = lambda: None


@define(eq=False)
class Gateway:
    """A gateway that runs."""

    tree: Tree
    way: Way
    folder: Path
    ledger: Path | None
    start_seconds: float
    answered: int = 1
    """Calls that must have left a receipt; the first one showed that it had started."""

    def rows(self) -> int:
        """How many receipts are on disk."""
        if self.ledger is None:
            return 0
        database = sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True, timeout=10)
        try:
            # Rows are only ever added, so the last number is the count, and asking for it reads one page.
            return int(database.execute("SELECT coalesce(max(rowid), 0) FROM receipts").fetchone()[0])
        finally:
            database.close()

    def settle(self) -> None:
        """Wait until every receipt is on disk; a gateway without a ledger has nothing to wait for."""
        if self.ledger is None:
            return
        count = self.answered
        ends = time.monotonic() + LEDGER_SECONDS
        while (rows := self.rows()) < count:
            if time.monotonic() > ends:
                raise Fault(f"{count} receipts should be in the ledger, but after {LEDGER_SECONDS} s there are {rows}")
            time.sleep(0.02)
        if rows > count:
            raise Fault(f"{count} receipts should be in the ledger, but there are {rows}")

    def count_anew(self) -> None:
        """After calls that were given up: some of them left a receipt, some never arrived."""
        time.sleep(2)
        self.answered = self.rows()


@contextmanager
def running(contender: Contender, upstream_port: int, cores: Cores) -> Iterator[Gateway]:
    """Start a gateway in a folder of its own, wait for its first answer, and stop it afterwards."""
    with tempfile.TemporaryDirectory(prefix="qlens-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx's worker is another user
        port = free_port()
        launch = contender.start(folder, port, upstream_port)
        way = Way(port, headers=launch.headers)
        with (folder / "output.txt").open("wb") as output, cores.for_gateway():
            began = time.perf_counter()
            leader = subprocess.Popen(
                launch.command,
                env=clean_env() | dict(launch.env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        tree = Tree(leader)
        try:
            answered = _first_answer(way, tree, folder / "output.txt")
            yield Gateway(tree, way, folder, launch.ledger, answered - began)
        finally:
            tree.stop()


def _first_answer(way: Way, tree: Tree, output: Path) -> float:
    """When it first answered a call with 200."""
    body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Are you there?"}]})
    headers = dict(header.split(": ", 1) for header in way.headers) | {"content-type": "application/json"}
    ends = time.monotonic() + START_SECONDS
    answer = "no answer"
    while time.monotonic() < ends and tree.leader.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", way.port, timeout=START_SECONDS)
        try:
            connection.request("POST", way.path, body, headers)
            response = connection.getresponse()
            answer = f"{response.status} {response.read(500)!r}"
            if response.status == 200:
                return time.perf_counter()
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.005)
    raise Fault(f"it did not start ({answer}):\n{output.read_text(errors='replace')[-2000:]}")


def config_of(contender: Contender) -> str:
    """Its configuration, for the report: with ports and keys as examples."""
    with tempfile.TemporaryDirectory() as name:
        text = contender.start(Path(name), 8000, 9000).config
        return re.sub(r"sk-[A-Za-z0-9_-]{16,}", UPSTREAM_KEY, text.replace(name, "FOLDER"))


# --- QLens --------------------------------------------------------------------------------------

NO_LIMIT = [
    {"per": "tenant", "requests_per_minute": 1_000_000_000, "tokens_per_minute": 1_000_000_000_000},
    {"per": "key", "concurrency": 1_000_000},
]
BUDGETS = {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 1_000_000}]}
"""One that nobody reaches."""
MODEL = {"max_output_tokens": 16384, "targets": [{"provider": "bench", "model": "gpt-4o-mini"}]}


def provider(upstream_port: int) -> dict[str, Any]:
    """The mock upstream as OpenAI."""
    return {"plugin": "openai", "base_url": f"http://127.0.0.1:{upstream_port}/v1", "api_key": UPSTREAM_KEY}


def qlens(folder: Path, port: int, config: str, key: str | None) -> Launch:
    """`qlens serve` as an operator runs it."""
    path = folder / "qlens.yaml"
    path.write_text(config)
    return Launch(
        [*QLENS, "serve", str(path)],
        config,
        env={"QLENS_PORT": str(port), "QLENS_ADMIN_PORT": str(free_port())},
        headers=[f"authorization: Bearer {key}"] if key else [],
        ledger=folder / "qlens.db" if "sqlite:///qlens.db" in config else None,
    )


def make_key(folder: Path, config: str) -> str:
    """A key as an operator makes it."""
    path = folder / "qlens.yaml"
    path.write_text(config)
    command = [*QLENS, "keys", "create", "-c", str(path), "--tenant", "bench"]
    run = subprocess.run(command, env=clean_env(), capture_output=True, text=True, check=False)
    if run.returncode:
        raise Fault(f"no key could be made:\n{run.stderr}")
    return run.stdout.strip()


def qlens_full(folder: Path, port: int, upstream_port: int, cost: Sequence[Mapping[str, Any]] = ()) -> Launch:
    """config/qlens.yaml with two changes: who answers, and limits that nobody reaches; and more at the stage cost."""
    limiter = {"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": NO_LIMIT}
    changes = {
        "providers": {"bench": provider(upstream_port)},
        "models": {"gpt-4o-mini": MODEL},
        "pipeline": {"rate_limit": [limiter]},
    }
    content = json.loads(changed(changes))
    content["pipeline"]["cost"] += cost
    config = as_yaml(content)
    return qlens(folder, port, config, make_key(folder, config))


def _qlens_bare(folder: Path, port: int, upstream_port: int) -> Launch:
    config = {
        "server": {"port": "${QLENS_PORT}", "admin": {"port": "${QLENS_ADMIN_PORT}"}},
        "pipeline": {"auth": [{"plugin": "anonymous"}]},
        "providers": {"bench": provider(upstream_port)},
        "models": {"gpt-4o-mini": MODEL},
    }
    return qlens(folder, port, as_yaml(config), None)


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as people write it."""
    return yaml.safe_dump(dict(config), sort_keys=False, width=120)


def _qlens_version() -> str:
    parts = {name: version(name) for name in ("qlens", "aiohttp")}
    return f"{parts['qlens']} (Python {python()}, aiohttp {parts['aiohttp']})"


def python() -> str:
    """The interpreter's version and how it was built: code takes longer on a shared library that is not optimized."""
    options = str(sysconfig.get_config_var("CONFIG_ARGS"))
    built = ["shared library" if "libpython" in Path("/proc/self/maps").read_text() else "one program"]
    built += ["optimized"] if "--enable-optimizations" in options else []
    return f"{platform.python_version()}, {', '.join(built)}"


# --- bare proxies -------------------------------------------------------------------------------

NGINX = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://model;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def _nginx_program() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def _nginx_version() -> str | None:
    program = _nginx_program()
    if program is None:
        return None
    return (
        subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr.strip().rpartition("/")[2]
    )


def _nginx(folder: Path, port: int, upstream_port: int) -> Launch:
    config = NGINX.format(folder=folder, port=port, upstream=upstream_port)
    path = folder / "nginx.conf"
    path.write_text(config)
    return Launch([_nginx_program() or "nginx", "-e", "stderr", "-p", str(folder), "-c", str(path)], config)


# As the project's own page on benchmarking asks for: no request ids, no dynamic statistics, no circuit breaking.
ENVOY = """\
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          codec_type: HTTP1
          generate_request_id: false
          route_config:
            virtual_hosts:
            - name: model
              domains: ["*"]
              routes: [{{match: {{prefix: "/"}}, route: {{cluster: model, timeout: 0s}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              dynamic_stats: false
  clusters:
  - name: model
    type: STATIC
    circuit_breakers:
      thresholds: [{{max_connections: 1000000, max_pending_requests: 1000000, max_requests: 1000000}}]
    load_assignment:
      cluster_name: model
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""
ENVOY_REQUIREMENTS = ROOT / "requirements" / "bench.txt"


def _envoy_program() -> Path:
    return TOOLS / "envoy" / "envoy" / "_bin" / "envoy"


def _envoy_version() -> str | None:
    if not _envoy_program().exists():
        return None
    output = subprocess.run([_envoy_program(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)/", output)
    return found[1] if found else "unknown"


def _install_envoy() -> None:
    pip("--require-hashes", "--requirement", str(ENVOY_REQUIREMENTS), "--target", str(TOOLS / "envoy"))
    _envoy_program().chmod(0o755)


def _envoy(folder: Path, port: int, upstream_port: int) -> Launch:
    config = ENVOY.format(port=port, upstream=upstream_port)
    path = folder / "envoy.yaml"
    path.write_text(config)
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"]
    return Launch([str(_envoy_program()), "-c", str(path), *options], config)


# --- gateways for language models, measured when asked for --------------------------------------

LITELLM = "1.99.4"
PORTKEY = "1.15.2"
# As npm resolves it, Portkey answers 500 to every stream; with these versions of its web framework it does not.
PORTKEY_PACKAGE = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": PORTKEY},
    "overrides": {"hono": "4.9.7", "@hono/node-server": "1.3.3"},
}


def _litellm_program() -> Path:
    return TOOLS / "litellm" / "bin" / "litellm"


def _install_litellm() -> None:
    folder = TOOLS / "litellm"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip(f"litellm[proxy]=={LITELLM}", python=str(folder / "bin" / "python"))


def _litellm(folder: Path, port: int, upstream_port: int) -> Launch:
    model = {"model": "openai/gpt-4o-mini", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": UPSTREAM_KEY}
    config = as_yaml(
        {
            "model_list": [{"model_name": "gpt-4o-mini", "litellm_params": model}],
            "litellm_settings": {"telemetry": False},
            "general_settings": {"master_key": "sk-example-bench-caller"},
        }
    )
    path = folder / "litellm.yaml"
    path.write_text(config)
    return Launch(
        [str(_litellm_program()), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)],
        config,
        env={"LITELLM_LOG": "ERROR"},
        headers=["authorization: Bearer sk-example-bench-caller"],
    )


def _portkey_folder() -> Path:
    return TOOLS / "portkey" / "node_modules" / "@portkey-ai" / "gateway"


def _install_portkey() -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Fault("Portkey needs Node.js with npm")
    folder = TOOLS / "portkey"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text(json.dumps(PORTKEY_PACKAGE))
    run = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise Fault(f"npm could not install Portkey:\n{run.stderr}")


def _portkey(_folder: Path, port: int, upstream_port: int) -> Launch:
    command = [shutil.which("node") or "node", str(_portkey_folder() / "build" / "start-server.js"), "--headless"]
    headers = [
        "x-portkey-provider: openai",
        f"x-portkey-custom-host: http://127.0.0.1:{upstream_port}/v1",
        f"authorization: Bearer {UPSTREAM_KEY}",
    ]
    return Launch(
        [*command, f"--port={port}"],
        "\n".join(headers) + "\n",
        env={"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1"},
        headers=headers,
    )


def pip(*arguments: str, python: str = sys.executable) -> None:
    """Install something."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise Fault(f"{' '.join(command)}:\n{run.stderr[-2000:]}")


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("qlens", "QLens, every stage", _qlens_version, qlens_full),
        Contender("bare", "QLens, no stage", _qlens_version, _qlens_bare),
        Contender("nginx", "nginx, bare proxy", _nginx_version, _nginx, missing="apt-get install nginx-light"),
        Contender("envoy", "Envoy, bare proxy", _envoy_version, _envoy, install=_install_envoy),
        Contender(
            "litellm",
            "LiteLLM",
            lambda: LITELLM if _litellm_program().exists() else None,
            _litellm,
            install=_install_litellm,
        ),
        Contender(
            "portkey",
            "Portkey",
            lambda: PORTKEY if _portkey_folder().exists() else None,
            _portkey,
            install=_install_portkey,
        ),
    )
}
DEFAULT = ("qlens", "bare", "nginx", "envoy")
PEERS = ("litellm", "portkey")
