"""Upkeep in PostgreSQL. See `storage.maintenance.interface.Upkeep` for what is promised.

Every call is one call of a server-side function (`storage/sql/functions/swap.sql`, `expiry.sql`,
`pins.sql`, `collection.sql`), where it is told why it is safe, on a gated connection: a catalog
that went back in time refuses all of them. Before files are given up for deletion the whole
judgement of `storage.postgres.rewind` is made anew, on that very connection, because what is
deleted then is gone for good.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import asyncpg

from lakebus.errors import SnapshotExpired, SnapshotNotFound, TagExists, Unavailable
from lakebus.snapshots import DataFile
from storage.catalog.interface import Catalog
from storage.files.objects import ObjectStore
from storage.maintenance.interface import (
    CondemnedFile,
    Expired,
    Intent,
    Pin,
    Swap,
    SwapOutcome,
    Swapped,
    Tag,
    check_swap,
)
from storage.postgres.failures import reading, writing
from storage.postgres.file_rows import FILE_COLUMNS, data_file, file_proposal
from storage.postgres.pool import Pool
from storage.postgres.rewind import HistoryGuard, examine, refusal

#: Snapshots that one transaction expires, and files that one condemns or gives up: fractions of a
#: second, because pins wait for it.
EXPIRE_STEP = 5_000
FILES_STEP = 2_000
#: Rows made into nouns before the loop is given back.
_CHUNK = 1_000
_FAR = 2**63 - 1

_LIVE_FILES = f"""
SELECT {FILE_COLUMNS} FROM data_file WHERE table_id = $1 AND last_snapshot IS NULL
 ORDER BY first_snapshot, file_id"""
_FILE_COUNTS = """
SELECT table_id, count(*) AS files, count(*) FILTER (WHERE size_bytes < $1) AS small
  FROM data_file WHERE last_snapshot IS NULL GROUP BY table_id"""
_REGISTER = """
INSERT INTO write_intent (file_id, kind, owner, expires_at, table_id)
SELECT gen_random_uuid(), 'data', $3, clock_timestamp() + $4, $1 FROM generate_series(1, $2)
RETURNING file_id"""
_REGISTER_CANARY = """
INSERT INTO write_intent (file_id, kind, owner, expires_at)
VALUES (gen_random_uuid(), 'canary', $1, clock_timestamp() + $2) RETURNING file_id"""
_SWAP = "SELECT * FROM publish_swap($1, $2, $3, $4, $5, $6, $7)"
_SWAP_RECORD = """
SELECT 'published' AS outcome, snapshot_id, published_at FROM snapshot WHERE publication_id = $1"""
_EXPIRE = "SELECT * FROM expire_snapshots($1, $2, $3, $4)"
_TAG = "SELECT * FROM create_tag($1, $2, $3)"
_PIN = "SELECT * FROM hold_pin($1, $2, $3, $4, $5, $6)"
_PINS = """
SELECT pin_id, kind, floor, snapshot_ids, expires_at, note FROM pin
 WHERE expires_at IS NULL OR expires_at > clock_timestamp() ORDER BY expires_at, pin_id"""
_CONDEMN = "SELECT * FROM condemn($1, $2)"
_BEGIN_DELETES = "SELECT * FROM begin_deletes($1, $2, $3)"
#: A page of each wanted state, by its index, and of these the newest.
_CONDEMNED = """
SELECT c.* FROM unnest(ARRAY['condemned', 'deleting', 'deleted']) AS s (state),
       LATERAL (SELECT * FROM condemned_file f
                 WHERE f.state = s.state AND f.condemned_at < coalesce($3, 'infinity'::timestamptz)
                 ORDER BY f.condemned_at DESC, f.file_id LIMIT $2) c
 WHERE s.state = coalesce($1, s.state)
 ORDER BY c.condemned_at DESC, c.file_id LIMIT $2"""
_NOTE_DELETED = """
UPDATE condemned_file SET state = 'deleted', deleted_at = clock_timestamp()
 WHERE file_id = ANY ($1) AND state = 'deleting'"""
_KNOWN = """
SELECT n.file_id,
       CASE WHEN f.file_id IS NOT NULL OR l.payload_key IS NOT NULL THEN 'used'
            WHEN w.file_id IS NOT NULL THEN 'intended' ELSE c.state END AS known
  FROM unnest($1::uuid[]) AS n (file_id)
  LEFT JOIN data_file f ON f.file_id = n.file_id
  LEFT JOIN bus_log l ON l.payload_key = 'bus/' || n.file_id || '.segment'
  LEFT JOIN write_intent w ON w.file_id = n.file_id
  LEFT JOIN condemned_file c ON c.file_id = n.file_id"""
_FORGET = """
WITH old AS (SELECT file_id FROM condemned_file
              WHERE state = 'deleted' AND deleted_at < clock_timestamp() - $1::interval LIMIT $2),
     gone AS (DELETE FROM condemned_file c USING old o WHERE c.file_id = o.file_id RETURNING 1)
