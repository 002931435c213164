"""Rewrites data files: the same rows in another order, cut into other files, and proved the same.

Three passes over the rows. The first reads the inputs and sums the hashes of all rows and of those
that are to be left out; the second reads them again, sorts, and streams them into Parquet files;
the third reads the finished files back from disk and sums again. Only when what came in, less what
was left out, is what can be read back, does the rewrite return (contract E1, D8, D12). Inputs must
have the size, the rows and the SHA-256 that the catalog recorded, so damage is never copied into a
file that looks sound.

Memory does not grow with the inputs: DuckDB sorts within its limit and spills, row groups are
bounded in rows and bytes, and batches by the rows' measured width. Everything that is written lies
in one new folder below `temp_dir`, so a rewrite may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lakebus.errors import Corrupt, Fault
from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from storage.files.parquet import ROW_GROUP_ROWS, scan_expression
from storage.files.partitions import PartitionSpec, partition_spec
from storage.maintenance.output_files import OutputFiles
from storage.maintenance.parquet_writing import FileColumns
from storage.maintenance.rewriting import (
    RewriteInput,
    RewriteRequest,
    Rewritten,
    RewrittenFile,
    RowSum,
)
from storage.maintenance.row_sums import Sums, sums_of
from storage.maintenance.segments import Span, runs_of, span_of
from storage.maintenance.sorting import order_terms
from storage.rows.types import Family, parse_type

#: Row groups of a sorted table: a look-up by the sort key reads one of them, so they are smaller.
SORTED_GROUP_ROWS: Final = 40_960

_MIB = 1024 * 1024
_BATCH_BYTES = 8 * _MIB
_GROUP_BYTES_MAX = 128 * _MIB
_FIXED_BYTES = 16  # of one column in one row, generously
#: Inputs up to this part of the memory are sorted without a spill.
_SORT_SHARE = 4


def rewrite(request: RewriteRequest, *, group_rows_max: int | None = None) -> Rewritten:
    """Runs one rewrite; blocks. The caller owns and removes `request.temp_dir`.

    Raises Corrupt for an input that is not what the catalog says, naming it, Fault when the
    outputs do not hold exactly the rows they should, SchemaInvalid for a `sort_by` or
    `partition_by` that the columns do not allow.
    """

    if group_rows_max is None:
        group_rows_max = SORTED_GROUP_ROWS if request.schema.sort_by else ROW_GROUP_ROWS
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
    """Seconds of each part, for the job's report."""

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

    def run(self) -> Rewritten:
        started = time.monotonic()
        timer = _Timer(started, {})
        inputs = self._request.inputs
        spans = [span_of(one, _verified(one)) for one in inputs]
        timer.lap("verify_s")
        if self._request.drop_places is not None:
            self._read_places(self._request.drop_places)
        left_out = self._left_out()
        relation = self._relation(inputs)
        before, removed = sums_of(self._connection, self._schema, relation, left_out=left_out)
        recorded = sum(one.file.rows for one in inputs)
        if before.rows.rows != recorded:
            raise Corrupt(
                f"{len(inputs)} data files of table {self._schema.name} hold {before.rows.rows} "
                f"rows where the catalog records {recorded}"
            )
        timer.lap("sum_inputs_s")
        files = self._write(spans, left_out, before)
        timer.lap("sort_and_write_s")
        written = scan_expression(self._schema, [str(file.path) for file in files], hidden=True)
        after, _ = sums_of(self._connection, self._schema, written)
        _require_equal(self._schema, before, removed, after)
        timer.lap("read_back_s")
        return Rewritten(
            files=files,
            before=before.rows,
            removed=removed.rows,
            after=after.rows,
            seconds=time.monotonic() - started,
            input_bytes=sum(one.file.size_bytes for one in inputs),
            spilled_bytes=self._spilled_bytes,
            notes=dict(timer.seconds),
        )

    def _relation(self, inputs: Sequence[RewriteInput]) -> str:
        """The rows of inputs, marked where `drop_places` names them."""

        paths = [str(one.path) for one in inputs]
        relation = scan_expression(self._schema, paths, hidden=True)
        if self._request.drop_places is None:
            return relation
        on = " AND ".join(f'r."{name}" = d."{name}"' for name in HIDDEN_COLUMNS)
        return (
            f'(SELECT r.*, d."$dropped" IS NOT NULL AS "$dropped" FROM {relation} AS r '
            f"LEFT JOIN places_dropped AS d ON {on})"
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

    def _write(
        self, spans: Sequence[Span | None], left_out: str | None, before: Sums
    ) -> tuple[RewrittenFile, ...]:
        if not before.rows.rows:
            return ()
        folder = self._folder / "files"
        folder.mkdir()
        outputs = OutputFiles(
            columns=FileColumns.of(self._schema),
            folder=folder,
            target_bytes=self._request.target_file_bytes,
            row_bytes=sum(one.file.size_bytes for one in self._request.inputs) / before.rows.rows,
            group_rows_max=self._group_rows_max,
            group_bytes_max=min(_GROUP_BYTES_MAX, max(_MIB, self._request.memory_bytes // 8)),
            unbounded=self._unbounded(),
        )
        spec = partition_spec(self._schema.partition_by, self._schema.columns)
        shared = self._shared_partition(spec)
        cuts = spec.sql() if spec and shared is None else []
        row_bytes = self._row_bytes(before)
        batch_rows = self._batch_rows(before, row_bytes)
        try:
            for run in self._runs(spans, row_bytes, cut=bool(cuts)):
                query = self._query(self._relation(run), left_out, cuts)
                for batch in self._connection.sql(query).to_arrow_reader(batch_rows):
                    self._watch_spill()
                    for part, values in _cut(batch, len(cuts)):
                        outputs.add(part, spec.text(values) if cuts else shared)
            return outputs.finish()
        except BaseException:
            outputs.abandon()
            raise

    def _runs(
        self, spans: Sequence[Span | None], row_bytes: int, *, cut: bool
    ) -> list[tuple[RewriteInput, ...]]:
        """What is sorted at a time: everything, unless rows keep the order of their arrival."""

        known = [span for span in spans if span is not None]
        if self._schema.sort_by or cut or len(known) < len(spans):
            return [self._request.inputs]
        return runs_of(known, rows_max=self._request.memory_bytes // _SORT_SHARE // row_bytes)

    def _query(self, relation: str, left_out: str | None, cuts: list[str]) -> str:
        """Rows in their order. The casts stand outside, so that they do not enter the order."""

        kept = f"SELECT * FROM {relation}"
        if left_out is not None:
            kept += f" WHERE NOT ({left_out})"
        marks = [f'"$partition{number}"' for number in range(len(cuts))]
        added = "".join(f", {sql} AS {mark}" for sql, mark in zip(cuts, marks, strict=True))
        terms = [f"{mark} NULLS LAST" for mark in marks]
        terms += order_terms(self._connection, self._schema, f"({kept})")
        columns = [_exported(column.name, column.type) for column in self._schema.columns]
        columns += [f'"{name}"' for name in HIDDEN_COLUMNS]
        return (
            f"SELECT {', '.join([*columns, *marks])} FROM (SELECT *{added} FROM ({kept}) "
            f"ORDER BY {', '.join(terms)})"
        )

    def _row_bytes(self, before: Sums) -> int:
        """What a row takes in memory, on the average."""

        columns = len(self._schema.columns) + len(HIDDEN_COLUMNS)
        return columns * _FIXED_BYTES + before.text_bytes // before.rows.rows

    def _batch_rows(self, before: Sums, row_bytes: int) -> int:
        rows = _BATCH_BYTES // row_bytes
        if before.text_bytes_max:
            # Long texts may follow each other, however few they are.
            rows = min(rows, self._request.memory_bytes // 4 // before.text_bytes_max)
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
    # The inputs are read twice, and never change.
    connection.execute("SET GLOBAL parquet_metadata_cache = true").fetchall()
    return connection


def _verified(one: RewriteInput) -> pq.FileMetaData:
    """The footer. Raises Corrupt unless the file is, byte for byte, what the catalog recorded."""

    file, name = one.file, one.file.object_key
    file_id = str(file.file_id)
    try:
        size = one.path.stat().st_size
        with one.path.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        if size != file.size_bytes or sha256 != file.sha256:
            raise Corrupt(
                f"the data file {name} is not the one that the catalog recorded", file_id=file_id
            )
        metadata: pq.FileMetaData = pq.read_metadata(one.path)
    except (pa.ArrowException, OSError) as error:
        raise Corrupt(f"the data file {name} cannot be read", file_id=file_id) from error
    if metadata.num_rows != file.rows:
        raise Corrupt(
            f"the data file {name} holds {metadata.num_rows} rows where the catalog records "
            f"{file.rows}",
            file_id=file_id,
        )
    return metadata


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

    if parse_type(sql_type).family is Family.UUID:
        return f'"{name}"::BLOB AS "{name}"'
    return f'"{name}"'


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
