"""What a gateway does as it starts: how many files it may open, and an order that comes before it can follow it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from e2e.serving import QLENS, changed, started, until

ADDED = {"models": {"added": {"max_output_tokens": 10, "targets": [{"provider": "echo", "model": "added"}]}}}


def test_as_many_files_may_be_open_as_the_system_lets_it(tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(changed({}))
    command = ["sh", "-c", 'ulimit -S -n 200; exec "$@"', "sh", *QLENS, "serve", str(config)]
    with started(command, tmp_path, {}) as served:
        soft, hard = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > 200


def test_an_order_to_reload_that_comes_too_early_is_followed_later(tmp_path: Path) -> None:
    config, told = tmp_path / "qlens.yaml", tmp_path / "told"
    os.mkfifo(config)

    def tell() -> None:
        with config.open("w") as first:  # waits until the gateway reads it, which then waits for what is written
            config.unlink()
            config.write_text(changed(ADDED))
            process = int(told.read_text())
            os.kill(process, signal.SIGHUP)
            time.sleep(0.05)  # it reads on: whatever it does about the order, it does before that
            first.write(changed({}))

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    command = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(told), *QLENS, "serve", str(config)]
    with started(command, tmp_path, {}) as served:
        telling.join()
        until(lambda: "loaded configuration" in served.output, "the reload")


def test_what_serving_does_not_need_is_not_loaded() -> None:
    """`aiohttp.web` has routes, applications and files, and reads the system's table of file types: 25 ms."""
    program = "import sys, qlens.cli, qlens.server; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'aiohttp.web_server'" in loaded
    assert "'aiohttp.web_fileresponse'" not in loaded
    assert "'qlens.workers.supervisor'" not in loaded
