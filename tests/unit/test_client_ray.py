"""connect("ray"): the client's calls through Serve's handles, without a cluster.

The handle is a fake that does with its arguments and items what Ray does (pickles them, large
buffers out of band) and runs the serving side on the client's own loop, over a lake in memory.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pyarrow as pa
import pytest

import lakebus
from lakebus import client_ray_calls
from lakebus.client import Client
from lakebus.client_errors import AnswerTruncated
from lakebus.client_http import SCOPE, CallScope, TransportFailed
from lakebus.client_rows import encode_rows
from lakebus.errors import (
    Backpressure,
    BodyTooLarge,
    Cancelled,
    Forbidden,
    IdempotencyConflict,
    MalformedBody,
    MalformedRequest,
    OutcomeUnknown,
    RateLimited,
    ResultTooLarge,
    RowsInvalid,
    TableNotFound,
    Unauthenticated,
    Unavailable,
)
from serve_app import handle_calls
from serve_app.dependencies import HttpLimits
from storage.ingesting.grants import Grant
from storage.ingesting.requests import IngestAnswer, IngestRequest
from storage.ingesting.service import IngestService
from tests.unit.http_rig import Server, server

with warnings.catch_warnings():
    # Ray Serve's own modules use what pydantic has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, RayServeException

    from lakebus import client_ray
    from lakebus.client_ray import Window

TABLE = pa.table({"id": pa.array(range(20_000), pa.int32()), "note": ["n"] * 20_000})


def on_loop(work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, client_ray._loop()).result(timeout=60)


def through_ray(value: Any) -> Any:
    """As it comes out in another process: large buffers as views of sealed memory."""

    buffers: list[Any] = []
    plain = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    sealed = [memoryview(bytes(one.raw())) for one in buffers]
    return pickle.loads(plain, buffers=sealed)


class Items:
    """What a handle answers with."""

    def __init__(self, items: Any) -> None:
        self._items = items
        self.cancelled = False

    async def __anext__(self) -> Any:
        return through_ray(await anext(self._items))

    def cancel(self) -> None:
        self.cancelled = True
        asyncio.get_running_loop().create_task(self._items.aclose())


class Handle:
    """Of both applications. `faults` are raised instead of calling, or after the call was done
    (`after`); None lets a call pass."""

    def __init__(self, made: Server) -> None:
        self.made = made
        self.calls: list[tuple[str, str]] = []
        self.faults: list[Exception | None] = []
        self.after: list[Exception | None] = []
        self.last: Items | None = None

    def of(self, application: str) -> Callable[..., Items]:
        def call(head: Any, body: Any) -> Items:
            self.calls.append((application, head["target"].partition("?")[0]))
            fault = self.faults.pop(0) if self.faults else None
            if fault is not None:
                raise fault
            answering = handle_calls.answer_call(self.made.app, through_ray(head), body)
            dies = self.after.pop(0) if self.after else None
            self.last = Items(answering if dies is None else _dying(answering, dies))
            return self.last

        return call


async def _dying(items: Any, error: Exception) -> AsyncIterator[Any]:
    async for _ in items:
        pass
    raise error
    yield


@pytest.fixture(scope="module")
def made() -> Iterator[Server]:
    stack = AsyncExitStack()

    async def start() -> Server:
        found = await stack.enter_async_context(server(limits=HttpLimits(body_bytes_max=1 << 20)))
        await found.create()
        return found

    found = on_loop(start())
    yield found
    on_loop(stack.aclose())


@pytest.fixture
def handle(made: Server, monkeypatch: pytest.MonkeyPatch) -> Handle:
    monkeypatch.setattr(ray, "put", through_ray)
    monkeypatch.setattr(client_ray, "_check_inside", lambda: None)
    found = Handle(made)
    monkeypatch.setattr(client_ray, "_serve_handle", found.of)
    return found


@pytest.fixture
def client(handle: Handle) -> Iterator[Client]:
    with lakebus.connect("ray", handle.made.key, timeout_s=20) as found:
        yield found


# --- the same calls ----------------------------------------------------------------------------


def test_A3_a_table_is_one_entry_by_whichever_way_its_key_comes(
    client: Client, handle: Handle
) -> None:
    sent = client.ingest("events", TABLE, key="by-ray")
    assert (sent.receipt.rows, sent.replayed) == (20_000, False)
    assert client.ingest("events", TABLE, key="by-ray").replayed
    content, media_type = encode_rows(TABLE)
    again = on_loop(handle.made.send(content, key="by-ray", content_type=media_type)).json()
    assert again["replayed"]
    assert again["receipt"]["payload_fingerprint"] == sent.receipt.payload_fingerprint
    with pytest.raises(IdempotencyConflict):
        client.ingest("events", [{"id": 1}], key="by-ray")


def test_an_arrow_body_is_read_where_it_lies(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[Any] = []
    accept = IngestService.accept

    async def watched(self: IngestService, request: IngestRequest) -> IngestAnswer:
        bodies.append(request.body)
        return await accept(self, request)

    put: list[Any] = []

    def keep(body: Any) -> Any:
        put.append(through_ray(body))
        return put[-1]

    monkeypatch.setattr(ray, "put", keep)
    monkeypatch.setattr(IngestService, "accept", watched)
    client.ingest("events", TABLE)
    client.ingest("events", [{"id": n} for n in range(20_000)])
    arrow, text = bodies
    assert isinstance(arrow, memoryview)
    assert arrow.readonly
    assert pa.py_buffer(arrow).address == pa.py_buffer(put[0]).address
    assert isinstance(text, bytes)
    assert len(put) == 2


def test_rows_of_every_kind_and_all_other_calls_go_through(client: Client, handle: Handle) -> None:
    assert client.ingest("events", {"id": 1, "amount": "1.50"}).receipt.rows == 1
    assert client.ingest("events", (b"id\n7\n8\n", "text/csv")).receipt.rows == 2
    made = client.create_table("of_jobs", {"id": "bigint"})
    assert made["name"] == "of_jobs"
    assert client.ingest("of_jobs", [{"id": 2}]).receipt.rows == 1
    assert {"events", "of_jobs"} <= {table["name"] for table in client.tables()}
    with client.writer("events", rows_max=5_000, senders=3) as writer:
        writer.write(TABLE)
        assert (writer.flush().rows, writer.written.batches) == (20_000, 4)
    assert client.query("SELECT 1").rows == [[1]]
    assert set(handle.calls) >= {("query", "/v1/query"), ("api", "/v1/tables")}
    assert all((app == "query") == (path == "/v1/query") for app, path in handle.calls)


def test_A9_errors_are_those_of_http_and_nothing_is_stored(client: Client, handle: Handle) -> None:
    made = handle.made
    with pytest.raises(RowsInvalid) as invalid:
        client.ingest("events", pa.table({"id": ["x"] * 3}))
    assert len(invalid.value.members["errors"]) == 3
    with pytest.raises(TableNotFound):
        client.ingest("nowhere", TABLE)
    with pytest.raises(TableNotFound, match="tä ble"):
        client.table("tä ble")
    with pytest.raises(BodyTooLarge):
        client.ingest("events", pa.table({"id": range(200_000)}))
    content, media_type = encode_rows(TABLE)
    with pytest.raises(MalformedBody, match="end mark"):
        client.ingest("events", (content[:-8], media_type))
    with pytest.raises(Unauthenticated):
        lakebus.connect("ray", "lbk_some_body").tables()
    reader = lakebus.connect("ray", on_loop(made.new_key(Grant("query"), principal="reader")))
    with pytest.raises(Forbidden):
        reader.ingest("events", TABLE)


def test_A11_bytes_in_flight_are_counted(client: Client, handle: Handle) -> None:
    budget = handle.made.budget
    taken = budget._limit_bytes - 1
    budget.add(999, taken)
    try:
        with pytest.raises(Backpressure):
            client.ingest("events", TABLE, timeout_s=0.5)
    finally:
        budget.give(999, taken)
    assert budget.held_bytes == 0


# --- what goes wrong on the way ----------------------------------------------------------------


def test_A6_a_replica_that_dies_in_mid_call_is_asked_again_with_the_same_key(
    client: Client, handle: Handle
) -> None:
    handle.after = [RayActorError("the replica is gone")]
    sent = client.ingest("events", TABLE)
    assert sent.replayed, "the first attempt had arrived"
    handle.faults = [RayServeException("no replica"), None]
    assert not client.ingest("events", TABLE).replayed
    handle.after = [RayActorError("gone")] * 50
    with pytest.raises(OutcomeUnknown):
        client.ingest("events", TABLE, timeout_s=0.3)


def test_a_cluster_without_lakebus_is_unavailable(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(application: str) -> Any:
        raise RayServeException("there is no Serve instance")

    monkeypatch.setattr(client_ray, "_serve_handle", nothing)
    with pytest.raises(Unavailable, match="no lakebus is served"):
        lakebus.connect("ray", "lbk_some_body", timeout_s=0.2).tables()


def test_a_full_queue_is_an_error_that_is_tried_again(client: Client, handle: Handle) -> None:
    full = BackPressureError(1, 1, 429, 0.01)
    handle.faults = [full]
    assert client.tables()
    handle.faults = [full] * 50
    hurried = lakebus.connect("ray", handle.made.key, timeout_s=0.2)
    with pytest.raises(RateLimited):
        hurried.tables()


def test_D9_an_answer_that_breaks_off_is_no_shorter_answer(client: Client, handle: Handle) -> None:
    engine = handle.made.engine
    usual = engine.parts
    try:
        engine.parts = [b"x" * 600_000, ValueError("the engine is gone")]
        with pytest.raises(AnswerTruncated):
            client.query("SELECT 1")
        assert len([path for _, path in handle.calls if path == "/v1/query"]) == 2
    finally:
        engine.parts = usual


def test_an_answer_that_is_too_large_for_the_store_says_what_to_use(
    client: Client, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle_calls, "ANSWER_BYTES_MAX", 1_000_000)
    engine = handle.made.engine
    usual = engine.parts
    try:
        engine.parts = [b"x" * 600_000] * 4
        with pytest.raises(ResultTooLarge, match="by HTTP"):
            client.query("SELECT 1")
    finally:
        engine.parts = usual


def test_D9_a_call_that_is_cancelled_ends_the_work_on_the_server(
    client: Client, handle: Handle
) -> None:
    engine = handle.made.engine
    gate = on_loop(_event())
    engine.gate, scope = gate, CallScope()
    engine.executing.clear()
    ended: list[BaseException] = []

    def ask() -> None:
        SCOPE.set(scope)
        try:
            client.query("SELECT 1")
        except Cancelled as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        on_loop(engine.executing.wait())
        scope.cancel()
        thread.join(timeout=60)
        assert len(ended) == 1
        on_loop(asyncio.wait_for(engine.results[-1].closed.wait(), 60))
        assert handle.last is not None
        assert handle.last.cancelled
    finally:
        engine.gate = None
        thread.join(timeout=60)


async def _event() -> asyncio.Event:
    return asyncio.Event()


def test_outside_of_a_cluster_the_error_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(MalformedRequest, match=r"ray\.init"):
        lakebus.connect("ray", "lbk_some_body")
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(MalformedRequest, match="Ray Client"):
        lakebus.connect("ray", "lbk_some_body")


def test_a_closed_client_and_a_pickled_one(client: Client, handle: Handle) -> None:
    with pickle.loads(pickle.dumps(client)) as other:
        assert other.url == "ray"
        assert other.tables()
    with pytest.raises(MalformedRequest, match="closed"):
        other.tables()


# --- the window --------------------------------------------------------------------------------


def test_the_window_bounds_calls_and_bytes_in_order_of_arrival() -> None:
    window = Window(calls_max=2, bytes_max=100)
    far = time.monotonic() + 60
    entered: list[str] = []
    leave = {name: threading.Event() for name in ("a", "b", "c", "d")}
    inside = {name: threading.Event() for name in leave}

    def hold(name: str, size: int) -> None:
        with window.place(size, until_s=far):
            entered.append(name)
            inside[name].set()
            leave[name].wait(60)

    threads = []
    sizes = {"a": 60, "b": 60, "c": 1, "d": 500}
    for waiting, name in enumerate(sizes):
        thread = threading.Thread(target=hold, args=(name, sizes[name]))
        thread.start()
        threads.append(thread)
        if name == "a":
            inside["a"].wait(60)
        while len(window._queue) < waiting:  # it stands in line before the next one comes
            time.sleep(0.001)
    assert entered == ["a"], "b does not fit, and c may not pass it"
    leave["a"].set()
    inside["c"].wait(60)
    assert entered == ["a", "b", "c"]
    leave["b"].set()
    leave["c"].set()
    inside["d"].wait(60)
    leave["d"].set()
    for thread in threads:
        thread.join(60)
    assert (window._calls, window._bytes) == (0, 0)


def test_who_waits_for_the_window_ends_in_time_and_when_cancelled() -> None:
    window = Window(calls_max=1, bytes_max=100)
    scope = CallScope()
    with window.place(1, until_s=time.monotonic() + 60):
        with pytest.raises(TransportFailed) as late, window.place(1, until_s=time.monotonic()):
            raise AssertionError
        assert not late.value.sent
        threading.Timer(0.05, scope.cancel).start()
        far = time.monotonic() + 60
        with pytest.raises(Cancelled), window.place(1, until_s=far, scope=scope):
            raise AssertionError
    with window.place(1, until_s=time.monotonic()):
        pass


def test_the_form_of_calls_is_small_where_the_content_is() -> None:
    assert client_ray_calls.shared(b"x" * 10) == b"x" * 10
    large = client_ray_calls.shared(bytes(client_ray_calls.SHARED_BYTES_MIN))
    assert isinstance(large, pickle.PickleBuffer)
    assert client_ray_calls.application_of("/v1/query?sql=x") == client_ray_calls.QUERY
    assert client_ray_calls.application_of("/v1/queries") == client_ray_calls.API
