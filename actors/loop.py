"""The one shape of every role's loop: turn, wait for the wake-up or the time, turn again.

A turn is bounded work that returns how long the loop may wait before the next one. It is
crash-only: a turn that keeps failing ends the process, because a fresh process is the one repair
that does not need to know what broke. Absence of store or catalog is not our failure, so it backs
off and only after a long time (a stuck pool) ends the process too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from actors.pacing import Backoff
from actors.settings import RoleSettings
from actors.wake import Wake
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock
from lakebus.errors import OutcomeUnknown, RetryLater
from lakebus.telemetry import Metrics

_LOG = logging.getLogger(__name__)

#: Called with the role's name and the last error when the process should end.
OnFatal = Callable[[str, BaseException], None]
Turn = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """`tick_age_s`: time since the loop last ended a turn or a wait, or showed progress."""

    role: str
    running: bool
    turns: int
    failures: int
    tick_age_s: float


async def run_steps(
    role: str,
    steps: Sequence[tuple[str, Callable[[], Awaitable[None]]]],
    *,
    failing: Collection[str],
) -> list[str]:
    """Runs steps that do not depend on each other, so that one that cannot be done now does not
    hold up the others. Answers the names of those that have to wait; which is told once, not at
    each turn. Raises what is not absence of store, catalog or crew."""

    waiting = []
    for name, step in steps:
        try:
            await step()
        except (RetryLater, OutcomeUnknown) as error:
            waiting.append(name)
            if name not in failing:
                _LOG.warning("the %s's step %s has to wait: %s", role, name, error)
    return waiting


class RoleLoop:
    def __init__(
        self,
        *,
        role: str,
        turn: Turn,
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        on_fatal: OnFatal,
        chance: Chance = SYSTEM_CHANCE,
    ) -> None:
        self.wake = Wake()
        self._role = role
        self._turn = turn
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._backoff = Backoff(
            first_s=settings.backoff_ms / 1e3,
            most_s=settings.backoff_ms_max / 1e3,
            clock=clock,
            chance=chance,
        )
        self._task: asyncio.Task[None] | None = None
        self._turns = 0
        self._ticked_s = clock.monotonic_s()

    def start(self) -> None:
        """Starts the loop; starting it again changes nothing."""

        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=self._role)

    async def stop(self) -> None:
        """Ends the loop, cancelling the turn it is in."""

        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def beat(self) -> None:
        """Shows progress inside a long turn."""

        self._ticked_s = self._clock.monotonic_s()

    def status(self) -> LoopStatus:
        return LoopStatus(
            role=self._role,
            running=self._task is not None and not self._task.done(),
            turns=self._turns,
            failures=self._backoff.failures,
            tick_age_s=self._clock.monotonic_s() - self._ticked_s,
        )

    async def _run(self) -> None:
        while True:
            try:
                wait_s = await self._turn()
            except Exception as error:  # noqa: BLE001 - crash-only: counted, and fatal in a row
                # Not cut short by wake-ups: hints must not hammer what is failing.
                await self._clock.sleep_s(self._failed(error))
            else:
                self._backoff.succeed()
                self._turns += 1
                self._ticked_s = self._clock.monotonic_s()
                await (self.wake.wait(wait_s) if wait_s > 0 else asyncio.sleep(0))
            self._ticked_s = self._clock.monotonic_s()

    def _failed(self, error: Exception) -> float:
        self._metrics.count("lakebus_role_failures_total", role=self._role)
        absent = isinstance(error, RetryLater | OutcomeUnknown)
        wait_s = self._backoff.fail()
        if self._backoff.worth_telling():
            cause = None if absent else error
            _LOG.warning("a turn of %s failed: %s", self._role, error, exc_info=cause)
        hopeless = (
            self._backoff.failing_for_s() > self._settings.unavailable_s_max
            if absent
            else self._backoff.failures >= self._settings.failures_max
        )
        if hopeless:
            self._on_fatal(self._role, error)
        return wait_s
