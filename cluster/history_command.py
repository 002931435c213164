"""`lakebus history`: what became of the database's past, and accepting a loss (contract F4).

Works on the external database, on the embedded one of a running stack, or on the embedded one that
is started for the command. It needs the database's DSN, which is more than any API key gives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster import components
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.schema_state import require_known_schema
from cluster.stack_files import StackFiles
from lakebus.errors import StartRefused
from lakebus.settings import Settings
from storage.postgres.rewind_acceptance import Report, accept_loss, report


async def show(settings: Settings) -> Report:
    """Compares the database with the marker in the object store; changes nothing."""

    async with database_of(settings) as dsn:
        return await report(dsn, store=components.object_store(settings))


async def accept(
    settings: Settings, *, agreed: Callable[[Report], bool], say: Callable[[str], None]
) -> bool:
    """Shows what is lost, asks, and begins a new line of history; False if nothing was done."""

    store = components.object_store(settings)
    async with database_of(settings) as dsn:
        found = await report(dsn, store=store)
        for line in lines(found):
            say(line)
        if found.verdict != "behind" or not agreed(found):
            return False
        assert found.history_id is not None
        began = await accept_loss(
            dsn,
            store=store,
            bus_settings=components.bus_settings(settings),
            history_id=found.history_id,
        )
    say(
        f"A new line of history began, {began.history_id}, with snapshot {began.snapshot_id}."
        " Servers that run open by themselves within seconds."
    )
    return True


def lines(found: Report) -> list[str]:
    """The report for people."""

    stands = f"The database stands at snapshot {found.snapshot_id}, published at"
    first = f"{stands} {found.published_at}, in the line of history {found.history_id}."
    if found.verdict == "behind":
        return [
            first,
            "It is older than what was already seen of it. Lost, at least:",
            *(f"  - {loss}" for loss in found.losses),
            "What was accepted within about a second after the last of these, nobody wrote down.",
        ]
    if found.verdict == "new_line":
        return [
            first,
            "It runs on a server or timeline that is new to it, and nothing is known to be lost:"
            " a new line of history begins by itself when the next process connects.",
        ]
    return [first, "It is not older than its marker in the object store: nothing is lost."]


@asynccontextmanager
async def database_of(settings: Settings) -> AsyncIterator[str]:
    """The DSN of the lake's database, started for this command when it is ours and stopped. Raises
    StartRefused."""

    if settings.postgres.dsn is not None:
        yield await _known(components.dsn_of(settings))
        return
    files = StackFiles(settings.data_dir)
    server = EmbeddedPostgres.from_settings(files.root, settings.postgres)
    if server.leftover() is not None:
        running = components.read_settings(str(files.root / components.SETTINGS_FILE))
        yield await _known(components.dsn_of(running))
        return
    if not server.cluster_dir.exists():
        raise StartRefused(f"There is no database in {files.root}; name its folder with --data-dir")
    files.make()
    with files.locked():
        async with server:
            yield await _known(server.dsn)


async def _known(dsn: str) -> str:
    await require_known_schema(dsn)
    return dsn
