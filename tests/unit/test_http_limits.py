"""Quotas and shares at the door: what is refused, with what, until when, and what is left."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.replica_components import limit_settings
from lakebus.errors import Backpressure, RateLimited, Unavailable
from lakebus.settings import Settings
from serve_app.dependencies import HttpLimits
from serve_app.limits import Admission, LimitSettings
from serve_app.limits_bytes import ByteBudget
from storage.ingesting.grants import Grant, Principal
from storage.ingesting.quotas import Quotas
from storage.memory_clock import ManualClock
from tests.unit.http_rig import EVERYTHING, RawExchange, Server, problem, server

BODY = b'[{"id": 1}]'
PATH = "/v1/tables/events/rows"
MIB = 1024 * 1024


@asynccontextmanager
async def limited(
    *, share: float = 1.0, bytes_max: int = MIB, **settings: Any
) -> AsyncIterator[tuple[Server, ManualClock]]:
    """A server with these limits, whose clock for them is moved by hand."""

    clock = ManualClock()
    admission = Admission(LimitSettings(**settings), clock=clock)
    budget = ByteBudget(bytes_max, share=share, clock=clock)
    limits = HttpLimits(body_bytes_max=MIB, inflight_bytes_max=bytes_max)
    async with server(limits=limits, admission=admission, budget=budget) as made:
        # The table is made by hand: making it over HTTP would be a request already.
        other = await made.new_key(*EVERYTHING, principal="maker")
        made.key, key = other, made.key
        await made.create()
        made.key = key
        yield made, clock
        assert made.budget.held_bytes == 0


def refused(answer: Any, limit: str, value: float) -> dict[str, Any]:
    document = problem(answer, 429, "rate_limited")
    assert (document["limit"], document["limit_value"]) == (limit, value)
    assert document["retryable"] is True
    return document


# --- requests a second ---------------------------------------------------------------------------


async def test_the_quota_of_requests_is_refused_and_passes_after_exactly_the_time_named() -> None:
    async with limited(requests_per_s=0.5, burst_s=4.0) as (lake, clock):
        for _ in range(2):
            assert (await lake.get("/v1/tables")).status_code == 200
        answer = await lake.send([{"id": 1}], key="k")
        document = refused(answer, "requests_per_s", 0.5)
        assert document["retry_after_ms"] == 2000
        assert answer.headers["retry-after"] == "2"
        assert "0.5 requests a second" in document["detail"]
        assert lake.untouched
        clock.advance_s(1.999)
        refused(await lake.send([{"id": 1}], key="k"), "requests_per_s", 0.5)
        clock.advance_s(0.001)
        assert (await lake.send([{"id": 1}], key="k")).status_code == 202
        refused(await lake.get("/v1/tables"), "requests_per_s", 0.5)


@pytest.mark.parametrize("per_s", [0.3, 3.0, 7.0, 1000 / 3, 999.0])
async def test_the_time_named_is_true_for_any_rate_and_any_moment(per_s: float) -> None:
    clock = ManualClock()
    admission = Admission(LimitSettings(requests_per_s=per_s, burst_s=1.0), clock=clock)
    someone = Principal(1, "p", ())
    for step in range(50):
        clock.advance_s(0.000_137 * step)
        wait_s = wait_of(admission, someone)
        while wait_s == 0.0:
            wait_s = wait_of(admission, someone)
        clock.advance_s(wait_s)
        assert wait_of(admission, someone) == 0.0


def wait_of(admission: Admission, principal: Principal) -> float:
    """Takes a request if it can; else says how long it has to wait."""

    try:
        admission.enter(principal)
    except RateLimited as error:
        return error.retry_after_s or 0.0
    admission.leave(principal)
    return 0.0


async def test_a_replica_allows_its_part_of_a_quota() -> None:
    async with limited(requests_per_s=4, burst_s=1.0, replicas=2) as (lake, clock):
        for _ in range(2):
            assert (await lake.get("/v1/tables")).status_code == 200
        document = refused(await lake.get("/v1/tables"), "requests_per_s", 4)
        assert (document["replicas"], document["retry_after_ms"]) == (2, 500)
        clock.advance_s(0.5)
        assert (await lake.get("/v1/tables")).status_code == 200


async def test_quotas_are_a_principals_and_a_keys_own_where_it_has_one() -> None:
    async with limited(requests_per_s=1, burst_s=1.0) as (lake, _):
        ring = lake.keyring
        first, second = [await lake.new_key(*EVERYTHING, principal="p") for _ in range(2)]
        assert (await lake.get("/v1/tables", api_key=first)).status_code == 200
        refused(await lake.get("/v1/tables", api_key=second), "requests_per_s", 1)
        assert (await lake.get("/v1/tables")).status_code == 200  # another principal
        own = await ring.issue(principal="p", grants=EVERYTHING, quotas=Quotas(requests_per_s=2))
        free = await ring.issue(principal="p", grants=EVERYTHING, quotas=Quotas(requests_per_s=0))
        for _ in range(2):
            assert (await lake.get("/v1/tables", api_key=own.text)).status_code == 200
        refused(await lake.get("/v1/tables", api_key=own.text), "requests_per_s", 2)
        for _ in range(50):
            assert (await lake.get("/v1/tables", api_key=free.text)).status_code == 200


async def test_health_has_no_quota_and_a_wrong_key_takes_none() -> None:
    async with limited(requests_per_s=1, burst_s=1.0) as (lake, _):
        for _ in range(5):
            assert (await lake.http.get("/healthz")).status_code == 200
        problem(await lake.get("/v1/tables", api_key=lake.key[:-1] + "_"), 401, "unauthenticated")
        assert (await lake.get("/v1/tables")).status_code == 200


async def test_a_principal_has_so_many_requests_here_at_once() -> None:
    async with limited(requests_at_once=2) as (lake, _):
        holders = [RawExchange() for _ in range(2)]
        sending = [asyncio.create_task(hold(lake, one, lake.key)) for one in holders]
        await until(lambda: lake.budget.held_bytes == 20)
        answer = await lake.get("/v1/tables")
        refused(answer, "requests_at_once", 2)
        assert int(answer.headers["retry-after"]) >= 1
        other = await lake.new_key(*EVERYTHING, principal="other")
        assert (await lake.get("/v1/tables", api_key=other)).status_code == 200
        for one in holders:
            one.left.set()
        await asyncio.gather(*sending)
        assert lake.untouched
        assert (await lake.get("/v1/tables")).status_code == 200


async def test_A3_a_replay_is_answered_whatever_the_quotas_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with limited(requests_per_s=1, ingest_bytes_per_s=11, burst_s=1.0) as (lake, clock):
        first = await lake.send(BODY, key="k")
        assert first.status_code == 202
        for _ in range(3):
            again = await lake.send(BODY, key="k")
            assert (again.status_code, again.json()["replayed"]) == (202, True)
            assert again.json()["receipt"] == first.json()["receipt"]
        problem(await lake.send(b'[{"id": 2}]', key="k"), 422, "idempotency_conflict")
        for key in ("new", None):
            refused(await lake.send(BODY, key=key), "requests_per_s", 1)
        clock.advance_s(1.0)  # what was refused, or answered again, took nothing
        assert (await lake.send(BODY, key="new")).status_code == 202
        assert lake.entries == 2

        async def away(*_: Any) -> Any:
            raise Unavailable("the database does not answer")

        monkeypatch.setattr(lake.bus, "find_key", away)
        problem(await lake.send(BODY, key="k"), 503, "unavailable")


async def test_A3_a_replay_takes_no_bytes_that_are_not_there() -> None:
    async with limited(ingest_bytes_per_s=11, burst_s=1.0) as (lake, clock):
        assert (await lake.send(BODY, key="k")).status_code == 202
        again = await lake.send(gzip.compress(BODY), key="k", content_encoding="gzip")
        assert (again.status_code, again.json()["replayed"]) == (202, True)
        refused(await lake.send(BODY, key="new"), "ingest_bytes_per_s", 11)
        clock.advance_s(1.0)
        assert (await lake.send(BODY, key="new")).status_code == 202


# --- bytes of rows a second ----------------------------------------------------------------------


async def test_A11_the_quota_of_bytes_is_refused_unread_and_passes_after_the_time_named() -> None:
    async with limited(ingest_bytes_per_s=100, burst_s=1.0) as (lake, clock):
        body = b'[{"id": 1, "note": "' + b"a" * 57 + b'"}]'
        assert len(body) == 80
        assert (await lake.send(body, key="k1")).status_code == 202
        exchange = RawExchange()
        headers = headers_of(lake.key, len(body), key="k2")
        await exchange.run(lake.app, "POST", PATH, headers=headers, parts=[body])
        document = json.loads(exchange.body)
        assert (exchange.status, document["code"]) == (429, "rate_limited")
        assert (document["limit"], document["limit_value"]) == ("ingest_bytes_per_s", 100)
        assert document["retry_after_ms"] == 600
        assert dict(exchange.sent[0]["headers"])[b"retry-after"] == b"1"
        assert exchange.received == 0
        assert (lake.entries, len(lake.lake.state.keys), lake.budget.held_bytes) == (1, 1, 0)
        clock.advance_s(0.6)
        assert (await lake.send(body, key="k2")).status_code == 202
        assert (await lake.get("/v1/tables")).status_code == 200  # only rows count


async def test_A11_bytes_count_after_decompression_and_what_was_begun_is_owed() -> None:
    async with limited(ingest_bytes_per_s=1000, burst_s=1.0) as (lake, clock):
        plain = b'[{"id": 1, "note": "' + b"a" * 2977 + b'"}]'
        assert len(plain) == 3000
        answer = await lake.send(gzip.compress(plain), content_encoding="gzip")
        assert answer.status_code == 202
        assert refused(await lake.send(BODY), "ingest_bytes_per_s", 1000)["retry_after_ms"] == 2011
        clock.advance_s(2.011)
        assert (await lake.send(BODY)).status_code == 202


async def test_A11_a_body_larger_than_the_burst_passes_when_nothing_is_owed() -> None:
    async with limited(ingest_bytes_per_s=100, burst_s=1.0) as (lake, clock):
        body = b'[{"id": 1, "note": "' + b"a" * 477 + b'"}]'
        assert (await lake.send(body)).status_code == 202
        document = refused(await lake.send(body), "ingest_bytes_per_s", 100)
        assert document["retry_after_ms"] == 5000
        clock.advance_s(5.0)
        assert (await lake.send(body)).status_code == 202


# --- bytes held ----------------------------------------------------------------------------------


async def test_A11_one_principal_takes_no_more_than_its_share_of_the_bytes() -> None:
    async with limited(bytes_max=4000, share=0.75) as (lake, _):
        holders = [RawExchange() for _ in range(3)]
        sending = [asyncio.create_task(hold(lake, one, lake.key, 1000)) for one in holders]
        await until(lambda: lake.budget.held_bytes == 3000)
        answer = await lake.send(BODY, key="k")
        document = problem(answer, 429, "backpressure")
        assert (document["limit"], document["limit_value"]) == ("inflight_bytes", 3000)
        assert answer.headers["retry-after"] == "1"
        other = await lake.new_key(*EVERYTHING, principal="other")
        assert (await lake.send(BODY, api_key=other)).status_code == 202
        for one in holders:
            one.left.set()
        await asyncio.gather(*sending)
        assert (lake.entries, len(lake.lake.state.keys)) == (1, 0)


def test_A11_who_was_refused_finds_its_bytes_when_it_comes_back() -> None:
    clock = ManualClock()
    budget = ByteBudget(100, clock=clock)
    for _ in range(10):
        budget.take(1, 10, mine=0)
    with pytest.raises(Backpressure):
        budget.take(2, 30, mine=0)
    for _ in range(3):
        budget.give(1, 10)
    for _ in range(2):
        with pytest.raises(Backpressure):
            budget.take(1, 10, mine=0)  # the flood does not get what is claimed
    clock.advance_s(1.0)
    budget.take(2, 30, mine=0)
    assert (budget.held_by(1), budget.held_by(2)) == (70, 30)
    budget.give(2, 30)
    budget.take(1, 10, mine=0)  # nobody claims anything any more


def test_A11_a_claim_ends_when_nobody_comes_back() -> None:
    clock = ManualClock()
    budget = ByteBudget(100, clock=clock)
    budget.take(1, 50, mine=0)
    budget.take(1, 50, mine=0)
    with pytest.raises(Backpressure):
        budget.take(2, 50, mine=0)
    budget.give(1, 10)
    with pytest.raises(Backpressure):
        budget.take(1, 10, mine=0)
    clock.advance_s(2.0)
    budget.take(1, 10, mine=0)


def test_A11_a_request_that_is_alone_is_let_in_however_large() -> None:
    budget = ByteBudget(100, share=0.5)
    budget.take(1, 80, mine=0)
    budget.take(1, 800, mine=80)
    with pytest.raises(Backpressure):
        budget.take(2, 1, mine=0)
    budget.give(1, 880)
    assert (budget.held_bytes, budget.held_by(1)) == (0, 0)


async def test_A3_a_replay_is_answered_while_the_bytes_are_all_taken() -> None:
    async with limited(bytes_max=2000) as (lake, _):
        first = await lake.send(BODY, key="k")
        assert first.status_code == 202
        holders = [RawExchange() for _ in range(2)]
        sending = [asyncio.create_task(hold(lake, one, lake.key, 1000)) for one in holders]
        await until(lambda: lake.budget.held_bytes == 2000)
        problem(await lake.send(BODY, key="new"), 429, "backpressure")
        problem(await lake.send(BODY), 429, "backpressure")
        again = await lake.send(BODY, key="k")
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json()["receipt"] == first.json()["receipt"]
        squeezed = await lake.send(gzip.compress(BODY), key="k", content_encoding="gzip")
        assert squeezed.json()["receipt"] == first.json()["receipt"]
        problem(await lake.send(b'[{"id": 2}]', key="k"), 422, "idempotency_conflict")
        stranger = await lake.new_key(*EVERYTHING, principal="stranger")
        problem(await lake.send(BODY, key="k", api_key=stranger), 429, "backpressure")
        assert lake.budget.held_bytes == 2000
        for one in holders:
            one.left.set()
        await asyncio.gather(*sending)
        assert (lake.entries, len(lake.lake.state.keys)) == (1, 1)


async def test_A3_the_refusal_is_not_uttered_while_the_key_cannot_be_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with limited(bytes_max=1000) as (lake, _):
        holder = RawExchange()
        sending = asyncio.create_task(hold(lake, holder, lake.key, 1000))
        await until(lambda: lake.budget.held_bytes == 1000)

        async def away(*_: object) -> Any:
            raise Unavailable("away")

        monkeypatch.setattr(lake.bus, "find_key", away)
        problem(await lake.send(BODY, key="k"), 503, "unavailable")
        holder.left.set()
        await sending


async def test_A11_bytes_are_given_back_before_the_wait_for_visibility() -> None:
    async with limited() as (lake, _):
        waiting = asyncio.create_task(lake.send(BODY, query="?wait=visible"))
        await until(lambda: lake.entries == 1)
        await until(lambda: lake.budget.held_bytes == 0)
        assert not waiting.done()
        await lake.publish()
        answer = await waiting
        assert (answer.status_code, answer.json()["visible"]) == (200, True)


# --- turns ---------------------------------------------------------------------------------------


async def test_A7_a_flood_of_rows_leaves_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async with limited(ingest_at_once=4) as (lake, _):
        gate, order = asyncio.Event(), []
        append = lake.bus.append

        async def slow(entry: Any) -> Any:
            order.append(entry.principal_id)
            if len(order) <= 30:
                await gate.wait()
            return await append(entry)

        monkeypatch.setattr(lake.bus, "append", slow)
        other = await lake.new_key(*EVERYTHING, principal="other")
        flood = [asyncio.create_task(lake.send(BODY)) for _ in range(12)]
        await until(lambda: len(order) == 12)  # alone, it is not bound
        victim = asyncio.create_task(lake.send(BODY, api_key=other))
        await until(lambda: len(order) == 13)
        flood += [asyncio.create_task(lake.send(BODY)) for _ in range(3)]
        victims = [victim, asyncio.create_task(lake.send(BODY, api_key=other))]
        await until(lambda: len(order) == 14)
        assert order[12] == order[13] != order[0]
        gate.set()
        answers = await asyncio.gather(*flood, *victims)
        assert {answer.status_code for answer in answers} == {202}


async def test_A6_a_request_whose_time_ends_in_the_queue_stored_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = ManualClock()
    late.advance_s(1e9)  # whoever has to wait is out of time
    one = LimitSettings(ingest_at_once=1, requests_all=1)
    async with server(admission=Admission(one, clock=late)) as lake:
        await lake.create()
        gate = asyncio.Event()
        entered = asyncio.Event()
        append = lake.bus.append

        async def slow(entry: Any) -> Any:
            entered.set()
            await gate.wait()
            return await append(entry)

        monkeypatch.setattr(lake.bus, "append", slow)
        first = asyncio.create_task(lake.send(BODY, key="k1"))
        await entered.wait()
        document = problem(await lake.send(BODY, key="k2"), 503, "unavailable")
        assert document["phase"] == "queue"
        assert lake.untouched
        gate.set()
        assert (await first).status_code == 202
        assert lake.entries == 1


async def test_a_query_waits_in_the_line_of_its_principal_with_its_own_bound() -> None:
    async with limited(queries_at_once=3) as (lake, _):
        reader = Grant("query")
        own = Quotas(queries_at_once=1)
        bound = await lake.keyring.issue(principal="bound", grants=[reader], quotas=own)
        plain = await lake.new_key(reader, principal="plain")
        for key in (bound.text, plain):
            answer = await lake.http.post(
                "/v1/query", json={"sql": "select 1"}, headers=lake.headers(key)
            )
            assert answer.status_code == 200, answer.text
        first, second = (plan.party for plan in lake.engine.plans)
        assert first.principal_id != second.principal_id
        assert (first.at_once_max, second.at_once_max) == (1, 3)


def test_the_settings_say_each_replicas_part() -> None:
    settings = Settings.load(
        environ={},
        flags={
            "http.ingest_replicas": 4,
            "http.query_replicas_min": 2,
            "http.query_replicas_max": 9,
            "http.ongoing_requests_max": 80,
            "limits.requests_per_s": 100,
        },
    )
    api, query = (limit_settings(settings, service) for service in ("ingest", "query"))
    assert (api.requests_per_s, api.replicas, query.replicas) == (100, 4, 2)
    assert (api.requests_at_once, api.requests_all) == (70, 80)
    assert limit_settings(settings, "server").replicas == 1


# --- by hand ---------------------------------------------------------------------------------


def headers_of(api_key: str, length: int, key: str | None = None) -> list[tuple[str, str]]:
    given = {
        "authorization": f"Bearer {api_key}",
        "content-type": "application/json",
        "content-length": str(length),
    }
    return list((given | ({} if key is None else {"idempotency-key": key})).items())


async def hold(lake: Server, exchange: RawExchange, api_key: str, length: int = 10) -> None:
    """A request that declares a body and sends none of it; its client leaves in the end."""

    headers = headers_of(api_key, length)
    await exchange.run(lake.app, "POST", PATH, headers=headers, parts=[])


async def until(what: Any) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.001)
