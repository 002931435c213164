"""Typed handles to roles in other processes: the one file that calls Ray actors.

A name is a locator, not a lock (two living actors of one name have been seen), so nothing here is
trusted for exclusion; epochs in the database are. A handle is resolved again by name when its actor
is gone. What Ray says is mapped at this edge:

* there is no actor of that name: Unavailable, nothing happened;
* the actor died, does not answer or is being restarted: it may have happened: OutcomeUnknown where
  the call changes something, Unavailable where it can simply be repeated;
* an error raised by the role itself arrives as that very error.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.publisher import Submitted
from lakebus.errors import Fault, OutcomeUnknown, Unavailable
from storage.bus.interface import Claim, LeaseRef
from storage.catalog.interface import Commit

_PREFIX = "lakebus:"


@dataclass(frozen=True, slots=True)
class ActorAddress:
    """Where a role's actor is found: by name, which holds its code version, in a namespace."""

    namespace: str
    role: str
    version: str

    @property
    def name(self) -> str:
        return f"{_PREFIX}{self.role}@{self.version}"

    @classmethod
    def parse(cls, namespace: str, name: str) -> ActorAddress | None:
        """The address in an actor's name, or None when the actor is none of ours."""

        role, at, version = name.removeprefix(_PREFIX).partition("@")
        if not name.startswith(_PREFIX) or not at:
            return None
        return cls(namespace, role, version)


@dataclass(frozen=True, slots=True)
class Ping:
    """`age_s` is how long the slowest loop of the role stands still; `refused` is why the role
    will not start however often it tries."""

    ready: bool
    age_s: float
    process_id: int
    roles: tuple[str, ...]
    refused: str | None = None


class RoleHandle:
    """One role's actor, wherever it lives now."""

    def __init__(self, address: ActorAddress, *, timeout_s: float = 30.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._actor: Any = None

    async def call(
        self, method: str, *arguments: Any, repeatable: bool, timeout_s: float | None = None
    ) -> Any:
        """Calls a method of the actor. Raises Unavailable, OutcomeUnknown, or what it raised."""

        actor = await self._resolve()
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                return await getattr(actor, method).remote(*arguments)
        except RayTaskError as error:
            raise _cause_of(error) from error
        except (RayActorError, TimeoutError) as error:
            self._actor = None
            text = f"the actor {self.address.name} did not answer: {type(error).__name__}"
            raise (Unavailable(text) if repeatable else OutcomeUnknown(text)) from error
        except RayError as error:
            self._actor = None
            raise OutcomeUnknown(f"Ray failed in a call to {self.address.name}: {error}") from error

    async def exists(self) -> bool:
        try:
            await self._resolve()
        except Unavailable:
            return False
        return True

    async def ping(self, *, timeout_s: float) -> Ping:
        """Raises Unavailable when it does not answer in time."""

        return cast(Ping, await self.call("ping", repeatable=True, timeout_s=timeout_s))

    async def wake(self) -> None:
        await self.call("wake", repeatable=True)

    async def stop(self, *, timeout_s: float) -> None:
        """Lets the role end its work and give back what it holds, then ends its actor for good."""

        if not await self.exists():
            return
        with contextlib.suppress(Unavailable, OutcomeUnknown):
            await self.call("stop", repeatable=True, timeout_s=timeout_s)
        await self.kill(restart=False)

    async def kill(self, *, restart: bool) -> None:
        """Ends the actor's process at once; with `restart` Ray starts it anew."""

        with contextlib.suppress(Unavailable):
            actor = await self._resolve()
            # Ended already is as good.
            with contextlib.suppress(RayError):
                await asyncio.to_thread(ray.kill, actor, no_restart=not restart)
        self._actor = None

    async def _resolve(self) -> Any:
        if self._actor is None:
            try:
                # In a thread: with Ray's control service away this call waits for a minute.
                self._actor = await asyncio.to_thread(
                    ray.get_actor, self.address.name, namespace=self.address.namespace
                )
            except (ValueError, RayError) as error:
                raise Unavailable(f"there is no actor {self.address.name}") from error
        return self._actor


class LeaseManagerHandle:
    """Implements `actors.lease_manager.Leases` by calls to its actor.

    A claim whose answer is lost stays with nobody until it expires; that costs its lease time, as
    the death of a coordinator does.
    """

    def __init__(self, role: RoleHandle) -> None:
        self._role = role

    async def acquire(self, owner: uuid.UUID) -> Claim | None:
        return cast(Claim | None, await self._role.call("lease_acquire", owner, repeatable=False))

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        return cast(
            Sequence[LeaseRef],
            await self._role.call("lease_renew", list(leases), repeatable=True),
        )

    async def release(self, lease: LeaseRef) -> None:
        await self._role.call("lease_release", lease, repeatable=False)

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        await self._role.call("lease_nack", lease, error, delay_s, repeatable=False)

    async def note_canary(self, lease: LeaseRef) -> None:
        await self._role.call("lease_note_canary", lease, repeatable=True)

    async def forget(self, lease: LeaseRef) -> None:
        with contextlib.suppress(Unavailable):  # it only keeps books
            await self._role.call("lease_forget", lease, repeatable=True)


class PublisherHandle:
    """Implements `actors.publisher.Publisher` by calls to its actor."""

    def __init__(self, role: RoleHandle) -> None:
        self._role = role

    async def submit(self, commit: Commit) -> Submitted:
        return cast(Submitted, await self._role.call("submit", commit, repeatable=False))


def create_actor(
    actor_class: Any, address: ActorAddress, arguments: Sequence[Any], *, env: dict[str, str]
) -> None:
    """Creates the actor unless one of its name lives. Returns before it is ready.

    Detached, so that it survives whoever created it; restarted by Ray for ever, through nothing but
    its constructor; never retried by Ray, because a second execution is for us to decide.
    """

    options: dict[str, Any] = {"runtime_env": {"env_vars": env}} if env else {}
    actor_class.options(
        name=address.name,
        namespace=address.namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        **options,
    ).remote(*arguments)


async def living(namespace: str) -> list[ActorAddress]:
    """Our actors of one namespace, of every code version. Raises Unavailable."""

    try:
        found = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
    except RayError as error:
        raise Unavailable("Ray does not say which actors live") from error
    parsed = [
        ActorAddress.parse(namespace, entry["name"])
        for entry in found
        if entry["namespace"] == namespace
    ]
    return [address for address in parsed if address is not None]


def _cause_of(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, Exception) else Fault(f"a role failed: {error}")
