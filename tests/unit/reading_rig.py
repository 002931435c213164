"""Doubles for the read path."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Callable, Mapping

from storage.catalog.interface import Head
from storage.engine.plans import ParsedStatement, QueryPlan

EPOCH = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
HISTORY = uuid.UUID(int=1)


def head_of(
    snapshot_id: int,
    watermark: Mapping[int, int] | None = None,
    *,
    history: uuid.UUID = HISTORY,
    oldest: int = 1,
) -> Head:
    at = EPOCH + dt.timedelta(seconds=snapshot_id)
    return Head(snapshot_id, at, history, watermark or {}, at, at, oldest)


class HeadCatalog:
    """A catalog of nothing but a head row. `gate` holds reads between the moment at which they saw
    the row and their answer; `fail` is what the next reads raise."""

    def __init__(self, head: Head) -> None:
        self.row = head
        self.reads = 0
        self.fail: Callable[[], Exception] | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def head(self) -> Head:
        self.reads += 1
        seen = self.row
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fail is not None:
            raise self.fail()
        return seen


# --- real files -----------------------------------------------------------------------------------


# --- a service ------------------------------------------------------------------------------------


class FakeResult:
    """Answers with the sources it was given, as text."""

    def __init__(self, plan: QueryPlan) -> None:
        self.columns = [{"name": "sources", "type": "varchar"}]
        self.row_count: int | None = None
        self.statistics: dict[str, float] = {}
        self.closed = False
        self._chunks = [source.relation_sql.encode() for source in plan.sources.values()]

    def __aiter__(self) -> FakeResult:
        return self

    async def __anext__(self) -> bytes:
        if self._chunks:
            return self._chunks.pop(0)
        self.row_count = 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


class FakeEngine:
    """Takes a statement to be the list of tables it reads. `plans` keeps what was executed."""

    def __init__(self) -> None:
        self.plans: list[QueryPlan] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def parse(self, sql: str) -> ParsedStatement:
        await self.gate.wait()
        return ParsedStatement(sql, "select", tuple(sql.split()), (), False, False, {})

    async def execute(self, plan: QueryPlan) -> FakeResult:
        self.plans.append(plan)
        return FakeResult(plan)
