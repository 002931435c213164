"""The roles as Ray actors: the one file that makes a class remote.

An actor is a thin shell around `RoleHost`. Ray places it and restarts it; PostgreSQL holds all
truth, and the epoch of each lease is the fence, so two living actors of one name are no harm.

* The constructor starts everything, because a restart runs nothing else.
* Methods of the group `ctl` have a loop of their own and answer while the work loop is busy.
* A thread watches the work loop and ends the process when it stands still: a blocked loop cannot
  end itself, and in the placement `together` there is nobody else to see it.
* An actor is told where a settings file is, never a secret.

Who revives whom: Ray restarts every actor; the supervisor creates what is missing and replaces what
stands still; whoever runs the stack calls `tend`, which does the same for the root (`core`, or the
supervisor). No step needs memory of the past.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import ray

from actors.backend import Backend, load_factory
from actors.handles import (
    ActorAddress,
    LeaseManagerHandle,
    Ping,
    PublisherHandle,
    RoleHandle,
    create_actor,
    living,
)
from actors.job_runner import RayJobRunner
from actors.publisher import Submitted
from actors.ray_metrics import RayMetrics
from actors.role_host import RoleHost
from actors.roles import Role
from actors.runtime_settings import CORE, RuntimeSettings
from actors.supervisor import Crew, NoCrew, RoleState
from lakebus.errors import (
    ConfigurationError,
    LakebusError,
    OutcomeUnknown,
    RetryLater,
    StartRefused,
    Unavailable,
)
from lakebus.telemetry import configure_logging
from storage.arrow_alone import leave_pandas_out
from storage.bus.interface import Claim, LeaseRef
from storage.catalog.interface import Commit

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_EXIT_FATAL, _EXIT_STANDING_STILL = 70, 71
_OPEN_RETRY_S = 0.5
_PING_TIMEOUT_S = 5.0
_READY_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """One actor as an operator sees it; `ping` is None when it does not answer."""

    role: str
    version: str
    ping: Ping | None


@dataclass(frozen=True, slots=True)
class RunningActors:
    """The actors of a stack, all ready."""

    settings: RuntimeSettings
    statuses: tuple[ActorStatus, ...]


@ray.remote(concurrency_groups={"ctl": 8})  # type: ignore[call-overload]
class RoleActor:
    """Hosts one or several roles. `role` is its name within the stack."""

    def __init__(self, settings: RuntimeSettings, role: str) -> None:
        configure_logging(service=f"actor.{role}", level=settings.log_level)
        leave_pandas_out()
        self._settings = settings
        self._role = role
        self._host: RoleHost | None = None
        self._backend: Backend | None = None
        self._refused: str | None = None
        self._beat_s = time.monotonic()
        self._work_loop = asyncio.get_running_loop()
        self._metrics = RayMetrics()
        self._tasks = [
            self._work_loop.create_task(self._open(), name="open"),
            self._work_loop.create_task(self._beat(), name="beat"),
            self._work_loop.create_task(self._metrics.keep_flushing(), name="metrics"),
        ]
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    # --- control ----------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    async def ping(self) -> Ping:
        host = self._host
        return Ping(
            ready=host is not None,
            age_s=self._age_s(),
            process_id=os.getpid(),
            roles=tuple(sorted(self._settings.roles().get(self._role, ()))),
            refused=self._refused,
        )

    @ray.method(concurrency_group="ctl")
    async def wake(self) -> None:
        if self._host is not None:
            self._work_loop.call_soon_threadsafe(self._host.wake)

    @ray.method(concurrency_group="ctl")
    async def stop(self) -> None:
        """Ends the roles and gives back what they hold; the actor lives on without work."""

        await self._on_work_loop(self._close())

    # --- roles that live here, called from others ---------------------------------------------

    async def lease_acquire(self, owner: uuid.UUID) -> Claim | None:
        return await self._ready().need_lease_manager().acquire(owner)

    async def lease_renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        return await self._ready().need_lease_manager().renew(leases)

    async def lease_release(self, lease: LeaseRef) -> None:
        await self._ready().need_lease_manager().release(lease)

    async def lease_nack(self, lease: LeaseRef, error: str, delay_s: float) -> None:
        await self._ready().need_lease_manager().nack(lease, error=error, delay_s=delay_s)

    async def lease_note_canary(self, lease: LeaseRef) -> None:
        await self._ready().need_lease_manager().note_canary(lease)

    async def lease_forget(self, lease: LeaseRef) -> None:
        await self._ready().need_lease_manager().forget(lease)

    async def submit(self, commit: Commit) -> Submitted:
        return await self._ready().need_publisher().submit(commit)

    # --- inside -----------------------------------------------------------------------------

    def _ready(self) -> RoleHost:
        if self._host is None:
            raise Unavailable(f"the role {self._role} is still starting", retry_after_s=0.5)
        return self._host

    async def _open(self) -> None:
        """Opens the backend, however long it takes, and starts the roles."""

        while True:
            try:
                # In a thread: it imports for seconds, on a busy machine for longer than the watch
                # lets the loop stand still, and a process that is ended for that starts over.
                open_backend = await asyncio.to_thread(load_factory, self._settings.factory)
                self._backend = await open_backend(self._settings.config)
                break
            except (RetryLater, OutcomeUnknown) as error:
                _LOG.warning("the backend is not there yet: %s", error)
            except (StartRefused, ConfigurationError) as error:
                _LOG.error("the role %s does not start: %s", self._role, error)
                self._refused = str(error)
            except Exception as error:  # noqa: BLE001 - crash-only: Ray starts the actor anew
                _end_process(self._role, error)
            await asyncio.sleep(_OPEN_RETRY_S)
        try:
            host = self._make_host(self._backend)
            await host.start()
        except Exception as error:  # noqa: BLE001 - crash-only: Ray starts the actor anew
            _end_process(self._role, error)
        self._host, self._refused = host, None
        _LOG.info("the role %s runs as process %d", self._role, os.getpid())

    def _make_host(self, backend: Backend) -> RoleHost:
        roles = self._settings.roles()[self._role]
        crew: Crew = NoCrew()
        if self._settings.placement == "spread":
            crew = RayCrew(self._settings, without=self._role)
        return RoleHost(
            backend=backend,
            roles=roles,
            on_fatal=_end_process,
            leases=LeaseManagerHandle(self._settings.handle(Role.LEASE_MANAGER)),
            publisher=PublisherHandle(self._settings.handle(Role.PUBLISHER)),
            crew=crew,
            runner=RayJobRunner(
                self._settings, rewrite_memory_bytes=backend.maintenance.rewrite_memory_bytes
            ),
            metrics=self._metrics,
        )

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        host, self._host = self._host, None
        if host is not None:
            await host.stop()
        if self._backend is not None:
            await self._backend.close()
            self._backend = None
        self._tasks = [self._work_loop.create_task(self._beat(), name="beat")]

    async def _on_work_loop(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        future = asyncio.run_coroutine_threadsafe(work, self._work_loop)
        return await asyncio.wrap_future(future)

    async def _beat(self) -> None:
        while True:
            self._beat_s = time.monotonic()
            await asyncio.sleep(self._settings.tick_age_s_max / 20)

    def _age_s(self) -> float:
        host = self._host
        beat_age_s = time.monotonic() - self._beat_s
        return beat_age_s if host is None else max(beat_age_s, host.status().age_s)

    def _watch(self) -> NoReturn:
        while True:
            time.sleep(self._settings.tick_age_s_max / 10)
            age_s = self._age_s()
            if age_s > self._settings.tick_age_s_max:
                _LOG.critical("the role %s stands still since %.1f s", self._role, age_s)
                os._exit(_EXIT_STANDING_STILL)


def _end_process(role: str, error: BaseException) -> NoReturn:
    """Crash-only: Ray starts the actor anew."""

    _LOG.critical("the role %s ends its process: %s", role, error, exc_info=error)
    logging.shutdown()
    os._exit(_EXIT_FATAL)


class RayCrew:
    """The wanted actors of a stack, but `without` the one that looks after them."""

    def __init__(self, settings: RuntimeSettings, *, without: str | None = None) -> None:
        self._settings = settings
        self._handles = {
            role: settings.handle(role) for role in settings.roles() if role != without
        }

    async def look(self) -> Sequence[RoleState]:
        return await asyncio.gather(*(self._look_at(role) for role in self._handles))

    async def create(self, role: str) -> None:
        await asyncio.to_thread(_create, self._settings, role)

    async def replace(self, role: str) -> None:
        await self._handles[role].kill(restart=True)
        await self.create(role)

    async def end_strangers(self) -> Sequence[str]:
        return await _end_strangers(self._settings)

    async def _look_at(self, role: str) -> RoleState:
        handle = self._handles[role]
        try:
            ping = await handle.ping(timeout_s=_PING_TIMEOUT_S)
        except (Unavailable, OutcomeUnknown):
            return RoleState(role, exists=await handle.exists())
        return RoleState(role, exists=True, age_s=ping.age_s)


async def start(settings: RuntimeSettings, *, timeout_s: float = 60.0) -> RunningActors:
    """Makes the actors that are not there, ends those of other code, and waits until all are ready.

    Raises StartRefused with the reason when a role will not start, Unavailable after `timeout_s`.
    """

    await _end_strangers(settings)
    for role in settings.roles():
        await asyncio.to_thread(_create, settings, role)
    try:
        async with asyncio.timeout(timeout_s):
            pings = await asyncio.gather(*(_until_ready(settings, r) for r in settings.roles()))
    except TimeoutError as error:
        raise Unavailable(f"the actors were not ready within {timeout_s:.0f} s") from error
    statuses = [
        ActorStatus(role, settings.version, ping)
        for role, ping in zip(settings.roles(), pings, strict=True)
    ]
    return RunningActors(settings, tuple(statuses))


async def stop(settings: RuntimeSettings) -> None:
    """Ends all actors of the stack, of whatever code: first who revives, then who works, last who
    holds the leases."""

    await _stop_all(await living(settings.namespace), timeout_s=settings.stop_s_max)


async def status(settings: RuntimeSettings) -> tuple[ActorStatus, ...]:
    """Every actor of the stack, wanted or not, and the wanted ones that are missing."""

    found = {(a.role, a.version): a for a in await living(settings.namespace)}
    for role in settings.roles():
        address = settings.handle(role).address
        found.setdefault((role, settings.version), address)
    return tuple(await asyncio.gather(*(_status_of(address) for address in found.values())))


async def tend(settings: RuntimeSettings) -> str | None:
    """Revives the root if it is gone or stands still; returns what was done, for a log.

    Where the root of another code version lives, that one is in charge, and nothing is done.
    """

    root = settings.root
    addresses = [a for a in await living(settings.namespace) if a.role == root]
    if addresses and all(address.version != settings.version for address in addresses):
        return None
    crew = RayCrew(settings)
    (state,) = [state for state in await crew.look() if state.role == root]
    if not state.exists:
        await crew.create(root)
        return f"created {root}"
    if state.age_s is not None and state.age_s > settings.tick_age_s_max:
        await crew.replace(root)
        return f"replaced {root}"
    return None


def _create(settings: RuntimeSettings, role: str) -> None:
    address = settings.handle(role).address
    create_actor(RoleActor, address, (settings, role), env=dict(settings.env))


async def _until_ready(settings: RuntimeSettings, role: str) -> Ping:
    handle = settings.handle(role)
    while True:
        with contextlib.suppress(Unavailable, OutcomeUnknown):  # being created or restarted
            ping = await handle.ping(timeout_s=_PING_TIMEOUT_S)
            if ping.refused is not None:
                raise StartRefused(ping.refused)
            if ping.ready:
                return ping
        await asyncio.sleep(_READY_POLL_S)


async def _end_strangers(settings: RuntimeSettings) -> list[str]:
    wanted = {settings.handle(role).address for role in settings.roles()}
    strangers = [a for a in await living(settings.namespace) if a not in wanted]
    await _stop_all(strangers, timeout_s=settings.stop_s_max)
    return [address.name for address in strangers]


async def _stop_all(addresses: Sequence[ActorAddress], *, timeout_s: float) -> None:
    order = {Role.SUPERVISOR: 0, Role.COORDINATOR: 1, Role.PUBLISHER: 2, Role.LEASE_MANAGER: 3}

    def place(address: ActorAddress) -> int:
        return order.get(Role(address.role.split("-")[0]), 0) if address.role != CORE else 0

    for step in sorted({place(address) for address in addresses}):
        handles = [RoleHandle(a) for a in addresses if place(a) == step]
        await asyncio.gather(*(handle.stop(timeout_s=timeout_s) for handle in handles))


async def _status_of(address: ActorAddress) -> ActorStatus:
    try:
        ping = await RoleHandle(address).ping(timeout_s=_PING_TIMEOUT_S)
    except LakebusError:
        return ActorStatus(address.role, address.version, None)
    return ActorStatus(address.role, address.version, ping)
