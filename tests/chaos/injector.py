"""Makes the faults of a schedule, ends them, and tells what became of each.

Whatever a fault holds (a stopped process, a full disk, a taken connection, a rule of the proxy) is
entered in one list before it is done, and `heal` lets go of all that is still in it, however the
run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster import processes
from cluster.processes import ProcessMark
from tests.chaos import victims
from tests.chaos.children import ChildFailed
from tests.chaos.database import AWAY
from tests.chaos.kinds import Group
from tests.chaos.schedule import Fault
from tests.chaos.stack import ChaosStack, StackDown
from tests.chaos.victims import Process

_RESTORED_S = 150.0
_POLL_S = 0.1
_TOLD_S = 12.0
#: Of these there may be more than one for a while: the next job, whichever it is; a balancer that
#: was replaced and still serves slow streams.
_ONE_IS_WHOLE = frozenset({"job", "haproxy"})
#: How long a job is waited for, and how far into it the blow falls at most.
_JOB_COMES_S, _INTO_JOB_S = 15.0, 2.5
_SIGNALS = {
    "reload_haproxy": signal.SIGUSR1,
    "restart_postgres_fast": signal.SIGINT,
    "restart_postgres_immediate": signal.SIGQUIT,
}
_OUR_SESSIONS = (
    "SELECT pid FROM pg_stat_activity WHERE usename = 'lakebus' AND backend_type = 'client backend'"
    " ORDER BY backend_start, pid"
)
_END_ALL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE usename = 'lakebus' AND backend_type = 'client backend'"
)
#: When one of these ends, `lakebus up` starts all of Ray's side again.
_STARTS_ALL_ANEW = frozenset({"raylet", "gcs", "ray_host"})
#: What the proxy does for each kind; a rule strikes until it is lifted.
_RULES: Mapping[str, Mapping[str, Any]] = {
    "lost_publish_replies": {"act": "cut", "sql": "publish(", "probability": 0.5},
    "lost_swap_replies": {"act": "cut", "sql": "publish_swap(", "probability": 0.7},
    "lost_append_replies": {"act": "cut", "sql": "append_group", "probability": 0.3},
    "lost_replies": {"act": "cut", "sql": "", "probability": 0.05},
    "partition": {"act": "hold"},
    "black_hole": {"act": "drop"},
    "slow_network": {"act": "delay", "sql": "", "way": "to_client", "delay_s": 0.15},
}


@dataclass(slots=True)
class Done:
    """What became of a planned fault. Times are seconds of the monotonic clock; `missed` says why
    it was not done; `restored_s` is how long the kind took to be whole again."""

    fault: Fault
    began_s: float
    healed_s: float = 0.0
    victim: str = ""
    missed: str = ""
    restored_s: float | None = None


class Injector:
    def __init__(self, stack: ChaosStack, *, note: Callable[[str], None]) -> None:
        self._stack = stack
        self._note = note
        self._held: dict[str, Callable[[], Awaitable[None]]] = {}
        self._watches: list[asyncio.Task[None]] = []
        self.fired: dict[str, int] = {}
        self.done: list[Done] = []
        if stack.proxy is not None:
            stack.proxy.on_word = self._count_strike

    async def play(self, faults: tuple[Fault, ...], *, zero_s: float) -> None:
        """Does every fault at its moment; overlapping ones beside each other."""
        tasks = []
        for fault in faults:
            await asyncio.sleep(max(0.0, zero_s + fault.at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self.do(fault), name=f"fault {fault.number}"))
        await asyncio.gather(*tasks)

    async def do(self, fault: Fault) -> Done:
        """One fault from its beginning to its end. What cannot be done is missed, not an error."""
        done = Done(fault, began_s=time.monotonic())
        self.done.append(done)
        try:
            await self._methods()[fault.known.group](fault, done)
        except (_Missed, ChildFailed, StackDown, *AWAY, ValueError, KeyError) as error:
            done.missed = f"{type(error).__name__}: {error}"
        done.healed_s = time.monotonic()
        self._note(
            f"fault {fault.number} {fault.kind} {done.victim}"
            + (f" missed: {done.missed}" if done.missed else " done")
        )
        return done

    async def heal(self) -> None:
        """Ends every fault that still lasts."""
        for name in list(self._held):
            await self._let_go(name)

    async def restored(self) -> None:
        """Waits for the watches over what was killed; each has its own limit."""
        await asyncio.gather(*self._watches)

    def _methods(self) -> Mapping[Group, Callable[[Fault, Done], Awaitable[None]]]:
        return {
            Group.KILL: self._kill,
            Group.FREEZE: self._freeze,
            Group.SIGNAL: self._signal,
            Group.SESSIONS: self._sessions,
            Group.DISK: self._disk,
            Group.NETWORK: self._network,
            Group.NODE: self._node,
            Group.STACK: self._kill_up,
        }

    # --- processes ------------------------------------------------------------------------------

    async def _kill(self, fault: Fault, done: Done) -> None:
        await self._strike(fault, done, signal.SIGKILL)

    async def _signal(self, fault: Fault, done: Done) -> None:
        await self._strike(fault, done, _SIGNALS[fault.kind])

    async def _strike(self, fault: Fault, done: Done, number: int) -> None:
        kind = fault.known.victim
        before = await self._living(fault)
        victim = _chosen(before, fault)
        done.victim = f"{kind}:{victim.pid}"
        done.began_s = time.monotonic()
        if not victim.mark.send(number):
            raise _Missed("it had just ended")
        # A stopped process takes a deadly signal only once it goes on.
        self._watches.append(asyncio.create_task(self._watch(done, kind, victim, len(before))))

    async def _freeze(self, fault: Fault, done: Done) -> None:
        kind = fault.known.victim
        victim = _chosen(await self._living(fault), fault)
        done.victim = f"{kind}:{victim.pid}"
        await self._while_held(fault, _freezing(victim.mark), _thawing(victim.mark))

    async def _living(self, fault: Fault) -> list[Process]:
        """Who may be struck. A job comes and goes: one is waited for, and met somewhere in it."""
        kind = fault.known.victim
        deadline_s, into_s = time.monotonic() + _JOB_COMES_S, fault.dice * _INTO_JOB_S
        while True:
            found = await asyncio.to_thread(victims.of_kind, self._stack.roots(), kind)
            if kind != "job" or time.monotonic() > deadline_s:
                return found
            if found:
                await asyncio.sleep(into_s)
                lasting = [process for process in found if process.mark.alive()]
                if lasting:
                    return lasting
                into_s /= 2
            await asyncio.sleep(_POLL_S)

    async def _watch(self, done: Done, kind: str, victim: Process, count: int) -> None:
        """Notes when the kind is whole again: as many as before, the victim not among them."""
        restarts = self._stack.restarts
        try:
            async with asyncio.timeout(_RESTORED_S):
                if kind in ("backend", "postmaster"):
                    await processes.wait_gone(victim.mark)
                    await self._stack.superuser.until_there(timeout_s=_RESTORED_S)
                elif kind in _ONE_IS_WHOLE:
                    await self._as_many(kind, victim, 1)
                elif kind in _STARTS_ALL_ANEW:
                    while self._stack.restarts <= restarts:
                        await asyncio.sleep(_POLL_S)
                    await self._stack.ready(timeout_s=_RESTORED_S)
                else:
                    await self._as_many(kind, victim, count)
        except (TimeoutError, StackDown):
            return
        done.restored_s = time.monotonic() - done.began_s

    async def _as_many(self, kind: str, victim: Process, count: int) -> None:
        while True:
            now = await asyncio.to_thread(victims.of_kind, self._stack.roots(), kind)
            if len(now) >= count and victim.mark not in {process.mark for process in now}:
                return
            await asyncio.sleep(_POLL_S)

    async def _kill_up(self, fault: Fault, done: Done) -> None:
        done.victim = "up"
        await self._stack.kill_up(pause_s=fault.dice * 3.0)

        async def watch() -> None:
            with contextlib.suppress(StackDown):
                await self._stack.ready(timeout_s=_RESTORED_S)
                done.restored_s = time.monotonic() - done.began_s

        self._watches.append(asyncio.create_task(watch()))

    # --- the database's connections -------------------------------------------------------------

    async def _sessions(self, fault: Fault, done: Done) -> None:
        superuser = self._stack.superuser
        if fault.kind == "end_backend":
            pids = await superuser.values(_OUR_SESSIONS)
            if not pids:
                raise _Missed("there is no session of ours")
            pid = pids[fault.ordinal % len(pids)]
            done.victim = f"backend:{pid}"
            done.began_s = time.monotonic()
            await superuser.execute("SELECT pg_terminate_backend($1)", pid)
            done.restored_s = time.monotonic() - done.began_s
        elif fault.kind == "end_backends":
            until_s = time.monotonic() + fault.hold_s
            while time.monotonic() < until_s:
                with contextlib.suppress(*AWAY):
                    await superuser.execute(_END_ALL)
                await asyncio.sleep(0.25)
        elif fault.kind == "full_pool":
            await self._while_held(fault, self._take_connections, self._give_connections)
        else:
            await self._hold_locks(fault)

    async def _take_connections(self) -> None:
        """No connection of ours can be made, and those that there are end."""
        await self._stack.superuser.execute("ALTER ROLE lakebus CONNECTION LIMIT 1")
        await self._stack.superuser.execute(_END_ALL)

    async def _give_connections(self) -> None:
        await self._stack.superuser.until_there(timeout_s=60.0)
        await self._stack.superuser.execute("ALTER ROLE lakebus CONNECTION LIMIT -1")

    async def _hold_locks(self, fault: Fault) -> None:
        """What a foreign transaction may hold: all tables as a dump does, or the head row."""
        async with (
            self._stack.superuser.connection() as connection,
            connection.transaction(isolation="repeatable_read"),
        ):
            if fault.kind == "held_tables":
                tables = await connection.fetchval(
                    "SELECT string_agg(format('lakebus.%I', tablename), ', ')"
                    " FROM pg_tables WHERE schemaname = 'lakebus'"
                )
                await connection.execute(f"LOCK TABLE {tables} IN ACCESS SHARE MODE")
            else:
                await connection.execute("SELECT 1 FROM lakebus.lake FOR UPDATE")
            await asyncio.sleep(fault.hold_s)

    # --- disks, network -------------------------------------------------------------------------

    async def _disk(self, fault: Fault, done: Done) -> None:
        stack = self._stack
        take: Callable[[], object] = stack.objects.take_away
        give: Callable[[], object] = stack.objects.put_back
        if fault.kind != "objects_away":
            disk = stack.disk if fault.kind == "full_objects" else stack.data
            take, give = disk.fill, disk.free
        done.victim = fault.kind
        if any(name.startswith(f"{fault.kind}/") for name in self._held):
            raise _Missed("it is so already")
        await self._while_held(fault, _in_thread(take), _in_thread(give))

    async def _network(self, fault: Fault, done: Done) -> None:
        proxy = self._stack.proxy
        if proxy is None:
            raise _Missed("there is no proxy")
        if fault.kind == "reset_connections":
            await proxy.ask({"do": "reset"})
            return
        name = f"fault-{fault.number}"
        rule = {"name": name, "times": None, **_RULES[fault.kind]}

        async def arm() -> None:
            await proxy.ask({"do": "arm", "rule": rule})

        async def lift() -> None:
            await proxy.ask({"do": "lift", "name": name})

        await self._while_held(fault, arm, lift)
        done.victim = f"strikes={self.fired.get(name, 0)}"

    def _count_strike(self, word: Mapping[str, Any]) -> None:
        name = word["fired"]["rule"]
        self.fired[name] = self.fired.get(name, 0) + 1

    # --- nodes ----------------------------------------------------------------------------------

    async def _node(self, fault: Fault, done: Done) -> None:
        """A node that is not the head falls silent, or dies; another one takes its place."""
        stack = self._stack
        if len(stack.raylets) < 2:
            raise _Missed("there is no second node")
        raylet = stack.raylets[-1]
        mark = ProcessMark.of(raylet)
        done.victim = f"node:{raylet}"
        if mark is None:
            raise _Missed("its raylet had just ended")
        workers = processes.descendants(raylet)
        if fault.kind == "kill_node":
            for one in (mark, *workers):
                one.send(signal.SIGKILL)
        else:
            frozen = [mark, *workers] if fault.kind == "freeze_node" else [mark]
            for one in frozen:
                await self._hold(f"{fault.kind}/{one.pid}", _freezing(one), _thawing(one))
            await asyncio.sleep(fault.hold_s)
            # The workers first: for some seconds two of a name live, and nobody tells the old one.
            # What the old one meets is told by its node's agent, which takes some seconds, too.
            for one in frozen[1:]:
                await self._let_go(f"{fault.kind}/{one.pid}")
            await asyncio.sleep(_TOLD_S if frozen[1:] else 3.0)
            await self._let_go(f"{fault.kind}/{mark.pid}")
            await asyncio.sleep(4.0)
        for one in (*workers, mark):
            one.send(signal.SIGKILL)
        await stack.remove_node(raylet)
        await stack.add_node()
        done.restored_s = time.monotonic() - done.began_s

    # --- holding --------------------------------------------------------------------------------

    async def _while_held(
        self,
        fault: Fault,
        take: Callable[[], Awaitable[None]],
        give: Callable[[], Awaitable[None]],
    ) -> None:
        name = f"{fault.kind}/{fault.number}"
        await self._hold(name, take, give)
        await asyncio.sleep(fault.hold_s)
        await self._let_go(name)

    async def _hold(
        self,
        name: str,
        take: Callable[[], Awaitable[None]],
        give: Callable[[], Awaitable[None]],
    ) -> None:
        self._held[name] = give
        await take()

    async def _let_go(self, name: str) -> None:
        """Until it has worked: a database that is down comes back."""
        give = self._held.get(name)
        deadline_s = time.monotonic() + 60.0
        while give is not None:
            try:
                await give()
                break
            except AWAY:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.2)
        self._held.pop(name, None)


class _Missed(Exception):
    """There was nobody to strike."""


def _chosen(found: list[Process], fault: Fault) -> Process:
    if not found:
        raise _Missed(f"no {fault.known.victim} lives")
    return found[fault.ordinal % len(found)]


def _freezing(mark: ProcessMark) -> Callable[[], Awaitable[None]]:
    async def freeze() -> None:
        if not mark.send(signal.SIGSTOP):
            raise _Missed("it had just ended")

    return freeze


def _thawing(mark: ProcessMark) -> Callable[[], Awaitable[None]]:
    async def thaw() -> None:
        mark.send(signal.SIGCONT)

    return thaw


def _in_thread(work: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        await asyncio.to_thread(work)

    return do
