"""The direct door of query replicas: told, used by clients, and seen by Serve."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import lakebus
from cluster.api_calls import Api
from lakebus.client_query_door import is_elsewhere
from lakebus.errors import MalformedRequest, QueryTimeout, SqlError, TableNotFound
from serve_app.app import create_query_app
from serve_app.direct_protocol import DoorProtocol
from serve_app.direct_url import DoorPlace, IngestUrl
from serve_app.query import WHOLE_BYTES_MAX
from serve_app.replica_load import count_in
from tests.unit.client_rig import answer_of, problem_of
from tests.unit.doors_rig import ID, KEY, Doors, two_doors
from tests.unit.http_rig import ARROW, Server, problem, server
from tests.unit.test_direct_door import SETTINGS, URL, client, opened

QUERY = "/v1/query"


# --- the server ------------------------------------------------------------------------------


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


async def test_answers_to_queries_tell_the_door_and_the_door_answers_them(lake: Server) -> None:
    assert lake.app.dependencies is not None
    async with opened(lake.app.direct) as door:
        lake.app.dependencies = dataclasses.replace(lake.app.dependencies, door=door)
        document = {"sql": "select n from events"}
        headers = lake.headers(host="127.0.0.1:8350")
        answer = await lake.http.post(QUERY, json=document, headers=headers)
        told = f"http://127.0.0.1:{door.port}; door={URL.door_id}"
        assert answer.headers["lakebus-query-url"] == told
        assert "lakebus-ingest-url" not in answer.headers
        elsewhere = lake.headers(host="balancer.example")
        assert (
            "lakebus-query-url"
            not in (await lake.http.post(QUERY, json=document, headers=elsewhere)).headers
        )
        async with client(door) as one:
            named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
            one.send("POST", QUERY, json.dumps(document).encode(), *named)
            status, found, body = await one.answer()
            assert (status, body["rows"]) == (200, [[1]])
            assert "lakebus-query-url" not in found
            one.send("POST", QUERY, json.dumps(document).encode(), named[0])
            assert (await one.answer())[0] == 401
            one.send("GET", "/healthz")
            assert (await one.answer())[1]["lakebus-door"] == URL.door_id


async def test_the_door_of_a_query_replica_answers_sql_alone(lake: Server) -> None:
    assert lake.app.dependencies is not None
    app = create_query_app(lake.app.dependencies)
    async with opened(app.direct) as door, client(door) as one:
        one.send("GET", "/v1/tables", b"", f"authorization: Bearer {lake.key}")
        status, _, body = await one.answer()
        assert (status, body["code"]) == (404, "not_found")
        assert "query_url" in body["detail"]


async def test_D9_a_query_ends_when_the_client_of_the_door_leaves(lake: Server) -> None:
    lake.engine.gate = asyncio.Event()
    async with opened(lake.app.direct) as door:
        async with client(door) as one:
            named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
            one.send("POST", QUERY, b'{"sql": "select n from events"}', *named)
            async with asyncio.timeout(20):
                await lake.engine.executing.wait()
            assert door.working == 1
        async with asyncio.timeout(20):
            await lake.engine.results[0].closed.wait()


async def test_status_tells_where_the_query_replicas_have_their_door(lake: Server) -> None:
    assert lake.app.dependencies is not None
    headers = lake.headers(host="127.0.0.1:8350")
    found = await lake.http.get("/v1/admin/status", headers=headers)
    assert "query_url" not in found.json()
    place = DoorPlace(IngestUrl("127.0.0.1", 8350), 8352)
    lake.app.dependencies = dataclasses.replace(lake.app.dependencies, query_place=place)
    found = await lake.http.get("/v1/admin/status", headers=headers)
    assert found.json()["query_url"] == "http://127.0.0.1:8352"


async def test_a_taken_port_names_the_setting_of_this_door(lake: Server) -> None:
    async with opened(lake.app.direct) as first:
        # Without SO_REUSEPORT on the first one's side it could be shared; another address cannot.
        settings = dataclasses.replace(
            SETTINGS, host="192.0.2.1", port=first.port, port_setting="direct.query_port"
        )
        async with opened(lake.app.direct, settings) as second:
            assert not second.listening
            assert second.trouble is not None
            assert "direct.query_port" in second.trouble


class Counter:
    """What Ray Serve has of this kind."""

    def __init__(self) -> None:
        self._num_ongoing_requests = 0

    def change(self, delta: int) -> int:
        self._num_ongoing_requests += delta
        return self._num_ongoing_requests


def test_serve_counts_the_requests_of_the_door() -> None:
    """Or replicas would be taken away under load, and none be added."""

    counter, at_the_door = Counter(), [0]
    counter.change(2)
    count_in(Counter, lambda: at_the_door[0])
    assert counter.change(0) == 2
    at_the_door[0] = 3
    assert counter.change(0) == 5
    assert counter.change(1) == 6
    at_the_door[0] = 0
    assert counter.change(-1) == 2
    at_the_door[0] = 1
    assert Counter().change(0) == 1


def test_ray_serve_still_counts_under_that_name() -> None:
    """By its text: importing Serve takes seconds."""

    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "serve/_private/replica.py").read_text()
    _, _, counter = text.partition("class ReplicaMetricsManager:")
    assert "self._num_ongoing_requests += delta" in counter
    assert "RUNNING_REQUESTS_KEY: self._num_ongoing_requests" in counter


# --- the client ------------------------------------------------------------------------------

TABLE = pa.table({"n": [1, 2]})


def arrow_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return bytes(sink.getvalue())


ANSWERED = {
    "columns": [{"name": "n", "type": "integer"}],
    "rows": [[1]],
    "row_count": 1,
    "snapshot_id": 3,
    "snapshot_time": "2026-01-31T12:00:00Z",
    "visibility_token": "lb1.x",
    "statistics": {},
}


def answer_to(request: bytes, *headers: str) -> bytes:
    if f"accept: {ARROW}".encode() in request.lower():
        return answer_of(
            200,
            arrow_bytes(),
            "lakebus-snapshot-id: 3",
            "lakebus-visibility-token: lb1.x",
            *headers,
        )
    return answer_of(200, ANSWERED, *headers)


@pytest.fixture
def doors() -> Iterator[Doors]:
    with two_doors("Lakebus-Query-Url", answer_to) as made:
        yield made


Ask = Callable[[], None]


@contextmanager
def whole(doors: Doors, query_url: str | None = None) -> Iterator[Ask]:
    with lakebus.connect(doors.url, KEY, timeout_s=10, query_url=query_url) as made:

        def ask() -> None:
            assert made.query("select n").rows == [[1]]

        yield ask


@contextmanager
def streamed(doors: Doors, query_url: str | None = None) -> Iterator[Ask]:
    with lakebus.connect(doors.url, KEY, timeout_s=10, query_url=query_url) as made:

        def ask() -> None:
            assert made.query_arrow("select n").equals(TABLE)

        yield ask


@contextmanager
def command(doors: Doors, query_url: str | None = None) -> Iterator[Ask]:
    with Api(doors.url, KEY, timeout_s=10, query_url=query_url) as made:

        def ask() -> None:
            with made.stream(QUERY, {"sql": "select n"}, accept=ARROW) as found:
                assert b"".join(found.parts) == arrow_bytes()

        yield ask


each = pytest.mark.parametrize("asker", [whole, streamed, command])


@each
def test_the_door_is_learned_asked_who_it_is_and_used(doors: Doors, asker: Any) -> None:
    with asker(doors) as ask:
        for _ in range(3):
            ask()
    doors.assert_learned()


@each
def test_a_door_that_is_given_is_used_and_the_own_address_means_none(
    doors: Doors, asker: Any
) -> None:
    doors.told = None
    with asker(doors, doors.door_url) as ask:
        ask()
    assert (len(doors.served), doors.at_door) == (0, 1)
    doors.told = f"{doors.door_url}; door={ID}"
    with asker(doors, doors.url) as ask:
        ask()
        ask()
    assert (len(doors.served), doors.at_door) == (2, 1)


@each
def test_a_stranger_at_the_address_never_sees_the_key(doors: Doors, asker: Any) -> None:
    doors.door_id = "fedcba9876543210"
    with asker(doors) as ask:
        for _ in range(3):
            ask()
    assert (len(doors.served), doors.at_door) == (3, 0)


@each
@pytest.mark.parametrize(
    "refusal",
    [
        None,
        answer_of(401, problem_of("unauthenticated", retryable=False)),
        answer_of(503, problem_of("unavailable", retryable=True)),
        answer_of(502, b"Bad Gateway"),
    ],
    ids=["hangs_up", "another_lake", "ends", "no_lakebus"],
)
def test_what_the_door_leaves_open_is_asked_by_the_url(
    doors: Doors, asker: Any, refusal: bytes | None
) -> None:
    doors.refusal = refusal
    with asker(doors) as ask:
        for _ in range(3):
            ask()
    assert doors.at_door == 1  # and then it rests
    assert len(doors.served) == 3


@each
@pytest.mark.parametrize(
    ("status", "code", "raised"),
    [
        (400, "sql_error", SqlError),
        (404, "table_not_found", TableNotFound),
        (408, "query_timeout", QueryTimeout),
        (504, "query_timeout", QueryTimeout),
    ],
)
def test_what_the_door_says_of_the_query_is_the_answer(
    doors: Doors, asker: Any, status: int, code: str, raised: type[Exception]
) -> None:
    """A query that had no time left is not run a second time."""

    doors.refusal = answer_of(status, problem_of(code, retryable=False))
    with asker(doors, doors.door_url) as ask, pytest.raises(raised):
        ask()
    assert (len(doors.served), doors.at_door) == (0, 1)


def test_a_pickled_client_keeps_its_door_and_a_wrong_one_is_refused(doors: Doors) -> None:
    made = lakebus.connect(doors.url, KEY, query_url=doors.door_url)
    with made, pickle.loads(pickle.dumps(made)) as again:
        again.query("select n")
    assert (len(doors.served), doors.at_door) == (0, 1)
    with pytest.raises(MalformedRequest):
        lakebus.connect(doors.url, KEY, query_url="nonsense")


def test_rows_and_queries_have_doors_of_their_own(doors: Doors) -> None:
    with lakebus.connect(doors.url, KEY, ingest_url=doors.url) as made:
        for _ in range(2):
            made.query("select n")
    assert (len(doors.served), doors.at_door) == (1, 1)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"code": 1}', b"{}", b"nonsense"])
def test_only_a_problem_of_ours_is_believed(body: bytes) -> None:
    assert is_elsewhere(404, body)
    assert not is_elsewhere(200, body)
    assert not is_elsewhere(404, b'{"code": "table_not_found"}')


async def test_queries_through_a_door_that_drains_are_answered(lake: Server) -> None:
    """What runs is finished, and the connection ends with it."""

    lake.engine.gate = asyncio.Event()
    async with opened(lake.app.direct) as door, client(door) as one:
        named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
        one.send("POST", QUERY, b'{"sql": "select n from events"}', *named)
        async with asyncio.timeout(20):
            await lake.engine.executing.wait()
        door.begin_drain(reachable_s=0.0)
        lake.engine.gate.set()
        status, headers, body = await one.answer()
        assert (status, body["rows"]) == (200, [[1]])
        assert headers["connection"] == "close"
        assert await one.ended() == b""


async def test_a_wrong_query_has_the_same_answer_at_the_door(lake: Server) -> None:
    lake.engine.fail = SqlError("no such thing", position=7)
    answer = await lake.http.post(QUERY, json={"sql": "x"}, headers=lake.headers())
    expected = problem(answer, 400, "sql_error")
    async with opened(lake.app.direct) as door, client(door) as one:
        named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
        one.send("POST", QUERY, b'{"sql": "x"}', *named)
        status, _, body = await one.answer()
    assert status == 400
    assert {**body, "request_id": ""} == {**expected, "request_id": ""}


async def test_the_head_of_an_answer_goes_with_its_body(lake: Server) -> None:
    """And alone where there is no body, or where the client waits for leave to send its own."""

    sent: list[bytes] = []

    class Recorded(DoorProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            write = self._outlet.send

            def record(data: bytes) -> None:
                sent.append(bytes(data))
                write(data)

            self._outlet.send = record

    async with opened(lake.app.direct) as door:
        door._connected = lambda: Recorded(door._config, door._state)  # type: ignore[method-assign, arg-type]
        await door._stop_listening()
        await door._try_to_listen()
        async with client(door) as one:
            named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
            body = b'{"sql": "select n from events"}'
            one.send("POST", QUERY, body, *named)
            assert (await one.answer())[0] == 200
            (whole,) = sent
            assert whole.startswith(b"HTTP/1.1 200")
            assert whole.endswith(b"}")
            sent.clear()
            one.writer.write(b"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await one.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            sent.clear()
            one.send("POST", QUERY, b"", *named, "expect: 100-continue", length=len(body))
            assert (await one.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            one.writer.write(body)
            assert (await one.answer())[0] == 200
            assert len(sent) == 2
            sent.clear()
            lake.engine.parts = [b"[[1],", b"x" * WHOLE_BYTES_MAX, b"[2]]"]
            one.send("POST", QUERY, body, *named, "connection: close")
            head, _, rest = (await one.ended()).partition(b"\r\n\r\n")
            assert b"transfer-encoding: chunked" in head
            assert rest.endswith(b"\r\n0\r\n\r\n")
            assert sent[0].startswith(head)
            assert len(sent[0]) > len(head) + 4
