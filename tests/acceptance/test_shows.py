"""What the system must show, at a size for every day: whole stacks over HTTP, both placements.

The scenarios are those of `benchmarks/show`, which runs them at full size.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http1 import Connection
from benchmarks.show import crash, exactly_once, processes, read_after_write, time_travel
from cluster.stack_files import StackFiles
from lakebus.client import connect
from tests.acceptance.stacks import lakebus
from tests.postgres_server import new_data_dir

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LEASE_TTL_MS = "1000"
#: A new process imports Ray, Arrow and us before it works; on two busy cores that takes long.
VISIBLE_AGAIN_S = 45.0


@dataclass(frozen=True, slots=True)
class Stack:
    url: str
    api_key: str
    data_dir: Path


@pytest.fixture(scope="module", params=["together", "spread"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    folder = new_data_dir()
    settings = {
        "LAKEBUS_BUS_LEASE_TTL_MS": LEASE_TTL_MS,
        "LAKEBUS_ACTORS_PLACEMENT": request.param,
        "LAKEBUS_ACTORS_COORDINATORS": "2",
    }
    code, output, error = lakebus(
        "up", "--detach", "--port", "0", "--data-dir", str(folder), environ=settings
    )
    assert code == 0, output + error
    try:
        connection = json.loads((folder / "connection.json").read_text())
        yield Stack(connection["url"], connection["api_key"], folder)
    finally:
        code, output, error = lakebus("down", "--data-dir", str(folder))
        assert code == 0, output + error
        state = StackFiles(folder).state()
        if state is not None:
            shutil.rmtree(state.run_dir, ignore_errors=True)
        shutil.rmtree(folder)


def held(report: dict[str, Any]) -> None:
    assert report["verdict"] == "held", json.dumps(report, indent=1)


def test_A3_sixteen_clients_send_a_third_twice_in_other_encodings(stack: Stack) -> None:
    report = asyncio.run(exactly_once.run(stack.url, stack.api_key, requests=600))
    held(report)
    assert report["replayed"] >= 200


def test_D4_every_read_sees_the_last_write_it_knows(stack: Stack) -> None:
    report = asyncio.run(
        read_after_write.run(stack.url, stack.api_key, seconds=6, writers=4, readers=4)
    )
    held(report)
    assert report["reads"] > 0


def test_D12_the_change_feed_gives_each_row_once(stack: Stack) -> None:
    with connect(stack.url, stack.api_key) as client:
        client.create_table("feed", {"n": "bigint"})
        known, seen = 0, []
        for turn in range(3):
            sent = [
                client.ingest("feed", [{"n": n}, {"n": -n}], ordering_key=str(n), wait_visible=True)
                for n in range(turn * 10, turn * 10 + 10)
            ]
            newest = max(one.snapshot_id or 0 for one in sent)
            for page in client.changes("feed", after=known, until=newest, rows_max=7):
                rows = page.as_dicts()
                places = [(row["$shard"], row["$position"], row["$row"]) for row in rows]
                assert places == sorted(places)
                assert all(known < row["$snapshot"] <= newest for row in rows)
                seen += [row["n"] for row in rows]
            known = newest
    assert sorted(seen) == sorted(n * sign for n in range(30) for sign in (1, -1))


def test_D8_recorded_answers_do_not_change(stack: Stack) -> None:
    report = asyncio.run(time_travel.run(stack.url, stack.api_key, snapshots=15))
    held(report)


def test_F1_each_kind_of_process_is_killed_under_load(stack: Stack) -> None:
    together = "coordinator-0" not in str(_roles(stack))
    kinds = (*crash.TOGETHER, *crash.COMMON) if together else crash.SPREAD
    report = asyncio.run(
        crash.run(
            stack.url,
            stack.api_key,
            supervisor=processes.supervisor_of(stack.data_dir),
            kinds=kinds,
            settle_s=1.0,
        )
    )
    held(report)
    assert len(report["kills"]) == len(kinds)
    assert max(kill["visible_again_s"] for kill in report["kills"]) < VISIBLE_AGAIN_S


def _roles(stack: Stack) -> list[str]:
    async def ask() -> list[str]:
        connection = Connection(stack.url, stack.api_key)
        answer = await connection.request("GET", "/v1/admin/status")
        connection.close()
        return [actor["role"] for actor in answer.json()["actors"]]

    return asyncio.run(ask())
