"""Partitions: which rows belong together in a file, by transforms of a table's columns.

A spec is a list of transforms, spelled as in `partition_by`. Each turns a row into a *value text*,
or null for a null; rows with equal value texts in every transform are one partition, and nulls are
a partition of their own. The same text comes out in three ways, which Hypothesis proves equal
(`tests/unit/test_partitions.py`): from Arrow columns (`split`), from DuckDB (`sql`), and from one
value of a query's predicate (`Transform.value_text`).

The canonical text of a column's value is the text of its bound in `storage.files.statistics`, with
two differences that make it the same for every value and under every type a column can be widened
to: decimals lose their trailing zeros (``1.50`` is ``1.5``, ``0.00`` is ``0``), and dates and
timestamps outside the years 1 to 9999, infinite ones too, are all ``beyond``.

==================  ======================================  ===================================
transform           columns                                 value text
==================  ======================================  ===================================
``c``               all but float, double, json, blob       the canonical text; of text, its
                                                            first 256 characters
``year(c)``         date, timestamp, timestamptz (in UTC)   ``2026``
``month(c)``        the same                                ``2026-01``
``day(c)``          the same                                ``2026-01-31``
``hour(c)``         timestamp, timestamptz (in UTC)         ``2026-01-31T23``
``bucket(n, c)``    all but float, double, json             ``0`` … n - 1: the first 32 bits of
                                                            the MD5 of the canonical text (of a
                                                            blob: of its bytes), big-endian,
                                                            modulo n; 2 ≤ n ≤ 1024
``truncate(w, c)``  varchar; integers                       the first w characters (code
                                                            points), 1 ≤ w ≤ 256; the greatest
                                                            multiple of w that is not above the
                                                            value, 2 ≤ w ≤ 10^18
==================  ======================================  ===================================

Floats have no equality worth grouping by, and JSON has many texts for one value, so both are
refused. `tests/vectors/partitions_v1.json` fixes the texts for ever: files on disk carry them.

A partition is written as a JSON object, transform text → value text. The names in it are those of
the schema version that the file was written with.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lakebus.errors import SchemaInvalid
from lakebus.schemas import Column, fold_name
from storage.files.partition_values import (
    BEYOND,
    CANONICAL,
    ISO_CHARACTERS,
    MICROSECONDS_A_DAY,
    MICROSECONDS_AN_HOUR,
    TransformKind,
    buckets_of,
    calendar_text,
    floor_divided,
    plain_values,
    widest_integer,
)
from storage.files.statistics import storage_of
from storage.rows.types import NESTED, ColumnType, Family, parse_type

TRANSFORMS_MAX: Final = 4
BUCKETS_MAX: Final = 1024
TEXT_CHARACTERS_MAX: Final = 256
TRUNCATE_WIDTH_MAX: Final = 10**18

_CALL = re.compile(r"([A-Za-z]+) ?\((.*)\)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,19}")

_TIMES = frozenset({Family.DATE, Family.TIMESTAMP, Family.TIMESTAMPTZ})
_INSTANTS = frozenset({Family.TIMESTAMP, Family.TIMESTAMPTZ})
_NEVER = NESTED | {Family.FLOAT, Family.JSON}


_FAMILIES: Final[Mapping[TransformKind, frozenset[Family]]] = {
    TransformKind.IDENTITY: frozenset(Family) - _NEVER - {Family.BLOB},
    TransformKind.YEAR: _TIMES,
    TransformKind.MONTH: _TIMES,
    TransformKind.DAY: _TIMES,
    TransformKind.HOUR: _INSTANTS,
    TransformKind.BUCKET: frozenset(Family) - _NEVER,
    TransformKind.TRUNCATE: frozenset({Family.VARCHAR, Family.INTEGER}),
}
_ISO_FORMATS: Final = {
    TransformKind.YEAR: "%Y",
    TransformKind.MONTH: "%Y-%m",
    TransformKind.DAY: "%Y-%m-%d",
    TransformKind.HOUR: "%Y-%m-%dT%H",
}


@dataclass(frozen=True, slots=True)
class Transform:
    """One transform of one column. `argument`: n of bucket, w of truncate, else 0."""

    kind: TransformKind
    column: Column
    type: ColumnType
    argument: int = 0

    @property
    def text(self) -> str:
        """The canonical spelling."""

        return _spelled(self.kind, self.argument, self.column.name)

    def value_text(self, value: object) -> str | None:
        """The value text of one value in the form of `BOUND_READERS` (days, microseconds, UTF-8
        bytes …), or None when it is no value that a row of the column can have."""

        canonical = CANONICAL[self.type.family](value)
        if canonical is None:
            return None
        match self.kind:
            case TransformKind.IDENTITY if self.type.family is Family.VARCHAR:
                return canonical[:TEXT_CHARACTERS_MAX]
            case TransformKind.IDENTITY:
                return canonical
            case TransformKind.BUCKET:
                raw = value if isinstance(value, bytes) else canonical.encode()
                return str(buckets_of([raw], self.argument)[0])
            case TransformKind.TRUNCATE if self.type.family is Family.VARCHAR:
                return canonical[: self.argument]
            case TransformKind.TRUNCATE:
                whole = int(canonical)
                return str(whole - whole % self.argument)
            case _:
                assert isinstance(value, int)
                hour = (
                    value * 24 if self.type.family is Family.DATE else value // MICROSECONDS_AN_HOUR
                )
                return calendar_text(self.kind, hour)

    def texts(self, column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray[Any, Any], list[str]]:
        """For each row the place of its value text in the list, or -1 for a null."""

        keys = self._keys(column)
        if isinstance(keys, pa.ChunkedArray):
            keys = keys.combine_chunks()
        encoded = pc.dictionary_encode(keys)
        uniques = self._unique_texts(encoded.dictionary)
        places: dict[str, int] = {}
        code_of = [places.setdefault(text, len(places)) for text in uniques]
        lookup = np.array([*code_of, -1], dtype=np.int64)  # the last one: for nulls
        indices = pc.fill_null(encoded.indices, len(uniques)).to_numpy(zero_copy_only=False)
        return lookup[indices], list(places)

    def sql(self, name: str) -> str:
        """A DuckDB expression that gives the value text; `name` is SQL of the column."""

        match self.kind:
            case TransformKind.IDENTITY if self.type.family is Family.VARCHAR:
                return f"substring({name}, 1, {TEXT_CHARACTERS_MAX})"
            case TransformKind.IDENTITY:
                return self._canonical_sql(name)
            case TransformKind.BUCKET:
                text = name if self.type.family is Family.BLOB else self._canonical_sql(name)
                return f"((('0x' || md5({text})[1:8])::ubigint % {self.argument})::varchar)"
            case TransformKind.TRUNCATE if self.type.family is Family.VARCHAR:
                return f"substring({name}, 1, {self.argument})"
            case TransformKind.TRUNCATE:
                value, width = f"({name})::hugeint", self.argument
                return f"(({value} - (({value} % {width}) + {width}) % {width})::varchar)"
            case _:
                return self._within_years(name, f"strftime({name}, '{_ISO_FORMATS[self.kind]}')")

    def _keys(self, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Few and cheap to compare: rows with equal keys have equal texts."""

        if isinstance(column.type, pa.BaseExtensionType):
            column = storage_of(column)
        match self.kind:
            case TransformKind.TRUNCATE if self.type.family is Family.INTEGER:
                return pc.cast(column, widest_integer(column.type))
            case TransformKind.TRUNCATE:
                return pc.utf8_slice_codeunits(column, 0, self.argument)
            case TransformKind.IDENTITY if self.type.family is Family.VARCHAR:
                return pc.utf8_slice_codeunits(column, 0, TEXT_CHARACTERS_MAX)
            case TransformKind.IDENTITY | TransformKind.BUCKET:
                return column
            case _ if self.type.family is Family.DATE:
                return pc.cast(column, pa.int32())
            case _:
                unit = (
                    MICROSECONDS_AN_HOUR if self.kind is TransformKind.HOUR else MICROSECONDS_A_DAY
                )
                return floor_divided(pc.cast(column, pa.int64()), unit)

    def _unique_texts(self, uniques: pa.Array) -> list[str]:
        if self.kind is TransformKind.BUCKET:
            return [str(b) for b in buckets_of(self._hashed(uniques), self.argument)]
        if self.kind in ISO_CHARACTERS:
            hours = 1 if self.kind is TransformKind.HOUR else 24
            return [calendar_text(self.kind, key * hours) for key in uniques.to_pylist()]
        values = plain_values(self.type.family, uniques)
        if self.kind is TransformKind.TRUNCATE and self.type.family is Family.INTEGER:
            return [str(value - value % self.argument) for value in values]
        canonical = CANONICAL[self.type.family]
        return [canonical(value) or "" for value in values]

    def _hashed(self, uniques: pa.Array) -> list[bytes]:
        family = self.type.family
        if family in (Family.VARCHAR, Family.BLOB):
            return list(pc.cast(uniques, pa.binary()).to_pylist())
        if family is Family.INTEGER:
            uniques = pc.cast(pc.cast(uniques, pa.string()), pa.binary())
            return list(uniques.to_pylist())
        canonical = CANONICAL[family]
        return [(canonical(value) or "").encode() for value in plain_values(family, uniques)]

    def _canonical_sql(self, name: str) -> str:
        match self.type.family:
            case Family.DATE:
                return self._within_years(name, f"strftime({name}, '%Y-%m-%d')")
            case Family.TIMESTAMP | Family.TIMESTAMPTZ:
                return self._within_years(name, f"epoch_us({name})::varchar")
            case Family.TIME:
                return f"epoch_us({name})::varchar"
            case Family.DECIMAL:
                # DuckDB writes no zero before the point when all digits stand behind it.
                text = f"regexp_replace(({name})::varchar, '^(-?)[.]', '\\10.')"
                return f"rtrim(rtrim({text}, '0'), '.')" if self.type.scale else text
            case _:
                return f"({name})::varchar"

    def _within_years(self, name: str, text: str) -> str:
        zone = "+00" if self.type.family is Family.TIMESTAMPTZ else ""
        sql = self.type.sql
        first, end = ("0001-01-01", "9999-12-31")
        if self.type.family is not Family.DATE:
            first, end = f"{first} 00:00:00{zone}", f"{end} 23:59:59.999999{zone}"
        return (
            f"(CASE WHEN {name} IS NULL THEN NULL WHEN {name} BETWEEN '{first}'::{sql} AND "
            f"'{end}'::{sql} THEN {text} ELSE '{BEYOND}' END)"
        )


