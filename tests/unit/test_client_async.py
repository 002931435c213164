"""The client for `await`: all of it, cancelled calls included."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from lakebus.client import AsyncClient, Client, connect, connect_async
from lakebus.client_errors import AnswerTruncated, RowsUnacknowledged, WriterFull
from lakebus.client_rows import encode_rows
from lakebus.errors import MalformedRequest, RowsInvalid
from lakebus.writer import Writer
from lakebus.writer_async import AsyncWriter
from tests.unit.client_rig import (
    accepted,
    answer_of,
    answering,
    body_of,
    listening,
    problem_of,
    scripted,
)
from tests.unit.http_rig import Server, server
from tests.unit.test_client_answers import HEAD, STREAM, TABLE

GENEROUS_S = 30.0


@pytest.fixture
async def lake() -> AsyncIterator[tuple[Server, str]]:
    async with server() as made, listening(made) as url:
        yield made, url


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


async def test_everything_that_the_client_has_is_there_for_await() -> None:
    client = connect_async("http://127.0.0.1:1", "k")
    for name in public(Client) - {"url"}:
        ours = getattr(client, name)
        assert callable(ours), name
        wanted = inspect.signature(getattr(Client, name)).parameters
        assert list(inspect.signature(ours).parameters) == list(wanted)[1:], name
    assert public(Writer) - {"full", "stopped", "outbox", "limits"} == public(AsyncWriter)
    await client.close()
    assert isinstance(client, AsyncClient)
    with pytest.raises(MalformedRequest, match="closed"):
        await client.tables()


@contextmanager
def slow() -> Iterator[tuple[str, threading.Event, threading.Event, list[bytes]]]:
    """A server whose answers wait for the second event; the first: a request is there."""

    asked, go = threading.Event(), threading.Event()

    def answer(request: bytes) -> bytes | None:
        asked.set()
        go.wait(GENEROUS_S)
        rows = body_of(request).count(b"\n")
        return answer_of(202, accepted(rows))

    with answering(answer) as (url, requests):
        try:
            yield url, asked, go, requests
        finally:
            go.set()


async def test_D9_a_cancelled_query_stops_on_the_server(lake: tuple[Server, str]) -> None:
    made, url = lake
    made.engine.gate = asyncio.Event()
    async with connect_async(url, made.key) as client:
        asking = asyncio.create_task(client.query("select 1"))
        await asyncio.wait_for(made.engine.executing.wait(), GENEROUS_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(made.engine.results[0].closed.wait(), GENEROUS_S)
        made.engine.gate = None
        assert (await client.query("select 1")).rows == [[1]]


async def test_D9_a_stream_that_is_left_stops_on_the_server(lake: tuple[Server, str]) -> None:
    made, url = lake
    made.engine.parts = [STREAM[: len(STREAM) // 2], b"x" * 2_000_000]
    async with connect_async(url, made.key) as client, client.query_batches("select 1") as batches:
        assert batches.schema == TABLE.schema
        async for batch in batches:
            assert batch.num_rows == 300
            break
    await asyncio.wait_for(made.engine.results[0].closed.wait(), GENEROUS_S)


async def test_batches_are_awaited_and_checked_to_their_end() -> None:
    broken = answer_of(200, STREAM[:-8], *HEAD)
    with scripted([answer_of(200, STREAM, *HEAD), answer_of(200, STREAM, *HEAD), broken]) as (
        url,
        _,
    ):
        async with connect_async(url, "k") as client:
            async with client.query_batches("select 1", after="lb1.x") as batches:
                assert (batches.token, batches.snapshot_id) == ("lb1.y", 3)
                assert [batch.num_rows async for batch in batches] == [300, 300, 300, 100]
            async with client.query_batches("select 1") as batches:
                assert (await batches.read_all()).equals(TABLE)
            async with client.query_batches("select 1") as batches:
                with pytest.raises(AnswerTruncated):
                    await batches.read_all()
            with pytest.raises(RuntimeError, match="async with"):
                _ = client.query_batches("select 1").schema


async def test_A7_rows_are_written_in_order(lake: tuple[Server, str]) -> None:
    made, url = lake
    async with connect_async(url, made.key) as client:
        await client.create_table("events", {"id": "bigint"})
        async with client.writer("events", rows_max=4) as writer:
            for n in range(6):
                assert await writer.write({"id": n}) == 1
            first = await writer.flush()
            assert await writer.write(TABLE.rename_columns(["id"]).slice(0, 30)) == 30
        assert (first.rows, writer.written.rows, writer.written.batches) == (6, 36, 10)
        assert writer.unacknowledged == ()
        assert made.entries == 10


async def test_a_full_writer_is_waited_for_without_stopping_others() -> None:
    with slow() as (url, asked, go, requests):
        async with connect_async(url, "k") as client:
            writer = client.writer("t", rows_max=1, held_batches_max=2)
            with pytest.raises(WriterFull) as full:
                await writer.write([{"id": n} for n in range(4)], timeout_s=0)
            assert full.value.members["rows_taken"] == 2
            with pytest.raises(RowsUnacknowledged, match="still being sent"):
                await writer.flush(timeout_s=0)
            waiting = asyncio.create_task(writer.write([{"id": 2}, {"id": 3}]))
            await asyncio.to_thread(asked.wait, GENEROUS_S)
            assert not waiting.done()
            go.set()
            assert await waiting == 2
            assert (await writer.close()).rows == 4
            assert (await writer.close()).rows == 4
    assert [json.loads(body_of(request))["id"] for request in requests] == [0, 1, 2, 3]


async def test_a_cancelled_task_leaves_at_once_and_its_rows_stay_in_hand() -> None:
    with slow() as (url, asked, _, _):
        async with connect_async(url, "k") as client:
            writer = client.writer("t", rows_max=1)

            async def work() -> None:
                async with writer:
                    await writer.write([{"id": 1}, {"id": 2}])
                    await asyncio.Event().wait()

            working = asyncio.create_task(work())
            await asyncio.to_thread(asked.wait, GENEROUS_S)
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            assert [batch.rows for batch in writer.unacknowledged] == [1, 1]


async def test_what_was_given_up_is_handed_back() -> None:
    wrong = answer_of(422, problem_of("rows_invalid", retryable=False, errors=[], error_count=1))
    with scripted([wrong, answer_of(202, accepted(1)), wrong]) as (url, _):
        async with connect_async(url, "k") as client:
            writer = client.writer("t", rows_max=1)
            await writer.write({"id": 1})
            with pytest.raises(RowsUnacknowledged):
                await writer.flush()
            with pytest.raises(RowsUnacknowledged) as refused:
                await writer.write({"id": 2})
            assert refused.value.members["rows_taken"] == 0
            (failed,) = writer.take_failed()
            assert isinstance(failed.error, RowsInvalid)
            (sent,) = await client.resend([failed])
            assert sent.receipt.rows == 1
            await writer.write({"id": 3})
            with pytest.raises(RowsUnacknowledged) as caught:
                await writer.close()
            assert caught.value.rows == 1
            assert await writer.stop() == caught.value.batches


def test_a_stream_of_batches_is_told_from_json() -> None:
    assert encode_rows(TABLE.to_batches(max_chunksize=300))[0] == STREAM
    with connect("http://127.0.0.1:1", "k") as client:
        assert client.url == "http://127.0.0.1:1"
