"""The protocol of programs that measure windows, ours and peers', so that they can take turns.

A program reads its order as one line of JSON, gets ready, says `{"ready": …}`, and then answers
each line (the window's arguments) with one line of figures, until its stdin ends. Between windows
it waits and takes no processor. Standard library only (uvloop where it is there).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

Window = Callable[..., Awaitable[dict[str, Any]]]


def run(program: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop  # an environment of peers may not have it
    except ImportError:
        asyncio.run(program)
    else:
        uvloop.run(program)


async def order() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await _line())
    return found


async def serve(window: Window, **ready: Any) -> None:
    _say({"ready": True, **ready})
    while line := await _line():
        _say(await window(**json.loads(line)))


def serve_plain(window: Callable[..., dict[str, Any]], **ready: Any) -> None:
    """The same for a program without a loop."""

    _say({"ready": True, **ready})
    for line in sys.stdin:
        _say(window(**json.loads(line)))


async def _line() -> str:
    return await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
