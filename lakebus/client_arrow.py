"""Answers as Arrow: those that came as JSON, by their SQL types, and streams with their end mark.

Arrow readers take a stream that ends between two batches for a whole one, so the end mark is looked
for here: without it an answer that broke off would look like a shorter one (contract D9).
"""

from __future__ import annotations

import datetime as dt
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lakebus.client_errors import AnswerTruncated, package_missing
from lakebus.client_http import Reply, TransportFailed
from lakebus.client_types import SqlType, parse_type
from lakebus.client_values import Convert, python_rows
from lakebus.errors import FixRequest

if TYPE_CHECKING:
    import pyarrow as pa

_SIMPLE = {
    "boolean": "bool_", "tinyint": "int8", "smallint": "int16", "integer": "int32",
    "bigint": "int64", "utinyint": "uint8", "usmallint": "uint16", "uinteger": "uint32",
    "ubigint": "uint64", "float": "float32", "double": "float64", "blob": "binary",
    "date": "date32", "null": "null",
}  # fmt: skip
#: Arrow has no type for them, but Python has one.
_AS_TEXT = frozenset({"uuid", "hugeint", "uhugeint", "bignum"})
_NANOSECONDS = frozenset({"timestamp_ns", "timestamptz_ns"})
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_UNITS = {"timestamp_s": "s", "timestamp_ms": "ms", "timestamp_ns": "ns", "timestamp": "us"}
_READ_BYTES = 1 << 16


def pyarrow(what: str) -> Any:
    """The package. Raises PackageMissing."""

    try:
        import pyarrow as pa  # here, because the client works without it
    except ImportError:
        raise package_missing("pyarrow", what) from None
    return pa


def pandas_of(table: pa.Table) -> Any:
    try:
        return table.to_pandas()
    except ImportError as error:
        raise package_missing("pandas", "a DataFrame of pandas") from error


def polars_of(table: pa.Table) -> Any:
    try:
        polars = importlib.import_module("polars")  # by name: it is optional, types and all
    except ImportError:
        raise package_missing("polars", "a DataFrame of polars") from None
    return polars.from_arrow(table)


# --- from JSON -----------------------------------------------------------------------------


