"""The job that erases rows for good: from every snapshot, the bus, quarantine and restores (E7).

What it promises when it has ended: no row of the table for which the predicate is true and whose
entry was accepted before the erasure can be read at any snapshot, on any replica, nor from
quarantine, and no object of the store and no segment of the bus holds one, but for what its report
names. What was accepted later is untouched.

The order, and why each step may be repeated after a crash:

1. A record in the object store, before anything is removed, so that a restore of an older catalog
   erases again (`storage.maintenance.erasure_records`).
2. Everything accepted before is waited for to be terminal, so the bus holds nothing of it that is
   still to be published.
3. Quarantined entries and reject sets that match, or cannot be judged, lose their bytes.
4. Every data file of the table, needed or not, is looked at; those with matches are written anew
   without them, in the shape they had, and take their place in one transaction. A compaction may
   have carried rows on meanwhile, so this is repeated until nothing is found: it ends, because the
   inputs of whoever comes later are gone or clean.
5. Objects that no catalog names (of writers that died or lost) are looked at in the same way.
6. The objects of all these are deleted: neither the safety window nor a pin delays it. A reader
   that has one open ends with what it reads, and one that opens it later gets `unavailable`.
7. The stored bytes of terminal entries leave the bus.
8. A snapshot with the operation `erase` tells of it.

Rows match by the shape that the caller saw: columns by id, whatever they are called now.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from lakebus.clock import parse_time
from lakebus.errors import Corrupt, Fault, Unavailable
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import Erased
from storage.engine.engine import QueryEngine
from storage.maintenance.cages import caged_engine
from storage.maintenance.erasing import Erasing, Replacement, by_snapshots
from storage.maintenance.erasure_quarantine import QuarantineErasure
from storage.maintenance.erasure_records import find_exchange, write_exchange, write_record
from storage.maintenance.input_files import locate
from storage.maintenance.jobs import Job, JobContext, publication_of
from storage.maintenance.matching import BATCH_S, Matcher, Matches, join_places
from storage.maintenance.patience import patiently
from storage.maintenance.rewrite import rewrite
from storage.maintenance.rewriting import RewriteRequest, RewrittenFile
from storage.reading.predicates import RowPredicate, read_predicate

#: How long one attempt waits for entries to become terminal, and for the bus to be emptied.
_TERMINAL_S: Final = 300.0
_EMPTY_S: Final = 30.0
_POLL_S: Final = 0.1
_PASSES_MAX: Final = 50
#: Files that take their place in one transaction.
_EXCHANGE_MAX: Final = 16
_ONE_FILE_BYTES: Final = 2**50
_PLACES: Final = ("$shard", "$position")


async def erase(context: JobContext, job: Job) -> Mapping[str, Any]:
    """The body of an `erase` job. Raises SqlError, StatementNotAllowed, and Unavailable for who
    tries again."""

    if context.erasing is None or job.table_id is None:
        raise Fault("an erasure without a table, or without the catalog's side of it")
    return await _Erasure(context, job, context.erasing, job.table_id).run()


class _Erasure:
    def __init__(self, context: JobContext, job: Job, erasing: Erasing, table_id: int) -> None:
        self._context, self._job, self._erasing = context, job, erasing
        self._table_id = table_id
        given = job.parameters
        self._erasure_id = uuid.UUID(str(given.get("erasure_id", job.job_id)))
        self._ends: dict[int, int] = dict(enumerate(given["ends"]))
        self._now: dt.datetime = parse_time(str(given["now"]))
        self._folder = context.temp_dir / "matches"
        self._clean: set[uuid.UUID] = set()
        self._report: dict[str, Any] = {"files_evaluated": 0, "files_rewritten": 0}

    async def run(self) -> Mapping[str, Any]:
        started_s = self._context.clock.monotonic_s()
        if not self._job.dry_run:
            await self._record()
        await self._wait_terminal()
        # failpoint: erasure.after_wait
        try:
            marks = await self._erase_all()
        finally:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        return await self._finish(marks, started_s)

    async def _record(self) -> None:
        record = {
            **self._job.parameters,
            "erasure_id": str(self._erasure_id),
            "table_id": self._table_id,
        }
        await patiently(
            self._context, lambda: write_record(self._context.store, self._erasure_id, record)
        )
        # failpoint: erasure.after_record
        await patiently(
            self._context, lambda: self._erasing.begin(self._erasure_id, self._table_id)
        )

    async def _wait_terminal(self) -> None:
        """Until everything accepted before is published or set aside."""

        clock = self._context.clock
        until_s = clock.monotonic_s() + _TERMINAL_S
        while True:
            head = await patiently(self._context, self._context.catalog.head)
            if all(head.watermark.get(s, 0) >= end for s, end in self._ends.items()):
                return
            if clock.monotonic_s() >= until_s:
                raise Unavailable("entries accepted before the erasure are not published yet")
            await self._context.note({**self._report, "step": "wait"})
            await clock.sleep_s(_POLL_S)

    async def _erase_all(self) -> Sequence[Erased]:
        schema = await self._shape()
        async with caged_engine(self._context) as engine:
            predicate = await read_predicate(engine, schema, str(self._job.parameters["where"]))
            matcher = self._matcher(engine, schema, predicate)
            found = await self._erase_files(matcher)
            if not self._job.dry_run:
                await self._erase_strays(matcher)
                # failpoint: erasure.after_strays
        self._report |= await QuarantineErasure(
            self._context,
            self._table_id,
            self._ends,
            str(self._erasure_id),
            dry_run=self._job.dry_run,
        ).run(schema, predicate, self._job.parameters.get("parameters"), self._now, self._folder)
        # failpoint: erasure.after_quarantine
        if self._job.dry_run:
            return found
        await self._delete_objects()
        await self._empty_bus()
        # failpoint: erasure.after_bus
        return await patiently(self._context, lambda: self._erasing.erased(self._erasure_id))

    async def _shape(self) -> TableSchema:
        """What the caller saw; a type that was widened since is the wider one."""

        states = await patiently(self._context, self._context.catalog.tables)
        live = next((s.schema for s in states if s.schema.table_id == self._table_id), None)
        newest = {} if live is None else {c.column_id: c.type for c in live.columns}
        given = self._job.parameters
        return TableSchema(
            table_id=self._table_id,
            name=str(given["table"]),
            version=int(given["schema_version"]),
            columns=tuple(
                Column(int(column_id), str(name), newest.get(column_id, str(kind)))
                for name, column_id, kind in given["shape"]
            ),
        )

    def _matcher(
        self, engine: QueryEngine, schema: TableSchema, predicate: RowPredicate
    ) -> Matcher:
        shard, position = (f'"{name}"' for name in _PLACES)
        parts = [f"({shard} = {s} AND {position} < {end})" for s, end in self._ends.items()]
        return Matcher(
            engine=engine,
            store=self._context.store,
            schema=schema,
            predicate=predicate,
            parameters=self._job.parameters.get("parameters"),
            now=self._now,
            folder=self._folder,
            places_sql=" OR ".join(parts) or "false",
        )

    # --- data files --------------------------------------------------------------------------

    async def _erase_files(self, matcher: Matcher) -> list[Erased]:
        """Passes over all files until one finds nothing. A dry run makes one, and tells."""

        for _ in range(_PASSES_MAX):
            files = await patiently(self._context, lambda: self._erasing.files(self._table_id))
            new = [file for file in files if file.file_id not in self._clean]
            new = await self._adopt_missing(new)
            matched = await self._match(matcher, new)
            if self._job.dry_run:
                head = await patiently(self._context, self._context.catalog.head)
                return [_would(self._erasure_id, one, head.snapshot_id) for one in matched]
            if not matched:
                return []
            await self._exchange(matched)
            # failpoint: erasure.after_exchange
        raise Unavailable(f"files with rows to erase were found {_PASSES_MAX} times")

    async def _adopt_missing(self, files: Sequence[DataFile]) -> list[DataFile]:
        """Files whose objects are there. One whose object an erasure of a lost line of history has
        deleted gives its place to what was left of it."""

        store, there = self._context.store, []
        for file in files:
            if await patiently(self._context, partial(store.size, file.object_key)):
                there.append(file)
                continue
            found = await find_exchange(store, file)
            if found is None or self._job.dry_run:
                self._report["files_missing"] = self._report.get("files_missing", 0) + 1
                self._clean.add(file.file_id)
                continue
            await self._replace([found])
        return there

    async def _match(self, matcher: Matcher, files: Sequence[DataFile]) -> list[Matches]:
        matched: list[Matches] = []
        looked: set[uuid.UUID] = set()
        for batch in matcher.batches(files):
            for one in await matcher.match(batch, deadline_s=BATCH_S):
                looked.add(one.file.file_id)
                if one.rows:
                    matched.append(one)
            await self._context.note({**self._report, "step": "files"})
        found = {one.file.file_id for one in matched}
        self._clean |= {file.file_id for file in files} - found
        self._report["files_evaluated"] += len(looked)
        return matched

    async def _exchange(self, matched: Sequence[Matches]) -> None:
        for start in range(0, len(matched), _EXCHANGE_MAX):
            made = [await self._rewritten(one) for one in matched[start : start + _EXCHANGE_MAX]]
            # failpoint: erasure.before_replace
            await self._replace([one for one in made if one is not None])

    async def _replace(self, replacements: Sequence[Replacement]) -> None:
        if not replacements:
            return
        for one in replacements:
            if not one.adopted:
                store = self._context.store
                await patiently(
                    self._context, partial(write_exchange, store, self._erasure_id, one)
                )
        # failpoint: erasure.after_exchange_records
        done = await patiently(
            self._context,
            lambda: self._erasing.replace(self._erasure_id, self._table_id, replacements),
        )
        self._report["files_rewritten"] += len(done)
        # failpoint: erasure.after_replace

    async def _rewritten(self, one: Matches) -> Replacement | None:
        """The file without the rows, in the shape that it has; None when it is gone meanwhile."""

        file = one.file
        if one.whole:
            return Replacement(file.file_id, one.rows, None)
        folder = self._context.temp_dir / self._context.chance.new_uuid().hex
        try:
            await asyncio.to_thread(folder.mkdir)
            return await self._rewrite(one, folder)
        except Corrupt:
            files = await patiently(self._context, lambda: self._erasing.files(self._table_id))
            if any(other.file_id == file.file_id for other in files):
                raise
            return None  # collected, or exchanged by somebody else
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _rewrite(self, one: Matches, folder: Path) -> Replacement:
        context, file, settings = self._context, one.file, self._context.settings
        schema = await patiently(
            context, lambda: context.catalog.schema_version(self._table_id, file.schema_version)
        )
        if schema is None:
            raise Fault(f"nobody knows the shape of the data file {file.object_key}")
        places = await asyncio.to_thread(join_places, [one], folder / "places.arrow")
        request = RewriteRequest(
            schema=dataclasses.replace(schema, partition_by=()),
            inputs=await locate(context, [file], folder / "inputs"),
            target_file_bytes=_ONE_FILE_BYTES,
            memory_bytes=settings.rewrite_memory_bytes,
            threads=settings.rewrite_threads,
            temp_dir=folder,
            drop_places=places,
        )
        made = await asyncio.to_thread(rewrite, request)
        if made.removed.rows != one.rows or len(made.files) != 1:
            raise Fault(f"an erasure left out {made.removed.rows} rows and not {one.rows}")
        return Replacement(file.file_id, one.rows, await self._put(schema, file, made.files[0]))

    async def _put(self, schema: TableSchema, old: DataFile, made: RewrittenFile) -> DataFile:
        context = self._context
        (file_id,) = await patiently(
            context,
            lambda: context.upkeep.register_intents(
                self._table_id,
                1,
                owner=context.chance.new_uuid(),
                ttl_s=context.settings.intent_ttl_s,
            ),
        )
        # failpoint: erasure.after_intent
        key = f"tables/{self._table_id}/{file_id}.parquet"
        await context.store.put_new(key, await asyncio.to_thread(made.path.read_bytes))
        # failpoint: erasure.after_put
        return DataFile(
            file_id=file_id,
            table_id=self._table_id,
            schema_version=old.schema_version,
            object_key=key,
            rows=made.rows,
            size_bytes=made.size_bytes,
            sha256=made.sha256,
            statistics=made.statistics,
            partition=old.partition,
            layout=",".join(schema.sort_by),
        )

    # --- objects, bus ------------------------------------------------------------------------

    async def _erase_strays(self, matcher: Matcher) -> None:
        """Objects that no snapshot has named: of those with rows accepted before, nobody needs any,
        because these entries are terminal."""

        context = self._context
        strays = await patiently(context, lambda: self._erasing.strays(self._table_id))
        gone: list[uuid.UUID] = []
        unread = 0
        for stray in strays:
            size = await patiently(context, partial(context.store.size, stray.object_key))
            if size is None:
                continue
            file = DataFile(
                file_id=stray.file_id,
                table_id=self._table_id,
                schema_version=0,
                object_key=stray.object_key,
                rows=0,
                size_bytes=size,
                sha256="",
                statistics={},
            )
            try:
                (found,) = await matcher.match([file], deadline_s=BATCH_S)
            except (Corrupt, Unavailable):
                unread += 1  # it may be somebody's who writes now; else collection deletes it
                continue
            if found.rows:
                gone.append(stray.file_id)
        if gone:
            await patiently(context, lambda: self._erasing.erase_strays(self._table_id, gone))
        self._report |= {"stray_objects": len(gone), "stray_objects_unread": unread}

    async def _delete_objects(self) -> None:
        context = self._context
        doomed = await patiently(context, lambda: self._erasing.doomed(self._table_id))
        for one in doomed:
            await patiently(context, partial(context.store.delete, one.object_key))
            # failpoint: erasure.after_object
        if doomed:
            ids = [one.file_id for one in doomed]
            await patiently(context, lambda: context.upkeep.note_deleted(ids))
        self._report["objects_deleted"] = len(doomed)

    async def _empty_bus(self) -> None:
        """Waits a while for what shares its place with entries that are not terminal yet."""

        context, clock = self._context, self._context.clock
        until_s = clock.monotonic_s() + _EMPTY_S
        objects = 0
        while True:
            made = await patiently(context, lambda: context.bus.empty(self._ends))
            objects += made.objects_deleted
            if not made.bytes_left or clock.monotonic_s() >= until_s:
                break
            await clock.sleep_s(_POLL_S)
        self._report |= {"bus_objects_deleted": objects, "bus_bytes_left": made.bytes_left}

    # --- what it says ------------------------------------------------------------------------

    async def _finish(self, marks: Sequence[Erased], started_s: float) -> Mapping[str, Any]:
        context = self._context
        runs = by_snapshots(marks)
        summary = {
            "erasure_id": str(self._erasure_id),
            "files_erased_from": sum(m.exchanged for m in marks),
            "snapshots_erased_from": sum(
                run["last_snapshot_id"] - run["first_snapshot_id"] + 1 for run in runs
            ),
        }
        if self._job.dry_run:
            snapshot_id = (await patiently(context, context.catalog.head)).snapshot_id
        else:
            snapshot_id = await patiently(
                context,
                lambda: self._erasing.finish(
                    self._erasure_id, self._table_id, publication_of(self._job.job_id), summary
                ),
            )
        # failpoint: erasure.after_finish
        identity = await patiently(context, context.catalog.identity)
        return {
            **self._report,
            **summary,
            "snapshots": runs,
            # What the snapshot that lost most has lost.
            "deleted_rows": max((run["rows"] for run in runs), default=0),
            "snapshot_id": snapshot_id,
            "evaluated_at_snapshot_id": snapshot_id,
            "history": str(identity.history),
            "dry_run": self._job.dry_run,
            "seconds": round(context.clock.monotonic_s() - started_s, 3),
        }


def _would(erasure_id: uuid.UUID, one: Matches, head: int) -> Erased:
    """What an exchange of this file would note."""

    file = one.file
    last = head + 1 if file.last_snapshot is None else file.last_snapshot
    return Erased(erasure_id, file.table_id, file.first_snapshot, last, one.rows, 1)
