"""The data files of one table, for any snapshot: rows in order of their first snapshot.

A snapshot is a range predicate (architecture 7): a file belongs to S when first ≤ S < last.
Between two changes of the table every snapshot has the same files, so views are kept by the last
change at or before the snapshot (`epoch`), and what is derived from a view (pruned lists, SQL) can
be too.

Adding rows whose first snapshot lies above everything read so far, and noting ends above it, never
changes the view of an earlier snapshot; that is why deltas may be applied while views are read.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass

from lakebus.snapshots import DataFile

#: The last snapshot of a file that is still live.
LIVE = 2**63 - 1


class FileRow:
    """One file and the snapshot from which on it is gone."""

    __slots__ = ("file", "last", "table_id")

    def __init__(self, file: DataFile, last: int) -> None:
        self.file = file
        self.last = last
        self.table_id = file.table_id


@dataclass(frozen=True, slots=True)
class FileView:
    """The files of one table between two of its changes. Do not change `files`: it is shared.
    `generation`: the same epoch may have other files after everything was loaded anew."""

    table_id: int
    epoch: int
    files: tuple[DataFile, ...]
    generation: int = 0

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class TableFiles:
    def __init__(self, table_id: int) -> None:
        self.table_id = table_id
        self._rows: list[FileRow] = []
        self._firsts: list[int] = []
        self._ends: list[int] = []
        self._ended: dict[int, list[FileRow]] = {}
        self._changes: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: FileRow) -> None:
        first = row.file.first_snapshot
        if self._firsts and first < self._firsts[-1]:
            place = bisect.bisect_right(self._firsts, first)
            self._firsts.insert(place, first)
            self._rows.insert(place, row)
        else:
            self._firsts.append(first)
            self._rows.append(row)
        _note(self._changes, first)
        if row.last != LIVE:
            self.note_end(row)

    def note_end(self, row: FileRow) -> None:
        """A row's `last` was set, for good."""

        bisect.insort(self._ends, row.last)
        self._ended.setdefault(row.last, []).append(row)
        _note(self._changes, row.last)

    def epoch(self, snapshot_id: int) -> int:
        """The last change of this table at or before the snapshot; 0 before the first."""

        place = bisect.bisect_right(self._changes, snapshot_id)
        return self._changes[place - 1] if place else 0

    def files_at(self, epoch: int, near: FileView | None) -> tuple[DataFile, ...]:
        """The files at `epoch`. `near`, a view at or before it, saves work when no file ended
        since: the usual step of a table that grows."""

        until = bisect.bisect_right(self._firsts, epoch)
        if near is not None and near.epoch <= epoch:
            ended = bisect.bisect_right(self._ends, epoch)
            if bisect.bisect_right(self._ends, near.epoch) == ended:
                start = bisect.bisect_right(self._firsts, near.epoch)
                return near.files + tuple([r.file for r in self._rows[start:until]])
        return tuple([row.file for row in self._rows[:until] if row.last > epoch])

    def lost_rows(self, *, began: int, ended: int, until: int) -> tuple[DataFile, ...]:
        """The files that began after `began`, ended in (ended, until], and whose end took rows.

        One snapshot is one operation. When as many rows began with it as ended, it only moved
        them; else it was a delete or row retention, and what it ended held the rows it removed.
        """

        found: list[DataFile] = []
        lo, hi = bisect.bisect_right(self._ends, ended), bisect.bisect_right(self._ends, until)
        for end in sorted(set(self._ends[lo:hi])):
            rows = self._ended[end]
            if sum(row.file.rows for row in rows) != self._rows_begun(end):
                found += [row.file for row in rows if row.file.first_snapshot > began]
        return tuple(found)

    def _rows_begun(self, snapshot_id: int) -> int:
        start = bisect.bisect_left(self._firsts, snapshot_id)
        end = bisect.bisect_right(self._firsts, snapshot_id)
        return sum(row.file.rows for row in self._rows[start:end])

    def ended_by(self, snapshot_id: int) -> int:
        """How many files no snapshot from this one on needs."""

        return bisect.bisect_right(self._ends, snapshot_id)


class FileViews:
    """Recently used views of all tables, bounded by the number of file references they hold."""

    def __init__(self, *, references_max: int = 4_000_000, generation: int = 0) -> None:
        self.generation = generation
        self._references_max = references_max
        self._references = 0
        self._views: OrderedDict[tuple[int, int], FileView] = OrderedDict()
        self._newest: dict[int, FileView] = {}

    @property
    def references(self) -> int:
        return self._references

    def view(self, table: TableFiles, snapshot_id: int) -> FileView:
        epoch = table.epoch(snapshot_id)
        key = (table.table_id, epoch)
        found = self._views.get(key)
        if found is not None:
            self._views.move_to_end(key)
            return found
        near = self._newest.get(table.table_id)
        view = FileView(table.table_id, epoch, table.files_at(epoch, near), self.generation)
        if near is None or near.epoch < epoch:
            self._newest[table.table_id] = view
        self._keep(key, view)
        return view

    def _keep(self, key: tuple[int, int], view: FileView) -> None:
        self._views[key] = view
        self._references += len(view.files)
        while self._references > self._references_max and len(self._views) > 1:
            (table_id, _), dropped = self._views.popitem(last=False)
            self._references -= len(dropped.files)
            if self._newest.get(table_id) is dropped:
                del self._newest[table_id]


def _note(changes: list[int], snapshot_id: int) -> None:
    if not changes or changes[-1] < snapshot_id:
        changes.append(snapshot_id)
        return
    place = bisect.bisect_left(changes, snapshot_id)
    if changes[place] != snapshot_id:
        changes.insert(place, snapshot_id)
