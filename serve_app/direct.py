"""The direct door: the same application on a listener of its own, inside each ingest replica.

Ray Serve's wrappers are the largest cost of a small request, so rows may take this way past them.
Serve still places the replica, checks it, and ends it: the door opens when the replica's components
work, an ended listener makes the replica ill, and the door drains with the replica. Nothing else
differs: the application, and with it authentication, limits and errors, is the same object.

Where it runs: on the loop that runs the application (Serve's main loop, see `deployments`), which
the components belong to; a thread of its own would cost each request two hops. All replicas of one
machine share one port (SO_REUSEPORT), and a replacement binds it while its predecessor drains.

A port that cannot be had makes nobody ill: rows go through Serve's route as before, `status` says
why, and the door tries again until it has the port.

A drain is in three steps: for `drain_s` the door goes on, not ready, and every answer ends its
connection, so that clients and balancers go elsewhere; then it stops listening, and takes what the
kernel had accepted for it; then what is going on is finished, and idle connections are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate

from uvicorn.config import Config

from lakebus.errors import Backpressure, LakebusError, Unavailable
from serve_app.calls import Message, Receive, Scope, Send
from serve_app.direct_protocol import ConnectionLimits, DoorProtocol, DoorState, refusal_of
from serve_app.direct_url import IngestUrl

_log = logging.getLogger(__name__)

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_TICK_S = 1.0
_BACKLOG = 2048
_DRAIN_LOOK_S = 0.02
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class DoorSettings:
    """What an operator tunes; see the settings of sections `direct` and `http`.

    `running_max` and `waiting_max`: requests worked on, and waiting for it, at a time, as Serve
    bounds them for its own route. `finish_s`: for the last requests, after `drain_s`.
    """

    host: str = "127.0.0.1"
    port: int = 0
    port_setting: str = "direct.port"
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    running_max: int = 256
    waiting_max: int = 512
    drain_s: float = 1.0
    finish_s: float = 4.0
    bind_again_s: float = 5.0


class DirectDoor:
    """One a replica, on its loop. `url`: what clients are told of it."""

    def __init__(self, settings: DoorSettings, url: IngestUrl) -> None:
        self.settings = settings
        self.url = url
        self.port = 0
        self.trouble: str | None = None
        self._state = DoorState(settings.connections)
        self._application: Application | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._config: Config | None = None
        self._listener: asyncio.Server | None = None
        self._socket: socket.socket | None = None
        self._places = asyncio.Semaphore(settings.running_max)
        self._waiting = 0
        self._tending: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None

    # --- what others ask ---------------------------------------------------------------------

    @property
    def working(self) -> int:
        """Requests that are worked on, or wait for it."""

        return len(self._state.tasks)

    @property
    def listening(self) -> bool:
        return self._listener is not None and self._listener.is_serving()

    def ended(self) -> str | None:
        """What of the door has ended by itself, so that the replica should be replaced. A port that
        was never had is none."""

        if self._drain is not None:
            return None
        if self._tending is None or self._tending.done():
            return "the direct door has ended"
        if self._listener is not None and not self._listener.is_serving():
            return "the listener of the direct door has ended"
        return None

    def advertised(self, host_header: str | None) -> str | None:
        """What the answers of Serve's route say to a client that came by this name."""

        if not self.listening or self._state.draining:
            return None
        found = self.url.for_client(host_header, self.port)
        return None if found is None else f"{found}; door={self.url.door_id}"

    def status(self) -> dict[str, object]:
        """Of this replica's door."""

        state = "draining" if self._state.draining else "listening"
        return {
            "state": state if self.listening else "closed",
            "port": self.port or self.settings.port,
            "connections": len(self._state.connections),
            "requests": len(self._state.tasks),
            "waiting": self._waiting,
            "trouble": self.trouble,
        }

    # --- life --------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, application: Application) -> AsyncIterator[None]:
        """Listens while the block lasts; its end is a drain."""

        self._application = application
        self._loop = asyncio.get_running_loop()
        self._config = Config(
            self._serve,
            lifespan="off",
            ws="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        self._config.load()
        self._dated()
        await self._try_to_listen()
        self._tending = asyncio.create_task(self._tend())
        try:
            yield
        finally:
            self.begin_drain(reachable_s=0.0)
            assert self._drain is not None, "it was begun"
            await self._drain
            self._tending.cancel()
            await asyncio.wait((self._tending,))

    def stopping(self) -> None:
        """The replica is about to end; may be called from any thread."""

        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self, *, reachable_s: float | None = None) -> None:
        """Once; without waiting for its end, for which `opened` waits. `reachable_s`: instead of
        `drain_s`."""

        if self._drain is not None:
            return
        stay_s = self.settings.drain_s if reachable_s is None else reachable_s
        self._state.draining = True
        for connection in self._connections():
            connection.last_answers()
        self._drain = asyncio.create_task(self._drained(stay_s))

    async def _drained(self, reachable_s: float) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + reachable_s + self.settings.finish_s
        await asyncio.sleep(reachable_s)
        await self._stop_listening()
        while self._connections() and loop.time() < until_s:
            for connection in self._connections():
                if not connection.busy:
                    connection.close_gently()
            await asyncio.sleep(_DRAIN_LOOK_S)
        for connection in self._connections():
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=_TICK_S)

    # --- listening ---------------------------------------------------------------------------

    async def _try_to_listen(self) -> None:
        host, port = self.settings.host, self.settings.port
        try:
            made = _bound(host, port)
        except OSError as error:
            trouble = (
                f"cannot listen on {host}:{port} ({error.strerror or error}); choose another with "
                f"{self.settings.port_setting}, or stop what listens there"
            )
            if trouble != self.trouble:
                _log.warning("the direct door is closed: %s", trouble)
            self.trouble = trouble
            return
        self.port = made.getsockname()[1]
        self._socket, self.trouble = made, None
        self._listener = await asyncio.get_running_loop().create_server(
            self._connected, sock=made, backlog=_BACKLOG
        )
        _log.info("the direct door listens on %s:%d", host, self.port)

    def _connected(self) -> DoorProtocol:
        assert self._config is not None, "it is opened"
        return DoorProtocol(self._config, self._state)

    async def _stop_listening(self) -> None:
        """Connections that the kernel has accepted would be reset by closing the listener; they are
        taken before it ends."""

        listener, self._listener = self._listener, None
        if listener is None or self._socket is None or self._socket.fileno() < 0:
            return
        rest = self._socket.dup()  # keeps the port open while the loop gives up its own
        listener.close()
        await asyncio.sleep(0)
        taken: list[socket.socket] = []
        with rest, contextlib.suppress(BlockingIOError):
            while True:
                taken.append(rest.accept()[0])
        for one in taken:
            with contextlib.suppress(OSError):  # it has left again
                await asyncio.get_running_loop().connect_accepted_socket(self._connected, one)

    async def _tend(self) -> None:
        """Looks for what is overdue, keeps the date of the answers, and tries for a port."""

        loop = asyncio.get_running_loop()
        limits = self.settings.connections
        tick_s = min(_TICK_S, limits.head_s / 2, limits.request_s / 2)
        bind_s = loop.time() + self.settings.bind_again_s
        while True:
            await asyncio.sleep(tick_s)
            self._dated()
            now_s = loop.time()
            for connection in self._connections():
                connection.overdue(now_s)
            if self._listener is None and self._drain is None and now_s >= bind_s:
                bind_s = now_s + self.settings.bind_again_s
                await self._try_to_listen()

    def _dated(self) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]

    def _connections(self) -> list[DoorProtocol]:
        return [one for one in self._state.connections if isinstance(one, DoorProtocol)]

    # --- requests ----------------------------------------------------------------------------

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._application is not None, "it is opened"
        if self._state.draining and scope["path"] == "/readyz":
            await _refuse(scope, send, Unavailable("this server is stopping; ask another one"))
            return
        if scope["path"] == "/healthz":
            send = _named(send, self.url.door_id)
        if self._places.locked() and self._waiting >= self.settings.waiting_max:
            await _refuse(scope, send, self._full())
            return
        if self._places.locked():
            self._waiting += 1
            try:
                await self._places.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._places.acquire()  # at once
        try:
            await self._application(scope, receive, send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise
            # The client has left, and the connection has ended this: nobody is to be told.
        finally:
            self._places.release()

    def _full(self) -> LakebusError:
        settings = self.settings
        return Backpressure(
            f"this server works on {settings.running_max} requests and {settings.waiting_max} more "
            "wait; send it again a little later, nothing was stored",
            retry_after_s=_RETRY_AFTER_S,
        )


def _bound(host: str, port: int) -> socket.socket:
    """Raises OSError."""

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.setblocking(False)
        made.bind((host, port))
        made.listen(_BACKLOG)  # here, because two that share a port may both be refused only now
    except OSError:
        made.close()
        raise
    return made


def _named(send: Send, door_id: str) -> Send:
    """An answer that says which lake's door this is."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"lakebus-door", door_id.encode())]
        await send(message)

    return sent


async def _refuse(scope: Scope, send: Send, error: LakebusError) -> None:
    """The answer to a request that does not reach the application."""

    status, headers, body = refusal_of(error)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
