"""The lease keeper: what one coordinator works under, and until when it may believe in it.

It asks for renewal at a third of the lease time, from a task of its own that Parquet encoding,
which runs in threads, cannot hold up. Between renewals it believes in a lease only until a local
deadline that lies before the database's: counted by the monotonic clock from *before* the call was
sent, and cut by a tenth. A wrong wall clock changes nothing (B5), and a paused process wakes up in
doubt. Belief only saves work; the fence is the epoch, checked in each transaction (B6).

A lease is renewed only while somebody may still finish: after `hold_ttls_max` lease times the
worker is taken to be stuck, and the lease is left to expire, so that one poison entry delays its
shard by a bounded time even if it makes an encoder spin for ever (B8).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from actors.lease_manager import Leases
from actors.settings import RoleSettings
from lakebus.clock import Clock
from storage.bus.interface import Claim, LeaseRef

_LOG = logging.getLogger(__name__)

_RENEW_AT = 1 / 3
_TRUST = 0.9
_IDLE_S = 5.0


@dataclass(slots=True)
class _Held:
    lease: LeaseRef
    ttl_s: float
    hold_until_s: float
    renew_at_s: float
    trusted_until_s: float


@dataclass(frozen=True, slots=True)
class RenewalReport:
    renewed: int = 0
    lost: int = 0
    given_up: int = 0


class LeaseKeeper:
    def __init__(self, *, leases: Leases, settings: RoleSettings, clock: Clock) -> None:
        self._leases = leases
        self._settings = settings
        self._clock = clock
        self._held: dict[tuple[int, int], _Held] = {}

    def hold(self, claim: Claim, *, asked_at_s: float) -> None:
        """Begins to keep a lease that was asked for at `asked_at_s` (monotonic)."""

        self._held[_key(claim.lease)] = _Held(
            lease=claim.lease,
            ttl_s=claim.ttl_s,
            hold_until_s=asked_at_s + self._settings.hold_s(claim.ttl_s),
            renew_at_s=asked_at_s + claim.ttl_s * _RENEW_AT,
            trusted_until_s=asked_at_s + claim.ttl_s * _TRUST,
        )

    def drop(self, lease: LeaseRef) -> None:
        self._held.pop(_key(lease), None)

    def holds(self, lease: LeaseRef) -> bool:
        """False once a renewal said that the lease is gone."""

        return _key(lease) in self._held

    def trusted(self, lease: LeaseRef) -> bool:
        held = self._held.get(_key(lease))
        return held is not None and self._clock.monotonic_s() < held.trusted_until_s

    def next_due_s(self) -> float:
        """How long until `run_once` has something to do."""

        if not self._held:
            return _IDLE_S
        due = min(held.renew_at_s for held in self._held.values())
        return min(_IDLE_S, max(0.0, due - self._clock.monotonic_s()))

    async def run_once(self) -> RenewalReport:
        """Renews what is due."""

        now = self._clock.monotonic_s()
        stuck = [h for h in self._held.values() if h.renew_at_s <= now and h.hold_until_s <= now]
        for held in stuck:
            held.renew_at_s = math.inf
            _LOG.error("lease %d is held too long and not renewed", held.lease.lease_id)
        due = [held for held in self._held.values() if held.renew_at_s <= now]
        lost = await self._renew(due) if due else 0
        return RenewalReport(renewed=len(due) - lost, lost=lost, given_up=len(stuck))

    async def confirm(self, lease: LeaseRef) -> bool:
        """Renews one lease now and tells whether it is still held."""

        held = self._held.get(_key(lease))
        return held is not None and await self._renew([held]) == 0

    async def _renew(self, due: list[_Held]) -> int:
        now = self._clock.monotonic_s()
        for held in due:  # if this call fails, the next try comes soon
            held.renew_at_s = now + held.ttl_s * _RENEW_AT / 4
        still = {_key(lease) for lease in await self._leases.renew([h.lease for h in due])}
        lost = 0
        for held in due:
            if _key(held.lease) in still:
                held.renew_at_s = now + held.ttl_s * _RENEW_AT
                held.trusted_until_s = now + held.ttl_s * _TRUST
            else:
                lost += 1
                self.drop(held.lease)
        return lost


def _key(lease: LeaseRef) -> tuple[int, int]:
    return lease.lease_id, lease.epoch
