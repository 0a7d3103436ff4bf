"""Serves a .gguf file to OpenAI clients on a free loopback port; prints its address, ends with its stdin."""

from __future__ import annotations

import os
import sys


def main(weights: str, name: str) -> None:
    """Serve until whoever started this closes its end of stdin, or dies."""
    try:
        import xllamacpp
    except ImportError as missing:
        sys.exit(f"the model server cannot be loaded: {missing}. On Debian: apt-get install libgomp1")

    params = xllamacpp.CommonParams()
    params.model.path = weights
    params.model_alias = {name}
    params.port = 0
    params.n_ctx = 4096
    params.n_parallel = 2
    params.n_predict = 128  # where the client sets no limit: small models do not know when to stop
    # One thread: llama.cpp's threads wait for each other by spinning, which is slow where the cores are shared.
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.verbosity = -1
    params.api_keys = [os.environ["QLENS_LLM_KEY"]]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
