"""Wake-up hints from ingest to coordinators: datagrams, sent and forgotten.

A hint says "there may be something to claim" and nothing else. It may be lost, repeated, late, or
forged; the poll beneath finds what hints miss, and the bus is the only truth. A datagram costs the
sender a few microseconds, where a call to an actor measured 2.8 ms on the way to visible rows.

Addresses come from a directory that receivers renew and senders read every few seconds. A datagram
carries the stack's name, so that a port which the system gave to another stack meanwhile is not
woken by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.loop import OnFatal, RoleLoop
from actors.settings import RoleSettings
from lakebus.clock import Clock
from lakebus.telemetry import Metrics

_LOG = logging.getLogger(__name__)

COORDINATOR_ROLE = "coordinator"
#: One receiver may be dead or busy; two at a time, in turn, wake somebody at little cost.
_RECEIVERS_A_HINT = 2
_MAGIC = b"lbh1:"


class HintDirectory(Protocol):
    """Where receivers can be reached; addresses only, no truth."""

    async def announce(self, role: str, instance: str, host: str, port: int) -> None:
        """Notes or renews an address."""
        ...

    async def receivers(self, role: str) -> Sequence[tuple[str, int]]:
        """The addresses of a role that were renewed lately."""
        ...


class MemoryHintDirectory:
    """A directory inside one process."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], tuple[str, int]] = {}

    async def announce(self, role: str, instance: str, host: str, port: int) -> None:
        self._rows[role, instance] = (host, port)

    async def receivers(self, role: str) -> Sequence[tuple[str, int]]:
        return [address for (known, _), address in self._rows.items() if known == role]


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """One exchange with the directory: the addresses known after it."""

    addresses: tuple[tuple[str, int], ...]


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, *, expected: bytes, heard: Callable[[], None]) -> None:
        self._expected = expected
        self._heard = heard

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        if data == self._expected:
            self._heard()


class HintReceiver:
    """Listens on a free port of `host` and calls `heard` for each hint to this stack."""

    def __init__(
        self,
        *,
        stack: str,
        instance: str,
        host: str,
        directory: HintDirectory,
        heard: Callable[[], None],
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        on_fatal: OnFatal,
    ) -> None:
        self._expected = _MAGIC + stack.encode()
        self._instance = instance
        self._host = host
        self._directory = directory
        self._heard = heard
        self._metrics = metrics
        self._every_s = settings.directory_every_s
        self._transport: asyncio.DatagramTransport | None = None
        self._loop = RoleLoop(
            role="hint_receiver",
            turn=self._turn,
            settings=settings,
            clock=clock,
            metrics=metrics,
            on_fatal=on_fatal,
        )

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens; None before `start`."""

        if self._transport is None:
            return None
        host, port = self._transport.get_extra_info("sockname")[:2]
        return host, port

    async def start(self) -> None:
        if self._transport is None:
            self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Datagrams(expected=self._expected, heard=self._on_hint),
                local_addr=(self._host, 0),
            )
            self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    async def run_once(self) -> DirectoryReport:
        """Announces itself."""

        address = self.address
        if address is None:
            return DirectoryReport(())
        await self._directory.announce(COORDINATOR_ROLE, self._instance, *address)
        return DirectoryReport((address,))

    async def _turn(self) -> float:
        await self.run_once()
        return self._every_s

    def _on_hint(self) -> None:
        self._metrics.count("lakebus_hints_received_total")
        self._heard()


class HintSender:
    """Sends at most one hint every `hint_every_ms`; the last one of a burst is never swallowed."""

    def __init__(
        self,
        *,
        stack: str,
        directory: HintDirectory,
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        on_fatal: OnFatal,
    ) -> None:
        self._message = _MAGIC + stack.encode()
        self._directory = directory
        self._clock = clock
        self._metrics = metrics
        self._every_s = settings.hint_every_ms / 1e3
        self._directory_every_s = settings.directory_every_s
        self._addresses: tuple[tuple[str, int], ...] = ()
        self._next = 0
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._sent_s = float("-inf")
        self._late: asyncio.TimerHandle | None = None
        self._loop = RoleLoop(
            role="hint_sender",
            turn=self._turn,
            settings=settings,
            clock=clock,
            metrics=metrics,
            on_fatal=on_fatal,
        )

    async def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()
        if self._late is not None:
            self._late.cancel()
            self._late = None
        for endpoint in self._sockets.values():
            endpoint.close()
        self._sockets.clear()

    def hint(self) -> None:
        """Tells coordinators that something was accepted. Never blocks, never fails."""

        if self._late is not None:
            return
        wait_s = self._sent_s + self._every_s - self._clock.monotonic_s()
        if wait_s <= 0:
            self._send()
        else:
            self._late = asyncio.get_running_loop().call_later(wait_s, self._send_late)

    async def run_once(self) -> DirectoryReport:
        """Reads the directory."""

        self._addresses = tuple(await self._directory.receivers(COORDINATOR_ROLE))
        return DirectoryReport(self._addresses)

    async def _turn(self) -> float:
        await self.run_once()
        return self._directory_every_s

    def _send_late(self) -> None:
        self._late = None
        self._send()

    def _send(self) -> None:
        self._sent_s = self._clock.monotonic_s()
        addresses = self._addresses
        for _ in range(min(_RECEIVERS_A_HINT, len(addresses))):
            self._next = (self._next + 1) % len(addresses)
            address = addresses[self._next]
            # A full buffer, a port nobody listens on any more: the poll beneath covers it.
            with contextlib.suppress(OSError):
                self._socket_for(address[0]).sendto(self._message, address)
        if addresses:
            self._metrics.count("lakebus_hints_sent_total")

    def _socket_for(self, host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        endpoint = self._sockets.get(family)
        if endpoint is None:
            endpoint = self._sockets[family] = socket.socket(family, socket.SOCK_DGRAM)
            endpoint.setblocking(False)
        return endpoint
