"""The snapshot publisher: joins the commits that wait into one publish transaction.

It holds no truth and is never sure to be the only one: the catalog's transaction checks each
commit's lease and epoch, so two publishers can only both be right (C1, C2, B6).

A lost reply is "unknown", not "failed" (C5): before anything else it is read back by the
publication's id; only when that says "it did not happen" is the same publication sent again, under
the same id. When the catalog does not come back, the commits go back to their submitters with
OutcomeUnknown, who give their leases up; if the publish did happen, that finds no lease to give up,
and if it did not, the range is published by somebody else under a newer epoch.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.loop import LoopStatus, OnFatal, RoleLoop
from actors.pacing import Backoff, Linger
from actors.settings import RoleSettings
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock
from lakebus.errors import OutcomeUnknown, RetryLater, Unavailable
from lakebus.telemetry import Metrics, Tracing
from storage.catalog.interface import Catalog, Commit, CommitOutcome, Published

_LOG = logging.getLogger(__name__)

#: The loop looks at itself this often although only submissions give it work.
_IDLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of one commit; `snapshot_id` is the snapshot it was published in."""

    outcome: CommitOutcome
    snapshot_id: int | None


class Publisher(Protocol):
    """What a coordinator asks of a publisher, in its own process or in another one."""

    async def submit(self, commit: Commit) -> Submitted:
        """Publishes the commit with whatever else waits.

        Raises Unavailable when nothing happened, OutcomeUnknown when it may have.
        """
        ...


@dataclass(frozen=True, slots=True)
class PublishReport:
    """One turn: how many commits were joined, and the snapshot they made, if any."""

    commits: int = 0
    snapshot_id: int | None = None
    failed: int = 0


@dataclass(slots=True)
class _Waiting:
    commit: Commit
    answer: asyncio.Future[Submitted]


