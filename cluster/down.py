"""`lakebus down`: stopping a stack by the processes it wrote down, whatever state it is in."""

from __future__ import annotations

import signal

from cluster import leftovers, processes
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.stack_files import StackFiles
from lakebus.errors import StartRefused
from lakebus.settings import Settings

_PATIENCE_S = 60.0


async def take_down(settings: Settings) -> str:
    """Stop the stack in the data folder; returns what was done, in words."""
    files = StackFiles(settings.data_dir)
    state = files.state()
    if state is None:
        return f"Nothing runs in {files.root}."
    if state.supervisor.send(signal.SIGTERM):
        if await processes.wait_gone(state.supervisor, timeout_s=_PATIENCE_S):
            return f"Stopped the stack in {files.root}."
        raise StartRefused(
            f"The stack in {files.root} (process {state.supervisor.pid}) does not stop;"
            " `lakebus logs up` tells what it waits for."
        )
    cleared = await leftovers.clear(state, state.stack_id)
    if await EmbeddedPostgres(files.root).stop_leftover():
        cleared += 1
    if not cleared:
        return f"Nothing runs in {files.root}."
    return f"Cleared away {cleared} processes that a killed stack left in {files.root}."
