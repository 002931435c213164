"""The client's calls inside a Ray cluster: through Serve's handles and the shared-memory store.

A call takes the way of `lakebus.client_ray_calls` instead of a connection, and everything else of
the client stays as it is: keys, retries, budgets, errors, cancelling. Serve's handles, and not the
replicas' actors, because they know which replicas are well, which of them drain, and how much each
has to do; and they need no namespace. A body goes into Ray's object store once an attempt, from
where the replica reads it; it is let go of when the answer begins, and rows are durable then.

Handles belong to the event loop on which they were first used, so all of them live on one loop, in
a thread of its own, for as long as the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from lakebus.client_forms import error_of
from lakebus.client_http import SCOPE, CallScope, Exchange, Reply, TransportFailed
from lakebus.client_ray_calls import METHOD, AnswerPart, RequestHead, application_of, shared
from lakebus.errors import MalformedRequest

#: What one client has in flight: bodies in the object store that wait for their answers.
CALLS_MAX = 16
BYTES_MAX = 64 * 1024 * 1024

_T = TypeVar("_T")
#: The handle of an application: called with head and body, it gives the answer's items.
Handle = Callable[[RequestHead, Any], Any]


class RayConnections:
    """The way to the stack of the Ray cluster that this process is part of. May be used by several
    threads. Raises MalformedRequest outside of a cluster."""

    def __init__(self) -> None:
        _check_inside()
        self._handles: dict[str, Handle] = {}
        self._window = Window(calls_max=CALLS_MAX, bytes_max=BYTES_MAX)
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Exchange:
        """One request and its whole answer. Raises TransportFailed, Cancelled, and the error in
        which the answer ended."""

        with self.open(method, target, body, headers, timeout_s=timeout_s) as answer:
            return Exchange(answer.status, bytes(answer.read()), answer.retry_after_s)

    def open(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> RayAnswer:
        """One request, and its answer as far as the head. Raises TransportFailed, Cancelled,
        MalformedRequest."""

        if self._closed:
            raise MalformedRequest("the client is closed: make a new one")
        _check_inside()  # Ray would start a cluster of its own for whoever has left this one
        until_s = time.monotonic() + timeout_s
        head: RequestHead = {"method": method, "target": target, "headers": [*headers.items()]}
        scope = SCOPE.get()
        with self._window.place(len(body), until_s=until_s, scope=scope):
            items = _Items(self._handle(application_of(target)), timeout_s)
            try:
                first = items.begin(head, body, until_s, scope)
            except BaseException:
                # Whatever it was, the next attempt asks Serve anew.
                self._handles.clear()
                raise
        return RayAnswer(items, first, scope)

    def _handle(self, application: str) -> Handle:
        handle = self._handles.get(application)
        if handle is None:
            try:
                handle = _serve_handle(application)
            except (RayServeException, RayError, KeyError) as error:
                raise TransportFailed(
                    f"no lakebus is served on this Ray cluster ({_short(error)})", sent=False
                ) from error
            self._handles[application] = handle
        return handle


def _check_inside() -> None:
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        raise MalformedRequest(
            "this process reaches Ray through ray:// (Ray Client), where nothing is shared: run"
            " this in a task or an actor, or connect to the address of the server, http://host:8350"
        )
    if not ray.is_initialized():
        raise MalformedRequest(
            'this process is not part of a Ray cluster: lakebus.connect("ray", …) is for tasks,'
            " actors and drivers of the cluster that serves lakebus, after ray.init(address=…);"
            " everywhere else connect to the address of the server, http://host:8350"
        )


def _serve_handle(application: str) -> Handle:
    """Raises what Serve raises."""

    found = serve.get_deployment_handle(application, application)

    def call(head: RequestHead, body: Any) -> Any:
        # By reference, whatever the job's environment says: over gRPC messages end at 4 MiB.
        streaming = found.options(method_name=METHOD, stream=True, _by_reference=True)
        return streaming.remote(head, body)

    return call


# --- one loop for all handles -----------------------------------------------------------------


_starting = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        return _started()


@functools.cache
def _started() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lakebus-ray", daemon=True).start()
    return loop


def _on_loop(work: Coroutine[Any, Any, _T], scope: CallScope | None) -> _T:
    """Raises what the work raises, and Cancelled."""

    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        if scope is not None:
            scope.enter(future.cancel)
        return future.result()
    except CancelledError as error:
        if scope is not None:
            scope.check()
        raise TransportFailed("the call was cancelled by Ray", sent=True) from error
    except BaseException:
        future.cancel()
        raise
    finally:
        if scope is not None:
            scope.leave()


# --- answers ----------------------------------------------------------------------------------


class _Items:
    """The items of one answer. Whoever stops reading closes them, which ends the work there."""

    def __init__(self, handle: Handle, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s
        self._items: Any = None

    def begin(self, head: RequestHead, body: bytes, until_s: float, scope: CallScope | None) -> Any:
        """The first item. Raises TransportFailed, Cancelled."""

        given: Any = shared(body)
        if not isinstance(given, bytes):
            # Once, from this thread: the loop is for messages.
            given = _put(given)
        return _on_loop(self._next(until_s, lambda: self._handle(head, given)), scope)

    def next(self, scope: CallScope | None) -> Any:
        """One more. Waits as long for it as for the first. Raises TransportFailed, Cancelled."""

        return _on_loop(self._next(time.monotonic() + self._timeout_s), scope)

    def close(self) -> None:
        items, self._items = self._items, None
        if items is not None:
            _loop().call_soon_threadsafe(items.cancel)

    async def _next(self, until_s: float, begin: Callable[[], Any] | None = None) -> Any:
        answered = begin is None
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                if begin is not None:
                    self._items = begin()
                return await anext(self._items)
        except StopAsyncIteration:
            self._items = None
            raise TransportFailed(
                "the answer ended before its end", sent=True, answered=answered
            ) from None
        except BackPressureError as error:
            return {"status": 429, "headers": _retry_after(error), "body": [], "last": True}
        except TimeoutError as error:
            self._cancel()
            raise TransportFailed("no answer in time", sent=True, answered=answered) from error
        except asyncio.CancelledError:
            self._cancel()
            raise
        except (RayServeException, RayError, RuntimeError) as error:
            self._items = None
            raise TransportFailed(_short(error), sent=True, answered=answered) from error

    def _cancel(self) -> None:
        items, self._items = self._items, None
        if items is not None:
            items.cancel()


def _put(body: Any) -> Any:
    """Raises TransportFailed."""

    try:
        return ray.put(body)
    except RayError as error:
        raise TransportFailed(_short(error), sent=False) from error


class RayAnswer(Reply):
    """An answer whose body is read piece by piece, as `lakebus.client_http.Answer` is. Parts that
    are large lie in the object store until they were read."""

    def __init__(self, items: _Items, first: Any, scope: CallScope | None) -> None:
        self._items: _Items | None = items
        self._scope = scope
        self._held: deque[memoryview] = deque()
        self._take(first)
        self.status = int(first["status"])
        self._headers = {name.lower(): value for name, value in first["headers"]}

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    def read(self, size: int = -1) -> bytes | memoryview:
        """At most `size` bytes, where they lie, and none only at the end; all that is left for -1.
        Raises TransportFailed when the answer broke off, and the error in which it ended."""

        if size >= 0:
            return self._some(size)
        pieces = []
        while piece := self._some(None):
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Before the end: what is done for it, ends."""

        items, self._items = self._items, None
        if items is not None:
            items.close()

    def _some(self, size: int | None) -> memoryview:
        while not self._held and self._items is not None:
            try:
                self._take(self._items.next(self._scope))
            except BaseException:
                self.close()
                raise
        if not self._held:
            return memoryview(b"")
        piece = self._held.popleft()
        if size is not None and len(piece) > size:
            self._held.appendleft(piece[size:])
            piece = piece[:size]
        return piece

    def _take(self, item: AnswerPart) -> None:
        if "failed" in item:
            status, problem = item["failed"]
            raise error_of(Exchange(status, problem, None))
        self._held.extend(memoryview(piece) for piece in item["body"] if len(piece))
        if item["last"]:
            self._items = None