@dataclass(frozen=True, slots=True)
class PartitionSpec:
    """The transforms of one schema version's `partition_by`; without any, everything is one."""

    transforms: tuple[Transform, ...]

    def __bool__(self) -> bool:
        return bool(self.transforms)

    @property
    def texts(self) -> tuple[str, ...]:
        """The canonical spellings, as `partition_by` stores them."""

        return tuple(transform.text for transform in self.transforms)

    def text(self, values: Sequence[str | None]) -> str:
        """The partition with these value texts, as `DataFile.partition` writes it."""

        pairs = dict(zip(self.texts, values, strict=True))
        return json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))

    def values(self, partition: str | None) -> tuple[str | None, ...] | None:
        """The value texts of a partition that was made by transforms spelled as these; None for a
        mixed file and for another spec. Spelled alike can mean other columns, so a file must be
        read with its own schema version where that matters."""

        if partition is None:
            return None
        found: dict[str, str | None] = json.loads(partition)
        return tuple(found.values()) if tuple(found) == self.texts else None

    def sql(self, *, qualifier: str = "") -> list[str]:
        """For each transform a DuckDB expression over the table's column names that gives the
        value text. The session's time zone must be UTC. `qualifier` is put before each name."""

        return [t.sql(f'{qualifier}"{t.column.name}"') for t in self.transforms]

    def split(
        self, rows: pa.Table, *, most: int | None = None
    ) -> list[tuple[str, pa.Table]] | None:
        """The rows of each partition in their order, partitions by their first row; None when
        there are more than `most`. Columns of `rows` are named `str(column_id)`; a missing one is
        null. A single partition costs no copy."""

        if not rows.num_rows:
            return []
        combined = np.zeros(rows.num_rows, dtype=np.int64)
        texts: list[list[str]] = []
        for transform in self.transforms:
            name = str(transform.column.column_id)
            if name not in rows.schema.names:
                texts.append([])
                continue
            codes, found = transform.texts(rows.column(name))
            texts.append(found)
            # Made dense before each step, so that products stay below rows times texts.
            combined = np.unique(combined, return_inverse=True)[1] * (len(found) + 1) + (codes + 1)
        _, firsts, inverse, counts = np.unique(
            combined, return_index=True, return_inverse=True, return_counts=True
        )
        if most is not None and len(firsts) > most:
            return None
        if len(firsts) == 1:
            return [(self._text_of_row(rows, 0), rows)]
        ordered = np.argsort(inverse, kind="stable")
        ends = np.cumsum(counts)
        return [
            (
                self._text_of_row(rows, int(firsts[place])),
                rows.take(pa.array(ordered[ends[place] - counts[place] : ends[place]])),
            )
            for place in np.argsort(firsts)
        ]

    def _text_of_row(self, rows: pa.Table, row: int) -> str:
        values: list[str | None] = []
        for transform in self.transforms:
            name = str(transform.column.column_id)
            found: list[str] = []
            if name in rows.schema.names:
                found = transform.texts(rows.column(name).slice(row, 1))[1]
            values.append(found[0] if found else None)
        return self.text(values)


