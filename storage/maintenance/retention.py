"""The job that lets go of what is too old: rows by the rule of their table, snapshots of the lake.

Rows. A table's rule names a column and a duration; the cut is that long before the database's now.
A row is old when its column lies before the cut (a date: when its whole day does); a NULL is kept
for ever. A file goes whole when its greatest value is old and it has no NULL. A file that holds
both is rewritten only when it is worth it: about a fifth of its rows is old (by its bounds), or its
oldest row is twice as old as the rule allows. So a row is gone at the latest when it is twice as
old as the rule says, and no file is rewritten for a few rows each hour. All is ONE swap a table.

That exactly the old rows went is proved three times (E1): the rewrite compares hash sums of what it
read, left out and wrote; old rows are counted anew in the inputs, and must be as many as were left
out; none may be in the outputs. The catalog compares its own counts as well.

Earlier snapshots still show the rows, and keep their files, until they expire (D8, E8): that is the
second half of this job, in batches.

Parameters: `table` (an id; as the job's own; then no snapshots expire) and `budget_bytes`, how much
is rewritten in one table at most; the rest is left to the next job.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import duckdb

from lakebus.clock import format_time
from lakebus.errors import Corrupt, Fault
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.files.parquet import scan_expression
from storage.files.statistics import BOUND_READERS
from storage.ingesting.layouts import RowRetention, row_retention
from storage.maintenance.compaction import (
    live_files,
    positive,
    refuse_unknown,
    table_of,
    tables_to_visit,
)
from storage.maintenance.input_files import locate
from storage.maintenance.interface import SwapOperation
from storage.maintenance.jobs import Job, JobContext
from storage.maintenance.patience import patiently
from storage.maintenance.rewriting import RewriteInput, Rewritten
from storage.maintenance.settings import MaintenanceSettings
from storage.maintenance.swapping import (
    RewritePart,
    SwapLost,
    SwapWork,
    newest_schema,
    run_swap,
)
from storage.maintenance.totals import LINES_MAX, SwapTotals
from storage.rows.types import Family, parse_type

_LOG = logging.getLogger(__name__)

BUDGET_BYTES: Final = 32 * 1024**3
#: A file that is old in part is rewritten from this share of its rows on.
OLD_SHARE_MIN: Final = 0.2
#: … or when its oldest row is so many times as old as the rule allows.
OVERDUE: Final = 2
#: Snapshots that one call expires.
_EXPIRE_BATCH: Final = 10_000
_LOST_MAX: Final = 5
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_LITERALS: Final = {Family.TIMESTAMP: "TIMESTAMP", Family.TIMESTAMPTZ: "TIMESTAMPTZ"}


class Age(Enum):
    """What a file's bounds say."""

    YOUNG = "young"  # nothing old in it, or too little to be worth a rewrite
    MIXED = "mixed"
    UNKNOWN = "unknown"  # no bound is known: its rows must be counted
    OLD = "old"  # every row is


@dataclass(frozen=True, slots=True)
class Cut:
    """A table's rule at one moment. `at`: what lies before it is old; `overdue`: very old."""

    rule: RowRetention
    column: Column
    at: dt.datetime
    overdue: dt.datetime

    @classmethod
    def of(cls, schema: TableSchema, now: dt.datetime) -> Cut | None:
        """None when the table keeps its rows for ever."""

        rule = row_retention(schema.retention)
        column = None if rule is None else schema.column(rule.column)
        if rule is None or column is None:
            return None
        return cls(rule, column, _before(now, rule.for_s), _before(now, OVERDUE * rule.for_s))

    @property
    def _family(self) -> Family:
        return parse_type(self.column.type).family

    def bound(self, moment: dt.datetime) -> int:
        """A moment in the order of the column's bounds: days, or microseconds, since 1970."""

        since = moment - _EPOCH
        return since.days if self._family is Family.DATE else since // dt.timedelta(microseconds=1)

    def old_sql(self) -> str:
        """True for rows that are old; NULL for a NULL."""

        if self._family is Family.DATE:
            literal = f"DATE '{self.at.date().isoformat()}'"
        else:
            zone = "+00" if self._family is Family.TIMESTAMPTZ else ""
            text = self.at.replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")
            literal = f"{_LITERALS[self._family]} '{text}{zone}'"
        return f'"{self.column.name}" < {literal}'

    def keep_sql(self) -> str:
        return f'("{self.column.name}" IS NULL OR NOT ({self.old_sql()}))'

    def age(self, file: DataFile) -> Age:
        bounds = file.statistics.get(self.column.column_id)
        if bounds is None or bounds.null_count == file.rows:
            return Age.YOUNG  # the file is older than the column, or has nothing but NULLs in it
        read = BOUND_READERS[self._family]
        at = self.bound(self.at)
        most = None if bounds.maximum is None else read(bounds.maximum)
        if most is not None and most < at and bounds.null_count == 0:
            return Age.OLD
        if bounds.minimum is None or most is None:
            return Age.UNKNOWN
        least = read(bounds.minimum)
        if least >= at:
            return Age.YOUNG
        share = min(1.0, (at - least) / (most - least + 1)) * (1 - bounds.null_count / file.rows)
        worth = share >= OLD_SHARE_MIN or least < self.bound(self.overdue)
        return Age.MIXED if worth else Age.YOUNG


