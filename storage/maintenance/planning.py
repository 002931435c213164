"""Which live files of a table are rewritten together: a pure function of the catalog's rows.

The files of one partition are sorted into tiers by size, each `tier_factor` times larger than the
one before. A tier is due when it holds `inputs_min` files; the merge takes larger tiers along while
what it makes is larger than they are. So every rewrite lifts every byte by a tier at least, a byte
is rewritten about log(target / first size) times, and a tier keeps fewer than `inputs_min` files: a
simulation of hours of writes proves both (`tests/unit/test_maintenance_planning.py`).

Many partitions hold many tails. When a plan would leave more than `small_files_max` small files,
tiers become finer and merges smaller (8, 4, 2), which is logarithmic still; then the small files of
partitions that nobody has written to for long are merged into one. What remains is bounded by
`small_files_bound`: a file cannot be smaller than its partition is rich.

A file of at least a quarter of the target is finished: one file instead of four saves a query a
millisecond where it reads millions of rows, and costs to write all of them again. Another layout or
an older partition spec never makes a merge due; the files are brought up to date together with one
that is, or by a full one.

Neighbours (by the first sort column where all bounds are known, else by age) are merged, so that
bounds stay tight. The same files give the same plan, whatever order they come in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.files.statistics import BOUND_READERS
from storage.maintenance.settings import MaintenanceSettings
from storage.rows.types import parse_type

_MIB: Final = 1024 * 1024
#: Small files over this share of `small_file_bytes` have tiers of their own; below it is one.
_FLOOR_DIVISOR: Final = 1024
#: A partition that got no file in so many snapshots of its table is cold.
COLD_SNAPSHOTS: Final = 10_000
#: A file of this share of the target is finished.
_FINISHED_DIVISOR: Final = 4
#: A mixed file is split once a partition gets about so much of it (share of `small_file_bytes`).
_SPLIT_DIVISOR: Final = 32
#: Rows in memory against bytes on disk, and what a rewrite takes beside its rows.
_MEMORY_FACTOR: Final = 10
_MEMORY_BASE_BYTES: Final = 128 * _MIB


class PlanReason(StrEnum):
    TIER = "tier"  # enough files of one size
    SMALL = "small"  # the table has too many small files
    COLD = "cold"  # the same, and nobody writes to the partition any more
    FULL = "full"  # somebody asked for it


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """Files to rewrite together, in order. `partition` is None for files that mix partitions.

    `split`: cut by the table's partitions; else the rows of a mixed merge stay together, because
    the pieces would be tiny. `memory_bytes` is what the rewrite takes at most.
    """

    table_id: int
    partition: str | None
    inputs: tuple[DataFile, ...]
    reason: PlanReason
    split: bool
    memory_bytes: int

    @property
    def input_bytes(self) -> int:
        return sum(file.size_bytes for file in self.inputs)

    @property
    def input_rows(self) -> int:
        return sum(file.rows for file in self.inputs)

    def summary(self) -> dict[str, object]:
        return {
            "table_id": self.table_id,
            "partition": self.partition,
            "reason": str(self.reason),
            "split": self.split,
            "files_in": len(self.inputs),
            "bytes_in": self.input_bytes,
            "rows_in": self.input_rows,
            "memory_bytes": self.memory_bytes,
        }


def plan_rewrites(
    schema: TableSchema,
    files: Iterable[DataFile],
    settings: MaintenanceSettings,
    *,
    full_until: int | None = None,
    small_only: bool = False,
) -> list[RewritePlan]:
    """Rewrites that are due, smallest files first; no file is in two of them.

    `small_only`: larger files count as finished, so that nothing is done that can wait.
    `full_until`: also everything not in the best form, among the files of this snapshot. (What the
    same job has made since is not looked at again, so a full rewrite ends.)
    """

    table = _Table(schema, files, settings, small_only=small_only)
    if full_until is not None:
        found = table.full(full_until)
        if found:
            return found
    found = table.tiers(_levels(settings)[0], PlanReason.TIER)
    for level in _levels(settings)[1:]:
        if table.small_after(found) <= settings.small_files_max:
            return found
        found = table.tiers(level, PlanReason.SMALL)
    if table.small_after(found) > settings.small_files_max:
        found = table.cold(found)
    return found


def small_files_bound(settings: MaintenanceSettings, *, partitions: int) -> int:
    """How many small files a table may keep when no rewrite is due any more."""

    _, factor = _levels(settings)[-1]
    tiers = _tier(settings.small_file_bytes - 1, _floor(settings), factor) + 1
    return max(settings.small_files_max, tiers * partitions)


def is_current(schema: TableSchema, file: DataFile) -> bool:
    """True when a rewrite would change neither the file's partition nor the order of its rows."""

    return file.layout == layout_of(schema) and _partition_is_current(schema, file)


