"""The job that merges files: rounds of plan, rewrite and swap until nothing is due.

Each round plans afresh from the database, so a job that died, ran twice or lost to a delete has
nothing to undo. Appends never stand in the way (C7): they add files that this round does not know
and the next one may take. A rewrite that loses an input gives up and the table is planned again, a
few times; what is skipped is said.

Parameters: `table` (an id; as the job's own), `full` (also bring everything to the table's newest
layout and partitions), `small` (leave larger files alone, however many), `budget_bytes` and
`budget_s`: no new rewrite begins beyond them. A full rewrite that ends early goes on where it
stopped when it is asked for again.
"""

from __future__ import annotations

import itertools
import logging
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from lakebus.errors import Corrupt, MalformedRequest
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.maintenance.interface import SwapOperation
from storage.maintenance.jobs import Job, JobContext
from storage.maintenance.patience import patiently
from storage.maintenance.planning import RewritePlan, plan_rewrites
from storage.maintenance.priority import tables_taken
from storage.maintenance.settings import MaintenanceSettings
from storage.maintenance.swapping import (
    RewritePart,
    SwapLost,
    SwapWork,
    newest_schema,
    run_swap,
)
from storage.maintenance.totals import LINES_MAX, SwapTotals

_LOG = logging.getLogger(__name__)

#: A periodic job leaves the rest to the next one, so that no table waits for another for long.
BUDGET_S: Final = 900.0
BUDGET_BYTES: Final = 32 * 1024**3
_ROUNDS_MAX: Final = 16
#: How often one table is planned anew because somebody else took files.
_LOST_MAX: Final = 5
#: How often the size of a rewrite is halved for attempts that died.
_HALVINGS_MAX: Final = 6
#: Rewrites of so many bytes are published together at most.
_TOGETHER_BYTES_MAX: Final = 64 * 1024**2


async def compact(context: JobContext, job: Job) -> Mapping[str, Any]:
    """The body of a `compact` job. Raises MalformedRequest for parameters it does not know."""

    wanted = _Wanted.of(job)
    tables = await tables_to_visit(context, wanted.table_id, least_files=1 if wanted.full else 2)
    if job.dry_run:
        return await _dry_run(context, tables, wanted)
    settings = settings_of_attempt(context.settings, job.fruitless_attempts)
    return await _Compaction(replace(context, settings=settings), job, wanted).run(tables)


def settings_of_attempt(settings: MaintenanceSettings, fruitless: int) -> MaintenanceSettings:
    """Every further attempt in a row that publishes nothing rewrites half as much at once. What
    died in the middle of a rewrite, again and again, had nothing to show for it; a part of it gets
    done."""

    halvings = min(max(fruitless - 1, 0), _HALVINGS_MAX)
    return replace(
        settings,
        inputs_max=_halved(settings.inputs_max, halvings, least=2 * settings.inputs_min),
        input_bytes_max=_halved(
            settings.input_bytes_max, halvings, least=2 * settings.target_file_bytes
        ),
    )


def _halved(value: int, times: int, *, least: int) -> int:
    return min(value, max(value >> times, least))


@dataclass(frozen=True, slots=True)
class _Wanted:
    table_id: int | None
    full: bool
    small: bool
    budget_bytes: float
    budget_s: float

    @classmethod
    def of(cls, job: Job) -> _Wanted:
        given = dict(job.parameters)
        table_id = given.pop("table", None)
        full = given.pop("full", False)
        small = given.pop("small", False)
        if not isinstance(full, bool) or not isinstance(small, bool):
            raise MalformedRequest("`full` and `small` of a compaction are true or false")
        if full and small:
            raise MalformedRequest("a compaction is `full` or of `small` files; give one of them")
        budget_bytes = positive(given, "budget_bytes", math.inf if full else BUDGET_BYTES)
        budget_s = positive(given, "budget_s", math.inf if full else BUDGET_S)
        refuse_unknown(given, "compaction", "table, full, small, budget_bytes, budget_s")
        return cls(
            table_id=table_of(job, table_id),
            full=full,
            small=small,
            budget_bytes=budget_bytes,
            budget_s=budget_s,
        )


class _Round(Enum):
    """How a round ended: all rewritten; the table's plan is no longer true because somebody took
    files, or because one is damaged; or the budget is spent."""

    DONE = "done"
    LOST = "lost"
    AGAIN = "again"
    STOP = "stop"


