"""Starts a small real model and the gateway in front of it, and stops both together: `make llm`."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
LLM = ROOT / ".tools" / "llm"
MODEL = "smollm2-135m"


def start_model(key: str) -> tuple[subprocess.Popen[str], str]:
    """Start the model server; return it with its address once it answers."""
    weights = next((LLM / "weights").glob("**/*.gguf"), None)
    if weights is None:
        sys.exit("the model is not there; `make llm` and `make test-llm` fetch it first")
    model = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("model_server.py")), str(weights), MODEL],
        env=os.environ | {"PYTHONPATH": str(LLM / "lib"), "QLENS_LLM_KEY": key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process alone: the gateway drains first
    )
    assert model.stdout is not None
    address = model.stdout.readline().strip()
    if not address:
        sys.exit(f"the model server ended with {model.wait()}")
    return model, address


def start_gateway(config: Path, address: str, key: str) -> subprocess.Popen[bytes]:
    """Start the gateway, which prints its own base URL, key and a snippet."""
    return subprocess.Popen(
        [sys.executable, "-m", "qlens", "serve", str(config)],
        env=os.environ | {"QLENS_LLM_URL": f"{address}/v1", "QLENS_LLM_KEY": key},
        cwd=ROOT,
        start_new_session=True,
    )


def main(config: Path) -> int:
    """Run the pair until SIGINT or SIGTERM; return what the gateway returned."""
    key = secrets.token_urlsafe(16)
    model, address = start_model(key)
    try:
        print(f"The model server listens at {address}; the gateway follows.", flush=True)
        gateway = start_gateway(config, address, key)

        def stop(_number: int, _frame: FrameType | None) -> None:
            gateway.terminate()

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        return gateway.wait()
    finally:
        model.terminate()
        model.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "config" / "llm.yaml"))
