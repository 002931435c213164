"""How the columns of one file are encoded: chosen by what a part of its first row group takes.

Numbers that lie near their neighbours are deltas, floats are split into streams of bytes, texts lie
behind all their lengths, and what repeats gets a dictionary. Where a trial says that another way is
smaller, that one is taken; a way that is read more slowly has to save something. Without enough
rows for a trial the type decides: such a file is soon merged with others.

Every way is one that DuckDB and Arrow both read. DuckDB 2.0 does not read split bytes of values
with a fixed length, which is why decimals of up to 18 digits are written as integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.files.statistics import storage_of
from storage.rows.types import ColumnType, Family

DELTAS: Final = "DELTA_BINARY_PACKED"
SPLIT: Final = "BYTE_STREAM_SPLIT"
LENGTHS: Final = "DELTA_LENGTH_BYTE_ARRAY"
PLAIN: Final = "PLAIN"
DICTIONARY: Final = "RLE_DICTIONARY"

#: With fewer rows the type decides.
TRIAL_ROWS_MIN: Final = 8192
_TRIAL_ROWS = 8192
_DICTIONARY_SHARE_MAX = 0.25
#: From this share of different values in the sample on, all are taken for different.
_ALL_DISTINCT_SHARE = 0.9
#: A value of split bytes takes 8 to 10 ns to read where a delta takes 6, and a plain one under zstd
#: 15 to 18: what such a way has to take at most, of what the quicker one takes.
_SPLIT_SHARE_MAX = 0.97
_PLAIN_SHARE_MAX = {DELTAS: 0.9, SPLIT: 0.95, LENGTHS: 0.95}
#: A codec that saves less than this is only work.
_CODEC_SHARE_MAX = 0.97
#: Texts gain a twenty-fifth by it for a tenth of the time; numbers nothing. Level 5 takes 2.5 times
#: as long as 3 for a fourteenth.
_TEXT_LEVEL = 3
_LEVEL = 1

_DELTA_FAMILIES = frozenset(
    {Family.INTEGER, Family.DATE, Family.TIME, Family.TIMESTAMP, Family.TIMESTAMPTZ}
)
_TEXT_FAMILIES = frozenset({Family.VARCHAR, Family.BLOB, Family.JSON})
_INTEGER_DIGITS_MAX = 18


@dataclass(frozen=True, slots=True)
class ColumnForm:
    """`compressed`: by zstd, at `level`."""

    encoding: str
    compressed: bool = True
    level: int = _LEVEL


@dataclass(frozen=True, slots=True)
class Trial:
    """Bytes that a value takes, with and without the codec."""

    plain: float
    compressed: float

    @property
    def least(self) -> float:
        return min(self.plain, self.compressed)


def natural_encoding(kind: ColumnType) -> str:
    """What suits a type when nothing is known about its values."""

    if kind.family in _DELTA_FAMILIES or _is_integral(kind):
        return DELTAS
    if kind.family is Family.FLOAT:
        return SPLIT
    return LENGTHS if kind.family in _TEXT_FAMILIES else PLAIN


def _is_integral(kind: ColumnType) -> bool:
    return kind.family is Family.DECIMAL and kind.precision <= _INTEGER_DIGITS_MAX


def distinct_values(group: pa.Table, names: Iterable[str]) -> dict[str, int]:
    """How many values each of the columns has in the row group; an estimate where nearly all of a
    sample are different."""

    found: dict[str, int] = {}
    # Without order: what goes round in a circle differs from its neighbours.
    sample = None
    if group.num_rows > 2 * _TRIAL_ROWS:
        sample = np.random.default_rng(1).integers(0, group.num_rows, _TRIAL_ROWS)
        # A row is drawn twice now and then, and would look like a value that repeats.
        sample = pa.array(np.unique(sample))
    for name in names:
        column = group.column(name)
        if pa.types.is_nested(column.type):
            continue  # no kernel counts them
        if isinstance(column.type, pa.BaseExtensionType):
            column = storage_of(column)
        if sample is not None:
            share = pc.count_distinct(column.take(sample)).as_py() / len(sample)
            if share >= _ALL_DISTINCT_SHARE:
                found[name] = int(share * group.num_rows)
                continue
        found[name] = pc.count_distinct(column).as_py()
    return found


def choose_forms(
    kinds: Mapping[str, ColumnType],
    group: pa.Table,
    distinct: Mapping[str, int],
    *,
    whole: bool,
) -> dict[str, ColumnForm]:
    """A form for each column of scalars. `whole`: many rows will be written this way, so that the
    whole group is worth a trial where a part of it would mislead."""

    scalars = {name: kind for name, kind in kinds.items() if not kind.is_nested}
    natural = {name: natural_encoding(kind) for name, kind in scalars.items()}
    if group.num_rows < TRIAL_ROWS_MIN:
        return {
            name: _form(_repeated(kind, group.num_rows, distinct.get(name)) or natural[name], kind)
            for name, kind in scalars.items()
        }
    # In the middle, and in one piece: deltas are between neighbours.
    part = group.slice((group.num_rows - _TRIAL_ROWS) // 2, _TRIAL_ROWS)
    tried = {name: code for name, code in natural.items() if scalars[name].family in _TRIED}
    levels = {name: _level(scalars[name]) for name in tried}
    first = _tried(part, tried, levels)
    plain = _tried(part, {name: PLAIN for name, code in tried.items() if code != PLAIN}, levels)
    deltas = [name for name, code in tried.items() if code == DELTAS and _width(scalars[name]) > 2]
    # zstd takes 128 KiB at a time, and so how many rows lie behind each other decides how well the
    # streams are kept apart.
    split = _tried(group, dict.fromkeys(deltas, SPLIT), levels) if whole else {}
    found: dict[str, ColumnForm] = {}
    for name, kind in scalars.items():
        code, least = natural[name], first.get(name)
        if least is not None:
            if name in split and split[name].least < least.least * _SPLIT_SHARE_MAX:
                code, least = SPLIT, split[name]
            share = _PLAIN_SHARE_MAX.get(code, 0.0)
            if name in plain and plain[name].least < least.least * share:
                code, least = PLAIN, plain[name]
        size = None if least is None else least.least
        repeated = _repeated(kind, group.num_rows, distinct.get(name), size)
        if repeated is not None:
            found[name] = _form(repeated, kind)
        elif least is not None:
            saves = least.compressed < least.plain * _CODEC_SHARE_MAX
            found[name] = ColumnForm(code, saves, _level(kind))
        else:
            found[name] = _form(code, kind)
    return found


_TRIED = _DELTA_FAMILIES | _TEXT_FAMILIES | {Family.DECIMAL, Family.FLOAT, Family.UUID}


def _form(encoding: str, kind: ColumnType) -> ColumnForm:
    return ColumnForm(encoding, True, _level(kind))


def _level(kind: ColumnType) -> int:
    return _TEXT_LEVEL if kind.family in _TEXT_FAMILIES else _LEVEL


def _width(kind: ColumnType) -> int:
    """Bytes of a value that deltas may hold, as Parquet's integers have them."""

    if kind.family is Family.INTEGER:
        return 8 if kind.bits == 64 else kind.bits // 8
    if kind.family is Family.DECIMAL:
        return 4 if kind.precision <= 9 else 8
    return 4 if kind.family is Family.DATE else 8