def layout_of(schema: TableSchema) -> str:
    """How a rewrite sorts rows of the table, as `DataFile.layout`."""

    return ",".join(schema.sort_by)


def memory_estimate_bytes(input_bytes: int, settings: MaintenanceSettings) -> int:
    """Memory that a rewrite of so many bytes takes at most; the sort spills beyond its share."""

    return _MEMORY_BASE_BYTES + min(settings.rewrite_memory_bytes, _MEMORY_FACTOR * input_bytes)


# --- tiers -----------------------------------------------------------------------------------


def _levels(settings: MaintenanceSettings) -> list[tuple[int, int]]:
    """(files that make a tier due, tier factor), each finer than the one before."""

    count, factor = max(2, settings.inputs_min), max(2, settings.tier_factor)
    levels = [(count, factor)]
    while levels[-1] != (2, 2):
        count, factor = max(2, count // 2), max(2, factor // 2)
        levels.append((count, factor))
    return levels


def _floor(settings: MaintenanceSettings) -> int:
    return max(1, settings.small_file_bytes // _FLOOR_DIVISOR)


def _tier(size_bytes: int, floor_bytes: int, factor: int) -> int:
    """0 below the floor, then one more each time the size grows by the factor."""

    tier, bound = 0, floor_bytes
    while size_bytes >= bound:
        tier, bound = tier + 1, bound * factor
    return tier


def _partition_is_current(schema: TableSchema, file: DataFile) -> bool:
    if not schema.partition_by:
        return file.partition is None
    return file.partition is not None and list(json.loads(file.partition)) == list(
        schema.partition_by
    )


class _Table:
    """The live files of one table, grouped. Mixed files, and those of an older spec, are None."""

    def __init__(
        self,
        schema: TableSchema,
        files: Iterable[DataFile],
        settings: MaintenanceSettings,
        *,
        small_only: bool,
    ) -> None:
        self._schema, self._settings = schema, settings
        self._floor = _floor(settings)
        self._finished_bytes = max(1, settings.target_file_bytes // _FINISHED_DIVISOR)
        if small_only:
            self._finished_bytes = min(self._finished_bytes, settings.small_file_bytes)
        self._groups: dict[str | None, list[DataFile]] = {}
        for file in sorted(files, key=_age):
            current = _partition_is_current(schema, file)
            self._groups.setdefault(file.partition if current else None, []).append(file)
        self._partitions = len(self._groups) - (None in self._groups)
        self._small = sum(map(self._is_small, self._files()))

    def _files(self) -> Iterable[DataFile]:
        return (file for group in self._groups.values() for file in group)

    def _is_small(self, file: DataFile) -> bool:
        return file.size_bytes < self._settings.small_file_bytes

    def _unfinished(self, files: Sequence[DataFile]) -> list[DataFile]:
        return [file for file in files if file.size_bytes < self._finished_bytes]

    def small_after(self, plans: Sequence[RewritePlan]) -> int:
        """Small files left by these plans, when each makes one file or large ones."""

        left = self._small
        for plan in plans:
            left -= sum(map(self._is_small, plan.inputs))
            left += plan.input_bytes < self._settings.small_file_bytes
        return left

    # --- what is due ---------------------------------------------------------------------

    def tiers(self, level: tuple[int, int], reason: PlanReason) -> list[RewritePlan]:
        found: list[RewritePlan] = []
        for partition, files in self._groups.items():
            for due in self._due(self._unfinished(files), level):
                found += self._plans(partition, due, reason)
        return _small_first(found)

    def _due(self, files: Sequence[DataFile], level: tuple[int, int]) -> list[list[DataFile]]:
        """Merges of one partition. A merge takes a larger tier along when what it makes would fill
        that tier, or is larger than the files in it."""

        count, factor = level
        tiers: dict[int, list[DataFile]] = {}
        for file in files:
            tiers.setdefault(_tier(file.size_bytes, self._floor, factor), []).append(file)
        merges: list[list[DataFile]] = []
        carry: list[DataFile] = []
        for tier in sorted(tiers):
            made = _tier(_bytes(carry), self._floor, factor) if carry else 0
            if not self._joins(tiers[tier], tier, count, made if carry else None):
                if carry:
                    merges.append(carry)
                carry = []
                continue
            carry = carry + tiers[tier]
        return [*merges, carry] if carry else merges

    def _joins(self, files: Sequence[DataFile], tier: int, count: int, made: int | None) -> bool:
        if made is not None and made > tier:
            return True
        if len(files) + (made == tier) >= count:
            return True
        return len(files) > 1 and _bytes(files) >= self._settings.target_file_bytes

    def cold(self, plans: Sequence[RewritePlan]) -> list[RewritePlan]:
        """These plans, but partitions nobody writes to merge all their small files."""

        newest = max(file.first_snapshot for file in self._files())
        found: list[RewritePlan] = []
        cold: set[str | None] = set()
        for partition, files in self._groups.items():
            small = [file for file in files if self._is_small(file)]
            if len(small) > 1 and newest - files[-1].first_snapshot > COLD_SNAPSHOTS:
                cold.add(partition)
                found += self._plans(partition, small, PlanReason.COLD)
        return _small_first([*found, *(plan for plan in plans if plan.partition not in cold)])

    def full(self, until: int) -> list[RewritePlan]:
        found: list[RewritePlan] = []
        for partition, files in self._groups.items():
            old = [file for file in files if file.first_snapshot <= until]
            stale = [file for file in old if not is_current(self._schema, file)]
            wanted = {file.file_id for file in (*stale, *self._unfinished(old))}
            chosen = [file for file in old if file.file_id in wanted]
            if len(chosen) > 1 or stale:
                found += self._plans(partition, chosen, PlanReason.FULL)
        return _small_first(found)

    # --- plans ---------------------------------------------------------------------------

    def _plans(
        self, partition: str | None, files: Sequence[DataFile], reason: PlanReason
    ) -> list[RewritePlan]:
        """Neighbours in pieces that one rewrite may take."""

        found: list[RewritePlan] = []
        for piece in self._pieces(sorted(files, key=self._order(files))):
            alone = len(piece) == 1
            if alone and (reason is not PlanReason.FULL or is_current(self._schema, piece[0])):
                continue
            size = _bytes(piece)
            plan = RewritePlan(
                table_id=self._schema.table_id,
                partition=partition,
                inputs=tuple(piece),
                reason=reason,
                split=self._splits(partition, size) or reason is PlanReason.FULL,
                memory_bytes=memory_estimate_bytes(size, self._settings),
            )
            found.append(plan)
        return found

    def _pieces(self, files: Sequence[DataFile]) -> list[list[DataFile]]:
        pieces: list[list[DataFile]] = []
        room_bytes = room = 0
        for file in files:
            if not pieces or room < 1 or room_bytes < file.size_bytes:
                pieces.append([])
                room, room_bytes = max(2, self._settings.inputs_max), self._settings.input_bytes_max
            pieces[-1].append(file)
            room, room_bytes = room - 1, room_bytes - file.size_bytes
        return pieces

    def _splits(self, partition: str | None, size_bytes: int) -> bool:
        """A mixed merge is split unless the partitions that exist would get crumbs of it."""

        if partition is not None or not self._schema.partition_by:
            return True
        crumb = self._settings.small_file_bytes // _SPLIT_DIVISOR
        return self._partitions <= self._settings.inputs_min or (
            size_bytes >= crumb * self._partitions
        )

    def _order(self, files: Sequence[DataFile]) -> Callable[[DataFile], Any]:
        """By the least value of the first sort column, when every file knows it; else by age."""

        first = self._schema.sort_by[0] if self._schema.sort_by else ""
        column = self._schema.column(first)
        read = BOUND_READERS.get(parse_type(column.type).family) if column else None
        if column is None or read is None:
            return _age
        least: dict[Any, Any] = {}
        for file in files:
            bounds = file.statistics.get(column.column_id)
            if bounds is None or bounds.minimum is None:
                return _age
            least[file.file_id] = read(bounds.minimum)
        return lambda file: (least[file.file_id], *_age(file))


def _age(file: DataFile) -> tuple[int, bytes]:
    return (file.first_snapshot, file.file_id.bytes)


def _bytes(files: Iterable[DataFile]) -> int:
    return sum(file.size_bytes for file in files)


def _small_first(plans: Iterable[RewritePlan]) -> list[RewritePlan]:
    return sorted(
        plans,
        key=lambda plan: (
            plan.input_bytes / len(plan.inputs),
            plan.partition or "",
            plan.inputs[0].file_id.bytes,
        ),
    )
