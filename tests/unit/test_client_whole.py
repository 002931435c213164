"""The client on a whole lake, DuckDB included: its documentation, DB-API, and what types become."""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import importlib.util
import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lakebus
from lakebus import dbapi
from lakebus.client import Client
from lakebus.client_errors import AnswerTruncated
from lakebus.client_rows import encode_rows
from lakebus.client_types import parse_type
from lakebus.errors import SqlError
from tests.unit.client_rig import Lake, whole_lake

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.read_text())
PANDAS = importlib.util.find_spec("pandas") is not None


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lake]:
    with whole_lake(tmp_path_factory.mktemp("lake")) as made:
        yield made


@pytest.fixture
def client(lake: Lake) -> Iterator[Client]:
    with lakebus.connect(lake.url, lake.key) as made:
        yield made


# --- the documentation -------------------------------------------------------------------------


def test_the_examples_of_the_page_run_and_print_what_they_say(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"url": lake.url, "api_key": lake.key, "__name__": "example"}
    assert len(BLOCKS) > 10
    for block in BLOCKS:
        if block.startswith("# needs pandas") and not PANDAS:
            continue
        if block.startswith("# needs Ray"):
            continue  # tests/acceptance/ray_job.py runs it
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, str(PAGE), "exec"), names)
        wanted = re.findall(r"(?m)^\s*print\(.*\)  # (.*)$", block)
        silent = len(re.findall(r"(?m)^\s*print\(.*\)$", block))
        assert wanted == [line for line in said.getvalue().splitlines() if line][: len(wanted)] or (
            silent and set(wanted) <= set(said.getvalue().splitlines())
        ), block
    made = names["lake"]
    assert isinstance(made, Client)
    made.close()


# --- what types become -------------------------------------------------------------------------

VALUES = {
    "true": (True, "boolean"),
    "12::TINYINT": (12, "tinyint"),
    "9223372036854775807": (2**63 - 1, "bigint"),
    "18446744073709551615::UBIGINT": (2**64 - 1, "ubigint"),
    "170141183460469231731687303715884105727::HUGEINT": (2**127 - 1, "hugeint"),
    "12345678901234567890.123456789012345678::DECIMAL(38,18)": (
        Decimal("12345678901234567890.123456789012345678"),
        "decimal(38,18)",
    ),
    "1.1::DOUBLE": (1.1, "double"),
    "1.5::FLOAT": (1.5, "float"),
    "'a\"b'": ('a"b', "varchar"),
    "'\\x00\\xFF'::BLOB": (b"\x00\xff", "blob"),
    "DATE '2026-01-31'": (dt.date(2026, 1, 31), "date"),
    "TIME '12:00:00.5'": (dt.time(12, 0, 0, 500_000), "time"),
    "TIMESTAMP '2026-01-31 12:00:00.000001'": (
        dt.datetime(2026, 1, 31, 12, 0, 0, 1),  # noqa: DTZ001 - as the type is
        "timestamp",
    ),
    "TIMESTAMPTZ '2026-01-31 12:00:00+01'": (
        dt.datetime(2026, 1, 31, 11, tzinfo=dt.UTC),
        "timestamptz",
    ),
    "[1, NULL]": ([1, None], "integer[]"),
    "[1.50::DECIMAL(4,2)]": ([Decimal("1.50")], "decimal(4,2)[]"),
    "{'a': DATE '2026-01-31', 'b c': 1}": (
        {"a": dt.date(2026, 1, 31), "b c": 1},
        'struct(a date, "b c" integer)',
    ),
    "MAP {1: 'x'}": ({1: "x"}, "map(integer, varchar)"),
    "MAP {'k': [1.5::DOUBLE], 'n': NULL}": ({"k": [1.5], "n": None}, "map(varchar, double[])"),
    "MAP {TIMESTAMPTZ '2026-01-31 12:00:00+01': MAP {'a': 2.5::DECIMAL(3,1)}}": (
        {dt.datetime(2026, 1, 31, 11, tzinfo=dt.UTC): {"a": Decimal("2.5")}},
        "map(timestamptz, map(varchar, decimal(3,1)))",
    ),
    "MAP {[1, NULL]: {'a': 'x'}, [2]: NULL}": (
        [([1, None], {"a": "x"}), ([2], None)],
        "map(integer[], struct(a varchar))",
    ),
    "[{'b': '\\xFF'::BLOB, 't': ROW(2::HUGEINT, '-0.0'::DOUBLE)}, NULL]": (
        [{"b": b"\xff", "t": [2, -0.0]}, None],
        "struct(b blob, t tuple(hugeint, double))[]",
    ),
    "NULL::INTEGER": (None, "integer"),
}


