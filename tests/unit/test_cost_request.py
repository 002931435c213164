"""What a request of rows takes of this process, counted: memory, not seconds.

From the body to the entry that the bus is given, with what Python and its libraries take from
Python's own allocator: decoded values, copies of bytes, and what hangs on to them. Arrow's buffers
are not in it. The bounds have air, because small objects differ between versions.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from storage.bus.interface import Accepted, AppendOutcome, NewEntry
from storage.bus.memory import MemoryBus
from storage.rows.segment import encode_segment
from tests.unit.http_rig import Server, server
from tests.unit.test_ingesting_service import request, service

#: Bytes of memory at the peak for each byte of body, by the number of requests at once.
MEASURED = {1: 5.8, 64: 1.2}
AIR = 2.0


class Sink(MemoryBus):
    """Encodes an entry, as the bus in the database does with a group."""

    async def append(self, entry: NewEntry) -> AppendOutcome:
        encode_segment([entry.parts])
        outcome = await super().append(entry)
        assert isinstance(outcome, Accepted)
        return outcome


def body(number: int) -> bytes:
    """A hundred rows, all different."""

    chance = random.Random(number)
    rows = [
        {
            "id": chance.getrandbits(53),
            "note": chance.randbytes(20).hex(),
            "amount": f"{chance.randrange(10**6)}.{chance.randrange(100):02}",
            "at": f"2026-11-23T14:{chance.randrange(60):02}:{chance.randrange(60):02}Z",
        }
        for _ in range(100)
    ]
    return json.dumps(rows).encode()


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


@pytest.mark.parametrize("at_once", [1, 64])
async def test_P22_requests_take_no_more_memory_than_they_did(lake: Server, at_once: int) -> None:
    door = service(lake, Sink(lake.lake))
    bodies = [body(number) for number in range(at_once)]
    for text in bodies[:2]:  # what is made once
        await door.accept(request(text, deadline_s=math.inf))
    size = sum(map(len, bodies))
    tracemalloc.start()
    try:
        await asyncio.gather(*(door.accept(request(text, deadline_s=math.inf)) for text in bodies))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / size <= AIR * MEASURED[at_once], f"{peak / size:.2f} bytes a byte"
