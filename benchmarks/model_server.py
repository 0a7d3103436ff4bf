"""A scripted model server for benchmarks: answers at once, always the same; prints its port, ends with its stdin."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

CHUNKS = 32


def main() -> None:
    """Serve chat calls, as a body or as a stream of 32 chunks, until stdin ends."""
    usage = {"prompt_tokens": 20, "completion_tokens": CHUNKS, "total_tokens": 20 + CHUNKS}
    head: dict[str, Any] = {"id": "chatcmpl-bench", "created": 1, "model": "bench"}
    answer = {"index": 0, "message": {"role": "assistant", "content": "word " * CHUNKS}, "finish_reason": "stop"}
    body = json.dumps(head | {"object": "chat.completion", "choices": [answer], "usage": usage}).encode()
    deltas = [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}] * CHUNKS
    events: list[dict[str, Any]] = [{"choices": [delta]} for delta in deltas]
    events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
    lines = [json.dumps(head | {"object": "chat.completion.chunk"} | event) for event in events]
    chunks = [f"data: {line}\n\n".encode() for line in [*lines, "[DONE]"]]

    async def chat(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            return web.Response(body=body, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    asyncio.run(run())


if __name__ == "__main__":
    main()