@pytest.mark.parametrize("sql", VALUES)
def test_D8_a_value_is_the_same_in_python_by_both_ways(client: Client, sql: str) -> None:
    found = client.query(f"SELECT {sql} AS v")
    value, kind = VALUES[sql]
    assert found.columns == (("v", kind),)
    assert parse_type(kind).name != kind or "(" not in kind
    ((python,),) = found.fetchall()
    assert (python, type(python)) == (value, type(value))


def test_D8_columns_made_here_are_those_of_the_server(client: Client) -> None:
    """Of every type that tables can have, and those that queries make of them."""

    names = [f"{sql} AS c{n}" for n, sql in enumerate(VALUES)]
    more = ["uuid() AS u", "'{}'::JSON AS j", "INTERVAL 1 DAY AS i", "NULL AS n",
            "TIMESTAMP_NS '2026-01-31 12:00:00.000000001' AS ns", "sum(1) AS s",
            "row(1, 'a') AS t", "{'a': MAP {'x': [1.5]}} AS m", "[uuid()] AS u",
            "[TIMESTAMPTZ_NS '2026-01-31 12:00:00.000000001+00', NULL] AS z",
            "{'h': 2::HUGEINT, 'i': 2::UNION(a INTEGER, b VARCHAR), 'e': {'k': 'x'::ENUM('x')}} x",
            "MAP {{'a': 1::UHUGEINT}: [ROW(NULL, 'b')]} AS k", "[1, NULL]::INTEGER[2] AS f",
            "struct_pack() AS z", "[]::INTEGER[] AS o", "MAP {} AS o", "[[NULL, []]] AS o",
            "MAP {MAP {1: 2::HUGEINT}: 'x'} AS y"]  # fmt: skip
    for sql in (*names, *more):
        ours, theirs = client.query(f"SELECT {sql}"), client.query_arrow(f"SELECT {sql}")
        if theirs.schema.names == ["i"]:  # Python has nothing that holds months and days
            assert ours.to_arrow().schema.field(0).type == pa.string()
            continue
        assert ours.to_arrow().schema == theirs.schema, sql
        assert theirs.schema.names == ["u"] or ours.to_arrow().equals(theirs), sql


#: A row far behind the first bytes of the answer cannot be cast, in every form. Asked for with
#: `deterministic`, in one thread: others could come to that row before the first rows are sent.
LATE = (
    "SELECT md5(range::VARCHAR) AS digest, "
    "CAST(CASE WHEN range = 270000 THEN 'no number' ELSE range::VARCHAR END AS INTEGER) AS n "
    "FROM range(280000)"
)


@pytest.mark.parametrize(
    ("accept", "end"),
    [
        ("application/json", b"}"),
        ("application/x-ndjson", b'"row_count":280000}\n'),
        ("text/csv", b",279999\n"),  # it has no end of its own
        ("application/vnd.apache.arrow.stream", b"\xff\xff\xff\xff\x00\x00\x00\x00"),
        ("application/vnd.apache.parquet", b"PAR1"),
    ],
    ids=["json", "ndjson", "csv", "arrow", "parquet"],
)
def test_D9_an_error_in_a_late_row_is_seen_by_the_reader(
    lake: Lake, accept: str, end: bytes
) -> None:
    got: list[bytes] = []

    def read() -> None:
        with httpx.stream(
            "POST",
            f"{lake.url}/v1/query",
            json={"sql": LATE, "deterministic": True},
            headers={"authorization": f"Bearer {lake.key}", "accept": accept},
            timeout=60,
        ) as answer:
            assert answer.status_code == 200
            got.extend(answer.iter_bytes())

    with pytest.raises(httpx.RemoteProtocolError):
        read()
    assert sum(map(len, got)) > 500_000
    assert not b"".join(got).endswith(end)


def test_D9_an_error_in_a_late_row_is_an_error_of_the_client(client: Client) -> None:
    with pytest.raises(AnswerTruncated):
        client.query(LATE, deterministic=True)
    with pytest.raises(AnswerTruncated):
        client.query_arrow(LATE, deterministic=True)


# --- the writer and the rest -------------------------------------------------------------------


def test_A3_A7_what_a_writer_wrote_is_read_by_its_tokens(client: Client) -> None:
    client.create_table("written", {"id": "bigint", "at": "timestamptz"})
    at = dt.datetime(2026, 1, 31, tzinfo=dt.UTC)
    with client.writer("written", rows_max=5, senders=2) as writer:
        for n in range(23):
            writer.write({"id": n, "at": at})
        writer.write(pa.table({"id": [23, 24], "at": pa.array([at, at], pa.timestamp("s", "UTC"))}))
    found = client.query('SELECT count(*), sum(id), max("at") FROM written', after=writer.written)
    assert found.fetchall() == [(25, 300, at)]
    assert writer.written.batches == 6
    assert len(client.snapshots(limit=2)) == 2


