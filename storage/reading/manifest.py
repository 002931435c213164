"""The manifest: what every retained snapshot consists of, in memory, kept by deltas.

What is authoritative: the catalog; this is a copy that says how far it goes (`until`). A snapshot
is answered from it only when the copy reaches that far, so it can be slow and never wrong. Deltas
are idempotent facts about snapshots (a file began, a file ended), and membership is a predicate
over the snapshot, so a delta half applied does not disturb readers of earlier snapshots.

What expires leaves the copy only by loading it anew (the catalog knows what tags still keep). A
load leaves out snapshots that had expired by then, so for a snapshot older than the oldest one at
the load the catalog is asked once more whether it is retained: if it is now, it was then, and the
copy has it.

A new line of history is loaded anew too, because files of the lost line must not be seen; and so
is everything after an erasure, which exchanges files of snapshots that were published before (E7).
A delta that was read after one more erasure does not fit, which its count tells.

Memory: about 1.8 KB a file with the statistics of five columns (3 KB with seven and texts among
them), most of it theirs, plus 8 bytes for each reference in a kept view (at most 32 MB), measured
by `benchmarks/manifest.py` and `benchmarks/growth/files.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lakebus.errors import LakebusError, SnapshotExpired, Unavailable
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import Catalog, Erased, Head, ManifestDelta, covering
from storage.reading.table_files import LIVE, FileRow, FileView, FileViews, TableFiles
from storage.reading.table_schemas import TableSchemas

_log = logging.getLogger(__name__)

#: What is derived from the files of one load is not mixed with that of another.
_LOADS = itertools.count(1)
#: The loop is given back after so many rows of a delta.
_CHUNK = 2_000
#: A copy of so many files is left out of later cyclic collections.
_FROZEN_MIN = 10_000


class _Copy:
    """One line of history as far as `until`; snapshots from `complete_from` on need no check."""

    def __init__(self, history: uuid.UUID) -> None:
        self.history = history
        self.erasures = 0
        self.erased: dict[int, list[Erased]] = {}
        self.until = 0
        self.complete_from = 0
        self.kept_by_tags = 0
        self.schemas = TableSchemas()
        self.rows: dict[uuid.UUID, FileRow] = {}
        self.tables: dict[int, TableFiles] = {}
        self.views = FileViews(generation=next(_LOADS))

    async def apply(self, delta: ManifestDelta) -> None:
        for life in delta.schemas:
            self.schemas.put(life)
        files = sorted(delta.files, key=lambda file: file.first_snapshot)
        for start in range(0, len(files), _CHUNK):
            for file in files[start : start + _CHUNK]:
                if file.file_id not in self.rows:
                    row = FileRow(file, LIVE if file.last_snapshot is None else file.last_snapshot)
                    self.rows[file.file_id] = row
                    self._table(file.table_id).add(row)
            if len(files) > _CHUNK:
                await asyncio.sleep(0)
        for file_id, last in delta.ended.items():
            ended = self.rows.get(file_id)
            if ended is not None and ended.last != last:
                ended.last = last
                self._table(ended.table_id).note_end(ended)
        self.until = max(self.until, delta.until)

    def dead(self, oldest_snapshot_id: int) -> int:
        """How many files only expired snapshots (or tags) can need."""

        return sum(table.ended_by(oldest_snapshot_id) for table in self.tables.values())

    def _table(self, table_id: int) -> TableFiles:
        found = self.tables.get(table_id)
        if found is None:
            found = self.tables[table_id] = TableFiles(table_id)
        return found


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """The tables and files of one snapshot. Stays right however far the manifest moves on."""

    snapshot_id: int
    _copy: _Copy
    _owed: frozenset[int] = frozenset()

    def schema(self, name: str) -> TableSchema | None:
        """The table of this (folded) name in this snapshot."""

        return self._copy.schemas.find(name, self.snapshot_id)

    def first_snapshot(self, schema: TableSchema) -> int:
        """The snapshot with which this version of the table began."""

        return self._copy.schemas.first_snapshot(schema)

    def schema_version(self, schema: TableSchema, version: int) -> TableSchema | None:
        """Another version of the same table, if it is known here: old files may outlive it."""

        return self._copy.schemas.version(schema, version)

    def schemas(self) -> Mapping[str, TableSchema]:
        """All tables of this snapshot by name. Do not change it: it is shared."""

        return self._copy.schemas.all_at(self.snapshot_id)

    def marks(self, table_id: int) -> tuple[Erased, ...]:
        """What erasures took of the table from this snapshot, by erasure."""

        found: dict[uuid.UUID, Erased] = {}
        for mark in covering(self._copy.erased.get(table_id, ()), self.snapshot_id):
            known = found.get(mark.erasure_id)
            rows = mark.rows if known is None else mark.rows + known.rows
            found[mark.erasure_id] = dataclasses.replace(mark, rows=rows)
        return tuple(sorted(found.values(), key=lambda mark: str(mark.erasure_id)))

    def erasures(self, table_id: int) -> tuple[str, ...]:
        """The ids of erasures that took rows of the table from this snapshot."""

        return tuple(str(mark.erasure_id) for mark in self.marks(table_id))

    def files(self, table_id: int) -> FileView:
        """Raises Unavailable while what was erased before a restore is erased again."""

        if table_id in self._owed:
            raise Unavailable(
                "rows of this table that were erased before a restore are being erased again; try "
                "again when that is done",
                retry_after_s=2.0,
            )
        table = self._copy.tables.get(table_id)
        if table is None:
            return FileView(table_id, 0, (), self._copy.views.generation)
        return self._copy.views.view(table, self.snapshot_id)

    def lost_rows(self, table_id: int, *, began: int, ended: int) -> tuple[DataFile, ...]:
        """The files of one table that began after the snapshot `began` and were ended after the
        snapshot `ended`, up to this one, by something that removed rows. `ended` is retained, or
        the copy may lack some of them."""

        table = self._copy.tables.get(table_id)
        if table is None:
            return ()
        return table.lost_rows(began=began, ended=ended, until=self.snapshot_id)


class Manifest:
    """One per process. `dead_rows_min`: so many useless files at least before a load anew.
    `on_load`: called after each, when `needs` may deny what it affirmed before."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        dead_rows_min: int = 10_000,
        on_load: Callable[[], None] | None = None,
    ) -> None:
        self._catalog = catalog
        self.on_load = on_load
        self._dead_rows_min = dead_rows_min
        self._copy: _Copy | None = None
        self._advance: asyncio.Task[None] | None = None
        self._wanted: Head | None = None

    @property
    def until(self) -> int:
        """The newest snapshot that can be answered without asking the catalog."""

        return 0 if self._copy is None else self._copy.until

    @property
    def file_count(self) -> int:
        return 0 if self._copy is None else len(self._copy.rows)

    def needs(self, file_id: uuid.UUID) -> bool:
        """Whether a snapshot may need the file, as far as is known here. False for a file that an
        erasure has exchanged (E7)."""

        return self._copy is None or file_id in self._copy.rows

    def prefetch(self, head: Head) -> None:
        """Begins to advance to a newer head in the background, so that its readers find it."""

        self._want(head)
        if self._advance is None or self._advance.done():
            self._start()

    async def at(self, snapshot_id: int, head: Head) -> SnapshotView:
        """The view of a snapshot that was found retained after `head` was read, in this request.
        Raises SnapshotExpired when it expired meanwhile, Unavailable."""

        if snapshot_id > head.snapshot_id:  # published after the head was read
            head = dataclasses.replace(head, snapshot_id=snapshot_id)
        while not self._reaches(snapshot_id, head):
            copy = self._copy
            if copy is not None and copy.history != head.history and copy.until > head.snapshot_id:
                raise Unavailable("the lake was restored during the request; send it again")
            self._want(head)
            task = self._advance
            # An advance that has ended and whose callback has not run yet is over: waiting for it
            # returns at once, without giving the loop the turn in which the callback would run.
            if task is None or task.done():
                task = self._start()
            await asyncio.shield(task)
        copy = self._copy
        assert copy is not None
        if snapshot_id < copy.complete_from:
            await self._catalog.snapshot(snapshot_id)
        return SnapshotView(snapshot_id, copy, head.erasures_owed)

    async def close(self) -> None:
        if self._advance is not None:
            self._advance.cancel()
            await asyncio.wait((self._advance,))

    def _reaches(self, snapshot_id: int, head: Head) -> bool:
        copy = self._copy
        return (
            copy is not None
            and copy.until >= snapshot_id
            and copy.history == head.history
            and copy.erasures >= head.erasures
        )

    def _want(self, head: Head) -> None:
        wanted = self._wanted
        if wanted is None or head.snapshot_id > wanted.snapshot_id:
            self._wanted = head
        elif head.erasures > wanted.erasures and head.history == wanted.history:
            self._wanted = dataclasses.replace(wanted, erasures=head.erasures)

    def _start(self) -> asyncio.Task[None]:
        self._advance = asyncio.get_running_loop().create_task(self._move(), name="manifest")
        self._advance.add_done_callback(self._moved)
        return self._advance

    def _moved(self, task: asyncio.Task[None]) -> None:
        if self._advance is task:
            self._advance = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            if not isinstance(error, LakebusError):
                _log.error("the manifest cannot be advanced", exc_info=error)
            return
        if self._advance is not None:  # the next one is under way already
            return
        wanted = self._wanted
        if wanted is not None and not self._reaches(wanted.snapshot_id, wanted):
            self._start()

    async def _move(self) -> None:
        head = self._wanted
        assert head is not None
        copy = self._copy
        if copy is None or copy.history != head.history or copy.erasures < head.erasures:
            self._replace(await self._load(head))
            return
        if copy.until < head.snapshot_id:
            try:
                delta = await self._catalog.manifest_delta(after=copy.until, until=head.snapshot_id)
            except SnapshotExpired:  # this process slept so long that ends were forgotten
                self._replace(await self._load(head))
                return
            if delta.erasures != copy.erasures:
                self._replace(await self._load(head))
                return
            await copy.apply(delta)
        if len(copy.rows) >= self._dead_rows_min and self._mostly_dead(copy, head):
            self._replace(await self._load(head))

    def _replace(self, copy: _Copy) -> None:
        self._copy = copy
        if self.on_load is not None:
            self.on_load()

    def _mostly_dead(self, copy: _Copy, head: Head) -> bool:
        dead = copy.dead(head.oldest_snapshot_id) - copy.kept_by_tags
        return dead >= self._dead_rows_min and dead > len(copy.rows) // 2

    async def _load(self, head: Head) -> _Copy:
        copy = _Copy(head.history)
        with _without_collections(copy):
            await self._fill(copy, head)
        return copy

    async def _fill(self, copy: _Copy, head: Head) -> None:
        delta = await self._catalog.manifest_delta(after=0, until=head.snapshot_id)
        copy.erasures = delta.erasures
        for mark in delta.erased:
            copy.erased.setdefault(mark.table_id, []).append(mark)
        await copy.apply(delta)
        after = await self._catalog.head()
        copy.complete_from = after.oldest_snapshot_id
        # Loading anew would bring them again, with every advance.
        copy.kept_by_tags = copy.dead(after.oldest_snapshot_id)


@contextlib.contextmanager
def _without_collections(copy: _Copy) -> Iterator[None]:
    """Nothing of a copy is in a cycle, and it lives long: looking through it again and again while
    it is made took 60 % of a load's time, and each full collection afterwards took longer. So the
    collector rests meanwhile and passes over a large copy from then on; what ends is freed as ever,
    because nothing refers to it."""

    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        if len(copy.rows) >= _FROZEN_MIN:
            gc.freeze()
    finally:
        gc.enable()