class _Compaction:
    def __init__(self, context: JobContext, job: Job, wanted: _Wanted) -> None:
        self._context, self._job, self._wanted = context, job, wanted
        self._totals = SwapTotals()
        #: Of the table that is worked on: what was there at the first look, or made here since.
        self._known: set[uuid.UUID] | None = None
        noted = job.report.get("tables", ())  # by earlier attempts
        self._swaps_of: dict[int, int] = {line["table_id"]: line["swaps"] for line in noted}
        self._names: dict[int, str] = {line["table_id"]: line["table"] for line in noted}
        self._began_s = context.clock.monotonic_s()
        self._ended_early = False

    async def run(self, tables: Sequence[TableSchema]) -> Mapping[str, Any]:
        full_until = None
        if self._wanted.full:
            head = await patiently(self._context, self._context.catalog.head)
            full_until = head.snapshot_id
        for table in tables:
            if self._spent(0):
                break
            await self._table(table, full_until)
            await self._context.note(self._report())
        return self._report()

    async def _table(self, table: TableSchema, full_until: int | None) -> None:
        """Rounds until nothing is due of the files that were there at first, and of those made of
        them: what comes in meanwhile is left to the next job, which merges more of it at once, so
        that a table under a flood does not keep the others waiting. A round that leaves as many
        files as it found is the last: it would be planned again for ever."""

        before = self._totals.swaps
        damaged: set[str] = set()
        lost = 0
        self._known = None
        for _ in range(_ROUNDS_MAX):
            plans = await self._plan(table, full_until, damaged)
            if not plans:
                break
            taken, made = self._totals.files_in, self._totals.files_out
            ended = await self._round(table, plans, damaged)
            if ended is _Round.LOST:
                lost += 1
                if lost >= _LOST_MAX:
                    self._totals.skip(table.name, f"its files were taken by others {lost} times")
                    break
                continue
            idle = full_until is None and self._grew(plans, taken, made)
            if ended is _Round.STOP or (ended is _Round.DONE and idle):
                break
        if self._totals.swaps > before:
            swaps = self._swaps_of.get(table.table_id, 0) + self._totals.swaps - before
            self._swaps_of[table.table_id] = swaps
            self._names[table.table_id] = table.name

    def _grew(self, plans: Sequence[RewritePlan], taken: int, made: int) -> bool:
        split = any(plan.partition is None and plan.split for plan in plans)
        return not split and self._totals.files_out - made >= self._totals.files_in - taken

    async def _plan(
        self, table: TableSchema, full_until: int | None, damaged: set[str]
    ) -> list[RewritePlan]:
        context = self._context
        files = await live_files(context, table)
        schema = await newest_schema(context, table)
        if schema is None:
            return []
        if self._known is None:
            self._known = {file.file_id for file in files}
        chosen = [
            file
            for file in files
            if file.file_id in self._known and str(file.file_id) not in damaged
        ]
        return plan_rewrites(
            schema,
            chosen,
            context.settings,
            full_until=full_until,
            small_only=self._wanted.small,
        )

    async def _round(
        self, table: TableSchema, plans: Sequence[RewritePlan], damaged: set[str]
    ) -> _Round:
        for together in _swaps(plans, self._context.settings):
            if self._spent(sum(plan.input_bytes for plan in together)):
                self._ended_early = True
                return _Round.STOP
            if table.table_id in await patiently(self._context, self._tables_taken):
                self._totals.skip(table.name, "a delete that lost files to compaction comes first")
                return _Round.STOP
            try:
                await self._rewrite(table, together)
            except SwapLost as error:
                _LOG.info("a rewrite is given up: %s", error)
                self._totals.lost += 1
                return _Round.LOST
            except Corrupt as error:
                # One bad file must not stop the others; it is left as it is, for the validator.
                file_id = str(error.members.get("file_id", ""))
                if not file_id or file_id in damaged:
                    raise
                _LOG.error("compaction leaves a damaged file alone: %s", error)
                self._totals.skip(table.name, error.detail)
                damaged.add(file_id)
                return _Round.AGAIN
            await self._context.note(self._report())
        return _Round.DONE

    async def _rewrite(self, table: TableSchema, plans: Sequence[RewritePlan]) -> None:
        work = SwapWork(
            table=table,
            operation=SwapOperation.COMPACT,
            parts=tuple(RewritePart(inputs=plan.inputs, split=plan.split) for plan in plans),
            summary={"reason": ", ".join(sorted({str(plan.reason) for plan in plans}))},
        )
        done = await run_swap(self._context, work)
        if self._known is not None:
            self._known.update(done.file_ids)
        self._totals.add(done)

    async def _tables_taken(self) -> frozenset[int]:
        return await tables_taken(self._context.upkeep)

    def _spent(self, next_bytes: int) -> bool:
        """The first rewrite always runs: a budget below one rewrite would mean none for ever."""

        wanted = self._wanted
        over_bytes = self._totals.bytes_in + next_bytes > wanted.budget_bytes
        over_s = self._context.clock.monotonic_s() - self._began_s > wanted.budget_s
        return self._totals.swaps > 0 and (over_bytes or over_s)

    def _report(self) -> dict[str, Any]:
        return {
            **self._totals.report(self._job),
            "tables": [
                {"table": self._names[table_id], "table_id": table_id, "swaps": swaps}
                for table_id, swaps in itertools.islice(self._swaps_of.items(), LINES_MAX)
            ],
            "ended_early": self._ended_early,
        }


