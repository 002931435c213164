"""A process that answers one query under its own pin; its parent may stop it in between.

Told on its standard input, in JSON: where the lake is, which snapshot. Says `first` once it has the
first part of the answer, waits for a line, reads the rest, and says how that ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from lakebus.errors import LakebusError
from storage.engine.engine import QueryEngine
from storage.engine.plans import ParsedStatement, QueryPlan
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.postgres import PostgresLake
from storage.reading.holds import Pins
from storage.reading.pins import PinKeeper, PinSettings
from storage.reading.query import Answering, QueryAnswer, QueryRequest
from storage.reading.resolve import SnapshotChoice
from tests.conformance.harness import SUITE_SETTINGS, LakeView
from tests.conformance.sql import Replica, everything

PIN = PinSettings(renew_s=0.2, ttl_s=2.0, margin_s=0.5)
#: Far more than what is buffered on its way, file after file.
LONG_SQL = "SELECT id, repeat('x', 3000) AS pad FROM t"


class Gated:
    """An engine that begins no query before `gate` is set; `reached`: one is at the gate."""

    def __init__(self, engine: QueryEngine) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.reached = asyncio.Event()
        self._engine = engine

    async def parse(self, sql: str) -> ParsedStatement:
        return await self._engine.parse(sql)

    async def execute(self, plan: QueryPlan) -> Answering:
        self.reached.set()
        await self.gate.wait()
        return await self._engine.execute(plan)


@asynccontextmanager
async def open_reader(
    dsn: str, objects: Path, temporary: Path, *, pins: Pins | None = None
) -> AsyncIterator[tuple[Replica, PinKeeper, Gated]]:
    """The read path of a process. `pins` replaces its keeper in the path."""

    async with AsyncExitStack() as stack:
        lake = await PostgresLake.open(dsn, bus_settings=SUITE_SETTINGS)
        stack.push_async_callback(lake.close)
        engine = QueryEngine(
            EngineSettings(
                allowed_directory=str(objects),
                temp_directory=str(temporary),
                spare=False,
                threads=1,
            )
        )
        await engine.start()
        stack.push_async_callback(engine.stop)
        keeper = PinKeeper(upkeep=lake.upkeep, head=lake.catalog.head, settings=PIN)
        keeper.start()
        stack.push_async_callback(keeper.stop)
        gated = Gated(engine)
        view = LakeView(lake.bus, lake.catalog, lake.jobs, lake.upkeep)
        replica = Replica(
            view,
            codec=lake.codec,
            engine=gated,
            store=LocalObjectStore(objects),
            pins=pins or keeper,
        )
        yield await stack.enter_async_context(replica), keeper, gated


async def begin(replica: Replica, snapshot_id: int) -> QueryAnswer:
    """The long query, with its first part read."""

    choice = SnapshotChoice(snapshot_id=snapshot_id)
    answer = await replica.service.query(QueryRequest(LONG_SQL, snapshot=choice), everything)
    await answer.__anext__()
    return answer


async def _serve(told: dict[str, Any]) -> dict[str, object]:
    folders = Path(told["objects"]), Path(told["temporary"])
    async with open_reader(told["dsn"], *folders) as (replica, _, _):
        answer = await begin(replica, told["snapshot_id"])
        print("first", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        parts = 0
        try:
            async for _ in answer:
                parts += 1
        except LakebusError as error:
            return {"parts": parts, "code": error.code, "detail": error.detail}
        finally:
            await answer.aclose()
        return {"parts": parts, "rows": answer.row_count}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_serve(json.loads(sys.stdin.readline())))), flush=True)
