"""`lakebus ingest` and `lakebus query` against a real socket: what they send, print and return."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import uvicorn
from click.testing import CliRunner, Result

from cluster import client_commands
from cluster.cli import cli
from cluster.text_table import text_table
from lakebus.client import connect
from tests.unit.http_rig import Server, server


@dataclass(frozen=True, slots=True)
class Lake:
    """A server in this process, and commands that are sent to it."""

    server: Server
    url: str
    folder: Path

    async def run(self, *arguments: str, given: str | None = None) -> Result:
        environ = {"LAKEBUS_URL": self.url, "LAKEBUS_API_KEY": self.server.key}
        return await asyncio.to_thread(
            CliRunner().invoke,
            cli,
            arguments,
            input=given,
            env=environ,
            standalone_mode=False,
            catch_exceptions=False,
        )

    def file(self, name: str, content: bytes | str) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)


@pytest.fixture
async def lake(tmp_path: Path) -> AsyncIterator[Lake]:
    async with server() as made:
        config = uvicorn.Config(
            made.app, port=0, host="127.0.0.1", lifespan="off", log_config=None, access_log=False
        )
        listening = uvicorn.Server(config)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(listening.serve(sockets=[sock]))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with connect(url, made.key) as client:
            await asyncio.to_thread(client.create_table, "events", {"id": "bigint"})
        try:
            yield Lake(made, url, tmp_path)
        finally:
            listening.should_exit = True
            await serving
            sock.close()


async def test_A3_content_sent_again_is_stored_once_whatever_its_file_is_called(lake: Lake) -> None:
    text = '{"id": 1}\n{"id": 2}\n'
    first = await lake.run("ingest", lake.file("a.ndjson", text), "--table", "events")
    assert (first.return_value, first.stderr) == (0, "2 rows durable in 1 request\n")
    again = await lake.run("ingest", "--table", "events", "--format", "ndjson", given=text)
    assert again.return_value == 0
    assert "stored before, nothing is doubled" in again.stderr
    assert again.stdout == first.stdout
    assert lake.server.entries == 1
    own = await lake.run("ingest", lake.file("b.jsonl", text), "--table", "events", "--key", "k2")
    assert own.return_value == 0
    assert lake.server.entries == 2


async def test_json_and_both_arrow_forms_are_told_by_their_names(lake: Lake) -> None:
    table = pa.table({"id": [1, 2, 3]})
    stream, file = pa.BufferOutputStream(), pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    bodies = {
        "a.json": b'[{"id": 1}, {"id": 2}, {"id": 3}]',
        "a.arrows": stream.getvalue().to_pybytes(),
        "a.arrow": file.getvalue().to_pybytes(),
    }
    for name, body in bodies.items():
        done = await lake.run(
            *("ingest", lake.file(name, body), "--table", "events", "--key", "same", "--json")
        )
        assert done.return_value == 0, done.output
        said = json.loads(done.stdout)
        assert (said["rows"], said["requests"]) == (3, 1)
    assert lake.server.entries == 1, "the three bodies are the same rows"


async def test_long_ndjson_goes_in_parts_and_a_corrected_file_doubles_nothing(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_commands, "PART_BYTES", 25)
    lines = [f'{{"id": {n}}}\n' for n in range(4)]
    wrong = await lake.run(
        *("ingest", "--table", "events", "--format", "ndjson"),
        given="".join([*lines, '{"id": "x"}\n']),
    )
    assert wrong.return_value == 1
    assert "row 4, column id" in wrong.stderr
    assert "2 of 3 requests are stored" in wrong.stderr
    right = await lake.run(
        *("ingest", "--table", "events", "--format", "ndjson", "--json"),
        given="".join([*lines, '{"id": 4}\n']),
    )
    said = json.loads(right.stdout)
    assert (said["rows"], said["requests"], said["replayed"]) == (5, 3, 2)
    assert lake.server.entries == 3


def test_parts_hold_every_byte_and_end_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_commands, "PART_BYTES", 8)
    for content in (
        b"",
        b"a",
        b"12345678\n1\n",
        b"123456789012\n1\n2\n3\n",
        b"\n" * 20,
        b"1\n" * 9,
    ):
        parts = list(client_commands._lines(content))
        assert b"".join(parts) == content
        assert all(part.endswith(b"\n") for part in parts[:-1])


async def test_query_prints_a_table_and_json(lake: Lake) -> None:
    sent = await lake.run("ingest", "--table", "events", "--format", "json", given='{"id": 7}')
    asking = asyncio.create_task(lake.run("query", "from events", "--after", sent.stdout.strip()))
    (published,) = await lake.server.publish()
    found = await asking
    assert (found.return_value, found.stdout) == (0, "n\n1\n")
    assert found.stderr == f"(1 row, snapshot {published.snapshot_id})\n"
    plain = await lake.run(
        *("query", "-", "-p", "12", "-p", "text", "--at", str(published.snapshot_id), "--json"),
        given="select 1",
    )
    assert json.loads(plain.stdout)["rows"] == [[1]]


async def test_exit_codes_tell_a_wrong_call_from_a_server_that_is_not_there(lake: Lake) -> None:
    missing = await lake.run("ingest", "--table", "event", "--format", "json", given="[]")
    assert missing.return_value == 1
    assert "table_not_found" in missing.stderr
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        away = await lake.run("query", "select 1", "--url", url, "--timeout-s", "0.2")
    assert away.return_value == 3
    assert "try again" in away.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ingest", "--table", "t"), "--format"),
        (("query", "select 1", "--data-dir", "."), "lakebus up"),
        (("query", "select 1", "--url", "http://127.0.0.1:1"), "--api-key"),
        (("query", "select 1", "--at", "noon", "--url", "http://h", "--api-key", "k"), "--at"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("LAKEBUS_URL", "LAKEBUS_API_KEY", "LAKEBUS_DATA_DIR")
    environ: dict[str, str | None] = dict.fromkeys(names)
    if arguments[0] == "ingest":
        environ |= {"LAKEBUS_URL": "http://h", "LAKEBUS_API_KEY": "k"}
    done = CliRunner().invoke(cli, arguments, env=environ)
    assert done.exit_code == 2
    assert said in done.stderr


def test_tables_of_text_keep_one_row_on_one_line() -> None:
    rows = [[1, "a\nb", None], [12345, "long text", True]]
    assert text_table(["n", "text", "flag"], rows, cell_max=6) == [
        "    n  text    flag",
        "    1  a\\nb",
        "12345  long …  true",
    ]