SELECT count(*) FROM gone"""


class PostgresUpkeep:
    """`object_store` is where the catalog's marker lies; without one nothing can be deleted that a
    catalog put back in time would still need, so its check is left out."""

    def __init__(
        self,
        *,
        pool: Pool,
        scans: Pool,
        catalog: Catalog,
        guard: HistoryGuard,
        object_store: ObjectStore | None,
    ) -> None:
        self._pool = pool
        self._scans = scans
        self._catalog = catalog
        self._guard = guard
        self._store = object_store

    # --- rewriting ---------------------------------------------------------------------

    async def live_files(self, table_id: int) -> Sequence[DataFile]:
        files: list[DataFile] = []
        for number, row in enumerate(await self._scan(_LIVE_FILES, table_id)):
            files.append(data_file(row, _FAR))
            if number % _CHUNK == 0:
                await asyncio.sleep(0)
        return files

    async def file_counts(self, *, small_bytes: int) -> Mapping[int, tuple[int, int]]:
        rows = await self._scan(_FILE_COUNTS, small_bytes)
        return {row["table_id"]: (row["files"], row["small"]) for row in rows}

    async def register_intents(
        self, table_id: int, count: int, *, owner: uuid.UUID, ttl_s: float
    ) -> Sequence[uuid.UUID]:
        rows = await self._all(_REGISTER, table_id, count, owner, _interval(ttl_s))
        return [row["file_id"] for row in rows]

    async def register_canary(self, *, owner: uuid.UUID, ttl_s: float) -> uuid.UUID:
        row = await self._one(_REGISTER_CANARY, owner, _interval(ttl_s))
        file_id: uuid.UUID = row["file_id"]
        return file_id

    async def forget_canary(self, file_id: uuid.UUID) -> None:
        await self._all("DELETE FROM write_intent WHERE file_id = $1 AND kind = 'canary'", file_id)

    async def publish_swap(self, swap: Swap) -> Swapped:
        check_swap(swap)
        # failpoint: upkeep.before_swap
        async with self._pool.connection() as connection:
            with writing():
                row = await connection.fetchrow(
                    _SWAP,
                    swap.publication_id,
                    swap.table_id,
                    swap.operation.value,
                    list(swap.inputs),
                    [file_proposal(file) for file in swap.files],
                    swap.rows_removed,
                    dict(swap.summary),
                )
        self._guard.changed()
        assert row is not None
        return _swapped(row)

    async def swap_outcome(self, publication_id: uuid.UUID) -> Swapped | None:
        async with self._pool.connection() as connection:
            with reading():
                # Whoever publishes holds the head row until the end: what is read after it is so.
                await connection.execute("SELECT 1 FROM lake FOR UPDATE")
                row = await connection.fetchrow(_SWAP_RECORD, publication_id)
        return None if row is None else _swapped(row)

    # --- snapshots ---------------------------------------------------------------------

    async def expire_snapshots(
        self, *, keep_s: float, keep_count: int, limit: int, dry_run: bool = False
    ) -> Expired:
        """In steps of `EXPIRE_STEP`, each one transaction that is right by itself."""

        total: Expired | None = None
        while True:
            step = limit if dry_run else min(limit, EXPIRE_STEP)
            row = await self._one(_EXPIRE, _interval(keep_s), keep_count, step, dry_run)
            made = Expired(
                row["first_id"], row["last_id"], row["tagged"], row["oldest_snapshot_id"]
            )
            total = made if total is None else _joined(total, made)
            limit -= step
            if dry_run or made.first is None or limit <= 0:
                return total

    async def create_tag(self, name: str, snapshot_id: int, *, created_by: str) -> Tag:
        if not 0 < snapshot_id <= _FAR:
            raise SnapshotNotFound(f"there is no snapshot {snapshot_id}")
        row = await self._one(_TAG, name, snapshot_id, created_by)
        if row["outcome"] == "not_retained":
            await self._raise_not_retained(snapshot_id)
        if row["outcome"] == "taken":
            raise TagExists(
                f"the tag {name} names snapshot {row['snapshot_id']}: choose another name, or "
                "delete the tag first",
                snapshot_id=row["snapshot_id"],
            )
        return _tag(row)

    async def drop_tag(self, name: str) -> Tag | None:
        rows = await self._all("SELECT * FROM drop_tag($1)", name)
        return _tag(rows[0]) if rows else None

    async def tags(self) -> Sequence[Tag]:
        return [_tag(row) for row in await self._all("SELECT * FROM tag ORDER BY name")]

    # --- pins --------------------------------------------------------------------------

    async def pin(
        self,
        pin_id: uuid.UUID,
        *,
        kind: str,
        floor: int | None,
        snapshot_ids: Sequence[int] = (),
        ttl_s: float | None,
        note: str = "",
    ) -> Pin:
        row = await self._one(
            _PIN,
            pin_id,
            kind,
            floor,
            list(snapshot_ids),
            None if ttl_s is None else _interval(ttl_s),
            note,
        )
        if row["refused"] is not None:
            await self._raise_not_retained(row["refused"], floor=row["refused"] == floor)
        return Pin(pin_id, kind, floor, tuple(snapshot_ids), row["expires_at"], note)

    async def release_pin(self, pin_id: uuid.UUID) -> None:
        await self._all("DELETE FROM pin WHERE pin_id = $1", pin_id)

    async def pins(self) -> Sequence[Pin]:
        return [
            Pin(
                row["pin_id"],
                row["kind"],
                row["floor"],
                tuple(row["snapshot_ids"]),
                row["expires_at"],
                row["note"],
            )
            for row in await self._all(_PINS)
        ]

    # --- collection --------------------------------------------------------------------

    async def condemn(self, *, limit: int, dry_run: bool = False) -> Sequence[CondemnedFile]:
        """In steps of `FILES_STEP`, each one transaction."""

        if dry_run:
            return [_condemned(row) for row in await self._scan(_CONDEMN, limit, True)]
        found: list[CondemnedFile] = []
        while len(found) < limit:
            step = min(FILES_STEP, limit - len(found))
            rows = await self._all(_CONDEMN, step, False)
            found += [_condemned(row) for row in rows]
            if len(rows) < step:
                break
        return found

    async def condemn_orphans(
        self, *, older_than_s: float, limit: int, dry_run: bool = False
    ) -> Sequence[CondemnedFile]:
        rows = await self._all(
            "SELECT * FROM condemn_orphans($1, $2, $3)", _interval(older_than_s), limit, dry_run
        )
        return [_condemned(row) for row in rows]

    async def begin_deletes(
        self, *, window_s: float, limit: int, dry_run: bool = False
    ) -> Sequence[CondemnedFile]:
        """In steps of `FILES_STEP`, each one transaction. Raises HistoryRewound for a catalog
        behind its marker or another lake's, and Unavailable when the object store holds no marker
        at all: it is not the store of this catalog."""

        window = _interval(window_s)
        if dry_run:
            rows = await self._scan(_BEGIN_DELETES, window, limit, True)
            return [_condemned(row) for row in rows]
        async with self._pool.connection() as connection:
            with reading():
                if self._store is not None:
                    await self._judge(connection)
                # failpoint: upkeep.before_deletes
                rows = await connection.fetch(_BEGIN_DELETES, window, min(limit, FILES_STEP), False)
                more = True
                while more and len(rows) < limit:
                    begun = len(rows)
                    step = min(limit, begun + FILES_STEP)
                    rows = await connection.fetch(_BEGIN_DELETES, window, step, False)
                    more = len(rows) > begun
        return [_condemned(row) for row in rows]

    async def _judge(self, connection: Any) -> None:
        settled = await examine(connection, store=self._store)
        error = refusal(settled)
        if error is not None:
            raise error
        if settled.marker is None:
            raise Unavailable(
                "the object store holds no marker of this lake, so it is not the store that the "
                "catalog knows: nothing is deleted; check the setting of the data directory"
            )

    async def note_deleted(self, file_ids: Sequence[uuid.UUID]) -> None:
        await self._all(_NOTE_DELETED, list(file_ids))

    async def condemned(
        self, *, state: str | None = None, limit: int = 1_000, before: dt.datetime | None = None
    ) -> Sequence[CondemnedFile]:
        return [_condemned(row) for row in await self._all(_CONDEMNED, state, limit, before)]

    async def intents(self) -> Sequence[Intent]:
        rows = await self._scan("SELECT * FROM write_intent ORDER BY expires_at, file_id")
        return [
            Intent(row["file_id"], row["kind"], row["owner"], row["expires_at"], row["table_id"])
            for row in rows
        ]

    async def known_names(self, file_ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, str]:
        rows = await self._scan(_KNOWN, list(file_ids))
        return {row["file_id"]: row["known"] for row in rows if row["known"] is not None}

    async def forget_deleted(self, *, older_than_s: float, limit: int) -> int:
        return int((await self._one(_FORGET, _interval(older_than_s), limit))[0])

    # --- plumbing ----------------------------------------------------------------------

    async def _raise_not_retained(self, snapshot_id: int, *, floor: bool = False) -> NoReturn:
        if not floor:
            await self._catalog.snapshot(snapshot_id)  # each way of not being there has its error
        head = await self._catalog.head()
        raise SnapshotExpired(
            f"snapshot {snapshot_id} has expired", oldest_snapshot_id=head.oldest_snapshot_id
        )

    async def _one(self, statement: str, *arguments: object) -> asyncpg.Record:
        (row,) = await self._all(statement, *arguments)
        return row

    async def _all(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """For calls that may be repeated: whether a lost one took effect does not matter."""

        async with self._pool.connection() as connection:
            with reading():
                return list(await connection.fetch(statement, *arguments))

    async def _scan(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        async with self._scans.connection() as connection:
            with reading():
                return list(await connection.fetch(statement, *arguments))


def _interval(seconds: float) -> dt.timedelta:
    return dt.timedelta(seconds=seconds)


def _swapped(row: asyncpg.Record) -> Swapped:
    return Swapped(SwapOutcome(row["outcome"]), row["snapshot_id"], row["published_at"])


def _joined(one: Expired, other: Expired) -> Expired:
    return Expired(
        one.first,
        one.last if other.last is None else other.last,
        one.tagged + other.tagged,
        other.oldest_snapshot_id,
    )


def _tag(row: asyncpg.Record) -> Tag:
    return Tag(row["name"], row["snapshot_id"], row["created_at"], row["created_by"])


def _condemned(row: asyncpg.Record) -> CondemnedFile:
    return CondemnedFile(
        row["file_id"],
        row["object_key"],
        row["table_id"],
        row["reason"],
        row["size_bytes"],
        row["state"],
        row["condemned_at"],
        row["deleted_at"],
    )
