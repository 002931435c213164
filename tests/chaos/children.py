"""Child processes of a run: told what to do on their standard input, a JSON object a line, and
heard on their standard output. Each ends when its input does, so none outlives the run."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.processes import ProcessMark

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1
_LINE_BYTES_MAX = 4 * 1024 * 1024


class ChildFailed(Exception):
    """A child ended or refused; its log says why."""


def die_with_parent() -> None:
    """For `preexec_fn`: SIGTERM when the thread that started this process is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Child:
    """One child process: `python -m MODULE …`."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name
        self._heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._reader = asyncio.create_task(self._listen(), name=f"hear {name}")
        self.on_word: Callable[[dict[str, Any]], None] = lambda _: None

    @classmethod
    async def start(
        cls, module: str, *arguments: str, log: Path, environ: Mapping[str, str] | None = None
    ) -> Child:
        with open(log, "ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                cwd=ROOT,
                env=None if environ is None else dict(environ),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=_LINE_BYTES_MAX,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return cls(process, module)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def mark(self) -> ProcessMark:
        found = ProcessMark.of(self.pid)
        if found is None:
            raise ChildFailed(f"{self._name} has ended")
        return found

    async def hear(self, *, timeout_s: float) -> dict[str, Any]:
        """The next thing it says. Raises ChildFailed when it ends or is silent for so long."""
        try:
            async with asyncio.timeout(timeout_s):
                word = await self._heard.get()
        except TimeoutError:
            raise ChildFailed(f"{self._name} said nothing for {timeout_s:.0f} s") from None
        if "ended" in word:
            raise ChildFailed(f"{self._name} ended ({word['ended']})")
        if "error" in word:
            raise ChildFailed(f"{self._name}: {word['error']}")
        return word

    async def ask(self, order: Mapping[str, Any], *, timeout_s: float = 60.0) -> dict[str, Any]:
        """Tells it something and returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()
        return await self.hear(timeout_s=timeout_s)

    async def end(self, *, timeout_s: float) -> int:
        """Ends its input and waits for it; killed when it takes too long. Returns its exit code."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(timeout_s):
                code = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            code = await self._process.wait()
        await self._reader
        return code

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            word: dict[str, Any] = json.loads(line)
            if "fired" in word:
                self.on_word(word)
            else:
                self._heard.put_nowait(word)
        self._heard.put_nowait({"ended": await self._process.wait()})


# --- on the other side ---------------------------------------------------------------------------


def say(document: Mapping[str, Any]) -> None:
    print(json.dumps(document), flush=True)


async def orders() -> AsyncIterator[dict[str, Any]]:
    """What the owner says, until it says no more."""
    reader = asyncio.StreamReader(limit=_LINE_BYTES_MAX)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


async def obey(do: Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]) -> None:
    """Answers each order until there are no more; an exception of `do` is the answer, too."""
    async for order in orders():
        try:
            answer = await do(order)
        except Exception as error:  # noqa: BLE001 - the owner decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            say(answer)


def environment(**more: str) -> dict[str, str]:
    """Ours without settings of lakebus, and some more."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LAKEBUS_")}
    return clean | more