def parse_partition_by(texts: Sequence[str], columns: Sequence[Column]) -> PartitionSpec:
    """Raises SchemaInvalid with what to change."""

    if len(texts) > TRANSFORMS_MAX:
        raise SchemaInvalid(f"partition_by takes at most {TRANSFORMS_MAX} transforms")
    by_name = {column.name: column for column in columns}
    transforms = tuple(_transform(text, by_name) for text in texts)
    seen: set[str] = set()
    for transform in transforms:
        if transform.text in seen:
            raise SchemaInvalid(f"partition_by names {transform.text} twice")
        seen.add(transform.text)
    return PartitionSpec(transforms)


@functools.lru_cache(maxsize=4096)
def partition_spec(texts: tuple[str, ...], columns: tuple[Column, ...]) -> PartitionSpec:
    """`parse_partition_by` of a stored schema, kept."""

    return parse_partition_by(texts, columns)


def transform_column(text: str) -> str:
    """The column that a canonical transform text names."""

    return _parsed(text)[2]


def renamed_transform(text: str, renames: Mapping[str, str]) -> str:
    """A canonical transform text after columns were renamed."""

    kind, argument, name = _parsed(text)
    return _spelled(kind, argument, renames.get(name, name))


def _spelled(kind: TransformKind, argument: int, name: str) -> str:
    if kind is TransformKind.IDENTITY:
        return name
    return f"{kind}({argument}, {name})" if argument else f"{kind}({name})"