def table_of(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]]) -> pa.Table:
    """A table with the types that the server's own Arrow answer has. Raises PackageMissing, and
    FixRequest for values that only that answer can carry."""

    pa = pyarrow("a table")
    values = python_rows(columns, rows)
    arrays, fields = [], []
    for place, (name, text) in enumerate(columns):
        kind = parse_type(text)
        wanted = arrow_type(pa, kind)
        try:
            arrays.append(_array(pa, [row[place] for row in values], wanted, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise FixRequest(
                f"column {name} ({text}) has values that Python cannot hold ({error}): ask for"
                " Arrow with query_arrow, which carries them"
            ) from error
        fields.append(pa.field(name, wanted))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def arrow_type(pa: Any, kind: SqlType) -> Any:
    """What DuckDB exports a type as; text where Arrow has nothing for it."""

    if kind.name in _SIMPLE:
        return getattr(pa, _SIMPLE[kind.name])()
    if kind.name in _UNITS:
        return pa.timestamp(_UNITS[kind.name])
    if kind.name in ("timestamptz", "timestamptz_ns"):
        return pa.timestamp("ns" if kind.name.endswith("_ns") else "us", "UTC")
    if kind.name == "time":
        return pa.time64("us")
    if kind.name == "decimal":
        return pa.decimal128(kind.precision, kind.scale)
    children = [arrow_type(pa, child) for child in kind.children]
    if kind.name == "list":
        return pa.list_(children[0], -1 if kind.size is None else kind.size)
    if kind.name == "map":
        key = kind.children[0].name
        return pa.map_(pa.string() if key == "null" else children[0], children[1])
    if kind.name in ("struct", "tuple"):
        return pa.struct(list(zip(_members(kind), children, strict=True)))
    return pa.string()


def _members(kind: SqlType) -> tuple[str, ...]:
    """DuckDB numbers the members of a tuple from 1."""

    return kind.names or tuple(f"element{n}" for n in range(1, len(kind.children) + 1))


def _array(pa: Any, values: list[Any], wanted: Any, kind: SqlType) -> Any:
    shape = _shape(kind)
    if shape is not None:
        values = [None if value is None else shape(value) for value in values]
    return pa.array(values, wanted)


def _shape(kind: SqlType) -> Convert | None:
    """From Python's values to those that pyarrow takes for the type; None: they are the same. Maps
    are lists of pairs, tuples are objects, and what Arrow has no type for is text."""

    if kind.name in _NANOSECONDS:
        return _nanoseconds
    if kind.name in _AS_TEXT:
        return str
    inner = [_shape(child) for child in kind.children]
    shapes = [_nullable(shape) if shape else _same for shape in inner]
    if kind.name == "map":
        return _pairs(*shapes)
    if kind.name == "tuple":
        return _object(_members(kind), shapes)
    if kind.name == "union" or not any(inner):
        return None
    if kind.name == "list":
        item = shapes[0]
        return lambda found: [item(value) for value in found]
    return lambda found: {
        name: shape(found[name]) for name, shape in zip(kind.names, shapes, strict=True)
    }


def _pairs(key: Convert, value: Convert) -> Convert:
    def pairs(found: Any) -> list[tuple[Any, Any]]:
        items = found.items() if isinstance(found, dict) else found
        return [(key(k), value(v)) for k, v in items]

    return pairs


def _object(names: Sequence[str], shapes: Sequence[Convert]) -> Convert:
    return lambda found: {
        name: shape(value) for name, shape, value in zip(names, shapes, found, strict=True)
    }


def _nullable(shape: Convert) -> Convert:
    return lambda value: None if value is None else shape(value)


def _same(value: Any) -> Any:
    return value


def _nanoseconds(text: str) -> int:
    """Since 1970; Python's own times have microseconds. Raises ValueError."""

    bare = text.removesuffix("Z")
    at = dt.datetime.fromisoformat(bare[:-3]).replace(tzinfo=dt.UTC)
    return (at - _EPOCH) // dt.timedelta(microseconds=1) * 1000 + int(bare[-3:])


# --- streams -------------------------------------------------------------------------------


class _Pipe(io.RawIOBase):
    """An answer's body as the file that pyarrow reads. `short`: it ended before what was asked for,
    so what pyarrow took for the end was none."""

    def __init__(self, read: Callable[[int], bytes | memoryview]) -> None:
        super().__init__()
        self._read = read
        self._held = memoryview(b"")
        self.short = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise io.UnsupportedOperation("an answer is read in pieces")
        if len(self._held) >= size:
            part, self._held = self._held[:size], self._held[size:]
            return bytes(part)
        parts, missing = [self._held], size - len(self._held)
        self._held = memoryview(b"")
        while missing > 0:
            more = memoryview(self._read(max(_READ_BYTES, missing)))
            if not more:
                self.short = True
                break
            self._held, more = more[missing:], more[:missing]
            parts.append(more)
            missing -= len(more)
        return b"".join(parts)

    def is_at_end(self) -> bool:
        return not self._held and not self._read(_READ_BYTES)


class Batches:
    """The record batches of an answer, as they come; iterate once, and close (`with`).

    Closing early cancels the query. An answer that breaks off raises AnswerTruncated, whatever
    batches came before it. `token` and `snapshot_id` as of a `Result`.
    """

    def __init__(self, answer: Reply) -> None:
        package = pyarrow("an Arrow answer")
        self._answer = answer
        self._pipe = _Pipe(answer.read)
        self._fault = package.ArrowException
        self._ended = False
        self.snapshot_id = int(answer.header("lakebus-snapshot-id") or 0)
        self.token = answer.header("lakebus-visibility-token") or ""
        self.query_id = answer.header("lakebus-query-id") or ""
        self._reader = self._guarded(lambda: package.ipc.open_stream(self._pipe))
        self.schema: pa.Schema = self._reader.schema

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while (batch := self.next()) is not None:
            yield batch

    def next(self) -> pa.RecordBatch | None:
        """The next batch, or None at the end. Raises AnswerTruncated."""

        if self._ended:
            return None
        batch = self._guarded(self._next)
        if batch is None:
            self._ended = True
            self.close()
        return batch

    def read_all(self) -> pa.Table:
        """All that is left, as a table. Raises AnswerTruncated."""

        return pyarrow("a table").Table.from_batches(list(self), schema=self.schema)

    def close(self) -> None:
        self._answer.close()

    def _next(self) -> pa.RecordBatch | None:
        try:
            return self._reader.read_next_batch()
        except StopIteration:
            if self._pipe.short:
                raise AnswerTruncated("the Arrow stream ended without its end mark") from None
            if not self._pipe.is_at_end():
                raise AnswerTruncated("bytes follow the Arrow stream's end mark") from None
            return None

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except AnswerTruncated:
            self._ended = True
            self.close()
            raise
        except (TransportFailed, self._fault, OSError) as error:
            self._ended = True
            self.close()
            raise AnswerTruncated(f"the answer broke off: {error}") from error