class SnapshotPublisher:
    """Implements `Publisher` on a catalog."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        tracing: Tracing,
        on_fatal: OnFatal,
        chance: Chance = SYSTEM_CHANCE,
    ) -> None:
        self._chance = chance
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracing
        self._waiting: list[_Waiting] = []
        self._stopping = False
        self._linger = Linger(
            linger_s=settings.linger_ms / 1e3,
            entries_min=settings.linger_entries_min,
            clock=clock,
        )
        self._loop = RoleLoop(
            role="publisher",
            turn=self._turn,
            settings=settings,
            clock=clock,
            metrics=metrics,
            on_fatal=on_fatal,
            chance=chance,
        )

    def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        """Takes nothing new, publishes what waits, and ends. What cannot be published in time goes
        back to its submitters."""

        self._stopping = True
        deadline_s = self._clock.monotonic_s() + self._settings.stop_s_max
        self._loop.wake.set()
        while self._waiting and self._clock.monotonic_s() < deadline_s:
            answers = [waiting.answer for waiting in self._waiting]
            if not self._loop.status().running:
                await self.run_once()
            await asyncio.wait(answers, timeout=deadline_s - self._clock.monotonic_s())
        await self._loop.stop()
        for waiting in self._waiting:
            _refuse(waiting, Unavailable("the publisher is stopping"))
        self._waiting.clear()

    def status(self) -> LoopStatus:
        return self._loop.status()

    @property
    def waiting(self) -> int:
        """Commits submitted and not answered yet."""

        return len(self._waiting)

    async def submit(self, commit: Commit) -> Submitted:
        if self._stopping:
            raise Unavailable("the publisher is stopping", retry_after_s=1.0)
        answer: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(commit, answer))
        self._loop.wake.set()
        return await answer

    async def run_once(self) -> PublishReport:
        """Publishes what waits, as one publication."""

        limit = self._settings.publish_commits_max
        batch = [waiting for waiting in self._waiting[:limit] if not waiting.answer.done()]
        if not batch:
            del self._waiting[:limit]
            return PublishReport()
        self._linger.begin(sum(w.commit.lease.hi - w.commit.lease.lo for w in batch))
        try:
            report = await self._publish_batch(batch)
        except asyncio.CancelledError:
            for waiting in batch:
                _refuse(waiting, OutcomeUnknown("the publisher was stopped while it published"))
            raise
        finally:
            # Last, so that `stop` sees a batch under way as waiting.
            done = {id(waiting) for waiting in batch}
            self._waiting = [waiting for waiting in self._waiting if id(waiting) not in done]
        return report

    async def _turn(self) -> float:
        if not self._waiting:
            return _IDLE_S
        delay_s = self._linger.delay_s()
        if delay_s > 0 and len(self._waiting) < self._settings.publish_commits_max:
            await self._clock.sleep_s(delay_s)
        await self.run_once()
        return 0.0 if self._waiting else _IDLE_S

    async def _publish_batch(self, batch: list[_Waiting]) -> PublishReport:
        commits = [waiting.commit for waiting in batch]
        try:
            published = await self._publish(commits)
        except (RetryLater, OutcomeUnknown) as error:
            for waiting in batch:
                _refuse(waiting, error)
            return PublishReport(commits=len(batch), failed=len(batch))
        except Exception as error:
            if len(batch) > 1:
                _LOG.exception("a publish of %d commits failed; they go one by one", len(batch))
                return await self._publish_apart(batch)
            _refuse(batch[0], error)
            raise
        for waiting in batch:
            if not waiting.answer.done():
                outcome = published.outcomes[waiting.commit.commit_id]
                is_in = outcome is CommitOutcome.PUBLISHED
                waiting.answer.set_result(
                    Submitted(outcome, published.snapshot_id if is_in else None)
                )
        return PublishReport(commits=len(batch), snapshot_id=published.snapshot_id)

    async def _publish_apart(self, batch: list[_Waiting]) -> PublishReport:
        """One commit must not fail its neighbours (A9), so each gets a publication of its own."""

        failed, newest = 0, None
        for waiting in batch:
            try:
                report = await self._publish_batch([waiting])
            except Exception:  # noqa: BLE001 - its submitter has it; the others go on
                failed += 1
            else:
                failed += report.failed
                newest = report.snapshot_id or newest
        return PublishReport(commits=len(batch), snapshot_id=newest, failed=failed)

    async def _publish(self, commits: Sequence[Commit]) -> Published:
        """One publication, tried until it happened or until its attempts are used up."""

        publication_id = self._chance.new_uuid()
        backoff = self._backoff()
        for attempt in range(self._settings.publish_attempts):
            if attempt:
                await self._clock.sleep_s(backoff.fail())
            self._loop.beat()
            began_s = self._clock.monotonic_s()
            try:
                with self._tracing.span("lakebus.publish") as span:
                    # failpoint: publisher.before_publish
                    published = await self._catalog.publish(publication_id, commits)
                    # failpoint: publisher.after_publish
                    span.set("lakebus.snapshot_id", published.snapshot_id or 0)
            except OutcomeUnknown:
                found = await self._read_back(publication_id, backoff)
                self._metrics.count(
                    "lakebus_publish_unknown_total", resolved="absent" if found is None else "found"
                )
                if found is not None:
                    return found
            except RetryLater as error:
                _LOG.warning("a publish could not be sent: %s", error)
            else:
                self._metrics.observe(
                    "lakebus_publish_seconds", self._clock.monotonic_s() - began_s
                )
                self._metrics.observe("lakebus_publish_commits", len(commits))
                return published
        raise Unavailable("the catalog did not take the publish", retry_after_s=1.0)

    async def _read_back(self, publication_id: uuid.UUID, backoff: Backoff) -> Published | None:
        """What became of a publication whose reply was lost (C5). Raises OutcomeUnknown."""

        for _ in range(self._settings.publish_attempts):
            self._loop.beat()
            try:
                # failpoint: publisher.before_read_back
                return await self._catalog.publish_outcome(publication_id)
            except (RetryLater, OutcomeUnknown) as error:
                _LOG.warning("the outcome of a publish could not be read: %s", error)
            await self._clock.sleep_s(backoff.fail())
        self._metrics.count("lakebus_publish_unknown_total", resolved="never")
        raise OutcomeUnknown("the catalog does not tell what became of the publish")

    def _backoff(self) -> Backoff:
        return Backoff(
            first_s=self._settings.backoff_ms / 1e3,
            most_s=self._settings.backoff_ms_max / 1e3,
            clock=self._clock,
            chance=self._chance,
        )


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
