"""The demo key: the only plain key that is ever kept, for a gateway that only its own machine can reach."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from qlens import Fault, StartupError
from qlens_plugins.auth.credentials import new_key

_KEY = re.compile(r"[\x21-\x7e]{16,512}")


def demo_key(path: Path) -> str:
    """The key in a file, which is made when it does not exist; raises StartupError when others may read it."""
    try:
        if not path.exists():
            _make(path)
        return _read(path)
    except OSError as error:
        raise StartupError([Fault(str(path), f"the demo key cannot be kept here: {error.strerror}")]) from error


def introduction(url: str, key: str, model: str) -> list[str]:
    """What to paste to see the gateway answer: the base URL, the key, a curl line and a program for OpenAI's SDK."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return [
        "",
        f"base URL  {url}/v1",
        f"API key   {key}",
        "",
        f"curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\",
        f"  -H 'Content-Type: application/json' -d '{body}'",
        "",
        "from openai import OpenAI",
        "",
        f'client = OpenAI(base_url="{url}/v1", api_key="{key}")',
        'messages = [{"role": "user", "content": "Hello!"}]',
        f'for chunk in client.chat.completions.create(model="{model}", messages=messages, stream=True):',
        '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
        "",
    ]


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(new_key() + "\n")
        # Appears with its content or not at all, and never over another process' file: whoever is second reads that.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _read(path: Path) -> str:
    with path.open() as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        text = file.read(4096).strip()
    if mode & 0o077:
        raise StartupError([Fault(str(path), f"others may read the demo key (mode {mode:04o}): chmod 600 {path}")])
    if not _KEY.fullmatch(text):
        raise StartupError(
            [Fault(str(path), "holds no key of 16 to 512 printable characters: delete it, and a new one is made")]
        )
    return text
