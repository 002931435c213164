"""Cuts a stream of ordered rows into row groups, and row groups into files.

A file ends where its partition ends, and otherwise at the row group that brings it nearest to the
target. Groups are bounded in rows and in bytes, and at most two wait in memory: the first of a
file until its second has come, because the two tell which filters the file needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pyarrow as pa

from storage.maintenance.parquet_writing import FileColumns, OutputFile, choose
from storage.maintenance.rewriting import RewrittenFile

#: A file has at least so many row groups when it reaches its target, so that it ends near it.
GROUPS_PER_FILE_MIN: Final = 5


class OutputFiles:
    """Files of one rewrite, written one after another into one folder.

    :param row_bytes: what a row takes in a file, before a file says so.
    :param group_bytes_max: what a row group may take in memory.
    :param unbounded: columns that get no bounds in any footer (contract D11).
    """

    def __init__(
        self,
        *,
        columns: FileColumns,
        folder: Path,
        target_bytes: int,
        row_bytes: float,
        group_rows_max: int,
        group_bytes_max: int,
        unbounded: frozenset[str],
    ) -> None:
        self._columns = columns
        self._folder = folder
        self._target_bytes = target_bytes
        self._row_bytes = row_bytes
        self._group_rows_max = group_rows_max
        self._group_bytes_max = group_bytes_max
        self._unbounded = unbounded
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._held: pa.Table | None = None
        self._open: OutputFile | None = None
        self._partition: str | None = None
        self._finished: list[RewrittenFile] = []

    def add(self, batch: pa.RecordBatch, partition: str | None) -> None:
        """Rows in their order, all of one partition."""

        rows = self._columns.table(pa.Table.from_batches([batch]))
        if partition != self._partition:
            self._end_file()
        self._partition = partition
        while rows.num_rows:
            room = max(1, self._group_rows() - self._pending_rows)
            part = rows.slice(0, room)
            rows = rows.slice(part.num_rows)
            self._pending.append(part)
            self._pending_rows += part.num_rows
            self._pending_bytes += part.nbytes
            if (
                self._pending_rows >= self._group_rows()
                or self._pending_bytes >= self._group_bytes_max
            ):
                self._end_group()

    def finish(self) -> tuple[RewrittenFile, ...]:
        self._end_file()
        return tuple(self._finished)

    def abandon(self) -> None:
        if self._open is not None:
            self._open.abandon()

    def _group_rows(self) -> int:
        by_target = self._target_bytes / GROUPS_PER_FILE_MIN / max(self._row_bytes, 0.1)
        return max(1, min(self._group_rows_max, int(by_target)))

    def _end_group(self) -> None:
        if not self._pending:
            return
        group = pa.concat_tables(self._pending)
        self._pending = []
        self._pending_rows = self._pending_bytes = 0
        if self._open is None and self._held is None:
            self._held = group
            return
        file = self._opened(group)
        file.put(group)
        self._row_bytes = file.written_bytes / file.rows
        half_a_group = self._row_bytes * self._group_rows() / 2
        if file.written_bytes + half_a_group >= self._target_bytes:
            self._close()

    def _opened(self, group: pa.Table | None) -> OutputFile:
        if self._open is None:
            held, self._held = self._held, None
            groups = [one for one in (held, group) if one is not None]
            choices = choose(self._columns, groups, unbounded=self._unbounded)
            path = self._folder / f"{len(self._finished):05d}.parquet"
            self._open = OutputFile(path, self._columns, choices)
            if held is not None:
                self._open.put(held)
        return self._open

    def _end_file(self) -> None:
        self._end_group()
        if self._held is not None:
            self._opened(None)
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._finished.append(self._open.close(self._partition))
            self._open = None