def _parsed(text: str) -> tuple[TransformKind, int, str]:
    """Kind, argument and folded column name. Raises SchemaInvalid."""

    stripped = text.strip()
    call = _CALL.fullmatch(stripped)
    if call is None:
        return TransformKind.IDENTITY, 0, fold_name(stripped)
    known = {kind.value: kind for kind in TransformKind if kind is not TransformKind.IDENTITY}
    kind = known.get(call[1].lower())
    if kind is None:
        raise SchemaInvalid(
            f"{text[:80]!r} is not a transform; use a column or one of year, month, day, hour "
            "(column), bucket(n, column), truncate(w, column)"
        )
    arguments = [argument.strip() for argument in call[2].split(",")]
    if kind not in (TransformKind.BUCKET, TransformKind.TRUNCATE):
        if len(arguments) != 1:
            raise SchemaInvalid(f"{kind} takes one column, like {kind}(ts)")
        return kind, 0, fold_name(arguments[0])
    if len(arguments) != 2 or not _NUMBER.fullmatch(arguments[0]):
        raise SchemaInvalid(f"{kind} takes a number and a column, like {kind}(16, id)")
    return kind, int(arguments[0]), fold_name(arguments[1])


def _transform(text: str, columns: Mapping[str, Column]) -> Transform:
    kind, argument, name = _parsed(text)
    column = columns.get(name)
    if column is None:
        raise SchemaInvalid(f"partition_by names {name}, which is no column of the table")
    found = parse_type(column.type)
    if found.family not in _FAMILIES[kind]:
        what = "partition_by a column itself" if kind is TransformKind.IDENTITY else str(kind)
        allowed = ", ".join(sorted(family.value for family in _FAMILIES[kind]))
        raise SchemaInvalid(
            f"the column {name} has the type {found.sql}, and {what} takes only: {allowed}"
        )
    low, high = _argument_range(kind, found.family)
    if not low <= argument <= high:
        raise SchemaInvalid(f"the number in {text[:80]} must lie between {low} and {high}")
    return Transform(kind, column, found, argument)


def _argument_range(kind: TransformKind, family: Family) -> tuple[int, int]:
    if kind is TransformKind.BUCKET:
        return 2, BUCKETS_MAX
    if kind is TransformKind.TRUNCATE:
        return (1, TEXT_CHARACTERS_MAX) if family is Family.VARCHAR else (2, TRUNCATE_WIDTH_MAX)
    return 0, 0
