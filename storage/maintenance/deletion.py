"""The job that deletes the rows for which a caller's predicate is true (contract E7).

What it promises: one snapshot E at which the predicate was evaluated over the whole table, one
snapshot P that took exactly those rows away (or none, when no row matched), and the exact count.

Why it is safe:

* E is exact. The head is read before and after the list of live files, and what was published in
  between is added from the catalog's delta, so the files are those of one snapshot and no other.
* Files never change. So a row that matched in a file of E matches for ever, and the swap, which
  demands that every input is still live, takes away what was found and nothing else: rows published
  after E lie in other files. A swap that loses an input (a compaction was faster) starts again at a
  newer E; what was found in files that are still there is kept, because it would be found again.
* The predicate answers the same each time: now() is the time at which the delete was accepted, and
  no function that answers at random gets here (`storage.reading.predicates`).
* It happens once. The publication's id is made of the job's, so a second try of a job that died
  after its publish, and a second worker of the same job, get the answer of the first (C5). What is
  answered then is read back from the snapshot, never from this process's memory.
* Names are those that the caller saw: when a column that the predicate names has become another one
  since the delete was accepted, the delete fails instead of reading the wrong one.

A delete that keeps losing asks compaction to leave the table alone: `storage.maintenance.priority`.

Parameters: `table`, `where`, `parameters`, `now`, `columns` (name → id when it was accepted),
`floor` (a snapshot that E must not be older than). The report has `snapshot_id` (P, or E when no
row matched), `evaluated_at_snapshot_id`, `deleted_rows`, `history`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import logging
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from lakebus.clock import parse_time
from lakebus.errors import (
    Fault,
    OutcomeUnknown,
    SchemaVersionMismatch,
    SnapshotExpired,
    TableNotFound,
    Unavailable,
)
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.engine.engine import QueryEngine
from storage.maintenance.cages import caged_engine
from storage.maintenance.interface import SwapOperation
from storage.maintenance.jobs import Job, JobContext, publication_of
from storage.maintenance.matching import Matcher, Matches, join_places
from storage.maintenance.patience import patiently
from storage.maintenance.priority import Priority
from storage.maintenance.rewriting import RewriteInput, Rewritten
from storage.maintenance.swapping import RewritePart, SwapLost, SwapWork, run_swap
from storage.reading.predicates import RowPredicate, read_predicate

_LOG = logging.getLogger(__name__)

#: So many lost swaps, and compaction is asked to leave the table alone.
LOST_BEFORE_PRIORITY: Final = 3
_LOST_MAX: Final = 30
#: A pin is renewed after a third of its life, and believed only until shortly before its end (E3).
_RENEW_SHARE: Final = 3
_PIN_MARGIN_S: Final = 10.0


async def delete(context: JobContext, job: Job) -> Mapping[str, Any]:
    """The body of a `delete` job. Raises SqlError, StatementNotAllowed, TableNotFound,
    SchemaVersionMismatch, and Unavailable for who tries again."""

    return await _Deletion(context, job).run()


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """The table at one snapshot."""

    snapshot_id: int
    files: tuple[DataFile, ...]


class _Deletion:
    def __init__(self, context: JobContext, job: Job) -> None:
        if job.table_id is None:
            raise Fault("a delete without a table")
        self._context, self._job, self._table_id = context, job, job.table_id
        given = job.parameters
        self._table, self._where = str(given["table"]), str(given["where"])
        self._parameters = given.get("parameters")
        self._now: dt.datetime = parse_time(str(given["now"]))
        self._publication_id = publication_of(job.job_id)
        self._folder = context.temp_dir / "matches"
        self._pin = _Pin(context, self._table_id)
        self._priority = Priority(context, table_id=self._table_id, job_id=job.job_id)
        self._found: dict[uuid.UUID, Matches] = {}
        self._version = 0
        self._counts = {"files_evaluated": 0, "files_pruned": 0, "swaps_lost": 0}

    async def run(self) -> Mapping[str, Any]:
        done = await self._published()
        if done is not None:
            return await self._report_of(done)
        # failpoint: deletion.after_look
        try:
            async with caged_engine(self._context) as engine:
                return await self._rounds(engine)
        finally:
            await self._priority.end()
            await self._pin.release()
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _rounds(self, engine: QueryEngine) -> Mapping[str, Any]:
        before = int(self._job.report.get("swaps_lost", 0))  # of an attempt that died
        for lost in range(before, before + _LOST_MAX):
            self._counts["swaps_lost"] = lost
            if lost >= LOST_BEFORE_PRIORITY:
                await self._priority.take()
            state = await self._state()
            schema, predicate = await self._predicate(engine)
            matched = await self._evaluate(engine, schema, predicate, state)
            # failpoint: deletion.after_evaluate
            rows = sum(one.rows for one in matched)
            # Before a count is answered: another worker of this job may have published.
            done = await self._published()
            if done is None and (rows == 0 or self._job.dry_run):
                return await self._report(state.snapshot_id, state.snapshot_id, rows)
            if done is None:
                done = await self._swap(schema, state, matched)
            if done is not None:
                return await self._report_of(done)
            # failpoint: deletion.after_loss
        raise Unavailable(f"the delete lost its files {_LOST_MAX} times", retry_after_s=5.0)

    async def _published(self) -> int | None:
        """The snapshot that this job has made, however many workers it had."""

        outcome = await patiently(
            self._context, lambda: self._context.upkeep.swap_outcome(self._publication_id)
        )
        return None if outcome is None else outcome.snapshot_id

    async def _swap(
        self, schema: TableSchema, state: _State, matched: Sequence[Matches]
    ) -> int | None:
        """The snapshot that was published; None when somebody else took a file."""

        # LeaseLost here: from now on only the worker whose job it is goes on. One that was paused
        # behind this line proposes files that its successor has looked at too.
        await self._note(state.snapshot_id, sum(one.rows for one in matched))
        # failpoint: deletion.before_swap
        try:
            work = await asyncio.to_thread(self._work, schema, state, matched)
            done = await run_swap(self._context, work, check=self._check)
        except SwapLost as error:
            _LOG.info("a delete starts again: %s", error)
            return None
        # failpoint: deletion.after_swap
        return done.snapshot_id

    # --- the table at one snapshot -----------------------------------------------------------

    async def _state(self) -> _State:
        """The live files at the newest snapshot, exactly, and a pin on them."""

        context = self._context
        before = await patiently(context, context.catalog.head)
        await self._pin.hold(before.snapshot_id)
        # failpoint: deletion.after_pin
        live = await patiently(context, lambda: context.upkeep.live_files(self._table_id))
        # failpoint: deletion.after_list
        head = await patiently(context, context.catalog.head)
        if head.history != before.history:
            raise Unavailable("the lake was restored meanwhile", retry_after_s=1.0)
        floor = int(self._job.parameters.get("floor", 0))
        if head.snapshot_id < floor:
            raise Unavailable(f"the catalog is behind snapshot {floor}", retry_after_s=1.0)
        files = {file.file_id: file for file in live}
        if head.snapshot_id > before.snapshot_id:
            # The list is that of some snapshot between the two heads; bring it to the second.
            delta = await patiently(
                context,
                lambda: context.catalog.manifest_delta(
                    after=before.snapshot_id, until=head.snapshot_id
                ),
            )
            files |= {file.file_id: file for file in delta.files if file.table_id == self._table_id}
            gone = {*delta.ended, *(f.file_id for f in delta.files if f.last_snapshot is not None)}
            files = {
                file_id: file
                for file_id, file in files.items()
                if file_id not in gone and file.first_snapshot <= head.snapshot_id
            }
        return _State(head.snapshot_id, tuple(files.values()))

    async def _predicate(self, engine: QueryEngine) -> tuple[TableSchema, RowPredicate]:
        """The table's newest shape, which every file can be read in, and the predicate in it."""

        states = await patiently(self._context, self._context.catalog.tables)
        schema = next((s.schema for s in states if s.schema.table_id == self._table_id), None)
        if schema is None:
            raise TableNotFound(f"the table {self._table} was dropped before the delete ended")
        predicate = await read_predicate(engine, schema, self._where)
        accepted: Mapping[str, int] = self._job.parameters["columns"]
        newest = {column.name: column.column_id for column in schema.columns}
        for name in sorted(predicate.names):
            if accepted.get(name) != newest.get(name):
                raise SchemaVersionMismatch(
                    f"the column {name} was changed while the delete waited; look at the table "
                    "again and send the delete with a new key",
                    schema_version=schema.version,
                )
        if schema.version != self._version:
            self._found.clear()  # a type may have been widened since
            self._version = schema.version
        return schema, predicate

    async def _evaluate(
        self,
        engine: QueryEngine,
        schema: TableSchema,
        predicate: RowPredicate,
        state: _State,
    ) -> list[Matches]:
        """What matches at the snapshot; files looked at before are not looked at again."""

        matcher = Matcher(
            engine=engine,
            store=self._context.store,
            schema=schema,
            predicate=predicate,
            parameters=self._parameters,
            now=self._now,
            folder=self._folder,
        )
        new = [file for file in state.files if file.file_id not in self._found]
        looked = 0
        for batch in matcher.batches(new):
            await self._pin.hold(state.snapshot_id)
            for one in await matcher.match(batch, deadline_s=self._pin.left_s()):
                self._found[one.file.file_id] = one
            looked += len(batch)
            # failpoint: deletion.after_batch
            await self._context.note(self._progress())
        self._counts["files_evaluated"] += looked
        self._counts["files_pruned"] = len(state.files) - len(
            [file for file in state.files if file.file_id in self._found]
        )
        found = [self._found[f.file_id] for f in state.files if f.file_id in self._found]
        return [one for one in found if one.rows]

    # --- the swap ----------------------------------------------------------------------------

    def _work(self, schema: TableSchema, state: _State, matched: Sequence[Matches]) -> SwapWork:
        parts = tuple(self._parts([one for one in matched if not one.whole]))
        return SwapWork(
            table=schema,
            operation=SwapOperation.DELETE,
            parts=parts,
            dropped=tuple(one.file for one in matched if one.whole),
            summary={
                "deleted_rows": sum(one.rows for one in matched),
                "evaluated_at_snapshot_id": state.snapshot_id,
                "job_id": str(self._job.job_id),
            },
            publication_id=self._publication_id,
        )

    def _parts(self, matched: Iterable[Matches]) -> Iterable[RewritePart]:
        """Files of one partition are rewritten together up to the size of a file."""

        settings = self._context.settings
        by_partition: dict[str | None, list[Matches]] = {}
        for one in matched:
            by_partition.setdefault(one.file.partition, []).append(one)
        number = 0
        for group in by_partition.values():
            part: list[Matches] = []
            for one in group:
                size_bytes = sum(other.file.size_bytes for other in part)
                full = size_bytes + one.file.size_bytes > settings.target_file_bytes
                if part and (full or len(part) >= settings.inputs_max):
                    yield self._part(part, number)
                    part, number = [], number + 1
                part.append(one)
            yield self._part(part, number)
            number += 1

    def _part(self, matched: Sequence[Matches], number: int) -> RewritePart:
        places = join_places(matched, self._folder / f"part-{number}.arrow")
        return RewritePart(inputs=tuple(one.file for one in matched), drop_places=places)

    def _check(self, schema: TableSchema, inputs: Sequence[RewriteInput], made: Rewritten) -> None:
        """Exactly the rows that matched are gone (E1)."""

        expected = sum(self._found[one.file.file_id].rows for one in inputs)
        if made.removed.rows != expected:
            raise Fault(f"a delete left out {made.removed.rows} rows and not {expected}")

    # --- what it says ------------------------------------------------------------------------

    async def _note(self, evaluated_at: int, rows: int) -> None:
        """Before the publish: what is answered when the job dies behind it and its snapshot has
        expired by the time somebody looks."""

        proposal = {"evaluated_at_snapshot_id": evaluated_at, "deleted_rows": rows}
        await self._context.note({**self._progress(), "proposed": proposal})

    def _progress(self) -> dict[str, Any]:
        return dict(self._counts)

    async def _report_of(self, snapshot_id: int) -> Mapping[str, Any]:
        """The report of a published delete, from what its snapshot says."""

        context = self._context
        said: Mapping[str, Any] = self._job.report.get("proposed", {})
        with suppress(SnapshotExpired):
            snapshot = await patiently(context, lambda: context.catalog.snapshot(snapshot_id))
            tables: Any = snapshot.summary["tables"]
            said = tables[str(self._table_id)]
        if not said:
            raise Fault(f"nobody knows any more what the delete in snapshot {snapshot_id} did")
        more = {
            name: said[name]
            for name in ("files_added", "files_removed", "bytes_added", "bytes_removed")
            if name in said
        }
        return await self._report(
            snapshot_id, said["evaluated_at_snapshot_id"], said["deleted_rows"], **more
        )

    async def _report(
        self, snapshot_id: int, evaluated_at: int, rows: int, **more: object
    ) -> Mapping[str, Any]:
        identity = await patiently(self._context, self._context.catalog.identity)
        return {
            **self._progress(),
            **more,
            "snapshot_id": snapshot_id,
            "evaluated_at_snapshot_id": evaluated_at,
            "deleted_rows": rows,
            "history": str(identity.history),
            "dry_run": self._job.dry_run,
        }