def test_files_of_every_form_are_stored(client: Client, tmp_path: Path) -> None:
    client.create_table("filed", {"id": "bigint", "note": "varchar"})
    table = pa.table({"id": [1, 2], "note": ["a", None]})
    lines = b'{"id": 1, "note": "a"}\n{"id": 2}\n'
    files = {
        "a.json": json.dumps(table.to_pylist()).encode(),
        "a.ndjson": lines,
        "a.ndjson.gz": gzip.compress(lines),
        "a.csv": b"id,note\n1,a\n2,\n",
        "a.arrows": encode_rows(table)[0],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write(table)
    sent = [client.ingest("filed", path, key=path.name) for path in sorted(tmp_path.iterdir())]
    assert len({one.receipt.payload_fingerprint for one in sent}) == 1
    found = client.query("SELECT id, note, count(*) FROM filed GROUP BY ALL ORDER BY 1", after=sent)
    assert found.fetchall() == [(1, "a", 7), (2, None, 7)]


def test_A10_nested_values_come_back_as_they_were_sent(
    client: Client, connection: dbapi.Connection
) -> None:
    types = {
        "l": "decimal(5,2)[]",
        "s": "struct(at timestamptz, b blob, n integer[])",
        "m": "map(date, varchar)",
        "o": "map(varchar, struct(x double))",
    }
    rows: list[dict[str, Any]] = [
        {
            "l": [Decimal("1.50"), None],
            "s": {"at": dt.datetime(2026, 1, 31, tzinfo=dt.UTC), "b": b"\x00", "n": []},
            "m": {dt.date(2026, 1, 31): "a", dt.date(1, 1, 1): None},
            "o": {'k"': {"x": -0.5}, "": None},
        },
        dict.fromkeys(types),
        {"l": [], "s": {"at": None, "b": None, "n": None}, "m": {}, "o": {}},
    ]
    client.create_table("nested", types)
    connection.see(client.ingest("nested", rows))
    cursor = connection.execute("SELECT l, s, m, o FROM nested")
    found = cursor.fetchall()
    assert [dict(zip(types, row, strict=True)) for row in found] == rows
    assert [code for _, code, *_ in cursor.description or []] == list(types.values())
    groups = (dbapi.STRING, dbapi.NUMBER, dbapi.BINARY, dbapi.DATETIME, dbapi.ROWID)
    assert not any(code == group for code in types.values() for group in groups)
    table = client.query("SELECT l, s, m, o FROM nested").to_arrow()
    assert table.equals(client.query_arrow("SELECT l, s, m, o FROM nested"))
    if PANDAS:
        frame = client.query("SELECT s, m FROM nested").to_pandas()
        assert frame["s"][0]["b"] == b"\x00"
        assert frame["m"][0] == [(dt.date(2026, 1, 31), "a"), (dt.date(1, 1, 1), None)]
    connection.see(client.ingest("nested", table))
    assert connection.execute("SELECT l, s, m, o FROM nested").fetchall() == [*found, *found]


def test_a_client_is_pickled_as_its_address(client: Client) -> None:
    with pickle.loads(pickle.dumps(client)) as other:
        assert other.query("SELECT 42").value() == 42


# --- DB-API 2.0 --------------------------------------------------------------------------------


@pytest.fixture
def connection(lake: Lake) -> Iterator[dbapi.Connection]:
    with dbapi.connect(lake.url, lake.key) as made:
        yield made


def test_the_module_is_what_pep_249_asks_for() -> None:
    assert (dbapi.apilevel, dbapi.threadsafety, dbapi.paramstyle) == ("2.0", 2, "qmark")
    assert issubclass(dbapi.Warning, Exception)
    assert issubclass(dbapi.InterfaceError, dbapi.Error)
    for kind in (
        dbapi.DataError, dbapi.OperationalError, dbapi.IntegrityError, dbapi.InternalError,
        dbapi.ProgrammingError, dbapi.NotSupportedError,
    ):  # fmt: skip
        assert issubclass(kind, dbapi.DatabaseError)
        assert getattr(dbapi.Connection, kind.__name__) is kind
    assert dbapi.TimestampFromTicks(0).isoformat() == "1970-01-01T00:00:00+00:00"
    assert (dbapi.DateFromTicks(0).year, dbapi.TimeFromTicks(60).minute) == (1970, 1)
    assert dbapi.Binary(b"x") == b"x"


def test_a_cursor_fetches_in_any_portion(connection: dbapi.Connection) -> None:
    cursor = connection.cursor()
    assert (cursor.description, cursor.rowcount) == (None, -1)
    with pytest.raises(dbapi.ProgrammingError, match="execute"):
        cursor.fetchone()
    cursor.execute("SELECT n, n * 1.5 AS d FROM unnest([0, 1, 2, 3, 4, 5]) t(n) WHERE n < ?", [5])
    assert (cursor.rowcount, cursor.rownumber) == (5, 0)
    name, kind, *rest = (cursor.description or [])[1]
    assert name == "d"
    assert kind == dbapi.NUMBER
    assert kind != dbapi.STRING
    assert rest[2:4] == [parse_type(kind).precision, 1]
    assert cursor.fetchone() == (0, Decimal("0.0"))
    assert cursor.fetchmany() == [(1, Decimal("1.5"))]
    assert [row[0] for row in cursor.fetchmany(2)] == [2, 3]
    assert [row[0] for row in cursor] == [4]
    assert (cursor.fetchone(), cursor.fetchall(), cursor.fetchmany(3)) == (None, [], [])
    cursor.execute("SELECT $a AS x", {"a": "text"})
    assert cursor.fetchall() == [("text",)]
    cursor.setinputsizes([1])
    cursor.setoutputsize(1)
    assert cursor.result is not None
    assert cursor.result.snapshot_id > 0
    cursor.close()
    with pytest.raises(dbapi.InterfaceError, match="closed"):
        cursor.fetchone()


def test_D6_a_connection_sees_what_it_is_told_and_never_goes_back(
    client: Client, connection: dbapi.Connection, lake: Lake
) -> None:
    client.create_table("seen", {"id": "bigint"})
    before = client.query("SELECT count(*) FROM seen")
    count = 'SELECT count(*) FROM "seen"'
    for n in range(3):
        connection.see(client.ingest("seen", {"id": n}))
        assert connection.execute(count).fetchone() == (n + 1,)
    with dbapi.connect(lake.url, lake.key, at=before.snapshot_id) as past:
        assert past.execute(count).fetchone() == (0,)
    with dbapi.connect(lake.url, lake.key, after=client.ingest("seen", {"id": 3})) as fresh:
        assert fresh.execute(count).fetchone() == (4,)


def test_errors_are_those_of_pep_249(connection: dbapi.Connection, lake: Lake) -> None:
    with pytest.raises(dbapi.ProgrammingError) as wrong:
        connection.execute("SELEC 1")
    assert (wrong.value.code, wrong.value.retryable) == ("sql_error", False)
    assert isinstance(wrong.value.__cause__, SqlError)
    with pytest.raises(dbapi.ProgrammingError) as missing:
        connection.execute("SELECT * FROM nowhere")
    assert missing.value.code == "table_not_found"
    with pytest.raises(dbapi.InterfaceError):
        connection.execute("SELECT ?", [object()])
    for changing in ("INSERT INTO seen VALUES (1)", " delete from seen", "MERGE INTO x"):
        with pytest.raises(dbapi.NotSupportedError, match="ingest"):
            connection.execute(changing)
    with pytest.raises(dbapi.NotSupportedError):
        connection.execute("DROP TABLE seen")
    with pytest.raises(dbapi.NotSupportedError, match="ingest"):
        connection.cursor().executemany("INSERT INTO seen VALUES (?)", [[1]])
    with pytest.raises(dbapi.NotSupportedError):
        connection.cursor().callproc("x")
    connection.commit()
    with pytest.raises(dbapi.NotSupportedError):
        connection.rollback()
    with dbapi.connect(lake.url, "lbk_nobody") as nobody, pytest.raises(dbapi.OperationalError):
        nobody.execute("SELECT 1")
    with pytest.raises(dbapi.ProgrammingError, match="address"):
        dbapi.connect("nowhere", "k")
    connection.close()
    for use in (connection.cursor, connection.commit, lambda: connection.execute("SELECT 1")):
        with pytest.raises(dbapi.InterfaceError, match="closed"):
            use()


def test_pandas_reads_through_it(client: Client, connection: dbapi.Connection) -> None:
    pd = pytest.importorskip("pandas")
    client.create_table("frames", {"id": "bigint", "price": "decimal(5,2)", "at": "timestamptz"})
    frame = pd.DataFrame(
        {"id": [1, 2, 3], "at": pd.to_datetime(["2026-01-01", "2026-01-02", None], utc=True)}
    )
    connection.see(client.ingest("frames", frame))
    sql = 'SELECT id, price, "at" FROM frames WHERE id >= ? ORDER BY id'
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pandas only supports SQLAlchemy")
        read = pd.read_sql(sql, connection, params=[1], parse_dates=["at"])
        parts = list(pd.read_sql(sql, connection, params=[1], chunksize=2))
    assert read["id"].tolist() == [1, 2, 3]
    assert read["at"].tolist()[:2] == frame["at"].tolist()[:2]
    assert [len(part) for part in parts] == [2, 1]
    again = client.query(sql, [1]).to_pandas()
    assert again["at"].tolist()[:2] == frame["at"].tolist()[:2]
