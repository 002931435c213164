"""The commit coordinator: claims a range, stages its files, proposes the commit.

It holds no truth: the range is fenced by its lease's epoch inside the publish transaction, files
have names never used before, and whatever is dropped half done is done again by whoever claims the
range next. So any number of coordinators may run, be paused, or be killed at any point.

How a range ends, and why nothing is condemned for our faults (B7, B8):

* published, or found to be somebody else's by now (LeaseLost): nothing more to do, a file that
  nobody published stays an orphan for the collector;
* store or catalog away, cancellation, intent lost, an unsound encoder: released, not counted;
* anything unexpected: given back as failed, which halves the range at the next attempt;
* stuck for `hold_ttls_max` lease times: the lease is left to expire and the process ends, because a
  thread that spins in native code cannot be stopped in any other way.

Ranges overlap: while one is being published the next is claimed and written. One claim follows the
last at once unless there is load; then a linger lets ranges grow, the longer the more a round of
claims costs, and a round is published as one, so that a flood makes few files and few snapshots.
Only a range that has failed before goes alone: whatever ends the process with it must not be held
against another one, which could then be set aside although nothing is wrong with it (B8).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from actors.brake import FilesBrake
from actors.lease_keeper import LeaseKeeper
from actors.lease_manager import Leases
from actors.loop import LoopStatus, OnFatal, RoleLoop, Turn
from actors.pacing import Backoff, ClaimPace, Linger
from actors.publisher import Publisher, Submitted
from actors.range_files import reason_of
from actors.rounds import Round
from actors.settings import RoleSettings
from actors.staging import EncoderUnsound, Staged, Stager
from actors.wake import Wake
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock
from lakebus.errors import LeaseLost, OutcomeUnknown, RetryLater
from lakebus.telemetry import Metrics, Tracing
from storage.bus.interface import Claim, ClaimedSegment, IngestBus, LeaseRef
from storage.catalog.interface import Commit, CommitOutcome
from storage.files.objects import ObjectExists

_LOG = logging.getLogger(__name__)

#: Waiting after a refused quarantine: somebody has to look, and the alarm is already out.
_QUARANTINE_STOPPED_DELAY_S = 5.0
_NACK_DELAY_S, _NACK_DELAY_TTLS_MAX = 0.1, 1 / 8
#: So long, or for a pause, a range that is written waits for the others of its round.
_GATHERING_S = 0.1


class RangeEnd(StrEnum):
    PUBLISHED = "published"
    RELEASED = "released"
    FAILED = "failed"
    LEASE_LOST = "lease_lost"
    INTENT_LOST = "intent_lost"
    QUARANTINE_STOPPED = "quarantine_stopped"
    STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class RangeReport:
    """What became of one claimed range."""

    end: RangeEnd
    lease: LeaseRef
    entries: int = 0
    rows: int = 0
    files: int = 0
    quarantined: int = 0
    snapshot_id: int | None = None
    error: str | None = None


class CommitCoordinator:
    def __init__(
        self,
        *,
        instance: uuid.UUID,
        leases: Leases,
        bus: IngestBus,
        stager: Stager,
        publisher: Publisher,
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        tracing: Tracing,
        on_fatal: OnFatal,
        chance: Chance = SYSTEM_CHANCE,
        brake: FilesBrake | None = None,
    ) -> None:
        self._chance = chance
        self._instance = instance
        self._leases = leases
        self._bus = bus
        self._stager = stager
        self._publisher = publisher
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracing
        self._on_fatal = on_fatal
        self._keeper = LeaseKeeper(leases=leases, settings=settings, clock=clock)
        self._tasks: set[asyncio.Task[RangeReport]] = set()
        self._asking: asyncio.Task[Claim | None] | None = None
        self._writing: set[int] = set()
        self._freed = Wake()
        self._alone = False
        self._unsound = 0
        self._linger = Linger(
            linger_s=settings.linger_ms / 1e3,
            entries_min=settings.linger_entries_min,
            clock=clock,
            load_s_max=settings.linger_ms_load / 1e3,
        )
        self._round = Round()
        self._round.close()
        self._pace = ClaimPace(
            shards=bus.shards,
            linger=self._linger,
            entries_large=settings.range_entries_large,
            bytes_large=settings.range_bytes_large,
        )
        self._backoff = Backoff(
            first_s=settings.backoff_ms / 1e3,
            most_s=settings.backoff_ms_max / 1e3,
            clock=clock,
            chance=chance,
        )
        self._claims = self._make_loop("coordinator", self._turn)
        self._renewals = self._make_loop("lease_keeper", self._renew)
        self._brakes: RoleLoop | None = None
        if brake is not None:
            self._brakes = self._make_loop("brake", lambda: brake.look(self._linger))

    async def start(self) -> None:
        """Warms the encoder up and begins to claim. Raises EncoderUnsound."""

        await self._stager.warm_up()
        self._claims.start()
        self._renewals.start()
        if self._brakes is not None:
            self._brakes.start()

    def wake(self) -> None:
        """A hint that there is something to claim."""

        self._claims.wake.set()

    async def stop(self) -> None:
        """Claims nothing new, ends what is under way if that is quick, and gives back the rest."""

        await self._claims.stop()
        self._round.close()
        if self._brakes is not None:
            await self._brakes.stop()
        await self._give_back_unseen()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._settings.stop_s_max)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._renewals.stop()
        self._stager.close()

    def status(self) -> LoopStatus:
        return max(
            self._claims.status(), self._renewals.status(), key=lambda status: status.tick_age_s
        )

    async def run_once(self) -> RangeReport | None:
        """One range from claim to end; None when nothing can be claimed."""

        claimed = await self._claim()
        return None if claimed is None else await self._carry(*claimed)

    async def _turn(self) -> float:
        if self._is_full():
            await self._freed.wait(self._poll_s)
            return 0.0
        delay_s = max(self._pace.delay_s(), self._backoff.delay_s())
        if delay_s > 0:
            await self._clock.sleep_s(delay_s)
        claimed = await self._claim()
        if claimed is None:
            self._round.close()
            return self._poll_s
        self._alone = claimed[0].attempt > 0
        if self._alone and self._tasks:
            await self._postpone(claimed[0])
            return 0.0
        self._begin(*claimed)
        # With nothing else there, a hint says when there is; the poll finds what hints miss.
        return 0.0 if claimed[0].more else self._poll_s

    def _is_full(self) -> bool:
        """Ranges that wait to be published hold no rows any more, so they count apart."""

        if self._alone:
            return bool(self._tasks)
        most = self._settings.ranges_in_flight
        return len(self._writing) >= most or len(self._tasks) >= most + self._bus.shards

    def _begin(self, claim: Claim, asked_at_s: float) -> None:
        """Works on a claimed range in a task of its own, as one of the round."""

        if self._round.closed:
            self._round = Round()
        joined, lease_id = self._round, claim.lease.lease_id
        joined.join(lease_id)
        joined.loaded = joined.loaded or self._linger.loaded()
        self._writing.add(lease_id)
        if self._alone or self._pace.over:
            joined.close()
        work = self._carry(claim, asked_at_s, joined)
        task = asyncio.get_running_loop().create_task(work, name="range")
        self._tasks.add(task)

        def ended(task: asyncio.Task[RangeReport]) -> None:
            self._tasks.discard(task)
            self._written(lease_id, joined)

        task.add_done_callback(ended)

    def _written(self, lease_id: int, joined: Round) -> None:
        """The range is written, or has ended; once more changes nothing."""

        self._writing.discard(lease_id)
        self._freed.set()
        joined.leave(lease_id)

    async def _give_back_unseen(self) -> None:
        """Ends the claim that was under way when the loop was stopped, and gives its range back."""

        asking, self._asking = self._asking, None
        if asking is None:
            return
        await asyncio.wait([asking], timeout=self._settings.stop_s_max)
        if not asking.done():
            asking.cancel()
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
        if isinstance(answer, Claim):
            await self._give_back(answer, RangeEnd.RELEASED, "the coordinator was stopped")

    async def _postpone(self, claim: Claim) -> None:
        """Gives a range back that must go alone, for whoever has nothing else under way."""

        self._keeper.drop(claim.lease)
        self._count(await self._give_back(claim, RangeEnd.RELEASED, "it must go alone"))

    async def _renew(self) -> float:
        await self._keeper.run_once()
        return self._keeper.next_due_s()

    async def _claim(self) -> tuple[Claim, float] | None:
        asked_at_s = self._clock.monotonic_s()
        # failpoint: coordinator.before_claim
        # A task of its own: a stop that comes meanwhile would leave a lease that nobody knows of.
        asking = asyncio.get_running_loop().create_task(
            self._leases.acquire(self._instance), name="claim"
        )
        self._asking = asking
        claim = await asyncio.shield(asking)
        self._asking = None
        if claim is None:
            self._pace.nothing_claimed()
            return None
        # failpoint: coordinator.after_claim
        self._keeper.hold(claim, asked_at_s=asked_at_s)
        self._renewals.wake.set()
        entries = claim.lease.hi - claim.lease.lo
        self._pace.claimed(claim.lease.shard, entries, more=claim.more)
        return claim, asked_at_s

    async def _carry(
        self, claim: Claim, asked_at_s: float, joined: Round | None = None
    ) -> RangeReport:
        """Works on a claimed range until it has ended, in whatever way."""

        lease = claim.lease
        spent_s = self._clock.monotonic_s() - asked_at_s
        try:
            async with asyncio.timeout(self._settings.hold_s(claim.ttl_s) - spent_s):
                report = await self._work(claim, joined)
        except asyncio.CancelledError:
            await self._give_back(claim, RangeEnd.RELEASED, "the coordinator was stopped")
            raise
        except LeaseLost as error:
            report = RangeReport(RangeEnd.LEASE_LOST, lease, error=str(error))
            await self._leases.forget(lease)
        except TimeoutError as error:
            report = self._stuck(claim, error)
        except (RetryLater, OutcomeUnknown, ObjectExists) as error:
            self._backoff.fail()
            if self._backoff.worth_telling():
                _LOG.warning("a range of shard %d is given back: %s", lease.shard, error)
            report = await self._give_back(claim, RangeEnd.RELEASED, str(error))
        except EncoderUnsound as error:
            report = await self._give_back_unsound(claim, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted and isolated
            _LOG.exception("a range of shard %d failed", lease.shard)
            report = await self._give_back(claim, RangeEnd.FAILED, reason_of(error))
        finally:
            self._keeper.drop(lease)
        self._count(report)
        return report

    async def _work(self, claim: Claim, joined: Round | None) -> RangeReport:
        lease = claim.lease
        attributes = {"lakebus.shard": lease.shard, "lakebus.lo": lease.lo, "lakebus.hi": lease.hi}
        with self._tracing.span("lakebus.range", attributes=attributes) as span:
            # Before the canary: bytes that the store does not give are no fault of the entry (B8).
            segments = await self._segments(claim)
            # failpoint: coordinator.after_read
            if lease.hi - lease.lo == 1 and claim.attempt > 0 and not claim.doomed:
                await self._stager.prove()
                await self._leases.note_canary(lease)
                # failpoint: coordinator.after_canary
            self._pace.note_bytes(sum(sum(s.entry_bytes) for s in segments))
            stage = self._stager.set_aside if claim.doomed else self._stager.stage
            staged = await stage(claim, segments)
            # failpoint: coordinator.after_stage
            del segments  # its rows are not kept for as long as it waits
            if joined is not None:
                self._written(lease.lease_id, joined)
                if joined.loaded:
                    await joined.gathered(max(self._linger.pause_s, _GATHERING_S))
            submitted = await self._submit(claim, staged)
            # failpoint: coordinator.after_submit
            span.set("lakebus.snapshot_id", submitted.snapshot_id or 0)
        return await self._conclude(claim, staged, submitted)

    async def _segments(self, claim: Claim) -> Sequence[ClaimedSegment]:
        return await self._bus.read(claim) if claim.brought is None else (claim.brought,)

    async def _submit(self, claim: Claim, staged: Staged) -> Submitted:
        if not self._keeper.trusted(claim.lease) and not await self._keeper.confirm(claim.lease):
            raise LeaseLost("the lease was reclaimed while its files were written")
        # failpoint: coordinator.before_submit
        return await self._publisher.submit(
            Commit(
                commit_id=self._chance.new_uuid(),
                lease=claim.lease,
                files=staged.files,
                range_bytes=staged.range_bytes,
                owner=self._instance,
                quarantined=staged.quarantined,
            )
        )

    async def _conclude(self, claim: Claim, staged: Staged, submitted: Submitted) -> RangeReport:
        outcome = submitted.outcome
        if outcome is CommitOutcome.LEASE_LOST:
            raise LeaseLost("the lease was reclaimed before its commit was published")
        if outcome is CommitOutcome.INTENT_LOST:
            return await self._give_back(claim, RangeEnd.INTENT_LOST, "a write intent expired")
        if outcome is CommitOutcome.QUARANTINE_STOPPED:
            self._metrics.count("lakebus_quarantine_stopped_total")
            return await self._give_back(
                claim, RangeEnd.QUARANTINE_STOPPED, staged.quarantined[0].reason
            )
        await self._leases.forget(claim.lease)
        self._backoff.succeed()
        self._unsound = 0
        for entry in staged.quarantined:
            self._metrics.count(
                "lakebus_quarantined_entries_total", cause="crash" if entry.by_crash else "verdict"
            )
        return RangeReport(
            RangeEnd.PUBLISHED,
            claim.lease,
            entries=staged.entries,
            rows=staged.rows,
            files=len(staged.files),
            quarantined=len(staged.quarantined),
            snapshot_id=submitted.snapshot_id,
        )

    async def _give_back(self, claim: Claim, end: RangeEnd, error: str) -> RangeReport:
        """Returns the range: counted when it failed, not counted otherwise (B7)."""

        lease = claim.lease
        try:
            if end is RangeEnd.FAILED:
                await self._leases.nack(lease, error=error, delay_s=_nack_delay_s(claim))
            elif end is RangeEnd.QUARANTINE_STOPPED:
                _LOG.error("quarantine has stopped; shard %d waits at %d", lease.shard, lease.lo)
                await self._leases.nack(lease, error=error, delay_s=_QUARANTINE_STOPPED_DELAY_S)
            else:
                await self._leases.release(lease)
        except LeaseLost:
            end = RangeEnd.LEASE_LOST
            await self._leases.forget(lease)
        except (RetryLater, OutcomeUnknown) as failure:  # it will expire by itself
            _LOG.warning("lease %d could not be given back: %s", lease.lease_id, failure)
        return RangeReport(end, lease, error=error)

    async def _give_back_unsound(self, claim: Claim, error: EncoderUnsound) -> RangeReport:
        self._backoff.fail()
        self._unsound += 1
        report = await self._give_back(claim, RangeEnd.RELEASED, str(error))
        if self._unsound >= self._settings.failures_max:
            self._on_fatal("coordinator", error)
        return report

    def _stuck(self, claim: Claim, error: TimeoutError) -> RangeReport:
        lease = claim.lease
        text = f"shard {lease.shard} {lease.lo}..{lease.hi} was worked on for too long"
        self._on_fatal("coordinator", error)
        return RangeReport(RangeEnd.STUCK, lease, error=text)

    def _count(self, report: RangeReport) -> None:
        self._metrics.count("lakebus_ranges_ended_total", outcome=report.end.value)
        if report.end is RangeEnd.PUBLISHED:
            self._metrics.count("lakebus_published_entries_total", report.entries)
            self._metrics.count("lakebus_published_rows_total", report.rows)

    @property
    def _poll_s(self) -> float:
        return self._settings.claim_poll_ms / 1e3

    def _make_loop(self, role: str, turn: Turn) -> RoleLoop:
        return RoleLoop(
            role=role,
            turn=turn,
            settings=self._settings,
            clock=self._clock,
            metrics=self._metrics,
            on_fatal=self._on_fatal,
            chance=self._chance,
        )


def _nack_delay_s(claim: Claim) -> float:
    doubled = _NACK_DELAY_S * 2.0 ** min(claim.attempt, 10)
    return min(doubled, claim.ttl_s * _NACK_DELAY_TTLS_MAX)
