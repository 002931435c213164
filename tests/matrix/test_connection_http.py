"""M01, and M04 as a caller sees it: HTTP over real sockets, with clients and wires that fail."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from tests.conformance.harness import total
from tests.faults.proxy import Act, Proxy, Rule, Way
from tests.matrix.connection_door import Door, answered, door, until
from tests.matrix.connection_rig import FaultyLake, lake, template  # noqa: F401 (fixtures)

_HANG_S = 20.0
_BODY = json.dumps([{"id": n, "note": "x" * 100} for n in range(100)]).encode()
_TABLES = ("bus_segment", "idem", "bus_log", "bus_lease", "bus_quarantine")


async def stored(lake: FaultyLake) -> dict[str, int]:  # noqa: F811
    connection = await asyncpg.connect(lake.database_dsn)
    try:
        return {
            name: await connection.fetchval(f"SELECT count(*) FROM lakebus.{name}")
            for name in _TABLES
        }
    finally:
        await connection.close()


@asynccontextmanager
async def wire_to(
    opened: Door,
) -> AsyncIterator[tuple[Proxy, asyncio.StreamReader, asyncio.StreamWriter]]:
    async with Proxy("127.0.0.1", opened.port, postgres=False) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.listening_port)
        yield proxy, reader, writer
        writer.close()


# --- M01: the client ------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [Act.RESET, Act.HALF_CLOSE])
@pytest.mark.parametrize("sent", [0, 1, len(_BODY) // 2, len(_BODY) - 1])
async def test_M01_a_body_that_breaks_off_leaves_no_key_and_no_entry(
    lake: FaultyLake,  # noqa: F811
    act: Act,
    sent: int,
) -> None:
    await lake.create()
    async with door(await lake.opened()) as opened:
        head = opened.request_head(key="k", length=len(_BODY))
        async with wire_to(opened) as (proxy, _reader, writer):
            broken = proxy.arm(Rule(act=act, way=Way.TO_SERVER, after_bytes=len(head) + sent))
            writer.write(head + _BODY)
            await asyncio.wait_for(broken.struck(), _HANG_S)
            await until(lambda: opened.budget.held_bytes == 0)
            assert set((await stored(lake)).values()) == {0}
        answer = await opened.send(json.loads(_BODY), key="k")
        assert (answer.status_code, answer.json()["replayed"]) == (202, False)
        assert total(dict(await lake.bus.ends())) == 1
    await lake.audited()
    assert sum((await lake.rows_by_entry()).values()) == 100


async def test_M01_a_client_that_half_closes_after_its_request_gets_its_answer_or_is_gone(
    lake: FaultyLake,  # noqa: F811
) -> None:
    # The body is whole, so either is right; what is not: a second entry.
    await lake.create()
    async with door(await lake.opened()) as opened:
        async with wire_to(opened) as (_, reader, writer):
            writer.write(opened.request_head(key="k", length=len(_BODY)) + _BODY)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), _HANG_S)
        answer = await opened.send(json.loads(_BODY), key="k")
        assert answer.status_code == 202
        assert total(dict(await lake.bus.ends())) == 1
    await lake.audited()


async def test_M01_a_body_that_stalls_is_refused_at_its_time_limit(
    lake: FaultyLake,  # noqa: F811
) -> None:
    await lake.create()
    async with door(await lake.opened()) as opened:
        head = opened.request_head(key="k", length=len(_BODY), timeout_ms=300)
        async with wire_to(opened) as (proxy, reader, writer):
            proxy.arm(Rule(act=Act.HOLD, way=Way.TO_SERVER, after_bytes=len(head) + 1_000))
            began_s = time.monotonic()
            writer.write(head + _BODY)
            status, headers, document = await asyncio.wait_for(answered(reader), _HANG_S)
            assert time.monotonic() - began_s < 5
            assert (status, document["code"], document["phase"]) == (503, "unavailable", "body")
            assert document["retryable"]
            assert int(headers["retry-after"]) >= 1
            assert set((await stored(lake)).values()) == {0}
        assert (await opened.send(json.loads(_BODY), key="k")).status_code == 202
    await lake.audited()


async def test_M01_a_slow_body_within_its_limit_is_accepted(
    lake: FaultyLake,  # noqa: F811
) -> None:
    await lake.create()
    opened = door(await lake.opened())
    async with opened as server, wire_to(server) as (proxy, reader, writer):
        proxy.set_bandwidth(Way.TO_SERVER, 60_000)
        writer.write(server.request_head(key="k", length=len(_BODY)) + _BODY)
        status, _, document = await asyncio.wait_for(answered(reader), _HANG_S)
        assert (status, document["receipt"]["rows"]) == (202, 100)
    await lake.audited()


# --- M04: the catalog -----------------------------------------------------------------------------


async def test_M04_the_caller_hears_outcome_unknown_and_its_retry_is_the_replay(
    lake: FaultyLake,  # noqa: F811
) -> None:
    await lake.create()
    wired = await lake.wired()
    async with door(wired.lake) as opened:
        for keyed in (True, False):
            key = "k" if keyed else None
            wired.proxy.arm(Rule(act=Act.CUT, sql="append_group("))
            answer = await opened.send([{"id": 1}], key=key)
            document = answer.json()
            assert (answer.status_code, document["code"]) == (503, "outcome_unknown")
            assert document["retryable"] == keyed  # without a key it must not be sent again
            assert int(answer.headers["retry-after"]) >= 1
        assert total(dict(await lake.bus.ends())) == 2
        answers = [await opened.send([{"id": 1}], key="k") for _ in range(2)]
        assert [a.headers["idempotent-replayed"] for a in answers] == ["true", "true"]
        assert [a.json()["replayed"] for a in answers] == [True, True]
        assert answers[0].json()["receipt"] == answers[1].json()["receipt"]
        other = await opened.send([{"id": 2}], key="k")
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")
        assert total(dict(await lake.bus.ends())) == 2
    await lake.audited()
    assert sum((await lake.rows_by_entry()).values()) == 2