def _retry_after(error: BackPressureError) -> list[tuple[str, str]]:
    wait_s = error.retry_after_s
    return [] if wait_s is None else [("retry-after", str(max(1, round(wait_s))))]


def _short(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


# --- the window -------------------------------------------------------------------------------


class Window:
    """At most so many calls, and so many bytes of their bodies, at a time; others wait in the order
    in which they came. A body that is larger than all of it goes alone."""

    def __init__(self, *, calls_max: int, bytes_max: int) -> None:
        self._calls_max, self._bytes_max = calls_max, bytes_max
        self._calls = self._bytes = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def place(self, size: int, *, until_s: float, scope: CallScope | None = None) -> Iterator[None]:
        """Raises TransportFailed when none gets free in time, and Cancelled."""

        self._enter(size, until_s, scope)
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._bytes -= size
                self._changed.notify_all()

    def _enter(self, size: int, until_s: float, scope: CallScope | None) -> None:
        if scope is not None:
            scope.enter(self._wake)
        ticket = object()
        try:
            with self._changed:
                self._queue.append(ticket)
                try:
                    while not (self._queue[0] is ticket and self._fits(size)):
                        if scope is not None:
                            scope.check()
                        left_s = until_s - time.monotonic()
                        if left_s <= 0:
                            raise TransportFailed(
                                "as many calls of this client as may be are in flight", sent=False
                            )
                        self._changed.wait(left_s)
                    self._calls += 1
                    self._bytes += size
                finally:
                    self._queue.remove(ticket)
                    self._changed.notify_all()
        finally:
            if scope is not None:
                scope.leave()

    def _fits(self, size: int) -> bool:
        if not self._calls:
            return True
        return self._calls < self._calls_max and self._bytes + size <= self._bytes_max

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
