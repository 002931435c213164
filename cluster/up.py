"""`lakebus up`: running a stack in this terminal, or leaving it behind in the background."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler

import click

from cluster.processes import ProcessMark
from cluster.stack import WIRING, Ready, Stack
from cluster.stack_files import StackFiles
from lakebus.errors import LakebusError, StartRefused
from lakebus.settings import Settings

READY_PHASE = "ready"


def foreground(settings: Settings, *, wiring: str = WIRING, migrate_external: bool = False) -> int:
    """Run a stack until SIGINT or SIGTERM; returns the exit code.

    Must be called on the main thread: the kernel ends the Ray host when the thread that started
    it ends.
    """
    _log_to_file(settings)
    log = logging.getLogger("lakebus.stack")

    def say(line: str) -> None:
        log.info(line)
        click.echo(f"lakebus: {line}", err=True)

    def tell(ready: Ready) -> None:
        say(f"ready after {ready.seconds:.1f} s")
        click.echo(f"url      {ready.url}")
        if ready.ingest_url:
            click.echo(f"direct   {ready.ingest_url}")
        if ready.query_url:
            click.echo(f"queries  {ready.query_url}")
        click.echo(f"api key  {ready.api_key}")
        click.echo(f"in       {StackFiles(settings.data_dir).connection_path}")

    async def run() -> None:
        stack = Stack(settings, wiring=wiring, migrate_external=migrate_external, say=say)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stack.stop)
        await stack.run(on_ready=tell)

    try:
        asyncio.run(run())
    except LakebusError as error:
        log.error("%s", error)
        click.echo(f"lakebus: {error}", err=True)
        return 1
    say("stopped")
    return 0


def detached(settings: Settings, arguments: Sequence[str]) -> int:
    """Start `lakebus up` with these arguments in the background; return when it is ready."""
    files = StackFiles(settings.data_dir)
    files.make()
    (files.logs / "up.out").touch(mode=0o600)  # the API key is printed
    with open(files.logs / "up.out", "wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "lakebus", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    mark = ProcessMark.of(child.pid)
    deadline = time.monotonic() + settings.ray.start_timeout_s + settings.postgres.start_timeout_s
    while time.monotonic() < deadline:
        code = child.poll()
        if code is not None:
            said = (files.logs / "up.out").read_text(errors="replace").strip()
            click.echo(said, err=True)
            return code or 1
        state = files.state()
        if state is not None and state.supervisor == mark and state.phase == READY_PHASE:
            said = (files.logs / "up.out").read_text(errors="replace").strip()
            if said.endswith(str(files.connection_path)):  # its last line, a moment after the state
                click.echo(said)
                return 0
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    raise StartRefused("The stack did not get ready in time; `lakebus logs` tells more.")


def _log_to_file(settings: Settings) -> None:
    files = StackFiles(settings.data_dir)
    files.make()
    handler = RotatingFileHandler(
        files.logs / "up.log", maxBytes=settings.log.file_bytes_max, backupCount=1
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("lakebus")
    log.addHandler(handler)
    log.setLevel(settings.log.level.upper())
