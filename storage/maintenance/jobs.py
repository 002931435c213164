"""Jobs of maintenance: what is asked for, what ran, what it did, and what a job stands on.

The record in the database is the truth. A job belongs to one worker at a time by a lease with an
epoch; a worker that lost its lease cannot write the record any more. That is bookkeeping, not
safety: every step of every job is safe when two run it at once, because swaps, expiry and
collection are each decided in one transaction of `storage.maintenance.interface`.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from lakebus.clock import Chance, Clock
from lakebus.telemetry import NO_METRICS, Metrics
from storage.bus.interface import IngestBus
from storage.catalog.interface import Catalog
from storage.engine.settings import EngineSettings
from storage.files.objects import ObjectStore
from storage.maintenance.erasing import Erasing
from storage.maintenance.inspection import Inspection
from storage.maintenance.interface import Upkeep
from storage.maintenance.settings import MaintenanceSettings

if TYPE_CHECKING:  # it needs the context; and who schedules jobs needs no engine
    from storage.maintenance.cages import WarmCage


class JobKind(StrEnum):
    COMPACT = "compact"
    RETAIN = "retain"
    COLLECT = "collect"
    VALIDATE = "validate"
    DELETE = "delete"
    ERASE = "erase"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class JobRequest:
    """`table_id` None: every table. `parameters` is JSON and depends on the kind.

    With `idempotency_key` (and then `principal_id` and `fingerprint`) the same request again is the
    same job, for ever. Without one, a request equal to a job still open (kind, table, parameters,
    dry run) is that job.
    """

    kind: JobKind
    requested_by: str
    table_id: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    principal_id: int | None = None
    idempotency_key: str | None = None
    fingerprint: bytes | None = None


#: In reports: the number of the last attempt that published something, 0 for none.
LAST_FRUITFUL_ATTEMPT: Final = "last_fruitful_attempt"


@dataclass(frozen=True, slots=True)
class Job:
    """`report` is JSON: what the job did (or, as a dry run, would do). `error` is set when it
    failed, or was given back by its last attempt: {code, detail}."""

    job_id: uuid.UUID
    kind: JobKind
    table_id: int | None
    parameters: Mapping[str, Any]
    dry_run: bool
    requested_by: str
    state: JobState
    attempt: int
    created_at: dt.datetime
    started_at: dt.datetime | None = None
    ended_at: dt.datetime | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.state in (JobState.DONE, JobState.FAILED)

    @property
    def fruitless_attempts(self) -> int:
        """How often it was begun since an attempt published something; 1 for the first. One that
        was killed after half of its work is no sign that the job cannot be done."""

        return self.attempt - int(self.report.get(LAST_FRUITFUL_ATTEMPT, 0))


@dataclass(frozen=True, slots=True)
class JobClaim:
    """The right to run a job until its lease ends; `epoch` is the fence of its record."""

    job: Job
    epoch: int
    ttl_s: float


class JobStore(Protocol):
    """All calls raise Unavailable, writes also OutcomeUnknown."""

    async def submit(self, request: JobRequest) -> tuple[Job, bool]:
        """(the job, whether it was there already). Raises IdempotencyConflict."""
        ...

    async def repeated(self, request: JobRequest) -> Job | None:
        """The job that a request with this principal, kind and key made before, asked before
        anything else of the request is judged. Raises IdempotencyConflict."""
        ...

    async def submit_due(self, kind: JobKind, *, every_s: float, requested_by: str) -> Job | None:
        """Submits the periodic job when its time has come, and sets the next time with a jitter of
        up to a tenth: in one transaction, so two schedulers submit it once."""
        ...

    async def claim(
        self, owner: uuid.UUID, *, kinds: Sequence[JobKind], ttl_s: float
    ) -> JobClaim | None:
        """The oldest job that is queued, or whose worker let its lease expire."""
        ...

    async def renew(self, claim: JobClaim, *, ttl_s: float) -> None:
        """Raises LeaseLost."""
        ...

    async def note(self, claim: JobClaim, report: Mapping[str, Any]) -> None:
        """Progress, for whoever looks. Raises LeaseLost."""
        ...

    async def finish(
        self,
        claim: JobClaim,
        report: Mapping[str, Any],
        *,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """Ends the job. Raises LeaseLost."""
        ...

    async def give_back(
        self, claim: JobClaim, *, delay_s: float, error: str, counted: bool = True
    ) -> None:
        """Somebody may try it again after the delay: store or catalog were away. Not `counted`: it
        was no attempt, because the worker was told to stop. Raises LeaseLost."""
        ...

    async def job(self, job_id: uuid.UUID) -> Job | None: ...

    async def jobs(
        self, *, limit: int = 100, before: dt.datetime | None = None, kind: JobKind | None = None
    ) -> Sequence[Job]:
        """Newest first."""
        ...

    async def forget(self, *, older_than_s: float) -> int:
        """Forgets ended jobs without a key that ended so long ago."""
        ...


@dataclass(frozen=True, slots=True)
class JobContext:
    """What a job stands on. `temp_dir` is its own and is removed after it. `engine` is how a caged
    engine is made, for predicates that callers wrote. `note` records progress and raises LeaseLost
    when the job is not ours any more; call it between steps. `inspection` is what the validator
    reads. `cage` is one that the process keeps between jobs."""

    catalog: Catalog
    upkeep: Upkeep
    bus: IngestBus
    store: ObjectStore
    settings: MaintenanceSettings
    engine: EngineSettings
    temp_dir: Path
    clock: Clock
    chance: Chance
    note: Callable[[Mapping[str, Any]], Awaitable[None]]
    inspection: Inspection | None = None
    metrics: Metrics = NO_METRICS
    erasing: Erasing | None = None
    cage: WarmCage | None = None


#: The body of a job; answers its report (JSON).
JobBody = Callable[[JobContext, Job], Awaitable[Mapping[str, Any]]]

_PUBLICATION: Final = uuid.UUID("6b0d6e4f-5f0a-4f1c-9c55-0f6f3ad0de1e")


def publication_of(job_id: uuid.UUID) -> uuid.UUID:
    """The one publication that a job which publishes once (a delete) can make."""

    return uuid.uuid5(_PUBLICATION, job_id.hex)
