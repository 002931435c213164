"""Which rows of which files a caller's predicate is true for, found in the caged engine.

The predicate is a stranger's, so it runs where strangers' queries run and nowhere else: what comes
back are places, three integers a row. They go to disk as they come, so memory is bounded by a batch
of the engine however many rows match.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from lakebus.errors import QueryTimeout, SqlError, StatementNotAllowed
from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from lakebus.snapshots import DataFile
from storage.engine.plans import Parameters, QueryPlan, SourceTable
from storage.files.downloads import download_all
from storage.files.objects import ObjectStore
from storage.files.parquet import HIDDEN_TYPES, scan_expression
from storage.files.pruning import prune, table_predicates
from storage.reading.predicates import RowPredicate, moved
from storage.reading.query import Engine

FILE_COLUMN: Final = "$file"
#: Files of one statement; each of them has a small file of places open meanwhile.
BATCH_FILES: Final = 32
BATCH_BYTES: Final = 256 * 1024 * 1024
#: A predicate that takes longer than this over one batch would hold up all other maintenance.
BATCH_S: Final = 300.0
_UNLIMITED: Final = 2**62
_PLACES: Final = pa.schema([(name, HIDDEN_TYPES[name][1]) for name in HIDDEN_COLUMNS])


@dataclass(frozen=True, slots=True)
class Matches:
    """`rows` of the file match; their places are an Arrow stream at `places`, None without any."""

    file: DataFile
    rows: int
    places: Path | None

    @property
    def whole(self) -> bool:
        return self.rows == self.file.rows


class Matcher:
    """One predicate over the files of one table. `folder` is its own, and within what the engine
    may read when the store keeps no files on this machine. `places_sql`: only rows for whose places
    this condition of ours is true."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: ObjectStore,
        schema: TableSchema,
        predicate: RowPredicate,
        parameters: Parameters,
        now: dt.datetime,
        folder: Path,
        places_sql: str | None = None,
    ) -> None:
        self._places_sql = places_sql
        self._engine = engine
        self._store = store
        self._schema = schema
        self._predicate = predicate
        self._parameters = parameters
        self._now = now
        self._folder = folder

    def batches(self, files: Iterable[DataFile]) -> Iterator[tuple[DataFile, ...]]:
        """The files that the pruner cannot leave out, in parts of a bounded size."""

        schemas = {self._schema.name: self._schema}
        found = table_predicates(self._predicate.tree, self._parameters, schemas)
        predicate = found[self._schema.name]
        kept = list(files) if predicate is None else prune(list(files), predicate)
        batch: list[DataFile] = []
        size_bytes = 0
        for file in kept:
            if batch and (len(batch) == BATCH_FILES or size_bytes + file.size_bytes > BATCH_BYTES):
                yield tuple(batch)
                batch, size_bytes = [], 0
            batch.append(file)
            size_bytes += file.size_bytes
        if batch:
            yield tuple(batch)

    async def match(self, files: Sequence[DataFile], *, deadline_s: float) -> list[Matches]:
        """Of one batch. Raises SqlError, StatementNotAllowed, Unavailable, and Corrupt."""

        folder = self._folder / files[0].file_id.hex
        folder.mkdir(parents=True, exist_ok=True)
        paths = await self._paths(files, folder)
        answer = folder / "answer.arrows"
        await self._ask(paths, answer, min(deadline_s, BATCH_S))
        return await asyncio.to_thread(_split, answer, files, folder)

    async def _ask(self, paths: Sequence[str], answer: Path, deadline_s: float) -> None:
        items = ", ".join(f'"{name}"' for name in (FILE_COLUMN, *HIDDEN_COLUMNS))
        sql = self._predicate.select(items)
        plan = QueryPlan(
            sql=sql,
            sources={self._schema.name: _source(self._schema, paths, self._places_sql)},
            started_at=self._now,
            query_id=f"delete-{answer.parent.name}",
            deadline_s=deadline_s,
            parameters=self._parameters,
            result_format="arrow",
            rows_max=_UNLIMITED,
            bytes_max=_UNLIMITED,
        )
        try:
            parts = await self._engine.execute(plan)
            try:
                with answer.open("wb") as opened:
                    async for part in parts:
                        opened.write(part)
            finally:
                await parts.aclose()
        except SqlError as error:
            where = self._predicate.where
            raise moved(error, sql.index("(\n") + 2, where) from error
        except QueryTimeout as error:
            raise StatementNotAllowed(
                f"the predicate takes longer than {deadline_s:.0f} s over a part of the table; make"
                " it simpler",
                kind="predicate",
            ) from error

    async def _paths(self, files: Sequence[DataFile], folder: Path) -> list[str]:
        """Where the files lie; `_split` removes what was brought here."""

        paths: list[Path] = []
        absent: list[tuple[DataFile, Path]] = []
        for file in files:
            path = self._store.local_path(file.object_key)
            if path is None:
                path = folder / f"{file.file_id}.parquet"
                absent.append((file, path))
            paths.append(path)
        if absent:
            await download_all(self._store, absent)
        return [str(path) for path in paths]


def _source(
    schema: TableSchema, paths: Sequence[str], places_sql: str | None = None
) -> SourceTable:
    """The rows of the files with their places, and the number of the file they lie in."""

    kept = "" if places_sql is None else f" WHERE {places_sql}"

    scans = (
        f'SELECT {number}::INTEGER AS "{FILE_COLUMN}", *'
        f" FROM {scan_expression(schema, (path,), hidden=True)}{kept}"
        for number, path in enumerate(paths)
    )
    columns = (
        (FILE_COLUMN, 0, "integer"),
        *((name, 0, HIDDEN_TYPES[name][0]) for name in HIDDEN_COLUMNS),
        *((column.name, column.column_id, column.type) for column in schema.columns),
    )
    return SourceTable(columns, f"({' UNION ALL '.join(scans)})")


def _split(answer: Path, files: Sequence[DataFile], folder: Path) -> list[Matches]:
    """The places of each file, in a file of their own; the answer and what was downloaded go."""

    rows = [0] * len(files)
    writers: dict[int, pa.RecordBatchWriter] = {}
    paths = [folder / f"{file.file_id}.places" for file in files]
    try:
        with pa.OSFile(str(answer)) as opened, pa.ipc.open_stream(opened) as reader:
            for batch in reader:
                numbers = batch.column(0)
                places = pa.RecordBatch.from_arrays(batch.columns[1:], schema=_PLACES)
                for number in pc.unique(numbers).to_pylist():
                    own = places.filter(pc.equal(numbers, number))
                    if number not in writers:
                        writers[number] = pa.ipc.new_stream(str(paths[number]), _PLACES)
                    writers[number].write_batch(own)
                    rows[number] += own.num_rows
    finally:
        for writer in writers.values():
            writer.close()
    answer.unlink()
    for downloaded in folder.glob("*.parquet"):
        downloaded.unlink()
    return [
        Matches(file, rows[number], paths[number] if number in writers else None)
        for number, file in enumerate(files)
    ]


def join_places(matches: Iterable[Matches], path: Path) -> Path:
    """The places of several files as one Arrow IPC file, as a rewrite takes them."""

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _PLACES) as writer:
        for one in matches:
            if one.places is not None:
                with pa.OSFile(str(one.places)) as opened, pa.ipc.open_stream(opened) as reader:
                    for batch in reader:
                        writer.write_batch(batch)
    return path
