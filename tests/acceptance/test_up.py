"""`lakebus up` with the whole application: from nothing to a first answer, and back to nothing."""

from __future__ import annotations

import json
import shutil
import stat
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.leftovers import leftovers
from cluster.stack_files import StackFiles
from tests.acceptance.stacks import lakebus, listeners
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
