"""`lakebus ingest` against a real socket, and what all client commands share."""

from __future__ import annotations

import gzip
import io
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from cluster import ingest_chunks
from cluster.cli import cli
from cluster.ingest_command import _Progress
from cluster.ingest_run import Run
from cluster.text_table import text_table
from lakebus.errors import Unavailable
from tests.unit.command_rig import Lake, lake

__all__ = ["lake"]


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
    monkeypatch.setattr(ingest_chunks, "CHUNK_BYTES", 25)
    lines = [f'{{"id": {n}}}\n' for n in range(4)]
    wrong = await lake.run(
        *("ingest", "--table", "events", "--format", "ndjson", "--parallel", "1"),
        given="".join([*lines, '{"id": "x"}\n']),
    )
    assert wrong.return_value == 1
    assert "row 4, column id" in wrong.stderr
    assert "2 requests with 4 rows stored; the same command goes on" in wrong.stderr
    right = await lake.run(
        *("ingest", "--table", "events", "--format", "ndjson", "--json"),
        given="".join([*lines, '{"id": 4}\n']),
    )
    said = json.loads(right.stdout)
    assert (said["rows"], said["requests"], said["replayed"]) == (5, 3, 2)
    assert lake.server.entries == 3


class Killed(BaseException):
    """What nothing catches: the process is gone."""


def rows_in(lake: Lake) -> int:
    return sum(
        entry.rows for shard in lake.server.lake.state.shards for entry in shard.log.values()
    )


def mixed_files(lake: Lake) -> tuple[str, int]:
    """(a folder with every format, its rows)."""

    def lines(first: int, count: int) -> str:
        return "".join(f'{{"id": {n}}}\n' for n in range(first, first + count))

    numbers = pa.table({"id": list(range(500, 560))})
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(numbers, parquet, row_group_size=7)
    with pa.ipc.new_file(arrow, numbers.schema) as writer:
        writer.write_table(numbers, max_chunksize=9)
    csv = "id\n" + "".join(f"{n}\n" for n in range(100))
    lake.file("in/a.ndjson", lines(0, 50))
    lake.file("in/again.ndjson", lines(0, 50))  # equal rows in two files count twice
    lake.file("in/b.csv.gz", gzip.compress(csv.encode()))
    lake.file("in/c.json", json.dumps([{"id": n} for n in range(70)], indent=1))
    lake.file("in/deep/d.parquet", parquet.getvalue())
    lake.file("in/deep/e.arrow.zst", pa.compress(arrow.getvalue(), codec="zstd", asbytes=True))
    lake.file("in/readme.txt", "not rows")
    return str(lake.folder / "in"), 50 + 50 + 100 + 70 + 60 + 60


async def test_A3_an_ingest_that_is_killed_and_started_again_stores_every_row_once(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "CHUNK_BYTES", 100)
    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 8)
    folder, rows = mixed_files(lake)
    command = ("ingest", folder, "--table", "events", "--json")
    post = Run._post
    for left in (5, 17):
        answers = iter(range(left))

        def dies(run: Run, chunk: Any, key: str, answers: Any = answers) -> dict[str, Any]:
            answer = post(run, chunk, key)  # stored, and nobody hears of it
            if next(answers, None) is None:
                raise Killed
            return answer

        monkeypatch.setattr(Run, "_post", dies)
        with pytest.raises(Killed):
            await lake.run(*command)
        assert 0 < rows_in(lake) < rows
    monkeypatch.setattr(Run, "_post", post)
    before = lake.server.entries
    done = await lake.run(*command)
    assert done.return_value == 0, done.output
    said = json.loads(done.stdout)
    assert (said["rows"], rows_in(lake), said["complete"]) == (rows, rows, True)
    assert said["replayed"] >= 17
    assert said["requests"] == lake.server.entries == before + said["requests"] - said["replayed"]
    assert [Path(one["file"]).name for one in said["files"]] == [
        *("a.ndjson", "again.ndjson", "b.csv.gz", "c.json", "d.parquet", "e.arrow.zst")
    ]
    assert [Path(name).name for name in said["skipped"]] == ["readme.txt"]
    again = await lake.run(*command[:-1])
    assert f"{rows} rows of 6 files durable" in again.stderr
    assert "stored before, nothing is doubled" in again.stderr
    assert rows_in(lake) == rows