class _Pin:
    """Files that a snapshot needs stay in the store while it is held; see E3 for the clock."""

    def __init__(self, context: JobContext, table_id: int) -> None:
        self._context, self._table_id = context, table_id
        self._pin_id = context.chance.new_uuid()
        self._ttl_s = context.settings.intent_ttl_s
        self._floor: int | None = None
        self._sent_s = 0.0

    async def hold(self, snapshot_id: int) -> None:
        """Every snapshot from this one on, or from an earlier one held already. Raises Unavailable,
        SnapshotExpired."""

        sent_s = self._context.clock.monotonic_s()
        if self._floor is not None and sent_s - self._sent_s < self._ttl_s / _RENEW_SHARE:
            return
        floor = self._floor if self._floor is not None else snapshot_id
        await patiently(
            self._context,
            lambda: self._context.upkeep.pin(
                self._pin_id,
                kind="job",
                floor=floor,
                ttl_s=self._ttl_s,
                note=f"delete of table {self._table_id}",
            ),
        )
        self._floor, self._sent_s = floor, sent_s

    def left_s(self) -> float:
        """How long the pin can be relied on. Raises Unavailable when that is over."""

        margin_s = min(_PIN_MARGIN_S, self._ttl_s / 4)
        left_s = self._sent_s + self._ttl_s - margin_s - self._context.clock.monotonic_s()
        if left_s <= 0:
            raise Unavailable("the delete was paused for longer than its files are kept")
        return left_s

    async def release(self) -> None:
        if self._floor is not None:
            # It expires by itself; an error here would hide the one that ends the job.
            with suppress(Unavailable, OutcomeUnknown):
                await self._context.upkeep.release_pin(self._pin_id)
