"""Rewrites data files: the same rows in another order, cut into other files, and proved the same.

The rows that come in are summed by their hashes, and those that are to be left out; they are put in
order and streamed into Parquet files; the finished files are read back from disk and summed again.
Only when what came in, less what was left out, is what can be read back, does the rewrite return
(contract E1, D8, D12). Inputs must have the size, the rows and the SHA-256 that the catalog
recorded, so damage is never copied into a file that looks sound.

Small inputs are decoded once, and these rows are summed and written; larger ones are read twice.
Without an order of its own a table keeps the order of its inputs, which is that of arrival: rows
that came together lie together, whatever shard they came by, so bounds of times and counters stay
narrow, and nothing is sorted.

Memory does not grow with the inputs: DuckDB sorts within its limit and spills, row groups are
bounded in rows and bytes, and batches by the rows' measured width. Everything that is written lies
in one new folder below `temp_dir`, so a rewrite may be killed at any moment.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from lakebus.errors import Corrupt, Fault
from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from storage.files.parquet import ROW_GROUP_ROWS, scan_expression
from storage.files.partitions import PartitionSpec, partition_spec
from storage.maintenance.output_files import OutputFiles
from storage.maintenance.parquet_writing import FileColumns
from storage.maintenance.reading_ahead import ahead
from storage.maintenance.rewriting import (
    RewriteRequest,
    Rewritten,
    RewrittenFile,
    RowSum,
)
from storage.maintenance.row_sums import NO_SUMS, Sums, sums_of
from storage.maintenance.sorting import order_terms
from storage.maintenance.verified_inputs import Piece, held_relation, one_piece, pieces
from storage.rows.types import Family, parse_type, with_leaves

#: What bounds lead to is read in less than half the time that it takes in groups of 122,880, and
#: whole scans take the same. Three streams of so many bytes are what zstd takes at a time, so those
#: of 8-byte values that are split (`encodings`) do not mix: 2 % less than in groups of 49,152.
GROUP_ROWS: Final = 43_690

_MIB = 1024 * 1024
_BATCH_BYTES = 8 * _MIB
_GROUP_BYTES_MAX = 128 * _MIB
_FIXED_BYTES = 16  # of one column in one row, generously
#: Inputs up to this part of the memory are held in it, and sorted without a spill.
_SORT_SHARE = 4
#: To keep rows that nobody sorts for longer than it takes to sum them only costs memory.
_HELD_BYTES_MAX = 16 * _MIB


def rewrite(request: RewriteRequest, *, group_rows_max: int = GROUP_ROWS) -> Rewritten:
    """Runs one rewrite; blocks. The caller owns and removes `request.temp_dir`.

    Raises Corrupt for an input that is not what the catalog says, naming it, Fault when the
    outputs do not hold exactly the rows they should, SchemaInvalid for a `sort_by` or
    `partition_by` that the columns do not allow.
    """

    folder = Path(tempfile.mkdtemp(prefix="rewrite-", dir=request.temp_dir))
    with closing(_connect(request, folder)) as connection:
        try:
            return _Rewrite(request, connection, folder, group_rows_max).run()
        except duckdb.OutOfMemoryException as error:
            raise Fault(
                f"a rewrite of table {request.schema.name} does not fit into "
                f"{request.memory_bytes} bytes; give maintenance more rewrite_memory_bytes"
            ) from error


@dataclass(slots=True)
class _Timer:
    """Seconds of each part, for the job's report. With a thread that reads, `read_s` is only what
    was waited for it."""

    last: float
    seconds: dict[str, float]

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self.last, 3)
        self.last = now


class _Rewrite:
    def __init__(
        self,
        request: RewriteRequest,
        connection: duckdb.DuckDBPyConnection,
        folder: Path,
        group_rows_max: int,
    ) -> None:
        self._request = request
        self._schema = request.schema
        self._connection = connection
        self._folder = folder
        self._group_rows_max = group_rows_max
        self._spilled_bytes = 0
        self._before = self._removed = NO_SUMS
        self._timer = _Timer(time.monotonic(), {})
        self._spec = partition_spec(self._schema.partition_by, self._schema.columns)
        self._shared = self._shared_partition(self._spec)
        self._cuts = self._spec.sql() if self._spec and self._shared is None else []

    def run(self) -> Rewritten:
        started = self._timer.last
        inputs = self._request.inputs
        if self._request.drop_places is not None:
            self._read_places(self._request.drop_places)
        files = self._write()
        self._timer.lap("write_s")
        written = scan_expression(self._schema, [str(file.path) for file in files], hidden=True)
        after, _ = sums_of(self._connection, self._schema, written)
        _require_equal(self._schema, self._before, self._removed, after)
        self._timer.lap("read_back_s")
        return Rewritten(
            files=files,
            before=self._before.rows,
            removed=self._removed.rows,
            after=after.rows,
            seconds=time.monotonic() - started,
            input_bytes=sum(one.file.size_bytes for one in inputs),
            spilled_bytes=self._spilled_bytes,
            notes=dict(self._timer.seconds),
        )

    def _left_out(self) -> str | None:
        """A condition over `_relation` that is true for the rows to be left out."""

        conditions: list[str] = []
        if self._request.drop_places is not None:
            conditions.append('"$dropped"')
        if self._request.keep_sql is not None:
            conditions.append(f"({self._request.keep_sql}) IS NOT TRUE")
        return " OR ".join(conditions) or None

    def _read_places(self, path: Path) -> None:
        names = ", ".join(f'"{name}"' for name in HIDDEN_COLUMNS)
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as places:
            self._connection.register("places_given", places.read_all())
            # One row per place, else the join would double what is named twice.
            self._connection.execute(
                f'CREATE TEMP TABLE places_dropped AS SELECT DISTINCT {names}, true AS "$dropped" '
                "FROM places_given"
            ).fetchall()
            self._connection.unregister("places_given")

    def _write(self) -> tuple[RewrittenFile, ...]:
        folder = self._folder / "files"
        folder.mkdir()
        inputs = self._request.inputs
        rows = sum(one.file.rows for one in inputs)
        outputs = OutputFiles(
            columns=FileColumns.of(self._schema),
            folder=folder,
            target_bytes=self._request.target_file_bytes,
            row_bytes=sum(one.file.size_bytes for one in inputs) / max(1, rows),
            group_rows_max=self._group_rows_max,
            group_bytes_max=min(_GROUP_BYTES_MAX, max(_MIB, self._request.memory_bytes // 8)),
            unbounded=self._unbounded(),
        )
        batches = self._batches()
        if self._request.threads > 1:
            batches = ahead(batches)
        try:
            with closing(batches):
                for batch in batches:
                    self._timer.lap("read_s")
                    for part, values in _cut(batch, len(self._cuts)):
                        outputs.add(part, self._spec.text(values) if self._cuts else self._shared)
                    self._timer.lap("write_s")
            return outputs.finish()
        except BaseException:
            outputs.abandon()
            raise

    def _batches(self) -> Generator[pa.RecordBatch, None, None]:
        """The rows to be written, in their order, with the sums of their inputs taken before."""

        columns, memory_bytes = FileColumns.of(self._schema), self._request.memory_bytes
        if self._ordered:
            found = one_piece(self._request.inputs, columns, bytes_max=memory_bytes // _SORT_SHARE)
        else:
            held_bytes = min(_HELD_BYTES_MAX, memory_bytes // _SORT_SHARE)
            found = pieces(self._request.inputs, columns, bytes_max=held_bytes)
        for piece in found:
            with self._relation(piece) as relation:
                sums = self._sum(piece, relation)
                if sums.rows.rows:
                    yield from self._rows_of(piece, relation, sums)

    @property
    def _ordered(self) -> bool:
        return bool(self._schema.sort_by or self._cuts)

    def _sum(self, piece: Piece, relation: str) -> Sums:
        before, removed = sums_of(
            self._connection, self._schema, relation, left_out=self._left_out()
        )
        if before.rows.rows != piece.recorded_rows:
            raise Corrupt(
                f"{len(piece.inputs)} data files of table {self._schema.name} hold "
                f"{before.rows.rows} rows where the catalog records {piece.recorded_rows}"
            )
        self._before, self._removed = self._before + before, self._removed + removed
        return before

    def _rows_of(self, piece: Piece, relation: str, sums: Sums) -> Iterator[pa.RecordBatch]:
        left_out = self._left_out()
        if piece.rows is not None and left_out is None and not self._ordered:
            yield from piece.rows.to_batches()
            return
        query = self._query(relation, left_out)
        batch_rows = self._batch_rows(sums)
        for batch in self._connection.sql(query).to_arrow_reader(batch_rows):
            self._watch_spill()
            yield batch

    @contextmanager
    def _relation(self, piece: Piece) -> Iterator[str]:
        """The rows of a piece, marked where `drop_places` names them."""

        if piece.rows is None:
            paths = [str(one.path) for one in piece.inputs]
            relation = scan_expression(self._schema, paths, hidden=True)
        else:
            self._connection.register("rows_held", piece.rows)
            relation = held_relation(self._schema, "rows_held")
        try:
            if self._request.drop_places is not None:
                on = " AND ".join(f'r."{name}" = d."{name}"' for name in HIDDEN_COLUMNS)
                relation = (
                    f'(SELECT r.*, d."$dropped" IS NOT NULL AS "$dropped" FROM {relation} AS r '
                    f"LEFT JOIN places_dropped AS d ON {on})"
                )
            yield relation
        finally:
            if piece.rows is not None:
                self._connection.unregister("rows_held")

    def _query(self, relation: str, left_out: str | None) -> str:
        """Rows in their order. The casts stand outside, so that they do not enter the order."""

        kept = f"SELECT * FROM {relation}"
        if left_out is not None:
            kept += f" WHERE NOT ({left_out})"
        marks = [f'"$partition{number}"' for number in range(len(self._cuts))]
        columns = [_exported(column.name, column.type) for column in self._schema.columns]
        columns += [f'"{name}"' for name in HIDDEN_COLUMNS]
        if not self._ordered:
            return f"SELECT {', '.join(columns)} FROM ({kept})"
        added = "".join(f", {sql} AS {mark}" for sql, mark in zip(self._cuts, marks, strict=True))
        terms = [f"{mark} NULLS LAST" for mark in marks]
        terms += order_terms(self._connection, self._schema, f"({kept})")
        return (
            f"SELECT {', '.join([*columns, *marks])} FROM (SELECT *{added} FROM ({kept}) "
            f"ORDER BY {', '.join(terms)})"
        )

    def _batch_rows(self, sums: Sums) -> int:
        columns = len(self._schema.columns) + len(HIDDEN_COLUMNS)
        rows = _BATCH_BYTES // (columns * _FIXED_BYTES + sums.text_bytes // sums.rows.rows)
        if sums.text_bytes_max:
            # Long texts may follow each other, however few they are.
            rows = min(rows, self._request.memory_bytes // 4 // sums.text_bytes_max)
        return max(1, min(rows, ROW_GROUP_ROWS))

    def _unbounded(self) -> frozenset[str]:
        """Float columns of which an input claims no bound although it has values: a NaN. Sorted by
        the column, NaNs come last, and only the last file need do without."""

        leading = self._schema.sort_by[:1]
        found: set[str] = set()
        for column in self._schema.columns:
            if parse_type(column.type).family is not Family.FLOAT or column.name in leading:
                continue
            for one in self._request.inputs:
                claim = one.file.statistics.get(column.column_id)
                if claim and claim.minimum is None and claim.null_count < one.file.rows:
                    found.add(column.name)
                    break
        return frozenset(found)

    def _shared_partition(self, spec: PartitionSpec) -> str | None:
        """The partition that all inputs are recorded in, if the newest schema wrote them: under an
        older one the same words may mean another column."""

        files = [one.file for one in self._request.inputs]
        partitions = {file.partition for file in files}
        if not spec or len(partitions) != 1:
            return None
        if any(file.schema_version != self._schema.version for file in files):
            return None
        (partition,) = partitions
        return partition if spec.values(partition) is not None else None

    def _watch_spill(self) -> None:
        spill = self._folder / "spill"
        size = sum(file.stat().st_size for file in spill.iterdir()) if spill.exists() else 0
        self._spilled_bytes = max(self._spilled_bytes, size)


def _connect(request: RewriteRequest, folder: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        ":memory:",
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "allow_persistent_secrets": False,
            "python_enable_replacements": False,
            "memory_limit": f"{request.memory_bytes}B",
            "threads": request.threads,
            "temp_directory": str(folder / "spill"),
            # The engine's, so that files lie in the order in which queries compare.
            "default_null_order": "NULLS_LAST",
            "default_collation": "",
            "preserve_insertion_order": True,
        },
    )
    connection.execute("SET GLOBAL TimeZone = 'UTC'").fetchall()
    connection.execute("SET GLOBAL Calendar = 'gregorian'").fetchall()
    # DuckDB would draw one on standard output after two seconds.
    connection.execute("SET enable_progress_bar = false").fetchall()
    # What is read twice never changes.
    connection.execute("SET GLOBAL parquet_metadata_cache = true").fetchall()
    return connection


def _require_equal(schema: TableSchema, before: Sums, removed: Sums, after: Sums) -> None:
    expected, places = before.rows - removed.rows, before.places - removed.places
    if after.rows == expected and after.places == places:
        return
    if after.rows.rows != expected.rows:
        what = f"hold {after.rows.rows} rows instead of {expected.rows}"
    elif after.places != places:
        what = "hold rows of other places (shard, position, row)"
    else:
        what = "hold other values"
    raise Fault(
        f"the files of a rewrite of table {schema.name} {what}; nothing was published",
        expected=_text(expected),
        found=_text(after.rows),
    )


def _text(found: RowSum) -> str:
    return f"{found.rows} rows, hash sum {found.hash_sum:032x}"


def _exported(name: str, sql_type: str) -> str:
    """A uuid leaves DuckDB as its 16 bytes; as itself it would be text."""

    kind = parse_type(sql_type)
    wanted = with_leaves(kind, lambda leaf: "blob" if leaf.family is Family.UUID else leaf.sql)
    return f'"{name}"' if wanted == kind.sql else f'"{name}"::{wanted} AS "{name}"'


def _cut(batch: pa.RecordBatch, marks: int) -> Iterator[tuple[pa.RecordBatch, list[str | None]]]:
    """The batch cut where any of its last `marks` columns changes; their values beside it."""

    if not marks:
        yield batch, []
        return
    columns = batch.columns[-marks:]
    ends = {end for column in columns for end in pc.run_end_encode(column).run_ends.to_pylist()}
    start = 0
    for end in sorted(ends):
        yield batch.slice(start, end - start), [column[start].as_py() for column in columns]
        start = end
