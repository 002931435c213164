"""Type codes and constructors of PEP 249. A column's type code is its SQL type, like `bigint`.

Lists, structs, tuples and maps are of none of the groups that PEP 249 has.
"""

from __future__ import annotations

import datetime as dt

from lakebus.client_types import parse_type

Date = dt.date
Time = dt.time
Timestamp = dt.datetime
Binary = bytes


def DateFromTicks(ticks: float) -> dt.date:  # noqa: N802 - the names are those of PEP 249
    return TimestampFromTicks(ticks).date()


def TimeFromTicks(ticks: float) -> dt.time:  # noqa: N802
    return TimestampFromTicks(ticks).time()


def TimestampFromTicks(ticks: float) -> dt.datetime:  # noqa: N802
    """In UTC, as everything in lakebus."""

    return dt.datetime.fromtimestamp(ticks, dt.UTC)


class TypeGroup:
    """Equals every type code of its kind."""

    def __init__(self, *names: str) -> None:
        self._names = frozenset(names)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return parse_type(other).name in self._names
        return self is other

    def __hash__(self) -> int:
        return hash(self._names)


STRING = TypeGroup(
    "varchar", "json", "uuid", "enum", "bit", "interval", "timetz", "time_ns", "geometry", "type",
    "union", "variant",
)  # fmt: skip
BINARY = TypeGroup("blob")
NUMBER = TypeGroup(
    "boolean", "tinyint", "smallint", "integer", "bigint", "hugeint", "bignum", "utinyint",
    "usmallint", "uinteger", "ubigint", "uhugeint", "float", "double", "decimal",
)  # fmt: skip
DATETIME = TypeGroup(
    "date", "time", "timestamp", "timestamp_s", "timestamp_ms", "timestamp_ns", "timestamptz",
    "timestamptz_ns",
)  # fmt: skip
#: Rows have no identity in SQL.
ROWID = TypeGroup()

#: (name, type code, display size, internal size, precision, scale, null is possible)
Description = tuple[str, str, None, None, int | None, int | None, None]


def description_of(name: str, kind: str) -> Description:
    found = parse_type(kind)
    return (name, kind, None, None, found.precision, found.scale, None)
