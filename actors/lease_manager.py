"""The lease manager: asks the bus for ranges for coordinators, and speaks for their leases.

It holds no truth. A lease is a row in the control plane, fenced by its epoch; what is remembered
here only lets a clean stop give everything back at once. So any number of managers may run, and
one that starts anew renews leases it has never seen, because each call names lease and epoch.

Renewal is asked for by whoever works under the lease (`actors.lease_keeper`), never done on its
own: a manager that renewed for a dead coordinator would keep its range from everybody for ever.
Renewals that arrive together travel as one statement.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lakebus.errors import LeaseLost, OutcomeUnknown, RetryLater
from lakebus.telemetry import Metrics
from storage.bus.interface import Claim, IngestBus, LeaseRef

_LOG = logging.getLogger(__name__)


class Leases(Protocol):
    """What a coordinator asks of a lease manager, in its own process or in another one."""

    async def acquire(self, owner: uuid.UUID) -> Claim | None:
        """The next range for `owner`, or None (B1-B3)."""
        ...

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        """Extends the leases that are still held, and returns those (B4)."""
        ...

    async def release(self, lease: LeaseRef) -> None:
        """Gives the range back, not counted (B7). Raises LeaseLost."""
        ...

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        """Gives the range back as failed (B8). Raises LeaseLost."""
        ...

    async def note_canary(self, lease: LeaseRef) -> None:
        """Tells that the worker under this lease works (B8). Raises LeaseLost."""
        ...

    async def forget(self, lease: LeaseRef) -> None:
        """The lease has ended by publishing, or was lost."""
        ...


@dataclass(frozen=True, slots=True)
class StopReport:
    released: int
    lost: int
    unreachable: int


class LeaseManager:
    """Implements `Leases` on a bus."""

    def __init__(self, *, bus: IngestBus, metrics: Metrics) -> None:
        self._bus = bus
        self._metrics = metrics
        self._held: dict[tuple[int, int], LeaseRef] = {}
        self._waiting: list[tuple[LeaseRef, asyncio.Future[bool]]] = []
        self._renewer: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def held(self) -> tuple[LeaseRef, ...]:
        return tuple(self._held.values())

    async def acquire(self, owner: uuid.UUID) -> Claim | None:
        if self._stopping:
            return None
        claim = await self._bus.claim(owner)
        if claim is None:
            return None
        # failpoint: lease_manager.after_claim
        if self._stopping:  # it stopped while the claim was under way
            await self._bus.release(claim.lease)
            return None
        self._held[_key(claim.lease)] = claim.lease
        self._metrics.count("lakebus_ranges_claimed_total", attempt=str(min(claim.attempt, 9)))
        self._metrics.gauge("lakebus_leases_held_count", len(self._held))
        return claim

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        loop = asyncio.get_running_loop()
        asked = [(lease, loop.create_future()) for lease in leases]
        self._waiting += asked
        if self._renewer is None:
            # A task of its own: a caller that is cancelled must not take its neighbours along.
            self._renewer = loop.create_task(self._renew_waiting(), name="renewals")
        results = await asyncio.gather(*(future for _, future in asked))
        return [lease for lease, is_held in zip(leases, results, strict=True) if is_held]

    async def release(self, lease: LeaseRef) -> None:
        # failpoint: lease_manager.before_release
        await self._bus.release(lease)
        self._drop(lease)

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        await self._bus.nack(lease, error=error, delay_s=delay_s)
        self._drop(lease)

    async def note_canary(self, lease: LeaseRef) -> None:
        await self._bus.note_canary(lease)

    async def forget(self, lease: LeaseRef) -> None:
        self._drop(lease)

    async def stop(self) -> StopReport:
        """Gives no more ranges out and gives every lease back at once (B7)."""

        self._stopping = True
        released = lost = unreachable = 0
        for lease in self.held:
            try:
                await self.release(lease)
                released += 1
            except LeaseLost:
                self._drop(lease)
                lost += 1
            except (RetryLater, OutcomeUnknown) as error:  # it will expire by itself
                _LOG.warning("lease %d could not be given back: %s", lease.lease_id, error)
                unreachable += 1
        return StopReport(released=released, lost=lost, unreachable=unreachable)

    async def _renew_waiting(self) -> None:
        """Renews what has been asked for, in rounds: what arrives during one goes with the next."""

        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    # failpoint: lease_manager.before_renew
                    still = {_key(x) for x in await self._bus.renew([x for x, _ in batch])}
                except Exception as error:  # noqa: BLE001 - raised again in each caller
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                else:
                    self._settle(batch, still)
        finally:
            self._renewer = None

    def _settle(
        self, batch: list[tuple[LeaseRef, asyncio.Future[bool]]], still: set[tuple[int, int]]
    ) -> None:
        for lease, future in batch:
            if _key(lease) not in still:
                self._drop(lease)
                self._metrics.count("lakebus_leases_lost_total")
            if not future.done():
                future.set_result(_key(lease) in still)

    def _drop(self, lease: LeaseRef) -> None:
        self._held.pop(_key(lease), None)
        self._metrics.gauge("lakebus_leases_held_count", len(self._held))


def _key(lease: LeaseRef) -> tuple[int, int]:
    return lease.lease_id, lease.epoch
