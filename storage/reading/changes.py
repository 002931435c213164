"""The change feed: the rows of one table that were published between two snapshots (D12).

A row is known for ever by (shard, position of its entry, row in the entry), which every file keeps,
and each position was published once, in a range that the catalog remembers for ever. So the feed
asks no file when its rows came: it reads files and keeps the rows whose position lies in a range
published in (after, until]. Compaction moves rows between files and changes neither, so it cannot
repeat or lose one.

Which files hold them all: those of the snapshot `until` (the ones that began after `after`), and,
because a delete or row retention may have removed a row in the window that published it, the files
that such a snapshot of the window ended. A row may lie in several of these, so then each place
counts once. A removal is no event of the feed: it says what was published.

When they are still there: a file that ended with snapshot e is needed by the snapshot e - 1, so it
is kept while that one is retained. From an `after` at or above the oldest retained snapshot on,
nothing is missing. An older `after` is answered only if no delete or row retention of the table is
recorded between it and the oldest retained snapshot (records of snapshots outlive their expiry);
else SnapshotExpired, instead of a feed that is shorter than it was.

Pages are in order of (shard, position, row). A cursor is the window and the place of the last row:
it needs no state in the server, and any replica can go on from it while `until` is retained.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime as dt
import json
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import pyarrow as pa

from lakebus.clock import Clock, SystemClock
from lakebus.errors import Fault, MalformedRequest, QueryTimeout, SnapshotExpired
from lakebus.schemas import POSITION_COLUMN, ROW_COLUMN, SHARD_COLUMN, TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import Catalog, Head, PublishedRange
from storage.engine.plans import Integers, QueryPlan, ResultFormat, SourceTable
from storage.files.parquet import scan_expression
from storage.reading.holds import Hold, Pins, Unpinned, held
from storage.reading.manifest import Manifest, SnapshotView
from storage.reading.planning import Planner, find_table
from storage.reading.query import Engine
from storage.reading.resolve import Resolved, Resolver, SnapshotChoice
from storage.turns import OURSELVES, Party

SNAPSHOT_COLUMN = "$snapshot"
#: The hidden columns, before the table's own.
PLACE_COLUMNS = (SNAPSHOT_COLUMN, SHARD_COLUMN, POSITION_COLUMN, ROW_COLUMN)
ROWS_MAX = 10_000
_TABLE = "changes"
_SQL = f"SELECT * FROM {_TABLE} ORDER BY 2, 3, 4 LIMIT {{limit}}"
_ROW_MAX = 2**31 - 1
_SHARD_MAX = 2**15 - 1


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a row stands among all rows of the lake."""

    shard: int = 0
    position: int = 0
    row: int = -1


@dataclass(frozen=True, slots=True)
class Window:
    """What was published after the snapshot `after`, up to `until`; `place`: rows beyond it."""

    after: int
    until: int
    place: Place = Place()

    def encode(self, table_id: int) -> str:
        """An opaque cursor, good for this table only."""

        numbers = (table_id, self.after, self.until, *dataclasses.astuple(self.place))
        text = json.dumps(numbers, separators=(",", ":")).encode("ascii")
        return base64.urlsafe_b64encode(text).rstrip(b"=").decode("ascii")

    @classmethod
    def decode(cls, text: str, table_id: int) -> Window:
        """Raises MalformedRequest for anything that `encode` did not give for this table."""

        known, window = _numbers_of(text)
        if known != table_id:
            raise MalformedRequest("the cursor belongs to another table")
        return window

    @staticmethod
    def until_of(text: str) -> int:
        """The end of a cursor's window, whatever its table. Raises MalformedRequest."""

        return _numbers_of(text)[1].until


def _numbers_of(text: str) -> tuple[int, Window]:
    numbers: tuple[int, ...] = ()
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        numbers = msgspec.json.decode(raw, type=tuple[int, int, int, int, int, int])
    except (ValueError, msgspec.DecodeError):
        pass  # no numbers: refused below
    sound = len(numbers) == 6 and all(0 <= n < 2**63 for n in numbers[:5])
    if not sound or not -1 <= numbers[5] <= _ROW_MAX or numbers[3] > _SHARD_MAX:
        raise MalformedRequest("the cursor is damaged: send it as it was given, or leave it out")
    return numbers[0], Window(numbers[1], numbers[2], Place(*numbers[3:]))


@dataclass(frozen=True, slots=True)
class ChangesRequest:
    """A page. `table` is the folded name; the caller has checked that it may be read."""

    table: str
    window: Window
    limit: int = 1_000
    timeout_ms: int = 30_000
    result_format: ResultFormat = "json"
    integers: Integers = "string"
    party: Party = OURSELVES