def _swaps(
    plans: Sequence[RewritePlan], settings: MaintenanceSettings
) -> Iterator[list[RewritePlan]]:
    """Small rewrites of neighbours in the plan are published together: to publish costs as much as
    to merge a few dozen small files, and each publish is a snapshot. Not more at once than one
    rewrite may take, nor so much that its loss would hurt."""

    together: list[RewritePlan] = []
    files = size = 0
    for plan in plans:
        over_files = files + len(plan.inputs) > settings.inputs_max
        if together and (over_files or size + plan.input_bytes > _TOGETHER_BYTES_MAX):
            yield together
            together, files, size = [], 0, 0
        together.append(plan)
        files, size = files + len(plan.inputs), size + plan.input_bytes
    if together:
        yield together


async def _dry_run(
    context: JobContext, tables: Sequence[TableSchema], wanted: _Wanted
) -> Mapping[str, Any]:
    """What the first round would merge."""

    head = await patiently(context, context.catalog.head)
    full_until = head.snapshot_id if wanted.full else None
    planned: list[Mapping[str, object]] = []
    files = rows = size = memory = count = 0
    for table in tables:
        live = await live_files(context, table)
        for plan in plan_rewrites(
            table, live, context.settings, full_until=full_until, small_only=wanted.small
        ):
            count += 1
            files, rows = files + len(plan.inputs), rows + plan.input_rows
            size, memory = size + plan.input_bytes, max(memory, plan.memory_bytes)
            if len(planned) < LINES_MAX:
                names = [str(file.file_id) for file in plan.inputs[:LINES_MAX]]
                planned.append({"table": table.name, **plan.summary(), "inputs": names})
        await context.note({"rewrites": count})
    return {
        "dry_run": True,
        "rewrites": count,
        "files_in": files,
        "rows_in": rows,
        "bytes_in": size,
        "memory_bytes": memory,
        "planned": planned,
        "skipped": [],
    }


# --- what jobs over tables share -------------------------------------------------------------


async def live_files(context: JobContext, table: TableSchema) -> Sequence[DataFile]:
    return await patiently(context, lambda: context.upkeep.live_files(table.table_id))


async def tables_to_visit(
    context: JobContext, table_id: int | None, *, least_files: int
) -> list[TableSchema]:
    """The tables of a job, those with the most small files first."""

    states = await patiently(context, context.catalog.tables)
    by_id = {state.schema.table_id: state.schema for state in states}
    if table_id is not None:
        return [by_id[table_id]] if table_id in by_id else []
    small_bytes = context.settings.small_file_bytes
    counts = await patiently(context, lambda: context.upkeep.file_counts(small_bytes=small_bytes))
    found = [number for number, (files, _) in counts.items() if files >= least_files]
    found.sort(key=lambda number: (-counts[number][1], number))
    return [by_id[number] for number in found if number in by_id]


def table_of(job: Job, given: object) -> int | None:
    """The table that a job is about, by its record or its parameters."""

    if given is None:
        return job.table_id
    if not isinstance(given, int) or isinstance(given, bool):
        raise MalformedRequest("`table` of a maintenance job is the id of a table")
    if job.table_id not in (None, given):
        raise MalformedRequest("the job and its parameters name two tables; give one")
    return given


def positive(given: dict[str, Any], name: str, default: float) -> float:
    value = given.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise MalformedRequest(f"`{name}` is a number above 0")
    return value


def refuse_unknown(given: Mapping[str, Any], what: str, known: str) -> None:
    if given:
        raise MalformedRequest(f"a {what} job has no parameter {min(given)!r}; it has {known}")
