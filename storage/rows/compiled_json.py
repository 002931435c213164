"""JSON bodies read by compiled code, straight into the buffers of Arrow columns.

`json_columns.c` reads rows of scalar columns in a sixth of the time that Python takes to make
objects of them and columns of these. It is optional: where it was not built, or does not know a
type of the table, `decode_json` reads as it would without it; and what it refuses, the other
readers judge. So it only must never accept more than they do, nor read another value. Tests of
properties hold it to that.

It works in buffers that belong to this module and cannot be outgrown: a body has no more text than
bytes, rows are bounded by what was made room for, and zeros behind each body end every loop. What
it has read is copied out of them, so they serve again.

It is a plain library called through ctypes, no extension module: it knows no Python object, counts
no references and allocates nothing. So it is all one to it which interpreter of a process calls it,
and no lock has to be held. What threads share here is code, plans, which nobody changes, and a list
that is changed in single steps, each of which is whole also without the GIL; buffers are never
shared. After a fork each process has its own. Plans hold addresses: they cannot be pickled. Where
memory ends, whoever asked for it raises MemoryError, and what is kept stays fit for use.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lakebus.schemas import Column
from storage.rows.shapes import TableShape
from storage.rows.types import ColumnType, Family

COLUMNS_MAX: Final = 64
BODIES_MAX: Final = 1024
#: Of bodies that are read at once in buffers that are kept. Larger ones get buffers of their own.
KEPT_BYTES: Final = 384 * 1024
#: Room for these; rows of fewer than 24 bytes may find none, and are read as without this module.
KEPT_ROWS: Final = 16 * 1024
#: Room for larger bodies, of which what they do not need is never touched.
ROOM_BYTES_MAX: Final = 512 * 1024 * 1024

_LAYOUT: Final = 1
PADDING_BYTES: Final = 64
_BRACE: Final = ord("{")
#: What the comparison takes for each byte stays in a core's cache.
_COUNTED_AT_ONCE: Final = 256 * 1024
_SLACK_BYTES: Final = 200
#: The widest value and its validity; of a text its end.
_VALUE_BYTES: Final = 16 + 1 + 4
_INTEGER_MAX: Final = (1 << 63) - 1
_DECIMAL_DIGITS: Final = 18
#: The numbers are those of the C code.
_FAMILIES: Final = {
    Family.BOOLEAN: 0,
    Family.INTEGER: 1,
    Family.FLOAT: 2,
    Family.DECIMAL: 3,
    Family.VARCHAR: 4,
    Family.DATE: 5,
    Family.TIMESTAMP: 6,
    Family.TIMESTAMPTZ: 7,
}
#: Numbers too: Arrow reads them as exactly, and faster than C's own library.
_AS_TEXT: Final = (Family.VARCHAR, Family.FLOAT)

_TO_DOUBLE: Final = pc.CastOptions.safe(pa.float64())

_Read = Callable[[bytes, int, int, int, int, int], None]


class _Table(ctypes.Structure):
    _fields_ = (
        ("columns", ctypes.c_int64),
        ("column", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
    )


class _Space(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("fixed", ctypes.c_void_p),
        ("fixed_step", ctypes.c_int64),
        ("valid", ctypes.c_void_p),
        ("valid_step", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
        ("ends_step", ctypes.c_int64),
        ("texts", ctypes.c_void_p),
        ("texts_step", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("stamp", ctypes.c_void_p),
        ("rows_read", ctypes.c_int64),
        ("body_ends", ctypes.c_void_p),
        ("lines", ctypes.c_void_p),
        ("row_ends", ctypes.c_void_p),
        ("nulls", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class CompiledReader:
    """`hold` keeps the GIL: what small bodies take is less than handing it over may take.
    `release` leaves it to others meanwhile."""

    hold: _Read
    release: _Read


def load(path: Path) -> CompiledReader | None:
    """None where nothing was built, or something for another version of this module."""

    try:
        libraries = [kind(str(path)) for kind in (ctypes.PyDLL, ctypes.CDLL)]
        layout = libraries[0].json_columns_layout
    except (OSError, AttributeError):
        return None
    layout.restype = ctypes.c_int64
    if layout() != _LAYOUT:
        return None
    sizes, pointers = [ctypes.c_int64] * 3, [ctypes.c_void_p] * 2
    for library in libraries:
        library.json_columns.restype = None
        library.json_columns.argtypes = [ctypes.c_char_p, *sizes, *pointers]
    return CompiledReader(*(library.json_columns for library in libraries))


def _find() -> CompiledReader | None:
    here = Path(__file__)
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    found = (load(here.with_name(f"json_columns{suffix}")) for suffix in suffixes)
    return next((reader for reader in found if reader is not None), None)


READER: Final = _find()


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """All that is derived from one schema version. `widths`: bytes of a column's values, 0 for
    texts. `owned`: what the C struct `table` points to."""

    reader: CompiledReader
    kinds: tuple[ColumnType, ...]
    arrow: pa.Schema
    widths: tuple[int, ...]
    texts: int
    order: NDArray[np.int64]
    table: _Table
    owned: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class CompiledRows:
    """The rows of the bodies that were read, one after the other. `ends[n]`: where those of body n
    end, -1 when it was refused. `size_bytes`: what all of them take."""

    batch: pa.RecordBatch
    ends: Sequence[int]
    size_bytes: int


def compiled_plan(
    columns: Sequence[Column],
    shape: TableShape,
    reader: CompiledReader | None = READER,
) -> CompiledPlan | None:
    """None without compiled code, and for a table with a type that it does not know."""

    kinds = shape.kinds
    if reader is None or len(kinds) > COLUMNS_MAX or not all(map(_is_known, kinds)):
        return None
    names = [column.name.encode() for column in columns]
    described = []
    widths = []
    text = start = 0
    for column, kind, name in zip(columns, kinds, names, strict=True):
        width = _width(kind)
        high = 10**kind.precision - 1 if kind.family is Family.DECIMAL else kind.high
        end = start + len(name)
        described.append(
            [
                *(_FAMILIES[kind.family], column.nullable, kind.integer_text_allowed),
                *(kind.low, min(high, _INTEGER_MAX), kind.scale),
                *(width, text, start, end),
            ]
        )
        widths.append(width)
        text += not width
        start = end
    table = np.array(described, np.int64)
    joined = np.frombuffer(b"".join(names), np.uint8)
    return CompiledPlan(
        reader=reader,
        kinds=kinds,
        arrow=shape.arrow,
        widths=tuple(widths),
        texts=text,
        order=np.arange(len(kinds)),
        table=_Table(len(kinds), table.ctypes.data, joined.ctypes.data),
        owned=(table, joined),
    )


def _is_known(kind: ColumnType) -> bool:
    if kind.family is Family.FLOAT:
        return kind.bits == 64
    if kind.family is Family.DECIMAL:
        return kind.scale < _DECIMAL_DIGITS
    return kind.family in _FAMILIES


def _width(kind: ColumnType) -> int:
    if kind.family in _AS_TEXT:
        return 0
    return 1 if kind.family is Family.BOOLEAN else int(kind.arrow.bit_width) // 8


class Buffers:
    """Room for `rows` rows of `size` bytes of bodies. Not for two threads at once."""

    def __init__(self, *, size: int, rows: int, bodies: int, columns: int, texts: int) -> None:
        # Steps that are no powers of two keep columns out of each other's places in the cache.
        self.fixed = np.empty((columns, 16 * rows + 72), np.uint8)
        self.valid = np.empty((columns, rows + 72), np.uint8)
        self.ends = np.zeros((texts, rows + 18), np.int32)
        self.texts = np.empty((texts, size + _SLACK_BYTES), np.uint8)
        self.order = np.zeros(columns, np.int64)
        self.stamp = np.zeros(columns, np.int64)
        self.body_ends = np.empty(bodies, np.int64)
        self.lines = np.empty(bodies, np.uint8)
        self.row_ends = np.empty(bodies, np.int64)
        self.nulls = np.empty(columns, np.int64)
        self.space = _Space(
            rows,
            *(self.fixed.ctypes.data, self.fixed.shape[1]),
            *(self.valid.ctypes.data, self.valid.shape[1]),
            *(self.ends.ctypes.data, self.ends.shape[1]),
            *(self.texts.ctypes.data, self.texts.shape[1]),
            *(self.order.ctypes.data, self.stamp.ctypes.data, 0),
            *(self.body_ends.ctypes.data, self.lines.ctypes.data),
            *(self.row_ends.ctypes.data, self.nulls.ctypes.data),
        )


#: Taken out while in use, so threads never share them.
_kept: list[Buffers] = []


def read_bodies(
    plan: CompiledPlan, bodies: Sequence[bytes], lines: Sequence[bool], *, rows_max: int
) -> CompiledRows | None:
    """The rows of each body that is right and usual, None when no body is. `lines`: whether a body
    has an object a line, instead of one array or one object."""

    # Only of bytes the length is that of the text: a view may count other items, or have gaps.
    if len(bodies) > BODIES_MAX or not all(type(body) is bytes for body in bodies):
        return None
    data = b"\0".join([*bodies, bytes(PADDING_BYTES)])
    small = len(data) <= KEPT_BYTES
    buffers = _kept_buffers() if small else own_buffers(plan, data, len(bodies))
    if buffers is None:
        return None
    try:
        return _read(plan, buffers, data, bodies, lines, rows_max)
    finally:
        if small:
            _kept[:] = [buffers]


def _kept_buffers() -> Buffers:
    """For any table. What its bodies do not need of them is never touched, and takes no memory."""

    try:
        return _kept.pop()
    except IndexError:
        return Buffers(
            size=KEPT_BYTES,
            rows=KEPT_ROWS,
            bodies=BODIES_MAX,
            columns=COLUMNS_MAX,
            texts=COLUMNS_MAX,
        )


def own_buffers(plan: CompiledPlan, data: bytes, bodies: int) -> Buffers | None:
    columns, texts = len(plan.kinds), plan.texts
    rows = _braces(data)
    if columns * rows * _VALUE_BYTES + texts * len(data) > ROOM_BYTES_MAX:
        return None
    return Buffers(size=len(data), rows=rows, bodies=bodies, columns=columns, texts=texts)


def _braces(data: bytes) -> int:
    """At least as many as there are rows. The method of bytes looks at each byte by itself: as
    long as reading a fifth of the rows."""

    count = 0
    for start in range(0, len(data), _COUNTED_AT_ONCE):
        part = np.frombuffer(data, np.uint8, min(_COUNTED_AT_ONCE, len(data) - start), start)
        count += int(np.count_nonzero(part == _BRACE))
    return count


def _read(
    plan: CompiledPlan,
    buffers: Buffers,
    data: bytes,
    bodies: Sequence[bytes],
    lines: Sequence[bool],
    rows_max: int,
) -> CompiledRows | None:
    count = len(bodies)
    # Each body but the first starts behind the zero that ends the one before.
    buffers.body_ends[:count] = [n + e for n, e in enumerate(accumulate(map(len, bodies)))]
    buffers.lines[:count] = lines
    buffers.order[: len(plan.kinds)] = plan.order
    read = plan.reader.hold if len(data) <= KEPT_BYTES else plan.reader.release
    table, space = ctypes.addressof(plan.table), ctypes.addressof(buffers.space)
    read(data, len(data), count, rows_max, table, space)
    ends: list[int] = buffers.row_ends[:count].tolist()
    rows = max(ends)
    if rows <= 0:
        return None
    nulls: list[int] = buffers.nulls[: len(plan.kinds)].tolist()
    arrays = []
    text = size = 0
    for place, (kind, width) in enumerate(zip(plan.kinds, plan.widths, strict=True)):
        bitmap = None
        if nulls[place]:
            bitmap = pa.py_buffer(np.packbits(buffers.valid[place, :rows], bitorder="little"))
        if width:
            values = buffers.fixed[place, : rows * width]
            if kind.family is Family.BOOLEAN:
                values = np.packbits(values, bitorder="little")
            content = [bitmap, pa.py_buffer(values.tobytes())]
            array = pa.Array.from_buffers(kind.arrow, rows, content, nulls[place])
            size += rows * width
        else:
            text_ends = buffers.ends[text, : rows + 1]
            texts = pa.py_buffer(buffers.texts[text, : text_ends[-1]].tobytes())
            where = pa.py_buffer(text_ends.tobytes())
            array = pa.StringArray.from_buffers(rows, where, texts, bitmap, nulls[place])
            text += 1
            size += where.size + texts.size
            if kind.family is Family.FLOAT:
                array = pc.call_function("cast", [array], _TO_DOUBLE)
        arrays.append(array)
    return CompiledRows(pa.RecordBatch.from_arrays(arrays, schema=plan.arrow), ends, size)
