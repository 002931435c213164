"""Deletes over a lake: the service at the door, and workers that run its jobs in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lakebus.clock import SystemChance, SystemClock, new_uuid
from lakebus.errors import LakebusError
from lakebus.tokens import TokenCodec
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.ingesting.deletes import DeleteAnswer, DeleteRequest, DeleteService
from storage.ingesting.grants import Grant, Principal
from storage.ingesting.memory_keys import MemoryKeyStore
from storage.ingesting.table_cache import TableCache
from storage.maintenance import deletion, erasure
from storage.maintenance.cages import caged_engine
from storage.maintenance.compaction import compact
from storage.maintenance.deletion import delete
from storage.maintenance.jobs import Job, JobClaim, JobContext, JobKind, JobRequest
from storage.maintenance.settings import MaintenanceSettings
from storage.reading.predicates import PredicateChecker
from storage.reading.resolve import LATEST, SnapshotChoice
from tests.conformance.harness import LakeHarness, entry_of
from tests.conformance.sql import SqlStack, sql_stack

SOMEONE = Principal(1, "someone", (Grant("ingest"), Grant("query")))
#: Two files are worth a merge.
SETTINGS = MaintenanceSettings(inputs_min=2, small_files_max=1)


@dataclasses.dataclass(slots=True)
class DeleteRig:
    stack: SqlStack
    service: DeleteService
    checker: PredicateChecker
    folder: Path
    settings: MaintenanceSettings = SETTINGS
    #: A cage of each job's own, as workers make them, and not the stack's engine: half a second a
    #: job, so a few tests only.
    own_cages: bool = False
    #: What workers get in place of the lake's own.
    upkeep: Any = None

    @property
    def lake(self) -> LakeHarness:
        return self.stack.lake

    async def publish(self, *ids: int, note: str | None = None, **more: Any) -> int:
        """One entry in a snapshot of its own."""

        table = await self.lake.catalog.table("t")
        assert table is not None
        more["note"] = note
        await self.lake.accept(entry_of(table.schema, list(ids), **more))
        published = await self.stack.writer.publish_one()
        assert published.snapshot_id is not None
        return published.snapshot_id

    async def ids(self, snapshot_id: int | None = None) -> list[int]:
        choice = LATEST if snapshot_id is None else SnapshotChoice(snapshot_id=snapshot_id)
        rows = await self.stack.rows("SELECT id FROM t ORDER BY id", snapshot=choice)
        return [row[0] for row in rows]

    async def head(self) -> int:
        return (await self.lake.catalog.head()).snapshot_id

    # --- asking ------------------------------------------------------------------------------

    def request(self, where: str, *, wait_s: float = 20.0, **more: Any) -> DeleteRequest:
        given: dict[str, Any] = {"principal": SOMEONE, "table": "t", **more}
        return DeleteRequest(where=where, deadline_s=time.monotonic() + wait_s, **given)

    async def ask(self, where: str, **more: Any) -> Job:
        """Asks, and goes away as soon as the job is there."""

        known = {job.job_id for job in await self.jobs()}
        asking = asyncio.ensure_future(
            self.service.delete(self.request(where, **more), self.checker)
        )
        while not asking.done():
            new = [job for job in await self.jobs() if job.job_id not in known]
            if new:
                asking.cancel()
                await asyncio.wait((asking,))
                return new[0]
            await asyncio.sleep(0.005)
        raise AssertionError(await asking)

    async def delete(self, where: str, **more: Any) -> DeleteAnswer:
        """Asks, runs the job, and gives the answer."""

        request = self.request(where, **more)
        asking = asyncio.ensure_future(self.service.delete(request, self.checker))
        while not asking.done():
            await self.work()
            await asyncio.sleep(0.005)
        return await asking

    async def answer_of(self, job_id: uuid.UUID) -> DeleteAnswer:
        return await self.service.look(SOMEONE, "t", str(job_id), deadline_s=0.0)

    # --- working -----------------------------------------------------------------------------

    async def claim(
        self, kind: JobKind = JobKind.DELETE, *, ttl_s: float = 60.0
    ) -> JobClaim | None:
        return await self.lake.jobs.claim(new_uuid(), kinds=(kind,), ttl_s=ttl_s)

    async def work(self, claim: JobClaim | None = None) -> Mapping[str, Any] | None:
        """Runs one delete as a worker does; None when there is none. An error that may be tried
        again, and any that a failpoint raised, leaves it to the next worker."""

        claim = claim or await self.claim()
        if claim is None:
            return None
        jobs = self.lake.jobs
        try:
            report = await delete(self.context(claim), claim.job)
        except LakebusError as error:
            if error.retryable:
                await jobs.give_back(claim, delay_s=0.0, error=error.detail)
                raise
            said = {"code": error.code, "detail": error.detail}
            await jobs.finish(claim, {}, error=said)
            return {}
        except BaseException:
            await jobs.give_back(claim, delay_s=0.0, error="it died")
            raise
        await jobs.finish(claim, report)
        return report

    async def compact(self) -> Mapping[str, Any]:
        """Merges what there is, as a job of its own."""

        job, _ = await self.lake.jobs.submit(
            JobRequest(JobKind.COMPACT, "someone", parameters={"full": True})
        )
        claim = await self.claim(JobKind.COMPACT)
        assert claim is not None
        assert claim.job.job_id == job.job_id
        report = await compact(self.context(claim), claim.job)
        await self.lake.jobs.finish(claim, report)
        return report

    def context(self, claim: JobClaim) -> JobContext:
        folder = self.folder / "jobs" / f"{claim.job.job_id}-{new_uuid()}"
        folder.mkdir(parents=True)

        async def note(report: Mapping[str, Any]) -> None:
            await self.lake.jobs.note(claim, report)

        return JobContext(
            catalog=self.lake.catalog,
            upkeep=self.upkeep or self.lake.upkeep,
            bus=self.lake.bus,
            store=self.stack.writer.store,
            settings=self.settings,
            engine=EngineSettings(
                allowed_directory=str(self.folder / "objects"),
                temp_directory=str(folder / "engine"),
                spare=False,
                threads=1,
            ),
            temp_dir=folder,
            clock=SystemClock(),
            chance=SystemChance(),
            note=note,
            erasing=self.lake.erasing,
        )

    async def jobs(self) -> Sequence[Job]:
        return await self.lake.jobs.jobs(kind=JobKind.DELETE)


@asynccontextmanager
async def delete_rig(lake: LakeHarness, folder: Path) -> AsyncIterator[DeleteRig]:
    async with sql_stack(lake, folder) as stack:
        codec = TokenCodec((await lake.catalog.identity()).token_secret)
        service = DeleteService(
            jobs=lake.jobs,
            tables=TableCache(lake.catalog),
            resolver=stack.replica.resolver,
            codec=codec,
            keys=MemoryKeyStore(),
        )
        rig = DeleteRig(stack, service, PredicateChecker(stack.engine), folder)
        with ExitStack() as patches:
            for module in (deletion, erasure):
                patches.enter_context(mock.patch.object(module, "caged_engine", _cages_of(rig)))
            yield rig


def _cages_of(rig: DeleteRig) -> Any:
    @asynccontextmanager
    async def cage(context: JobContext) -> AsyncIterator[QueryEngine]:
        if not rig.own_cages:
            yield rig.stack.engine
            return
        async with caged_engine(context) as engine:
            yield engine

    return cage


def random_predicate(chance: random.Random) -> tuple[str, Any]:
    """A predicate over (id, note) and the same in Python; None where it is null."""

    number = chance.randrange(0, 40)
    choices: list[tuple[str, Any]] = [
        (f"id = {number}", lambda row: row[0] == number),
        (f"id < {number} AND id % 3 = 0", lambda row: row[0] < number and row[0] % 3 == 0),
        (f"id BETWEEN {number} AND {number + 5}", lambda row: number <= row[0] <= number + 5),
        ("note IS NULL", lambda row: row[1] is None),
        (f"note = 'n{number % 4}'", lambda row: row[1] is not None and row[1] == f"n{number % 4}"),
        (
            f"NOT (note = 'n{number % 4}') AND id > {number}",
            lambda row: row[1] is not None and row[1] != f"n{number % 4}" and row[0] > number,
        ),
        (f"id IN ({number}, {number + 1}, 3)", lambda row: row[0] in (number, number + 1, 3)),
        ("id > 1000", lambda row: row[0] > 1000),
    ]
    return chance.choice(choices)
