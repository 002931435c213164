"""Predicates over a file's statistics: "can any row of this file make the condition true?"

A predicate is built once a query and asked once a file, so the checks are small closures over
ready values. The answer may be a needless yes, never a wrong no (contract D11): a column without
statistics, a bound that is not claimed and a bound that cannot be read all keep the file.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lakebus.snapshots import ColumnStatistics, DataFile
from storage.files.constants import Interval
from storage.files.partition_pruning import MayHold
from storage.files.statistics import BOUND_READERS
from storage.rows.types import ColumnType, Family

Statistics = Mapping[int, ColumnStatistics]
#: Statistics and rows of a file, and the file itself for what only it says.
Check = Callable[[Statistics, int, DataFile | None], bool]
_Reader = Callable[[str], Any]

#: Families whose bounds take longer to read than to look up again. The same texts come back with
#: every query on a table.
_SLOW_FAMILIES = (Family.UUID, Family.DATE, Family.DECIMAL)
_READERS: Mapping[Family, _Reader] = {
    family: functools.lru_cache(maxsize=1 << 16)(reader) if family in _SLOW_FAMILIES else reader
    for family, reader in BOUND_READERS.items()
}


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition that is certainly applied to every row of one table that a query uses."""

    check: Check

    def keeps(self, statistics: Statistics, rows: int) -> bool:
        """False only when no row of a file with these statistics can satisfy the condition."""

        return self.check(statistics, rows, None)


def prune(files: Sequence[DataFile], predicate: Predicate | None) -> list[DataFile]:
    """The files that may hold rows the query needs, in their order; all of them without one."""

    if predicate is None:
        return list(files)
    check = predicate.check
    return [file for file in files if check(file.statistics, file.rows, file)]


def all_of(predicates: Iterable[Predicate | None]) -> Predicate | None:
    """AND. A part that is not understood (None) is left out."""

    checks = [p.check for p in predicates if p is not None]
    if len(checks) <= 1:
        return Predicate(checks[0]) if checks else None
    return Predicate(
        lambda statistics, rows, file: all(check(statistics, rows, file) for check in checks)
    )


def any_of(predicates: Iterable[Predicate | None]) -> Predicate | None:
    """OR. A part that is not understood makes the whole not understood."""

    parts = list(predicates)
    checks = [p.check for p in parts if p is not None]
    if len(checks) != len(parts) or not checks:
        return None
    if len(checks) == 1:
        return Predicate(checks[0])
    return Predicate(
        lambda statistics, rows, file: any(check(statistics, rows, file) for check in checks)
    )


def is_null(column_id: int) -> Predicate:
    def check(statistics: Statistics, rows: int, _: DataFile | None) -> bool:
        found = statistics.get(column_id)
        return found is None or found.null_count > 0

    return Predicate(check)


def is_not_null(column_id: int) -> Predicate:
    def check(statistics: Statistics, rows: int, _: DataFile | None) -> bool:
        found = statistics.get(column_id)
        return found is None or found.null_count < rows

    return Predicate(check)


def within(
    column_id: int,
    kind: ColumnType,
    *,
    least: Interval | None = None,
    most: Interval | None = None,
    strict: bool = False,
) -> Predicate:
    """The column is at least `least` and at most `most`, where given; `strict`: neither equal."""

    read = _READERS[kind.family]
    strict_least = strict and least is not None and least.exact
    strict_most = strict and most is not None and most.exact
    low = None if least is None else least.lower
    high = None if most is None else most.upper

    def check(statistics: Statistics, rows: int, _: DataFile | None) -> bool:
        found = statistics.get(column_id)
        if found is None:
            return True
        if found.null_count >= rows:
            return False
        try:
            if low is not None and found.maximum is not None:
                maximum = read(found.maximum)
                if maximum < low or (strict_least and maximum == low):
                    return False
            if high is not None and found.minimum is not None:
                minimum = read(found.minimum)
                if minimum > high or (strict_most and minimum == high):
                    return False
        except (ValueError, ArithmeticError):  # a bound of another type, from before a widening
            return True
        return True

    return Predicate(check)


def equal_to_one_of(column_id: int, kind: ColumnType, constants: Sequence[Interval]) -> Predicate:
    """The column equals one of the constants, of which there is at least one."""

    if len(constants) == 1:
        return within(column_id, kind, least=constants[0], most=constants[0])
    read = _READERS[kind.family]
    ordered = sorted(constants, key=lambda constant: constant.upper)
    uppers = [constant.upper for constant in ordered]
    # Rounding moves both ends of an interval monotonically, so `lowers` is sorted too.
    lowers = [constant.lower for constant in ordered]

    def check(statistics: Statistics, rows: int, _: DataFile | None) -> bool:
        found = statistics.get(column_id)
        if found is None:
            return True
        if found.null_count >= rows:
            return False
        try:
            first = 0
            if found.minimum is not None:
                first = bisect.bisect_left(uppers, read(found.minimum))
            if first == len(uppers):
                return False
            return found.maximum is None or bool(lowers[first] <= read(found.maximum))
        except (ValueError, ArithmeticError):
            return True

    return Predicate(check)


def starts_with(column_id: int, prefix: bytes) -> Predicate:
    """The text of the column begins with `prefix`."""

    length = len(prefix)

    def check(statistics: Statistics, rows: int, _: DataFile | None) -> bool:
        found = statistics.get(column_id)
        if found is None:
            return True
        if found.null_count >= rows:
            return False
        if found.maximum is not None and found.maximum.encode() < prefix:
            return False
        return found.minimum is None or found.minimum.encode()[:length] <= prefix

    return Predicate(check)


def in_partition(may_hold: MayHold, bounded: Predicate) -> Predicate:
    """`bounded`, for rows that `may_hold` looks for; it is asked once for each partition."""

    verdicts: dict[tuple[int, str], bool] = {}
    within_bounds = bounded.check

    def check(statistics: Statistics, rows: int, file: DataFile | None) -> bool:
        if file is not None and file.partition is not None:
            key = (file.schema_version, file.partition)
            verdict = verdicts.get(key)
            if verdict is None:
                verdict = verdicts[key] = may_hold(*key)
            if not verdict:
                return False
        return within_bounds(statistics, rows, file)

    return Predicate(check)
