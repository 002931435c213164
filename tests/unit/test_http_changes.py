"""The change feed over HTTP (D12), with the real engine, files and roles."""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa

from storage.ingesting.grants import Grant
from tests.unit.http_rig import ARROW, Server, problem
from tests.unit.test_http_engine import lake

__all__ = ["lake"]  # the fixture
_PATH = "/v1/tables/events/changes"


async def _publish(lake: Server, count: int) -> list[int]:
    """`count` requests of two rows, each in a snapshot of its own or shared; the snapshots."""

    made = []
    for n in range(count):
        sent = await lake.send([{"id": n}, {"id": -n}], query="?wait=visible&timeout_ms=20000")
        assert sent.status_code == 200, sent.text
        made.append(sent.json()["snapshot_id"])
    return made


async def _pages(lake: Server, query: str) -> list[list[Any]]:
    found: list[list[Any]] = []
    cursor = ""
    while True:
        answer = await lake.get(f"{_PATH}?{cursor or query}&limit=3")
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert len(document["rows"]) == document["row_count"]
        found += document["rows"]
        if document["cursor"] is None:
            return found
        assert answer.headers["lakebus-changes-cursor"] == document["cursor"]
        cursor = f"cursor={document['cursor']}"


async def test_D12_a_consumer_that_asks_after_the_last_snapshot_sees_each_row_once(
    lake: Server,
) -> None:
    known = 0
    seen: list[int] = []
    for _ in range(3):
        await _publish(lake, 4)
        answer = await lake.get(f"{_PATH}?after={known}&limit=1000")
        document = answer.json()
        assert answer.status_code == 200, answer.text
        assert (document["after"], document["cursor"]) == (known, None)
        seen += [int(row[4]) for row in document["rows"]]
        known = document["until"]
        assert answer.headers["lakebus-snapshot-id"] == str(known)
    assert sorted(seen) == sorted(3 * [0, 0, 1, -1, 2, -2, 3, -3])
    nothing = await lake.get(f"{_PATH}?after={known}")
    assert nothing.json()["rows"] == []
    assert [c["name"] for c in nothing.json()["columns"]] == [
        "$snapshot", "$shard", "$position", "$row", "id", "note", "amount", "at",
    ]  # fmt: skip


async def test_D12_pages_of_a_window_are_in_order_and_whole(lake: Server) -> None:
    made = await _publish(lake, 5)
    rows = await _pages(lake, f"after={made[0]}&until={made[-1]}")
    assert len(rows) == 8
    places = [tuple(int(value) for value in row[1:4]) for row in rows]
    assert places == sorted(set(places))
    assert {int(row[0]) for row in rows} == set(made[1:])
    arrow = await lake.get(f"{_PATH}?after={made[0]}&limit=10000", accept=ARROW)
    with pa.ipc.open_stream(arrow.content) as reader:
        assert reader.read_all().num_rows == 8
    assert "lakebus-changes-cursor" not in arrow.headers


async def test_bad_windows_are_problems_that_say_what_to_change(lake: Server) -> None:
    made = await _publish(lake, 2)
    problem(await lake.get(_PATH), 400, "malformed_request")
    problem(await lake.get(f"{_PATH}?after={made[1]}&until={made[0]}"), 400, "malformed_request")
    problem(await lake.get(f"{_PATH}?after=0&limit=0"), 400, "malformed_request")
    problem(await lake.get(f"{_PATH}?after=0&limit=10001"), 400, "malformed_request")
    problem(await lake.get(f"{_PATH}?cursor=nonsense"), 400, "malformed_request")
    problem(await lake.get(f"{_PATH}?after=0&until={made[1] + 9}"), 404, "snapshot_not_found")
    problem(await lake.get(f"{_PATH}?after={made[1] + 9}"), 400, "malformed_request")
    page = (await lake.get(f"{_PATH}?after=0&limit=1")).json()
    both = await lake.get(f"{_PATH}?cursor={page['cursor']}&after=1")
    assert "leave them out" in problem(both, 400, "malformed_request")["detail"]
    missing = await lake.get("/v1/tables/nothing/changes?after=0")
    problem(missing, 404, "table_not_found")
    text = await lake.get(f"{_PATH}?after=0", accept="text/html")
    problem(text, 415, "unsupported_media_type")


async def test_D10_changes_of_a_table_without_a_grant_do_not_exist(lake: Server) -> None:
    await _publish(lake, 1)
    stranger = await lake.new_key(Grant("query", ("other_*",)), principal="stranger")
    hidden = problem(await lake.get(f"{_PATH}?after=0", api_key=stranger), 404, "table_not_found")
    absent = problem(
        await lake.get("/v1/tables/absent/changes?after=0", api_key=stranger),
        404,
        "table_not_found",
    )
    assert hidden["detail"].replace("events", "absent") == absent["detail"]
    writer = await lake.new_key(Grant("ingest"), principal="writer")
    problem(await lake.get(f"{_PATH}?after=0", api_key=writer), 403, "forbidden")


async def test_D9_the_page_stops_when_its_client_goes_away(lake: Server) -> None:
    await _publish(lake, 1)
    from tests.unit.http_rig import RawExchange

    class Stalled:
        def __init__(self) -> None:
            self.begun, self.stopped = asyncio.Event(), asyncio.Event()

        async def page(self, request: object) -> Any:
            self.begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.stopped.set()

    stalled = Stalled()
    dependencies = lake.app.dependencies
    assert dependencies is not None
    object.__setattr__(dependencies, "changes", stalled)
    exchange = RawExchange()
    headers = list(lake.headers().items())
    work = asyncio.create_task(
        exchange.run(lake.app, "GET", _PATH, headers=headers, query=b"after=0")
    )
    await asyncio.wait_for(stalled.begun.wait(), 10)
    exchange.left.set()
    await asyncio.wait_for(stalled.stopped.wait(), 0.25)
    await work
    assert exchange.status is None