def _repeated(
    kind: ColumnType, rows: int, distinct: int | None, size: float | None = None
) -> str | None:
    """A dictionary, where values repeat and it is smaller. Texts take it in any case: DuckDB works
    on the words of a dictionary and not on the rows."""

    if kind.family is Family.BOOLEAN or distinct is None:
        return None
    if distinct > rows * _DICTIONARY_SHARE_MAX:
        return None
    if size is None or kind.family in _TEXT_FAMILIES:
        return DICTIONARY
    bits = max(1, (distinct - 1).bit_length())
    estimate = bits / 8 + distinct / max(1, rows) * size
    return DICTIONARY if estimate < size else None


def _tried(
    rows: pa.Table, encodings: Mapping[str, str], levels: Mapping[str, int]
) -> dict[str, Trial]:
    if not encodings:
        return {}
    names = list(encodings)
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows.select(names),
        sink,
        row_group_size=rows.num_rows,
        max_rows_per_page=rows.num_rows,
        compression="zstd",
        compression_level={name: levels[name] for name in names},
        use_dictionary=False,
        column_encoding=dict(encodings),
        write_statistics=False,
        store_decimal_as_integer=True,
        store_schema=False,
    )
    metadata = pq.read_metadata(pa.BufferReader(sink.getvalue()))
    found: dict[str, Trial] = {}
    for place, name in enumerate(names):
        chunk = metadata.row_group(0).column(place)
        found[name] = Trial(
            chunk.total_uncompressed_size / rows.num_rows,
            chunk.total_compressed_size / rows.num_rows,
        )
    return found


def writer_options(forms: Mapping[str, ColumnForm], leaves: Sequence[str]) -> dict[str, Any]:
    """Of `pyarrow.parquet.ParquetWriter`. `leaves`: paths of all columns in the file; one without a
    form is plain and compressed."""

    names = [name for name in leaves if name in forms]
    codecs = dict.fromkeys(leaves, "zstd")
    codecs |= {name: "none" for name in names if not forms[name].compressed}
    return {
        "compression": codecs,
        "compression_level": {
            path: forms[path].level if path in forms else _LEVEL
            for path in leaves
            if codecs[path] == "zstd"
        },
        "use_dictionary": [n for n in names if forms[n].encoding == DICTIONARY] or False,
        "column_encoding": {
            n: forms[n].encoding for n in names if forms[n].encoding not in (DICTIONARY, PLAIN)
        },
        "store_decimal_as_integer": True,
    }
