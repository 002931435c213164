"""Noticing that the catalog went back in time, and beginning a new line of history (F3, F4).

What is authoritative: the decision is one transaction (`settle_history`), so any number of
processes may notice at once and one line begins. This class only makes sure that no connection is
used before the server behind it was judged, and that nothing is served from a catalog that was
found behind.

Why nothing slips through: a database cannot go back while a connection to it lives, because a
server that restarts, is promoted or replaced, and a database that is made anew, ends every
connection. So each new connection asks which server start and which database it has reached, one
small question; at the first connection to another one, before it is handed out, the whole judgement
is made on this very connection: by the marker in the object store and by what this process has seen
itself. The same judgement is repeated now and then, for what has no connection to break (a store
that was put back, a second primary that lives on).

The gate is closed by the first bad verdict and opened by the first good one: whoever has accepted
the loss does not need to restart anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import asyncpg

from lakebus.clock import SYSTEM_CHANCE, Chance, new_uuid
from lakebus.errors import HistoryRewound, LakebusError, OutcomeUnknown, Unavailable
from storage.bus.settings import BusSettings
from storage.files.objects import ObjectStore
from storage.postgres.rewind_marker import State, is_newer, read_marker, sees_more, write_marker

_log = logging.getLogger(__name__)


class Connection(Protocol):
    """What is asked of a connection, pooled or not."""

    async def fetchrow(self, query: str, *arguments: object) -> asyncpg.Record | None: ...

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]: ...

    async def fetchval(self, query: str, *arguments: object) -> Any: ...


#: What an operator does about it.
ACCEPT_COMMAND = "lakebus history accept-loss"

_SERVER = """
SELECT pg_postmaster_start_time() AS started, d.oid::bigint AS database
  FROM pg_database d WHERE d.datname = current_database()"""
_LAKE_ID = "SELECT lake_id FROM lake"
_SETTLE = """
SELECT verdict, state::text AS state
  FROM settle_history($1::text::jsonb, $2, $3, $4, $5, $6, $7)"""
_EXAMINE = """
SELECT s::text AS state, history_verdict(s, $1::text::jsonb) AS verdict FROM lake_state() s"""
_HISTORIES = "SELECT history_serial, history_id FROM history"
_REWOUND_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """`marker_s`: how long after a publication its marker is written, with those in between.
    `check_s`: how often everything is judged again though nothing happened; `recheck_s`: the same
    while the gate is closed or the judgement fails."""

    marker_s: float = 1.0
    check_s: float = 5.0
    recheck_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Settled:
    """One judgement: `verdict` is empty, same, behind, began, changed or foreign; an examination
    that changes nothing may also find new_line or unbound."""

    verdict: str
    state: State | None
    marker: State | None


class Histories(Mapping[int, uuid.UUID]):
    """History ids by serial, as far as this process knows them."""

    def __init__(self, on_unknown: Callable[[], None]) -> None:
        self._known: dict[int, uuid.UUID] = {}
        self._on_unknown = on_unknown

    def learn(self, known: Mapping[int, uuid.UUID]) -> None:
        self._known.update(known)

    def __getitem__(self, serial: int) -> uuid.UUID:
        known = self._known.get(serial)
        if known is None:
            self._on_unknown()
            raise OutcomeUnknown(
                "a new line of history has just begun; ask again with the same key",
                retry_after_s=1.0,
            )
        return known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


async def examine(connection: Connection, *, store: ObjectStore | None) -> Settled:
    """The verdict by the marker alone; changes nothing. Raises Unavailable, Corrupt."""

    marker, foreign = await _marker_of(connection, store)
    if foreign:
        return Settled("foreign", None, marker)
    return await _examine(connection, marker, None)


async def _examine(connection: Connection, marker: State | None, seen: State | None) -> Settled:
    row = await connection.fetchrow(_EXAMINE, _witnesses(marker, seen))
    assert row is not None
    if row["state"] is None:
        return Settled("empty", None, marker)
    return Settled(row["verdict"], json.loads(row["state"]), marker)


def _witnesses(*states: State | None) -> str:
    return json.dumps([state for state in states if state is not None])


async def settle(
    connection: Connection,
    *,
    store: ObjectStore | None,
    bus_settings: BusSettings,
    seen: State | None = None,
    accept: uuid.UUID | None = None,
    reason: str | None = None,
) -> Settled:
    """Judges the catalog behind `connection` and does what follows, as one transaction.

    A line that began is in the marker before this returns, so that nothing is served on a line that
    the store does not know. `accept` names the line whose loss is accepted. Without a store no line
    is begun, because nobody could tell what is missing. Raises Unavailable, Corrupt.
    """

    if store is None:
        return await _examine(connection, None, seen)
    marker, foreign = await _marker_of(connection, store)
    if foreign:
        return Settled("foreign", None, marker)
    row = await connection.fetchrow(
        _SETTLE,
        _witnesses(marker, seen),
        accept,
        reason,
        new_uuid(),
        new_uuid(),
        bus_settings.claim_bytes_max,
        bus_settings.claim_entries_max,
    )
    assert row is not None
    state = json.loads(row["state"]) if row["state"] is not None else None
    settled = Settled(row["verdict"], state, marker)
    if settled.verdict == "began" and state is not None:
        _log.warning(
            "a new line of history began: %s, forked at its parent's end", state["history_id"]
        )
    if state is None or settled.verdict not in ("same", "began"):
        return settled
    if is_newer(state, marker):
        try:
            await write_marker(store, state)
        except Unavailable as error:
            if settled.verdict == "began":
                raise  # nothing is served on a line that the store does not know
            # A full store must not keep a new process from renewing leases: the marker only says
            # less than it could, and the next comparison tries again.
            _log.warning("the marker was not written: %s", error)
    return settled


async def _marker_of(
    connection: Connection, store: ObjectStore | None
) -> tuple[State | None, bool]:
    """The marker of this lake; or that of another lake, and True, when there is none of it."""

    lake_id = await connection.fetchval(_LAKE_ID)
    marker = await read_marker(store, lake_id) if store is not None else None
    return marker, marker is not None and marker["lake_id"] != str(lake_id)


def refusal(settled: Settled) -> HistoryRewound | None:
    """The error of a verdict that stops every door."""

    marker = settled.marker
    if settled.verdict == "foreign":
        assert marker is not None
        return HistoryRewound(
            f"the object store belongs to the lake {marker['lake_id']} and the database does not "
            "hold it: restore that lake's database, or use another folder for the objects",
            retry_after_s=_REWOUND_RETRY_S,
        )
    if settled.verdict == "behind":
        return HistoryRewound(
            "the database is older than what was already seen of it (a restored volume, or a "
            "standby that lagged): stop, look at what was lost, and if it cannot be brought back "
            f"run `{ACCEPT_COMMAND}`",
            retry_after_s=_REWOUND_RETRY_S,
            snapshot_id=settled.state["snapshot_id"] if settled.state else None,
            snapshot_id_seen=marker["snapshot_id"] if marker else None,
        )
    return None


class HistoryGuard:
    """One per process. `start` begins the repeated judgement; before it, connections are judged
    all the same."""

    def __init__(
        self,
        *,
        store: ObjectStore | None,
        bus_settings: BusSettings,
        settings: GuardSettings | None = None,
        chance: Chance = SYSTEM_CHANCE,
    ) -> None:
        self._store = store
        self._bus_settings = bus_settings
        self._settings = settings or GuardSettings()
        self._chance = chance
        self._admitted: tuple[Any, int] | None = None
        self._refusal: HistoryRewound | None = None
        self._settling = asyncio.Lock()
        self._urgent = asyncio.Event()
        self._changed = asyncio.Event()
        self._seen_history: uuid.UUID | None = None
        self._seen_snapshot = 0
        self._seen_ends = [0] * bus_settings.shards
        self._task: asyncio.Task[None] | None = None
        self._replaced: Callable[[], Awaitable[None]] | None = None
        self.histories = Histories(self._urgent.set)

    # --- what this process sees --------------------------------------------------------------

    def saw_head(self, history: uuid.UUID, snapshot_id: int) -> None:
        """Called with every head that is read."""

        if history != self._seen_history:
            self._urgent.set()  # a line that was not judged here yet
        elif snapshot_id > self._seen_snapshot:
            self._seen_snapshot = snapshot_id

    def saw_entry(self, shard: int, position: int) -> None:
        """Called with every entry for which this process has a receipt."""

        if position >= self._seen_ends[shard]:
            self._seen_ends[shard] = position + 1

    def changed(self) -> None:
        """Something was published here: the marker is due."""

        self._changed.set()

    # --- the gate ----------------------------------------------------------------------------

    @property
    def rewound(self) -> bool:
        return self._refusal is not None

    def refuse(self) -> None:
        """Raises HistoryRewound while the gate is closed."""

        error = self._refusal
        if error is not None:
            raise HistoryRewound(error.detail, retry_after_s=error.retry_after_s, **error.members)

    async def admit(self, connection: Connection) -> None:
        """Judges the server behind a new connection, unless it is the one judged last. A bad
        verdict closes the gate; the connection may then be used to look, not to serve."""

        if await self._server_of(connection) != self._admitted:
            await self.judge(connection)

    async def judge(self, connection: Connection) -> Settled:
        """The whole judgement now, on this connection. Raises Unavailable, Corrupt."""

        async with self._settling:
            server = await self._server_of(connection)
            self._changed.clear()
            seen = self._seen()
            settled = await settle(
                connection, store=self._store, bus_settings=self._bus_settings, seen=seen
            )
            await self._conclude(connection, settled, server)
            if settled.verdict == "behind" and seen is not None:
                await self._testify(settled, seen)
        return settled

    async def _testify(self, settled: Settled, seen: State) -> None:
        """What only this process saw goes into the marker, so that everybody stops, and whoever
        accepts the loss is told of it."""

        state, marker = settled.state, settled.marker
        if self._store is None or state is None or seen["history_id"] != state["history_id"]:
            return
        ahead = seen["snapshot_id"] - state["snapshot_id"]
        witness = {
            **state,
            **seen,
            # Both count publications, so the one tells the other.
            "publish_count": state["publish_count"] + max(ahead, 0),
            "snapshot_id": max(seen["snapshot_id"], state["snapshot_id"]),
            "wal": (state["wal"] or 0) + 1,
        }
        if marker is None or (
            marker["history_id"] == seen["history_id"] and sees_more(witness, marker)
        ):
            await write_marker(self._store, witness)

    async def _conclude(
        self, connection: Connection, settled: Settled, server: tuple[Any, int]
    ) -> None:
        error = refusal(settled)
        was, self._refusal = self._refusal, error
        known, self._admitted = self._admitted, server if error is None else None
        if error is not None and was is None:
            _log.error("nothing is served: %s", error)
            self._urgent.set()  # from here on it is judged more often
        if settled.verdict == "empty":
            self._admitted = None
            return
        state = settled.state
        line = uuid.UUID(state["history_id"]) if state is not None else None
        if error is None and state is not None and line != self._seen_history:
            rows = await connection.fetch(_HISTORIES)
            self.histories.learn({row["history_serial"]: row["history_id"] for row in rows})
            self._seen_history = line
            self._seen_snapshot = state["snapshot_id"]
            self._seen_ends = list(state["ends"])
        if known is not None and self._admitted != known and self._replaced is not None:
            # Connections to what was admitted before must not be used beside those to this one.
            await self._replaced()

    async def _server_of(self, connection: Connection) -> tuple[Any, int]:
        row = await connection.fetchrow(_SERVER)
        assert row is not None
        return row["started"], row["database"]

    def _seen(self) -> State | None:
        if self._seen_history is None:
            return None
        return {
            "history_id": str(self._seen_history),
            "snapshot_id": self._seen_snapshot,
            "ends": list(self._seen_ends),
        }

    # --- now and then ------------------------------------------------------------------------

    def start(
        self, look: Callable[[], Awaitable[object]], *, replaced: Callable[[], Awaitable[None]]
    ) -> None:
        """`look` judges on a connection of the caller's choice; `replaced` is called when another
        server was admitted, to give up the connections to the one before."""

        self._replaced = replaced
        self._task = asyncio.get_running_loop().create_task(self._run(look), name="history guard")

    async def stop(self, look: Callable[[], Awaitable[object]], *, within_s: float = 2.0) -> None:
        """Writes the last marker, so that a copy of what is shut down in order is exact."""

        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._changed.is_set() and self._store is not None:
            try:
                async with asyncio.timeout(within_s):
                    await look()
            except (LakebusError, TimeoutError) as error:
                _log.warning("the last marker was not written: %s", error)

    async def _run(self, look: Callable[[], Awaitable[object]]) -> None:
        while True:
            await self._wait()
            try:
                await look()
            except LakebusError as error:
                _log.warning("the catalog cannot be compared with its marker: %s", error)
                await asyncio.sleep(self._settings.recheck_s)
            except Exception:  # noqa: BLE001 (a bug here must not end every later comparison)
                _log.exception("comparing the catalog with its marker failed")
                await asyncio.sleep(self._settings.recheck_s)

    async def _wait(self) -> None:
        """Until something is urgent; a publication is old enough for its marker; or it is time."""

        wait_s = self._settings.recheck_s if self.rewound else self._settings.check_s
        urgent = asyncio.ensure_future(self._urgent.wait())
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait(
                (urgent, changed),
                timeout=wait_s * (0.75 + self._chance.jitter() / 2),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if changed.done():
                await asyncio.wait((urgent,), timeout=self._settings.marker_s)
        finally:
            urgent.cancel()
            changed.cancel()
        self._urgent.clear()