async def test_what_cannot_be_now_is_tried_again_and_then_told(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake.server.lake.faults.lose_replies.add("append")
    sent = await lake.run("ingest", "--table", "events", "--format", "json", given='{"id": 1}')
    assert (sent.return_value, rows_in(lake)) == (0, 1)
    assert "stored before" in sent.stderr
    lake.server.lake.faults.unreachable = True
    asked = ("ingest", "--table", "events", "--format", "json", "--timeout-s", "0.2")
    away = await lake.run(*asked, "--json", given='{"id": 2}')
    assert away.return_value == 3
    document = json.loads(away.stdout)
    assert (document["complete"], document["rows"]) == (False, 0)
    assert document["error"]["code"] == Unavailable.code


async def test_rows_that_do_not_fit_are_named_by_file_or_set_aside(lake: Lake) -> None:
    path = lake.file("bad.csv", "id\n1\nx\n3\n")
    refused = await lake.run("ingest", path, "--table", "events")
    assert (refused.return_value, lake.server.entries) == (1, 0)
    assert "bad.csv: row 1, column id" in refused.stderr
    aside = await lake.run("ingest", path, "--table", "events", "--on-invalid", "quarantine")
    assert aside.return_value == 0
    assert "2 rows durable in 1 request; 1 row set aside" in aside.stderr


async def test_an_interrupted_ingest_says_how_to_go_on(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 2)
    show = _Progress.show
    asked: list[int] = []

    def interrupted(progress: _Progress, *given: Any) -> None:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        show(progress, *given)

    monkeypatch.setattr(_Progress, "show", interrupted)
    path = lake.file("nine.csv", "id\n" + "".join(f"{n}\n" for n in range(9)))
    stopped = await lake.run("ingest", path, "--table", "events", "--json")
    assert stopped.return_value == 130
    assert stopped.stderr == "lakebus: interrupted; the same command goes on\n"
    assert json.loads(stopped.stdout)["complete"] is False
    assert rows_in(lake) < 9
    on = await lake.run("ingest", path, "--table", "events")
    assert (on.return_value, rows_in(lake)) == (0, 9)


async def test_a_missing_table_is_made_from_the_first_rows(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 2)
    path = lake.file("new.csv", "n,word\n" + "".join(f"{n},w{n}\n" for n in range(9)))
    made = await lake.run("ingest", path, "--table", "made", "--create")
    assert made.return_value == 0, made.stderr
    assert "9 rows durable in 5 requests" in made.stderr
    again = await lake.run("ingest", path, "--table", "made", "--create", "--json")
    assert json.loads(again.stdout)["replayed"] == 5
    assert (await lake.run("ingest", path, "--table", "other")).return_value == 4


async def test_A13_older_than_the_window_is_refused_where_the_first_attempt_is_told(
    lake: Lake,
) -> None:
    path = lake.file("old.ndjson", '{"id": 1}\n')
    command = ("ingest", path, "--table", "events", "--first-attempt")
    late = await lake.run(*command, "2020-01-01T00:00:00Z")
    assert (late.return_value, lake.server.entries) == (5, 0)
    assert "idempotency_expired" in late.stderr


async def test_ingest_waits_and_prints_one_token_for_all_its_requests(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 2)
    path = lake.file("nine.ndjson", "".join(f'{{"id": {n}}}\n' for n in range(9)))
    sent = await lake.run("ingest", path, "--table", "events")
    assert "9 rows durable in 5 requests" in sent.stderr
    (token,) = sent.stdout.split()
    waited = await lake.run("token", "wait", token, "--timeout-s", "0.05")
    assert waited.return_value == 3
    await lake.server.publish()
    again = await lake.run("ingest", path, "--table", "events", "--wait", "--quiet")
    assert (again.return_value, again.stderr) == (0, "")
    waited = await lake.run("token", "wait", again.stdout.strip(), "--json")
    assert json.loads(waited.stdout)["visible"] is True


async def test_exit_codes_tell_a_wrong_call_from_a_server_that_is_not_there(lake: Lake) -> None:
    missing = await lake.run("ingest", "--table", "event", "--format", "json", given="{}")
    assert missing.return_value == 4
    assert "table_not_found" in missing.stderr
    assert "did you mean events?" in missing.stderr
    nothing = await lake.run("ingest", "--table", "events", "--format", "json", given="[]")
    assert (nothing.return_value, lake.server.entries) == (1, 0)
    assert "there are no rows" in nothing.stderr
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
