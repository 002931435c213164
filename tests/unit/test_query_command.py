"""`lakebus query`: forms, files, scripts and the prompt, against a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest

from cluster.api_calls import Api
from cluster.query_output import Question, answer, form_of_output
from cluster.query_shell import Completer, Session, has_words, run_prompt, split, statements_of
from lakebus.errors import SqlError
from serve_app.query import WHOLE_BYTES_MAX
from tests.unit.command_rig import Lake, lake

__all__ = ["lake"]

_END = b'{"complete":true,"row_count":2}\n'


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
    assert plain.stderr == ""
    assert lake.server.engine.plans[-1].parameters == [12, "text"]
    await lake.run("query", "select $a", "--set", "a=1", "--set", "b=x=y")
    assert lake.server.engine.plans[-1].parameters == {"a": 1, "b": "x=y"}


async def test_forms_are_passed_on_and_files_are_there_only_when_whole(lake: Lake) -> None:
    engine, target = lake.server.engine, lake.folder / "out.ndjson"
    engine.parts = [b'{"n":1}\n{"n"', b":2}\n", _END]
    piped = await lake.run("query", "select 1", "--format", "ndjson")
    assert (piped.return_value, piped.stdout) == (0, '{"n":1}\n{"n":2}\n')
    written = await lake.run("query", "select 1", "-o", str(target))
    assert written.return_value == 0
    assert target.read_text() == '{"n":1}\n{"n":2}\n'
    assert written.stderr == "(2 rows, snapshot 2)\n"
    engine.parts = [b'{"n":1}\n', b'{"n":2}\n']
    cut_short = await lake.run("query", "select 1", "-o", str(target.with_name("b.ndjson")))
    assert cut_short.return_value == 3
    assert "not whole" in cut_short.stderr
    engine.parts = [b"x" * (2 * WHOLE_BYTES_MAX), SqlError("broke in the middle")]
    broken = await lake.run("query", "select 1", "-o", str(target.with_name("c.csv")))
    assert broken.return_value == 3
    assert "broke off" in broken.stderr
    assert [path.name for path in lake.folder.iterdir()] == ["out.ndjson"]
    engine.parts = [b"PAR1"]
    pages = await lake.run("query", "select 1", "-o", str(target.with_name("d.parquet")))
    assert (pages.return_value, (lake.folder / "d.parquet").read_bytes()) == (0, b"PAR1")


async def test_a_script_runs_until_its_first_error(lake: Lake) -> None:
    done = await lake.run("query", given="select 1; -- one; two\n select ';'")
    assert (done.return_value, done.stdout) == (0, "n\n1\n" * 2)
    lake.server.engine.fail = SqlError("no such thing")
    failed = await lake.run("query", given="select 1; select 2;")
    assert failed.return_value == 1
    assert failed.stderr == "lakebus: sql_error: no such thing\n"


class Answering:
    """An `Api` that gives one document to whatever is asked."""

    timeout_s = 10.0

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self.accept = ""

    @contextlib.contextmanager
    def stream(self, path: str, document: Any, *, accept: str) -> Iterator[Any]:
        self.accept = accept
        whole = json.dumps(self._document).encode()
        yield SimpleNamespace(parts=iter([whole[:20], whole[20:]]), headers={})


def test_a_table_shows_every_digit_and_what_is_nested_as_json() -> None:
    columns = {"d": "decimal(38,2)", "f": "double", "l": "struct(a varchar, b bigint[])[]",
               "m": "map(integer, boolean)", "s": "varchar"}  # fmt: skip
    digits = "123456789012345678901234567890123456.78"
    api = Answering(
        {
            "columns": [{"name": name, "type": kind} for name, kind in columns.items()],
            "rows": [
                [digits, "NaN", [{"a": "é\n", "b": ["9007199254740993", None]}],
                 [{"key": 1, "value": True}], None],
                ["1.50", 0.5, [], None, "1.50"],
            ],
            "snapshot_id": 3,
            "visibility_token": "lb1.y",
        }
    )  # fmt: skip
    out = BytesIO()
    found = answer(cast(Api, api), Question("select"), form="table", out=out)
    assert (found.rows, api.accept) == (2, "application/json")
    nested = '[{"a":"é\\n","b":["9007199254740993",null]}]'
    pairs = '[{"key":1,"value":true}]'
    assert out.getvalue().decode().splitlines() == [
        f"{'d':>39}    f  {'l':{len(nested)}}  {'m':{len(pairs)}}  s",
        f"{digits}  NaN  {nested}  {pairs}",
        f"{'1.50':>39}  0.5  {'[]':{len(nested)}}  {'':{len(pairs)}}  1.50",
    ]


def typed(lines: Iterable[str | BaseException]) -> Callable[[str], str]:
    """A person who types these lines, and then Ctrl-D."""

    waiting = iter(lines)

    def ask(_: str) -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


async def test_the_prompt_reads_what_it_read_before_and_goes_on_after_errors(
    lake: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = BytesIO(), list[str]()
    api = Api(lake.url, lake.server.key, timeout_s=10)
    session = Session(api, Question(""), form="table", out=out, say=said.append)
    lines: list[str | BaseException] = [
        *(r"\?", r"\dt", r"\d events", r"\nope", r"\timing", "select 1", "from", "events;"),
        *(r"\at noon", r"\at 1", "select 2; select 3;", r"\at latest", "select 'a", ";"),
        *(KeyboardInterrupt(), "from nothing;", r"\q", "select 4;"),
    ]
    with api:
        code = await asyncio.to_thread(run_prompt, session, api, read=typed(lines))
    assert code == 0
    assert out.getvalue() == b"n\n1\n" * 3
    shown = capsys.readouterr()
    assert "events     0" in shown.out
    assert "id      bigint" in shown.out
    assert "table_not_found" in shown.err
    assert "Traceback" not in shown.err
    text = "\n".join(said)
    assert "Tab completes names" in text
    assert "\\nope is no command" in text
    assert "--at takes a snapshot's id" in text
    assert "(1 row, snapshot 1) " in text
    plans = lake.server.engine.plans
    assert [plan.sql for plan in plans] == ["select 1\nfrom\nevents", "select 2", "select 3"]


async def test_tab_completes_tables_columns_and_keywords(lake: Lake) -> None:
    with Api(lake.url, lake.server.key, timeout_s=10) as api:
        completer = Completer(api)

        def candidates() -> list[list[str]]:
            return [completer.candidates(text) for text in ("ev", "SEL", "\\t", "i", "zz")]

        found = await asyncio.to_thread(candidates)
    assert found[:3] == [["events"], ["SELECT "], ["\\timing"]]
    assert {"id", "in ", "is ", "inner "} <= set(found[3])
    assert found[4] == []
    assert completer.complete("ev", 0) == "events"
    assert completer.complete("ev", 1) is None


@pytest.mark.parametrize(
    ("text", "statements", "rest"),
    [
        ("select 1", [], "select 1"),
        ("select 1;", ["select 1"], ""),
        (";;select 1; select 2", ["select 1"], " select 2"),
        ("select ';' ; ", ["select ';'"], " "),
        ("select 'it''s;' ; x", ["select 'it''s;'"], " x"),
        ('select ";" -- ; \n; y', ['select ";" -- ;'], " y"),
        ("select /* ; */ 1; z", ["select /* ; */ 1"], " z"),
        ("select $$;$$; z", ["select $$;$$"], " z"),
        ("select 'open ; ", [], "select 'open ; "),
        ("select 4/2-1;", ["select 4/2-1"], ""),
        ("/* only */; -- this\n", [], " -- this\n"),
    ],
)
def test_statements_end_with_a_semicolon_outside_quotes_and_comments(
    text: str, statements: list[str], rest: str
) -> None:
    assert split(text) == (statements, rest)
    assert has_words(rest) == bool(rest.strip() and not rest.strip().startswith("--"))


def test_what_makes_no_sense_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(click.UsageError, match="no statement"):
        statements_of("-- nothing\n")
    with pytest.raises(click.UsageError, match="--format"):
        form_of_output(tmp_path / "answer", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(click.UsageError, match="not for a terminal"):
        form_of_output(None, "parquet")
    assert form_of_output(None, None) == "table"