@dataclass(frozen=True, slots=True)
class _Plan:
    cut: Cut
    dropped: tuple[DataFile, ...]
    mixed: tuple[DataFile, ...]
    deferred: int = 0

    @property
    def empty(self) -> bool:
        return not self.dropped and not self.mixed


@dataclass(slots=True)
class _Report:
    job: Job
    totals: SwapTotals = field(default_factory=SwapTotals)
    tables: list[Mapping[str, object]] = field(default_factory=list)
    snapshots: Mapping[str, object] | None = None

    def told(self) -> dict[str, Any]:
        tables = [*self.job.report.get("tables", ()), *self.tables][:LINES_MAX]
        return {**self.totals.report(self.job), "tables": tables, "snapshots": self.snapshots}


async def retain(context: JobContext, job: Job) -> Mapping[str, Any]:
    """The body of a `retain` job. Raises MalformedRequest for parameters it does not know."""

    given = dict(job.parameters)
    table_id = table_of(job, given.pop("table", None))
    budget_bytes = positive(given, "budget_bytes", BUDGET_BYTES)
    refuse_unknown(given, "retention", "table, budget_bytes")
    report = _Report(job)
    for table in await tables_to_visit(context, table_id, least_files=1):
        if not row_retention(table.retention):
            continue
        try:
            await _table(context, table, budget_bytes, report, dry_run=job.dry_run)
        except Corrupt as error:
            # The other tables are not to wait for it; the validator finds it, too.
            _LOG.error("retention of %s meets a damaged file: %s", table.name, error)
            report.totals.skip(table.name, error.detail)
        await context.note(report.told())
    if table_id is None:
        await _expire(context, report, dry_run=job.dry_run)
    return {**report.told(), "dry_run": job.dry_run}


# --- rows ------------------------------------------------------------------------------------


async def _table(
    context: JobContext, table: TableSchema, budget_bytes: float, report: _Report, *, dry_run: bool
) -> None:
    for _ in range(_LOST_MAX):
        plan = await _plan(context, table, budget_bytes)
        if plan is None or plan.empty:
            return
        if dry_run:
            report.tables.append(await _told(context, table, plan))
            return
        try:
            await _swap(context, table, plan, report)
            return
        except SwapLost as error:
            _LOG.info("retention of %s is planned anew: %s", table.name, error)
            report.totals.lost += 1
    report.totals.skip(table.name, f"its files were taken by others {_LOST_MAX} times")


async def _plan(context: JobContext, table: TableSchema, budget_bytes: float) -> _Plan | None:
    files = await live_files(context, table)
    schema = await newest_schema(context, table)
    head = await patiently(context, context.catalog.head)
    cut = None if schema is None else Cut.of(schema, head.now)
    if cut is None or schema is None:
        return None
    ages = {file.file_id: cut.age(file) for file in files}
    mixed: list[DataFile] = []
    deferred, room = 0, budget_bytes
    for file in files:
        age = ages[file.file_id]
        if age not in (Age.MIXED, Age.UNKNOWN):
            continue
        if age is Age.UNKNOWN and not await _count_old(context, schema, cut, file):
            continue
        if mixed and file.size_bytes > room:
            deferred += 1
            continue
        room -= file.size_bytes
        mixed.append(file)
    dropped = tuple(file for file in files if ages[file.file_id] is Age.OLD)
    return _Plan(cut, dropped, tuple(mixed), deferred)


