"""`lakebus up` with the whole application: from nothing to a first answer, and back to nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.leftovers import leftovers
from cluster.stack_files import StackFiles
from lakebus.client import Client, connect
from tests.acceptance.stacks import ROOT, lakebus, listeners, wait_until
from tests.postgres_server import new_data_dir

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A stack left running in the background by `lakebus up --detach`."""
    folder = new_data_dir()
    code, output, error = lakebus("up", "--detach", "--port", "0", "--data-dir", str(folder))
    assert code == 0, output + error
    try:
        yield folder
    finally:
        code, output, error = lakebus("down", "--data-dir", str(folder))
        state = StackFiles(folder).state()
        assert code == 0, output + error
        assert state is not None
        assert leftovers(state, state.stack_id) == []
        shutil.rmtree(state.run_dir)
        shutil.rmtree(folder)


def call(data_dir: Path, method: str, path: str, body: object = None) -> dict[str, Any]:
    """One request with the key of `connection.json`."""
    connection = json.loads((data_dir / "connection.json").read_text())
    request = urllib.request.Request(
        connection["url"] + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {connection['api_key']}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert len(answer.headers.get_all("x-request-id")) == 1  # Serve's or ours, not both
        value: dict[str, Any] = json.loads(answer.read())
    return value


def lakebus_client(data_dir: Path, **given: Any) -> Client:
    """A client of the stack, with what `connection.json` says where nothing else is given."""
    connection = json.loads((data_dir / "connection.json").read_text())
    return connect(**{**connection, **given})


def test_connection_file_is_private_and_enough_for_a_first_answer(data_dir: Path) -> None:
    assert stat.S_IMODE((data_dir / "connection.json").stat().st_mode) == 0o600
    call(
        data_dir,
        "POST",
        "/v1/tables",
        {"name": "birds", "columns": [{"name": "id", "type": "bigint"}]},
    )
    rows = [{"id": number} for number in range(10)]
    written = call(data_dir, "POST", "/v1/tables/birds/rows", rows)
    read = call(
        data_dir,
        "POST",
        "/v1/query",
        {
            "sql": "SELECT count(*)::integer FROM birds",
            "min_visibility_token": written["receipt"]["visibility_token"],
        },
    )
    assert read["rows"] == [[10]]


def test_a_table_is_made_by_its_first_rows(data_dir: Path) -> None:
    rows = [{"page": "/", "ms": 12, "at": "2026-01-31T12:00:00Z", "by": None}, {"ms": 7.5}]
    written = call(data_dir, "POST", "/v1/tables/visits/rows?create=true", rows)
    assert written["columns_skipped"] == ["by"]
    read = call(
        data_dir,
        "POST",
        "/v1/query",
        {
            "sql": 'SELECT page, ms, "at" FROM visits ORDER BY ms DESC',
            "min_visibility_token": written["receipt"]["visibility_token"],
        },
    )
    assert read["rows"] == [["/", 12.0, "2026-01-31T12:00:00.000000Z"], [None, 7.5, None]]


def test_A3_the_direct_door_and_serves_route_give_one_receipt(data_dir: Path) -> None:
    found = json.loads((data_dir / "connection.json").read_text())
    state = StackFiles(data_dir).state()
    assert state is not None
    assert found["ingest_url"] == f"http://127.0.0.1:{state.direct_port}"
    assert call(data_dir, "GET", "/v1/admin/status")["ingest_url"] == found["ingest_url"]
    with (
        lakebus_client(data_dir) as direct,
        lakebus_client(data_dir, ingest_url=found["url"]) as serve,
    ):
        serve.create_table("doors", {"id": "bigint"}, if_not_exists=True)
        first = direct.ingest("doors", [{"id": 1}], key="one")
        again = serve.ingest("doors", [{"id": 1}], key="one")
        assert (first.replayed, again.replayed) == (False, True)
        assert first.receipt == again.receipt
        learning = lakebus_client(data_dir, ingest_url=None)
        with learning:
            assert learning.ingest("doors", [{"id": 1}], key="one").receipt == first.receipt
            assert learning._direct is not None
            assert learning._direct._door.url() == found["ingest_url"]


def test_D4_queries_take_the_direct_door_of_a_query_replica(data_dir: Path) -> None:
    found = json.loads((data_dir / "connection.json").read_text())
    state = StackFiles(data_dir).state()
    assert state is not None
    assert found["query_url"] == f"http://127.0.0.1:{state.query_port}"
    assert call(data_dir, "GET", "/v1/admin/status")["query_url"] == found["query_url"]
    with (
        lakebus_client(data_dir) as direct,
        lakebus_client(data_dir, query_url=None) as learning,
        lakebus_client(data_dir, query_url=found["url"]) as serve,
    ):
        direct.create_table("asked", {"id": "bigint"}, if_not_exists=True)
        sent = direct.ingest("asked", [{"id": 1}], key="one")
        for client in (direct, learning, serve):
            for _ in range(2):
                assert client.query("SELECT id FROM asked", after=sent).rows == [[1]]
            assert client.query_arrow("SELECT id FROM asked", after=sent).num_rows == 1
        doors = [
            one._direct_sql._door.url() for one in (direct, learning, serve) if one._direct_sql
        ]
        assert doors == [found["query_url"], found["query_url"], None]


def test_F1_a_killed_replicas_door_is_back_on_its_port(data_dir: Path) -> None:
    found = json.loads((data_dir / "connection.json").read_text())
    state = StackFiles(data_dir).state()
    assert state is not None
    place = ("127.0.0.1", state.direct_port)

    def at_the_door() -> set[int]:
        pids = {mark.pid for mark in leftovers(state, state.stack_id)}
        return {pid for pid in pids if place in listeners({pid})}

    with lakebus_client(data_dir, timeout_s=90) as client:
        client.create_table("doors", {"id": "bigint"}, if_not_exists=True)
        client.ingest("doors", [{"id": 2}], key="before")
        (before,) = at_the_door()
        os.kill(before, signal.SIGKILL)
        assert client.ingest("doors", [{"id": 3}], key="meanwhile").receipt.rows == 1
        assert client.ingest("doors", [{"id": 2}], key="before").replayed
    wait_until(lambda: at_the_door() - {before}, within_s=60, why="the door is back")
    with lakebus_client(data_dir, timeout_s=90) as client:
        assert client.ingest("doors", [{"id": 3}], key="meanwhile").replayed
        assert client._direct is not None
        assert client._direct._door.url() == found["ingest_url"]


def test_A3_A6_D4_a_job_on_the_cluster_sends_and_reads_through_ray(data_dir: Path) -> None:
    asked = {"principal": "reader", "scopes": [{"scope": "query", "tables": ["by_job"]}]}
    reader = call(data_dir, "POST", "/v1/admin/keys", asked)["key"]
    key = json.loads((data_dir / "connection.json").read_text())["api_key"]
    code, output, error = lakebus("ray-env", "--data-dir", str(data_dir))
    assert code == 0, error
    named = dict(line.removeprefix("export ").split("=", 1) for line in output.splitlines())
    done = subprocess.run(
        [sys.executable, "-m", "tests.acceptance.ray_job", key, reader],
        cwd=ROOT,
        env=os.environ | named,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    tables = said.pop("tables")
    assert said == {
        "example": [1000] * 2,
        "again": True,
        "equal": True,
        "at": 200_000,
        "visible": True,
        "written": 200_000,
        "actor": 400_000,
        "errors": {
            "conflict": "idempotency_conflict",
            "rows": "rows_invalid",
            "sql": "sql_error",
            "key": "unauthenticated",
            "scope": "forbidden",
        },
        "reader": True,
    }
    assert {"by_job", "parts"} <= set(tables)


def test_nothing_of_the_whole_application_listens_beyond_loopback(data_dir: Path) -> None:
    state = StackFiles(data_dir).state()
    assert state is not None
    pids = {mark.pid for mark in leftovers(state, state.stack_id)}
    found = listeners(pids)
    assert len(found) > 10
    assert {address for address, _ in found} <= {"127.0.0.1", "::1"}, found


def test_status_and_logs_of_a_running_stack(data_dir: Path) -> None:
    code, output, _ = lakebus("status", "--json", "--data-dir", str(data_dir))
    assert (code, json.loads(output)["problems"]) == (0, [])
    for component in ("up", "host", "postgres", "serve", "ray"):
        code, output, _ = lakebus("logs", "--data-dir", str(data_dir), "-n", "2", component)
        assert code == 0, component
        assert "==>" in output


def test_secrets_are_in_no_log(data_dir: Path) -> None:
    files = StackFiles(data_dir)
    state = files.state()
    assert state is not None
    key = files.api_key()
    assert key is not None
    passwords = json.loads((files.secrets / "postgres.json").read_text()).values()
    hidden = [text.encode() for text in (key, *passwords)]
    logs = [*files.logs.glob("*.log"), *Path(state.run_dir).rglob("*.log")]
    assert logs
    for log in logs:
        text = log.read_bytes()
        assert not any(secret in text for secret in hidden), log