@dataclass(frozen=True, slots=True)
class ChangesPage:
    """A page: `body` is a JSON array of rows, or an Arrow stream. `cursor` is None at the end."""

    columns: list[dict[str, str]]
    body: bytes
    row_count: int
    cursor: str | None


class Changes(Protocol):
    """Whoever has the rows: this process, or another replica."""

    def page(self, request: ChangesRequest) -> Coroutine[Any, Any, ChangesPage]:
        """Raises TableNotFound, SnapshotExpired, QueryTimeout, ResultTooLarge, Unavailable."""
        ...


class ChangeReader:
    """Reads pages with the SQL engine of this process. `ranges_max`: ranges looked at in a step."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        resolver: Resolver,
        manifest: Manifest,
        planner: Planner,
        engine: Engine,
        pins: Pins | None = None,
        bytes_max: int = 64 << 20,
        ranges_max: int = 1_000,
        clock: Clock | None = None,
    ) -> None:
        self._catalog = catalog
        self._resolver = resolver
        self._manifest = manifest
        self._planner = planner
        self._engine = engine
        self._pins = pins or Unpinned()
        self._bytes_max = bytes_max
        self._ranges_max = ranges_max
        self._clock = clock or SystemClock()

    async def page(self, request: ChangesRequest) -> ChangesPage:
        deadline_s = self._clock.monotonic_s() + request.timeout_ms / 1000
        window = request.window
        resolved = await self._resolver.resolve(
            SnapshotChoice(snapshot_id=window.until), deadline_s=deadline_s
        )
        # Files that the window's snapshots ended are read, too: they are held from its beginning,
        # or from the oldest snapshot that is left.
        oldest = resolved.head.oldest_snapshot_id
        since = min(window.until, max(window.after, oldest))
        async with held(self._pins, since, onward=since >= oldest) as hold:
            return await self._page(request, resolved, hold, deadline_s)

    async def _page(
        self, request: ChangesRequest, resolved: Resolved, hold: Hold, deadline_s: float
    ) -> ChangesPage:
        window = request.window
        view = await self._manifest.at(resolved.snapshot_id, resolved.head)
        schema = find_table(view, request.table, visible=lambda _: True)
        # A file from before the window holds nothing that was published in it.
        files = [
            file for file in view.files(schema.table_id).files if file.first_snapshot > window.after
        ]
        removed = await self._removed(view, schema, window.after, resolved.head)
        paths = self._planner.locate([*files, *removed])
        await self._bring([*files, *removed], hold, deadline_s)
        place = window.place
        while True:
            ranges = await self._catalog.published_ranges(
                after=window.after,
                until=window.until,
                shard=place.shard,
                position=place.position,
                limit=self._ranges_max,
            )
            more = len(ranges) == self._ranges_max
            if not ranges:  # nothing is read, and the answer still has its columns
                paths = []
            source = _source(schema, paths, ranges, place, several=bool(removed))
            page = await self._read(request, source, resolved.started_at, deadline_s)
            if page.row_count == request.limit:
                place = _last_place(page, request.result_format)
            elif more:
                place = Place(ranges[-1].shard, ranges[-1].hi - 1, _ROW_MAX)
                if page.row_count == 0:
                    continue
            else:
                return page
            window = dataclasses.replace(window, place=place)
            return dataclasses.replace(page, cursor=window.encode(schema.table_id))

    async def _bring(self, files: Sequence[DataFile], hold: Hold, deadline_s: float) -> None:
        """To this machine, where the store keeps them elsewhere. Raises QueryTimeout."""

        left_s = max(0.0, deadline_s - self._clock.monotonic_s())
        try:
            async with asyncio.timeout(left_s):
                await self._planner.bring(files, hold)
        except TimeoutError as error:
            raise QueryTimeout(
                "the time ran out while files were brought from the object store: raise timeout_ms,"
                " or ask for fewer snapshots at once",
                phase="fetch",
            ) from error

    async def _removed(
        self, view: SnapshotView, schema: TableSchema, after: int, head: Head
    ) -> tuple[DataFile, ...]:
        """The files that held rows which were removed in the window. Raises SnapshotExpired."""

        table_id, oldest = schema.table_id, head.oldest_snapshot_id
        if after < oldest:
            until = min(oldest, view.snapshot_id)
            if await self._catalog.removed_rows(table_id, after=after, until=until):
                raise SnapshotExpired(
                    f"rows of {schema.name} that were published after snapshot {after} were deleted"
                    " and have expired: read the table at a retained snapshot, and ask for the "
                    "changes after it",
                    oldest_snapshot_id=oldest,
                )
        return view.lost_rows(table_id, began=after, ended=max(after, oldest))

    async def _read(
        self,
        request: ChangesRequest,
        source: SourceTable,
        started_at: dt.datetime,
        deadline_s: float,
    ) -> ChangesPage:
        left_s = deadline_s - self._clock.monotonic_s()
        if left_s <= 0:
            raise QueryTimeout(
                "the time ran out between two parts of the window: raise timeout_ms, or ask for "
                "fewer snapshots at once",
                phase="plan",
            )
        answer = await self._engine.execute(
            QueryPlan(
                sql=_SQL.format(limit=request.limit),
                sources={_TABLE: source},
                started_at=started_at,
                query_id=uuid.uuid4().hex,
                deadline_s=left_s,
                result_format=request.result_format,
                integers=request.integers,
                rows_max=ROWS_MAX,
                bytes_max=self._bytes_max,
                party=request.party,
            )
        )
        try:
            body = b"".join([part async for part in answer])
        finally:
            await answer.aclose()
        if answer.row_count is None:
            raise Fault("a page of changes ended without its count")
        return ChangesPage(answer.columns, body, answer.row_count, None)


def _source(
    schema: TableSchema,
    paths: Sequence[str],
    ranges: Sequence[PublishedRange],
    place: Place,
    *,
    several: bool = False,
) -> SourceTable:
    """The rows of the ranges beyond `place`, with their places, as one relation. `several`: a row
    may lie in several of the files, and then in each as the same.

    ASOF: each row meets the one range that begins at or before its position; ranges are disjoint.
    The bounds on shard and position say nothing new: they are for the reader of Parquet, which can
    skip row groups by them.
    """

    columns = tuple((column.name, column.column_id, column.type) for column in schema.columns)
    hidden = tuple((name, 0, "bigint") for name in PLACE_COLUMNS)
    names = "".join(f', f."{name}"' for name, _, _ in columns)
    if not ranges:
        nothing = scan_expression(schema, (), hidden=True)
        relation = (
            f'(SELECT NULL::BIGINT AS "{SNAPSHOT_COLUMN}", f."{SHARD_COLUMN}",'
            f' f."{POSITION_COLUMN}", f."{ROW_COLUMN}"{names} FROM {nothing} AS f)'
        )
        return SourceTable((*hidden, *columns), relation)
    values = ", ".join(
        f"({one.shard}::SMALLINT, {one.lo}::BIGINT, {one.hi}::BIGINT, {one.snapshot_id}::BIGINT)"
        for one in ranges
    )
    low, high = ranges[0], ranges[-1]
    bounds = f'f."{SHARD_COLUMN}" BETWEEN {low.shard} AND {high.shard}'
    if low.shard == high.shard:
        bounds += f' AND f."{POSITION_COLUMN}" BETWEEN {low.lo} AND {high.hi - 1}'
    scan = scan_expression(schema, paths, hidden=True)
    once = ""
    if several:
        once = f'DISTINCT ON (f."{SHARD_COLUMN}", f."{POSITION_COLUMN}", f."{ROW_COLUMN}") '
    relation = (
        f'(SELECT {once}r.snapshot_id AS "{SNAPSHOT_COLUMN}", f."{SHARD_COLUMN}",'
        f' f."{POSITION_COLUMN}", f."{ROW_COLUMN}"{names}'
        f" FROM (SELECT * FROM {scan} AS f WHERE {bounds}) AS f"
        f" ASOF JOIN (VALUES {values}) AS r (shard, lo, hi, snapshot_id)"
        f' ON f."{SHARD_COLUMN}" = r.shard AND f."{POSITION_COLUMN}" >= r.lo'
        f' WHERE f."{POSITION_COLUMN}" < r.hi AND (f."{SHARD_COLUMN}", f."{POSITION_COLUMN}",'
        f' f."{ROW_COLUMN}") > ({place.shard}, {place.position}, {place.row}))'
    )
    return SourceTable((*hidden, *columns), relation)


def _last_place(page: ChangesPage, result_format: ResultFormat) -> Place:
    if result_format == "arrow":
        with pa.ipc.open_stream(page.body) as reader:
            last: Mapping[str, Any] = reader.read_all().slice(page.row_count - 1).to_pylist()[0]
        return Place(*(int(last[name]) for name in PLACE_COLUMNS[1:]))
    return Place(*(int(value) for value in msgspec.json.decode(page.body)[-1][1:4]))