async def _swap(context: JobContext, table: TableSchema, plan: _Plan, report: _Report) -> None:
    cut = plan.cut

    def keep(schema: TableSchema) -> str:
        column = schema.column(cut.rule.column)
        same = column is not None and column.column_id == cut.column.column_id
        if row_retention(schema.retention) != cut.rule or not same:
            raise SwapLost("the table's retention was changed meanwhile")
        return cut.keep_sql()

    def check(schema: TableSchema, inputs: Sequence[RewriteInput], made: Rewritten) -> None:
        old = _old_rows(schema, cut, [str(one.path) for one in inputs])
        left = _old_rows(schema, cut, [str(file.path) for file in made.files])
        if old != made.removed.rows or left:
            raise Fault(
                f"retention left out {made.removed.rows} rows where {old} are old, and kept {left}"
            )

    work = SwapWork(
        table=table,
        operation=SwapOperation.RETAIN,
        parts=tuple(_parts(plan.mixed, context.settings)),
        dropped=plan.dropped,
        keep=keep,
        summary={"cut": format_time(cut.at)},
    )
    done = await run_swap(context, work, check=check)
    report.totals.add(done)
    if len(report.tables) < LINES_MAX:
        line = {"rows_removed": done.rows_removed, "snapshot_id": done.snapshot_id}
        report.tables.append({**_line(table, plan), **line})


def _parts(files: Iterable[DataFile], settings: MaintenanceSettings) -> Iterable[RewritePart]:
    """Files of one partition together, as many as one rewrite may take."""

    groups: dict[str | None, list[list[DataFile]]] = {}
    for file in files:
        pieces = groups.setdefault(file.partition, [[]])
        size = sum(one.size_bytes for one in pieces[-1]) + file.size_bytes
        full = len(pieces[-1]) >= settings.inputs_max or size > settings.input_bytes_max
        if pieces[-1] and full:
            pieces.append([])
        pieces[-1].append(file)
    for pieces in groups.values():
        for piece in pieces:
            yield RewritePart(tuple(piece))


def _old_rows(schema: TableSchema, cut: Cut, paths: Sequence[str]) -> int:
    """Blocking: how many rows of these files are old."""

    with duckdb.connect() as connection:
        connection.execute("SET threads = 1; SET TimeZone = 'UTC'")
        sql = f"SELECT count(*) FROM {scan_expression(schema, paths)} WHERE {cut.old_sql()}"
        found = connection.execute(sql).fetchone()
    assert found is not None
    return int(found[0])


async def _count_old(context: JobContext, schema: TableSchema, cut: Cut, file: DataFile) -> int:
    [located] = await locate(context, [file], context.temp_dir / "counted")
    try:
        return await asyncio.to_thread(_old_rows, schema, cut, [str(located.path)])
    except duckdb.Error as error:
        raise Corrupt(f"the data file {file.object_key} cannot be read") from error


async def _told(context: JobContext, table: TableSchema, plan: _Plan) -> dict[str, object]:
    """A dry run: the same plan, with the rows counted."""

    schema = await newest_schema(context, table) or table
    old = [await _count_old(context, schema, plan.cut, file) for file in plan.mixed]
    return {
        **_line(table, plan),
        "rows_removed": sum(old) + sum(file.rows for file in plan.dropped),
        "dropped": [str(file.file_id) for file in plan.dropped[:LINES_MAX]],
        "rewritten": [str(file.file_id) for file in plan.mixed[:LINES_MAX]],
    }


def _line(table: TableSchema, plan: _Plan) -> dict[str, object]:
    return {
        "table": table.name,
        "table_id": table.table_id,
        "cut": format_time(plan.cut.at),
        "files_dropped": len(plan.dropped),
        "files_rewritten": len(plan.mixed),
        "files_deferred": plan.deferred,
        "bytes_rewritten": sum(file.size_bytes for file in plan.mixed),
    }


def _before(now: dt.datetime, seconds: int) -> dt.datetime:
    """So long before now, or the beginning of time: a rule may be older than the calendar."""

    try:
        return now.astimezone(dt.UTC) - dt.timedelta(seconds=seconds)
    except OverflowError:
        return dt.datetime.min.replace(tzinfo=dt.UTC)


# --- snapshots -------------------------------------------------------------------------------


async def _expire(context: JobContext, report: _Report, *, dry_run: bool) -> None:
    settings = context.settings
    first = last = oldest = None
    tagged, left = 0, settings.expire_max
    while left > 0:
        limit = left if dry_run else min(left, _EXPIRE_BATCH)

        async def expire(limit: int = limit) -> Any:
            return await context.upkeep.expire_snapshots(
                keep_s=settings.snapshot_keep_s,
                keep_count=settings.snapshot_keep_count,
                limit=limit,
                dry_run=dry_run,
            )

        expired = await patiently(context, expire)
        left, oldest = left - limit, expired.oldest_snapshot_id
        if expired.first is not None:
            first = expired.first if first is None else first
            last, tagged = expired.last, tagged + expired.tagged
        report.snapshots = {
            "first": first,
            "last": last,
            "tagged": tagged,
            "oldest_snapshot_id": oldest,
        }
        await context.note(report.told())
        # failpoint: retention.after_expire
        if expired.first is None:
            return
