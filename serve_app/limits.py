"""What one principal may take of a server, so that others get their share.

Quotas (requests and bytes a second) are the operator's choice: the settings', or a key's own. They
are counted by this process alone, without asking anybody: a replica allows its part of a quota, the
quota divided by the number of replicas. Keys without a quota of their own share their principal's.

Shares need no choice and are always kept: places for requests in this process, for work at the door
(`ingest_turn`) and in the SQL engine (`party`), and bytes of bodies (`limits_bytes`).

A refusal for a quota names a time after which the same request passes, if nothing else of the
principal was sent meanwhile. Nothing is counted for a request that was refused. The replay of a
request that was accepted before is answered, not refused (A3): keys are looked up before a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass

from lakebus.clock import Clock, SystemClock
from lakebus.errors import RateLimited, Unavailable
from serve_app.limits_bytes import Known
from serve_app.limits_rates import Buckets, Rate
from storage.ingesting.grants import Principal
from storage.turns import Party, Turns

_RETRY_AFTER_S = 1.0
_UNITS = {"requests_per_s": "requests", "ingest_bytes_per_s": "bytes of rows"}


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What an operator tunes; see the settings of section `limits`. Quotas of 0 are none.
    `requests_all`: how many requests the process is given at a time. `replicas`: among how many
    processes a quota is divided."""

    requests_per_s: float = 0.0
    ingest_bytes_per_s: float = 0.0
    burst_s: float = 2.0
    queries_at_once: int = 0
    requests_at_once: int = 224
    requests_all: int = 256
    ingest_at_once: int = 8
    presence_s: float = 1.0
    replicas: int = 1


class Admission:
    """One a process, on its event loop."""

    def __init__(
        self, settings: LimitSettings | None = None, *, clock: Clock | None = None
    ) -> None:
        self._settings = settings or LimitSettings()
        self._clock = clock or SystemClock()
        self._buckets = Buckets()
        self._present: dict[int, int] = {}
        self._turns = Turns(
            "ingest_requests",
            places=self._settings.ingest_at_once,
            alone=self._settings.requests_all,
            waiting_max=self._settings.requests_all,
            memory_s=self._settings.presence_s,
            clock=self._clock,
        )

    # --- requests ------------------------------------------------------------------------------

    def enter(self, principal: Principal, *, judged_later: bool = False) -> RateLimited | None:
        """Counts a request; `leave` ends it. Raises RateLimited; what a quota says is given back
        instead when it is `judged_later`, by who can tell whether it is a replay."""

        present = self._present.get(principal.principal_id, 0)
        most = self._settings.requests_at_once
        if present >= most:
            raise RateLimited(
                f"{present} requests of yours are being answered by this server, which is as many "
                "as one principal may have; send fewer at a time",
                retry_after_s=_RETRY_AFTER_S,
                limit="requests_at_once",
                limit_value=most,
            )
        refusal = None
        try:
            self._take("requests_per_s", principal, 1)
        except RateLimited as error:
            if not judged_later:
                raise
            refusal = error
        self._present[principal.principal_id] = present + 1
        return refusal

    def leave(self, principal: Principal) -> None:
        left = self._present[principal.principal_id] - 1
        if left:
            self._present[principal.principal_id] = left
        else:
            del self._present[principal.principal_id]

    # --- bodies --------------------------------------------------------------------------------

    def counts_bytes(self, principal: Principal) -> bool:
        """True when the principal has a quota of bytes."""

        return self._per_s("ingest_bytes_per_s", principal) > 0

    def allowance(self, principal: Principal, *, known: Known | None = None) -> Allowance:
        """What one body of rows may take of the quota of bytes. `known` says whether the request
        was accepted before; asked before it is refused."""

        return Allowance(self, principal, known)

    def take_bytes(self, principal: Principal, count: int, *, begun: bool) -> None:
        """A body that was begun is not cut short: what it has more is owed. Raises RateLimited."""

        self._take("ingest_bytes_per_s", principal, count, owed=begun)

    # --- turns ---------------------------------------------------------------------------------

    def ingest_turn(self, principal: Principal, deadline_s: float) -> IngestTurn:
        """A place to decode and append, while its block lasts. Raises RateLimited, Unavailable."""

        return IngestTurn(self._turns, Party(principal.principal_id), deadline_s)

    def party(self, principal: Principal) -> Party:
        """How this principal queues for the SQL engine."""

        own = principal.quotas.queries_at_once
        most = self._settings.queries_at_once if own is None else own
        return Party(principal.principal_id, most or None)

    # --- quotas --------------------------------------------------------------------------------

    def _take(self, name: str, principal: Principal, units: int, *, owed: bool = False) -> None:
        per_s = self._per_s(name, principal)
        if not per_s:
            return
        own = getattr(principal.quotas, name)
        key = (name, principal.principal_id, "" if own is None else principal.key_id)
        share = per_s / self._settings.replicas
        rate = Rate(share, share * self._settings.burst_s)
        now_s = self._clock.monotonic_s()
        wait_ms = 0 if owed else self._buckets.wait_ms(key, rate, units, now_s)
        if wait_ms > 0:
            raise self._over(name, per_s, wait_ms)
        self._buckets.take(key, rate, units, now_s)

    def _per_s(self, name: str, principal: Principal) -> float:
        """The key's own quota, or the settings'; 0 is none."""

        own: float | None = getattr(principal.quotas, name)
        found: float = getattr(self._settings, name) if own is None else own
        return found

    def _over(self, name: str, per_s: float, wait_ms: int) -> RateLimited:
        replicas = self._settings.replicas
        shared = f", of which this one of {replicas} servers allows its part" * (replicas > 1)
        return RateLimited(
            f"the quota of {per_s:g} {_UNITS[name]} a second is used up{shared}; send it again "
            f"after {wait_ms} ms, nothing was done",
            retry_after_s=wait_ms / 1000,
            limit=name,
            limit_value=per_s,
            replicas=replicas,
            retry_after_ms=wait_ms,
        )


class IngestTurn:
    """What `async with` takes and gives; a generator took four times as long."""

    __slots__ = ("_deadline_s", "_party", "_turns")

    def __init__(self, turns: Turns, party: Party, deadline_s: float) -> None:
        self._turns = turns
        self._party = party
        self._deadline_s = deadline_s

    async def __aenter__(self) -> None:
        try:
            await self._turns.take(self._party, self._deadline_s)
        except TimeoutError:
            raise Unavailable(
                "timeout_ms ran out while other requests had their turn; nothing was stored",
                phase="queue",
            ) from None

    async def __aexit__(self, *_: object) -> None:
        self._turns.give(self._party)


class Allowance:
    """One body's part of a quota: what it takes is counted as it comes."""

    def __init__(self, admission: Admission, principal: Principal, known: Known | None) -> None:
        self._admission = admission
        self._principal = principal
        self._known = known
        self._taken = 0
        self._replay = False

    async def grow_to(self, total: int) -> None:
        """Raises RateLimited, for the first bytes of a body only, and what looking up the key
        raises."""

        more = total - self._taken
        if more <= 0 or self._replay:
            return
        try:
            self._admission.take_bytes(self._principal, more, begun=self._taken > 0)
        except RateLimited:
            if self._known is None or not await self._known():
                raise
            self._replay = True
        self._taken = total
