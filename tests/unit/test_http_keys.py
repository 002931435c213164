"""Who may call: keys, scopes, the routes that need them, and the audit log (contract D10)."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lakebus.errors import MalformedRequest, Unauthenticated, Unavailable
from serve_app.app import API_ROUTES, QUERY_ROUTES
from storage.ingesting.grants import Grant, Principal, grants_from_json
from storage.ingesting.keyring import KeyRing
from storage.ingesting.memory_keys import MemoryKeyStore
from storage.memory_clock import ManualClock
from tests.unit.http_rig import Server, problem, server

ROUTES = [*API_ROUTES, *QUERY_ROUTES]


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


def path_of(template: str) -> str:
    values = {"table": "events", "batch_id": "b1-0-0", "snapshot_id": "1", "query_id": "q"}
    values |= {"job_id": "j", "kind": "compact", "name": "kept"}
    return template.format(key_id="k", quarantine_id="1", **values)


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
async def test_every_route_but_health_needs_a_key(lake: Server, route: Any) -> None:
    answer = await lake.http.request(route.method, path_of(route.path))
    if route.path in ("/healthz", "/readyz"):
        assert answer.status_code == 200
    else:
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Basic abc",
        "Bearer lbk_aaaaaaaaaaaaaaaa_" + "a" * 43,
        "Bearer lbk_" + "a" * 9000,
        "Bearer \xff",
    ],
)
async def test_bad_keys_are_refused_alike(lake: Server, authorization: str) -> None:
    headers = [(b"authorization", authorization.encode("latin-1"))]
    for path in ("/v1/tables", "/v1/nothing", "/docs"):
        answer = await lake.http.get(path, headers=headers)
        problem(answer, 401, "unauthenticated")


async def test_a_wrong_secret_is_refused(lake: Server) -> None:
    problem(await lake.get("/v1/tables", api_key=lake.key[:-1] + "_"), 401, "unauthenticated")
    swapped = lake.key[:-1] + ("a" if lake.key[-1] != "a" else "b")
    problem(await lake.get("/v1/tables", api_key=swapped), 401, "unauthenticated")


@pytest.mark.parametrize(
    "route", [r for r in ROUTES if r.scope], ids=lambda r: f"{r.method} {r.path}"
)
async def test_every_route_checks_its_scope(lake: Server, route: Any) -> None:
    needed = route.scope.split(" and ")
    others = [Grant(s) for s in ("ingest", "create", "query", "admin") if s not in needed]
    if route.path == "/v1/visibility":
        others = [grant for grant in others if grant.scope != "ingest"]
    key = await lake.new_key(*others, principal="p")
    answer = await lake.http.request(route.method, path_of(route.path), headers=lake.headers(key))
    assert problem(answer, 403, "forbidden")["scope"] in needed


async def test_a_scope_may_be_limited_to_tables(lake: Server) -> None:
    key = await lake.new_key(Grant("ingest", ("ev*",)), Grant("query", ("*",)), principal="p")
    assert (await lake.send([{"id": 1}], api_key=key)).status_code == 202
    answer = await lake.send([{"id": 1}], table="others", api_key=key)
    assert problem(answer, 403, "forbidden")["scope"] == "ingest"
    both = await lake.send({"events": [{"id": 1}], "others": [{"id": 1}]}, table="*", api_key=key)
    problem(both, 403, "forbidden")
    assert lake.entries == 1


async def test_a_key_is_made_shown_once_used_and_revoked(lake: Server) -> None:
    made = await lake.http.post(
        "/v1/admin/keys",
        json={
            "principal": "bob",
            "scopes": [{"scope": "ingest", "tables": ["events"]}, "query"],
            "quotas": {"requests_per_s": 2.5, "ingest_bytes_per_s": 0},
        },
        headers=lake.headers(),
    )
    assert made.status_code == 201
    assert made.json()["quotas"] == {"requests_per_s": 2.5, "ingest_bytes_per_s": 0}
    key, key_id = made.json()["key"], made.json()["key_id"]
    assert (await lake.send([{"id": 1}], api_key=key)).status_code == 202
    listed = await lake.get("/v1/admin/keys")
    assert key not in listed.text
    (shown,) = [k for k in listed.json()["keys"] if k["key_id"] == key_id]
    assert shown["principal"] == "bob"
    assert shown["quotas"] == {"requests_per_s": 2.5, "ingest_bytes_per_s": 0}
    assert [k["quotas"] for k in listed.json()["keys"] if k["principal"] == "root"] == [{}]
    assert shown["last_used_at"] is not None
    gone = await lake.http.delete(f"/v1/admin/keys/{key_id}", headers=lake.headers())
    assert gone.json() == {"key_id": key_id, "revoked": True}
    problem(await lake.send([{"id": 1}], api_key=key), 401, "unauthenticated")
    problem(await lake.http.delete("/v1/admin/keys/none", headers=lake.headers()), 404, "not_found")
    records = (await lake.get("/v1/admin/audit")).json()["records"]
    assert [r["action"] for r in records[:2]] == ["key.revoke", "key.create"]
    assert records[0]["principal"] == "root"
    assert key not in str(records)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"principal": "bob"},
        {"principal": "bob", "scopes": []},
        {"principal": "bob", "scopes": ["everything"]},
        {"principal": "bob", "scopes": [{"scope": "query", "tables": []}]},
        {"principal": "bob", "scopes": [{"scope": "query", "tables": ["a b"]}]},
        {"principal": "bob", "scopes": [{"scope": "query", "table": "a"}]},
        {"principal": "bob", "scopes": [7]},
        {"principal": "", "scopes": ["query"]},
        {"principal": "b b", "scopes": ["query"]},
        {"principal": "bob", "scopes": ["query"], "expires_at": "2020-01-01T00:00:00Z"},
        {"principal": "bob", "scopes": ["query"], "expires_at": "soon"},
        {"principal": "bob", "scopes": ["query"], "label": "x" * 201},
        {"principal": "bob", "scopes": ["query"], "more": 1},
        {"principal": "bob", "scopes": ["query"], "quotas": []},
        {"principal": "bob", "scopes": ["query"], "quotas": {"requests": 1}},
        {"principal": "bob", "scopes": ["query"], "quotas": {"requests_per_s": -1}},
        {"principal": "bob", "scopes": ["query"], "quotas": {"requests_per_s": "1"}},
        {"principal": "bob", "scopes": ["query"], "quotas": {"requests_per_s": True}},
        {"principal": "bob", "scopes": ["query"], "quotas": {"requests_per_s": 1e9}},
        {"principal": "bob", "scopes": ["query"], "quotas": {"ingest_bytes_per_s": 1.5}},
        {"principal": "bob", "scopes": ["query"], "quotas": {"queries_at_once": None}},
    ],
)
async def test_bad_keys_are_not_made(lake: Server, document: Any) -> None:
    before = len((await lake.get("/v1/admin/keys")).json()["keys"])
    answer = await lake.http.post("/v1/admin/keys", json=document, headers=lake.headers())
    problem(answer, 400, "malformed_request")
    assert len((await lake.get("/v1/admin/keys")).json()["keys"]) == before


async def test_a_partial_administrator_cannot_make_keys(lake: Server) -> None:
    part = await lake.new_key(Grant("admin", ("sales.*",)), principal="part")
    for method, path in (
        ("POST", "/v1/admin/keys"),
        ("GET", "/v1/admin/keys"),
        ("DELETE", "/v1/admin/keys/x"),
        ("GET", "/v1/admin/audit"),
    ):
        answer = await lake.http.request(method, path, headers=lake.headers(part))
        assert problem(answer, 403, "forbidden")["scope"] == "admin"


# --- the key ring --------------------------------------------------------------------------------


class CountingStore(MemoryKeyStore):
    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock=clock)
        self.asked = 0
        self.away = False

    async def find(self, key_id: str) -> Any:
        self.asked += 1
        if self.away:
            raise Unavailable("away")
        return await super().find(key_id)


async def test_a_revoked_key_dies_elsewhere_within_five_seconds() -> None:
    clock = ManualClock()
    store = CountingStore(clock)
    here, there = KeyRing(store, clock=clock), KeyRing(store, clock=clock)
    issued = await here.issue(principal="p", grants=[Grant("query")])
    assert await there.authenticate(issued.text) == Principal(
        1, "p", (Grant("query"),), issued.key.key_id
    )
    await here.revoke(issued.key.key_id)
    with pytest.raises(Unauthenticated):
        await here.authenticate(issued.text)
    await there.authenticate(issued.text)
    clock.advance_s(5.0)
    with pytest.raises(Unauthenticated):
        await there.authenticate(issued.text)


async def test_the_store_is_asked_once_in_a_while() -> None:
    clock = ManualClock()
    store = CountingStore(clock)
    ring = KeyRing(store, clock=clock)
    issued = await ring.issue(principal="p", grants=[Grant("query")])
    for _ in range(100):
        await ring.authenticate(issued.text)
    assert store.asked == 1
    clock.advance_s(5.0)
    store.away = True
    with pytest.raises(Unavailable):
        await ring.authenticate(issued.text)
    store.away = False
    await ring.authenticate(issued.text)


async def test_an_expired_key_is_refused_though_remembered() -> None:
    clock = ManualClock()
    ring = KeyRing(MemoryKeyStore(clock=clock), clock=clock)
    issued = await ring.issue(
        principal="p",
        grants=[Grant("query")],
        expires_at=clock.utc_now() + dt.timedelta(seconds=1),
    )
    await ring.authenticate(issued.text)
    clock.advance_s(1.0)
    with pytest.raises(Unauthenticated):
        await ring.authenticate(issued.text)


async def test_a_key_made_elsewhere_is_known_soon() -> None:
    clock = ManualClock()
    store = CountingStore(clock)
    ring, other = KeyRing(store, clock=clock), KeyRing(store, clock=clock)
    issued = await other.issue(principal="p", grants=[Grant("query")])
    store._keys.pop(issued.key.key_id)
    with pytest.raises(Unauthenticated):
        await ring.authenticate(issued.text)
    store._keys[issued.key.key_id] = issued.key
    clock.advance_s(1.0)
    await ring.authenticate(issued.text)


def test_patterns_match_whole_names_and_nothing_more() -> None:
    grants = grants_from_json([{"scope": "query", "tables": ["sales.*", "one"]}])
    person = Principal(1, "p", grants)
    assert person.allows("query", "sales.x")
    assert person.allows("query", "one")
    for name in ("sales", "salesx", "one2", "x.one", "sales\n.x"):
        assert not person.allows("query", name)
    assert not person.allows("ingest", "one")
    with pytest.raises(MalformedRequest):
        grants_from_json("query")
