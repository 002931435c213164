"""Maintenance over HTTP: jobs, tags, what the client and the commands make of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from cluster.maintain_command import KINDS
from lakebus.clock import new_uuid
from storage.ingesting.grants import Grant
from storage.maintenance.jobs import JobStore
from storage.maintenance.registry import RUNNABLE
from storage.maintenance.service import ASKABLE
from tests.unit.command_rig import Lake, lake
from tests.unit.http_rig import Server, problem, server

__all__ = ["lake"]
RUN = "/v1/admin/maintenance/"


@pytest.fixture
async def api() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


async def post(
    api: Server, path: str, document: object = None, *, api_key: str | None = None, **more: str
) -> Any:
    content = b"" if document is None else json.dumps(document).encode()
    named = {"content_type": "application/json"} if document is not None else {}
    headers = api.headers(api_key, **named, **more)
    return await api.http.post(path, content=content, headers=headers)


async def work(
    jobs: JobStore, report: Mapping[str, Any], error: Mapping[str, Any] | None = None
) -> None:
    """What a worker does with the oldest job, as soon as there is one."""
    async with asyncio.timeout(20):
        while (claim := await jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=60)) is None:
            await asyncio.sleep(0.01)
    await jobs.finish(claim, report, error=error)


async def audited(api: Server) -> list[tuple[str, str]]:
    records = await api.keyring.store.audit_records()
    return [(record.action, record.principal) for record in reversed(records)][1:]


# --- jobs ----------------------------------------------------------------------------------


async def test_a_job_is_asked_for_run_and_looked_at(api: Server) -> None:
    answer = await post(api, RUN + "compact?table=EVENTS&dry_run=true", {"parameters": {"a": 1}})
    job = answer.json()
    assert answer.status_code == 202, job
    assert (job["kind"], job["state"], job["table"]) == ("compact", "queued", "events")
    assert (job["dry_run"], job["parameters"], job["requested_by"]) == (True, {"a": 1}, "root")
    assert (job["report"], job["error"], job["ended_at"]) == ({}, None, None)
    again = await post(api, RUN + "compact?table=events&dry_run=true", {"parameters": {"a": 1}})
    assert again.json()["job_id"] == job["job_id"]  # equal and open
    other = await post(api, RUN + "compact")
    assert other.json()["job_id"] != job["job_id"]
    assert other.json()["table"] is None

    await work(api.jobs, {"files_in": 3})
    found = (await api.get(f"/v1/admin/jobs/{job['job_id']}")).json()
    assert (found["state"], found["report"], found["attempt"]) == ("done", {"files_in": 3}, 1)
    listed = (await api.get("/v1/admin/jobs")).json()["jobs"]
    assert [one["job_id"] for one in listed] == [other.json()["job_id"], job["job_id"]]
    older = (await api.get(f"/v1/admin/jobs?limit=1&before={listed[0]['job_id']}")).json()["jobs"]
    assert older == [found]
    assert (await api.get("/v1/admin/jobs?kind=collect")).json() == {"jobs": []}
    status = (await api.get("/v1/admin/status")).json()
    assert [one["job_id"] for one in status["jobs"]] == [one["job_id"] for one in listed]
    assert await audited(api) == [("maintenance.compact", "root")] * 2


async def test_whoever_waits_gets_the_end(api: Server) -> None:
    working = asyncio.ensure_future(work(api.jobs, {"errors": 0}))
    answer = await post(api, RUN + "validate?timeout_ms=20000")
    await working
    assert answer.status_code == 200
    assert answer.json()["state"] == "done"
    answer = await post(api, RUN + "retain?timeout_ms=30")
    assert answer.status_code == 202
    job_id = answer.json()["job_id"]
    assert (await api.get(f"/v1/admin/jobs/{job_id}?timeout_ms=30")).json()["state"] == "queued"
    working = asyncio.ensure_future(work(api.jobs, {}, {"code": "corrupt", "detail": "torn"}))
    found = (await api.get(f"/v1/admin/jobs/{job_id}?timeout_ms=20000")).json()
    await working
    assert (found["state"], found["error"]) == ("failed", {"code": "corrupt", "detail": "torn"})


async def test_A3_a_key_means_one_job(api: Server) -> None:
    first = await post(api, RUN + "collect", idempotency_key="k")
    await work(api.jobs, {"files_deleted": 2})
    again = await post(api, RUN + "collect", idempotency_key="k")
    assert again.status_code == 200
    assert again.json()["job_id"] == first.json()["job_id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    problem(
        await post(api, RUN + "collect?dry_run=true", idempotency_key="k"),
        422,
        "idempotency_conflict",
    )
    problem(
        await post(api, RUN + "collect", idempotency_key="a b"), 400, "malformed_idempotency_key"
    )


async def test_what_is_wrong_is_said(api: Server) -> None:
    problem(await post(api, RUN + "delete"), 404, "not_found")
    wrong = problem(await post(api, RUN + "compact?table=event"), 404, "table_not_found")
    assert wrong["did_you_mean"] == ["events"]
    problem(await post(api, RUN + "compact?dry_run=yes"), 400, "malformed_request")
    problem(await post(api, RUN + "compact", {"table": "events"}), 400, "malformed_request")
    problem(await post(api, RUN + "compact", [1]), 400, "malformed_request")
    problem(await api.get("/v1/admin/jobs/1"), 404, "job_not_found")
    problem(await api.get(f"/v1/admin/jobs/{new_uuid()}"), 404, "job_not_found")
    problem(await api.get(f"/v1/admin/jobs?before={new_uuid()}"), 404, "job_not_found")
    problem(await api.get("/v1/admin/jobs?kind=x"), 400, "malformed_request")
    assert await api.jobs.jobs() == []


async def test_D10_all_of_it_needs_the_scope_on_every_table(api: Server) -> None:
    await post(api, "/v1/admin/tags", {"name": "t", "snapshot_id": "latest"})
    some = await api.new_key(Grant("admin", ("events",)), Grant("query"), principal="some")
    none = await api.new_key(Grant("query", ("events",)), principal="none")
    for key in (some, none):
        for method, path in (
            ("POST", RUN + "compact?table=events"),
            ("POST", RUN + "compact?table=nothing"),
            ("GET", "/v1/admin/jobs"),
            ("GET", f"/v1/admin/jobs/{new_uuid()}"),
            ("POST", "/v1/admin/tags"),
            ("GET", "/v1/admin/tags"),
            ("DELETE", "/v1/admin/tags/t"),
        ):
            answer = await api.http.request(method, path, headers=api.headers(key))
            assert problem(answer, 403, "forbidden")["scope"] == "admin", path
    assert "jobs" not in (await api.get("/v1/admin/status", api_key=some)).json()
    latest = "/v1/snapshots/latest"
    assert (await api.get(latest, api_key=some)).json()["tags"] == ["t"]
    assert (await api.get(latest, api_key=none)).json()["tags"] == []


# --- tags ----------------------------------------------------------------------------------


async def test_E8_a_tag_names_a_snapshot(api: Server) -> None:
    made = await post(api, "/v1/admin/tags", {"name": "first", "snapshot_id": 1})
    assert made.status_code == 201, made.text
    assert (made.json()["snapshot_id"], made.json()["created_by"]) == (1, "root")
    again = await post(api, "/v1/admin/tags", {"name": "first", "snapshot_id": 1})
    assert again.json() == made.json()
    newest = await post(api, "/v1/admin/tags", {"name": "now", "snapshot_id": "latest"})
    assert newest.json()["snapshot_id"] == 2
    tags = (await api.get("/v1/admin/tags")).json()["tags"]
    assert [tag["name"] for tag in tags] == ["first", "now"]
    listed = (await api.get("/v1/snapshots")).json()["snapshots"]
    assert [(one["snapshot_id"], one["tags"]) for one in listed] == [(2, ["now"]), (1, ["first"])]

    taken = await post(api, "/v1/admin/tags", {"name": "first", "snapshot_id": 2})
    assert problem(taken, 409, "tag_exists")["snapshot_id"] == 1
    gone = await api.http.delete("/v1/admin/tags/first", headers=api.headers())
    assert (gone.status_code, gone.json()["dropped"]) == (200, True)
    problem(await api.http.delete("/v1/admin/tags/first", headers=api.headers()), 404, "not_found")
    assert [action for action, _ in await audited(api)][-1] == "tag.drop"


@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        ({"name": "t", "snapshot_id": 99}, 404, "snapshot_not_found"),
        ({"name": "t", "snapshot_id": "newest"}, 400, "malformed_request"),
        ({"name": "t", "snapshot_id": -1}, 400, "malformed_request"),
        ({"name": "t"}, 400, "malformed_request"),
        ({"name": "", "snapshot_id": 1}, 400, "malformed_request"),
        ({"name": "a/b", "snapshot_id": 1}, 400, "malformed_request"),
        ({"name": "n" * 64, "snapshot_id": 1}, 400, "malformed_request"),
    ],
)
async def test_a_tag_that_cannot_be(api: Server, document: object, status: int, code: str) -> None:
    problem(await post(api, "/v1/admin/tags", document), status, code)
    assert (await api.get("/v1/admin/tags")).json() == {"tags": []}


# --- commands ------------------------------------------------------------------------------


def test_the_command_knows_every_kind() -> None:
    assert tuple(ASKABLE) == KINDS


async def test_maintain_waits_and_prints_the_report(lake: Lake) -> None:
    working = asyncio.ensure_future(work(lake.server.jobs, {"files_in": 3, "skipped": []}))
    done = await lake.run("maintain", "compact", "--table", "events")
    await working
    assert done.return_value == 0, done.output
    assert "compact of events: done" in done.stdout
    assert "  files_in: 3\n  skipped: []\n" in done.stdout
    asked = await lake.run("maintain", "retain", "--dry-run", "--no-wait", "--json")
    assert asked.return_value == 0
    job = json.loads(asked.stdout)
    assert (job["kind"], job["dry_run"], job["state"]) == ("retain", True, "queued")
    listed = await lake.run("jobs")
    assert [line.split()[1] for line in listed.stdout.splitlines()[1:]] == ["retain", "compact"]
    shown = await lake.run("jobs", job["job_id"], "--json")
    assert json.loads(shown.stdout) == job
    assert (await lake.run("maintain", "retain", "--table", "nothing")).return_value == 4


async def test_maintain_says_badly_with_its_exit_code(lake: Lake) -> None:
    working = asyncio.ensure_future(work(lake.server.jobs, {"errors": 2, "warnings": 0}))
    found = await lake.run("maintain", "validate", "--full")
    await working
    assert found.return_value == 1
    (job,) = json.loads((await lake.run("jobs", "--json")).stdout)["jobs"]
    assert job["parameters"] == {"full": True}
    error = {"code": "corrupt", "detail": "a file is torn"}
    working = asyncio.ensure_future(work(lake.server.jobs, {}, error))
    failed = await lake.run("maintain", "collect")
    await working
    assert failed.return_value == 1
    assert "a file is torn" in failed.stdout


async def test_tags_are_made_listed_and_dropped(lake: Lake) -> None:
    made = await lake.run("tags", "create", "v1")
    assert (made.return_value, made.stdout) == (0, "the tag v1 keeps snapshot 2\n")
    assert (await lake.run("tags", "create", "v0", "--snapshot", "1")).return_value == 0
    listed = (await lake.run("tags", "list")).stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["v0", "1"], ["v1", "2"]]
    assert (await lake.run("tags", "create", "v0", "--snapshot", "2")).return_value == 1
    dropped = await lake.run("tags", "drop", "v0", "--json")
    assert json.loads(dropped.stdout)["dropped"] is True
    assert (await lake.run("tags", "drop", "v0")).return_value == 4
