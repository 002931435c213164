"""The compiled JSON reader takes what is right and usual, and never more than the exact pass."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import LakebusError
from lakebus.schemas import Column, TableSchema
from storage.rows import compiled_json, decode_json, decode_together
from storage.rows.compiled_json import CompiledRows, compiled_plan, load, read_bodies
from storage.rows.decode_json import exact_json, exact_ndjson
from storage.rows.decode_together import JsonBody
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart
from storage.rows.shapes import TableShape
from tests.json_reader.judge import storage_of
from tests.unit import compiled_rig
from tests.unit.test_rows_agreement import FITTING, bodies

ROWS_MAX = 50
KNOWN = [
    *("bigint", "boolean", "date", "decimal(38,10)", "decimal(9,2)", "double", "integer"),
    *("smallint", "timestamp", "timestamptz", "tinyint", "ubigint", "uinteger", "varchar"),
]
FITTING_KNOWN = sorted(set(KNOWN) & set(FITTING))


def table(*columns: tuple[str, str] | tuple[str, str, bool]) -> TableSchema:
    return TableSchema(1, "t", 1, tuple(Column(n, *c) for n, c in enumerate(columns, 1)))


def read(
    schema: TableSchema, *texts: str | bytes, lines: bool = False, rows_max: int = ROWS_MAX
) -> CompiledRows | None:
    plan = compiled_rig.plan_for(schema)
    assert plan is not None
    contents = [t if isinstance(t, bytes) else t.encode("utf-8", "surrogatepass") for t in texts]
    return read_bodies(plan, contents, [lines] * len(texts), rows_max=rows_max)


def assert_exact(schema: TableSchema, got: pa.RecordBatch, body: bytes, *, lines: bool) -> None:
    exact = exact_ndjson if lines else exact_json
    wanted = exact(schema, body, on_invalid="reject", rows_max=ROWS_MAX).batch
    assert got.schema == wanted.schema
    for mine, its in zip(got.columns, wanted.columns, strict=True):
        assert storage_of(mine).equals(storage_of(its)), body


EVENTS = table(
    ("id", "bigint", False),
    ("small", "tinyint"),
    ("positive", "uinteger"),
    ("huge", "ubigint"),
    ("ok", "boolean"),
    ("value", "double"),
    ("amount", "decimal(18,4)"),
    ("note", "varchar"),
    ("day", "date"),
    ("local", "timestamp"),
    ("at", "timestamptz"),
)
ROWS = [
    '{"id":1,"small":-128,"positive":4294967295,"huge":9223372036854775807,"ok":true,"value":0.1,'
    '"amount":12.5,"note":"eight by","day":"2024-02-29","local":"2026-01-31T12:00:00.25",'
    '"at":"2026-01-31T12:00:00Z"}',
    '{"at": "9999-12-31 23:59:59.999999Z", "local": "0001-01-01T00:00:00", "day": "2000-02-29",\n'
    '"note": "\\u00fc\\ud83d\\ude00\\"\\\\\\/\\b\\f\\n\\r\\t üß€😀", "amount": "-99999.9999",\t'
    '"value": -1.7976931348623157E+30, "ok": false, "huge": "18", "positive": 0, "small": 127,'
    ' "id": "9223372036854775807"}',
    '{"id":-9223372036854775807,"value":5e-32,"amount":"0","note":"","day":"1969-12-31",'
    '"local":"1969-12-31T23:59:59.999999","at":"1970-01-01T00:00:00-23:59"}',
    '{"id":0,"small":null,"positive":null,"huge":null,"ok":null,"value":null,"amount":null,'
    '"note":null,"day":null,"local":null,"at":null}',
    '{ "id" : -0 , "value" : -0.0 , "note" : "a text of more than sixteen bytes" }',
    '{"value":123456789012345678901234567890,"id":7,"amount":-0.0001}',
]


@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
def test_A10_all_types_and_spellings_that_are_usual(lines: bool) -> None:
    rows = [row.replace("\n", " ") for row in ROWS] if lines else ROWS
    body = "\r\n".join(rows) if lines else f" [{' , '.join(rows)}]\n"
    got = read(EVENTS, body, lines=lines)
    assert got is not None
    assert got.ends == [len(ROWS)]
    assert_exact(EVENTS, got.batch, body.encode(), lines=lines)
    got.batch.validate(full=True)


def test_A10_one_object_is_one_row() -> None:
    got = read(EVENTS, ROWS[0], ROWS[3])
    assert got is not None
    assert got.ends == [1, 2]
    assert_exact(EVENTS, got.batch.slice(0, 1), ROWS[0].encode(), lines=False)
    assert_exact(EVENTS, got.batch.slice(1), ROWS[3].encode(), lines=False)


def test_it_reads_the_bodies_of_the_benchmark() -> None:
    schema = table(("event_id", "bigint", False), ("ts", "timestamp"), ("amount", "decimal(18,4)"))
    row = {"event_id": 10**12, "ts": "2026-03-01T00:00:00.000001", "amount": "12345.6789"}
    got = read(schema, json.dumps([row] * ROWS_MAX), json.dumps([row]))
    assert got is not None
    assert got.ends == [ROWS_MAX, ROWS_MAX + 1]
    assert got.size_bytes == (ROWS_MAX + 1) * (8 + 8 + 16)


REFUSED = {
    "nothing": "",
    "no rows": "[]",
    "a row too many": "[" + ",".join(['{"id":1}'] * (ROWS_MAX + 1)) + "]",
    "cut short": '[{"id":1}',
    "cut in a text": '[{"id":1,"note":"a',
    "cut in an escape": '[{"id":1,"note":"\\u00',
    "cut in a time": '[{"id":1,"at":"2026-01-31T12:00',
    "more text": '[{"id":1}] x',
    "two arrays": '[{"id":1}][{"id":1}]',
    "comma at the end": '[{"id":1},]',
    "comma in the row": '[{"id":1,}]',
    "no comma": '[{"id":1}{"id":2}]',
    "no object": "[1]",
    "a zero byte": '[{"id":1}]\0',
    "a zero byte in a text": '[{"id":1,"note":"a\0b"}]',
    "a key twice": '[{"id":1,"note":"a","id":1}]',
    "a null twice": '[{"id":1,"note":null,"note":null}]',
    "an unknown key": '[{"id":1,"idx":1}]',
    "part of a key": '[{"id":1,"not":"a"}]',
    "missing": '[{"note":"a"}]',
    "null where none may be": '[{"id":null}]',
    "nearly null": '[{"id":1,"note":nul}]',
    "nearly true": '[{"id":1,"ok":truE}]',
    "a number for text": '[{"id":1,"note":1}]',
    "text for a small integer": '[{"id":1,"small":"1"}]',
    "a fraction": '[{"id":1.5}]',
    "an exponent": '[{"id":1e0}]',
    "zeros before": '[{"id":01}]',
    "a lone sign": '[{"id":-}]',
    "empty for a number": '[{"id":""}]',
    "beyond 8 bits": '[{"id":1,"small":128}]',
    "below no sign": '[{"id":1,"positive":-1}]',
    "beyond 64 bits": '[{"id":9223372036854775808}]',
    "20 digits": '[{"id":10000000000000000000}]',
    "perhaps beyond all doubles": '[{"id":1,"value":1e309}]',
    "digits for more than a double": f'[{{"id":1,"value":{"9" * 101}}}]',
    "digits for less than a double": f'[{{"id":1,"value":0.{"0" * 100}1}}]',
    "a point without digits": '[{"id":1,"value":1.}]',
    "an exponent without digits": '[{"id":1,"value":1e+}]',
    "a zero with a sign only some keep": '[{"id":1,"value":-0}]',
    "finer than the column": '[{"id":1,"amount":0.00001}]',
    "more digits than the column": '[{"id":1,"amount":"100000000000000"}]',
    "a day that is none": '[{"id":1,"day":"2100-02-29"}]',
    "month 13": '[{"id":1,"day":"2026-13-01"}]',
    "day 0": '[{"id":1,"day":"2026-01-00"}]',
    "year 0": '[{"id":1,"day":"0000-01-01"}]',
    "a time for a day": '[{"id":1,"day":"2026-01-01T00:00:00"}]',
    "hour 24": '[{"id":1,"local":"2026-01-31T24:00:00"}]',
    "second 60": '[{"id":1,"local":"2026-01-31T12:00:60"}]',
    "no seconds": '[{"id":1,"local":"2026-01-31T12:00"}]',
    "finer than a microsecond": '[{"id":1,"local":"2026-01-31T12:00:00.0000001"}]',
    "a zone where none is": '[{"id":1,"local":"2026-01-31T12:00:00Z"}]',
    "no zone where one is": '[{"id":1,"at":"2026-01-31T12:00:00"}]',
    "a zone without its colon": '[{"id":1,"at":"2026-01-31T12:00:00+0530"}]',
    "a zone of 24 hours": '[{"id":1,"at":"2026-01-31T12:00:00+24:00"}]',
    "before year 1": '[{"id":1,"at":"0001-01-01T00:00:00+00:01"}]',
    "after year 9999": '[{"id":1,"at":"9999-12-31T23:59:59-00:01"}]',
    "an escape that is none": '[{"id":1,"note":"\\x"}]',
    "half a pair": '[{"id":1,"note":"\\ud800"}]',
    "the other half": '[{"id":1,"note":"\\udc00"}]',
    "the other half twice": '[{"id":1,"note":"\\udc00\\udc00"}]',
    "half a pair and a letter": '[{"id":1,"note":"\\ud800\\u0061"}]',
    "a line feed in a text": '[{"id":1,"note":"a\nb"}]',
    "an overlong form": b'[{"id":1,"note":"\xc0\xaf"}]',
    "an overlong form of three": b'[{"id":1,"note":"\xe0\x80\xaf"}]',
    "a half in UTF-8": b'[{"id":1,"note":"\xed\xa0\x80"}]',
    "beyond Unicode": b'[{"id":1,"note":"\xf4\x90\x80\x80"}]',
    "a character cut short": b'[{"id":1,"note":"\xe2\x82"}]',
    "a lone continuation": b'[{"id":1,"note":"eight by\x80"}]',
    "a byte order mark": b'\xef\xbb\xbf[{"id":1}]',
}


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
def test_A9_A10_what_is_refused_leaves_nothing_behind(bad: str | bytes) -> None:
    got = read(EVENTS, ROWS[0], bad, ROWS[3], ROWS[2])
    assert got is not None
    assert got.ends == [1, -1, 2, 3]
    for place, row in enumerate((ROWS[0], ROWS[3], ROWS[2])):
        assert_exact(EVENTS, got.batch.slice(place, 1), row.encode(), lines=False)
    assert read(EVENTS, bad) is None


@pytest.mark.parametrize("joint", ["\n\n", "", " ", ",", "\n,"])
def test_A10_lines_hold_one_object_each(joint: str) -> None:
    assert read(EVENTS, '{"id":1}' + joint + '{"id":2}', lines=True) is None
    assert read(EVENTS, '[{"id":1}]', lines=True) is None
    assert read(EVENTS, '{"id":1,\n"ok":true}', lines=True) is None


@settings(max_examples=80, deadline=None)
@given(bodies(FITTING_KNOWN))
def test_A10_it_never_accepts_more_nor_reads_other_values(
    case: tuple[TableSchema, str, bool],
) -> None:
    schema, text, lines = case
    got = read(schema, text, lines=lines)
    if got is not None:
        assert_exact(schema, got.batch, text.encode("utf-8", "surrogatepass"), lines=lines)
        got.batch.validate(full=True)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_A10_bytes_that_went_wrong(data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS)).encode()
    start = data.draw(st.integers(0, len(row)))
    end = data.draw(st.integers(start, min(len(row), start + 3)))
    body = row[:start] + data.draw(st.binary(max_size=2)) + row[end:]
    got = read(EVENTS, body)
    if got is None:
        return
    try:
        assert_exact(EVENTS, got.batch, body, lines=False)
    except LakebusError:
        pytest.fail(f"accepted what is refused: {body!r}")


def test_large_bodies_have_buffers_of_their_own_and_threads_share_none() -> None:
    schema = table(("id", "bigint"), ("note", "varchar"))

    def rows_of(first: int) -> pa.RecordBatch | None:
        rows = [{"id": first + n, "note": "x" * (first % 7) + str(n)} for n in range(20_000)]
        got = read(schema, json.dumps(rows), rows_max=len(rows))
        assert got is not None
        assert got.batch.column(0).to_pylist() == [row["id"] for row in rows]
        assert got.batch.column(1).to_pylist() == [row["note"] for row in rows]
        return got.batch

    with ThreadPoolExecutor(3) as pool:
        assert len([*pool.map(rows_of, range(0, 300_000, 100_000))]) == 3


@pytest.mark.parametrize("at_once", [7, 997, 1 << 40])
def test_large_bodies_get_room_for_all_of_their_rows(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Rows are counted in parts; one too few would leave the body to the other readers."""

    monkeypatch.setattr(compiled_json, "_COUNTED_AT_ONCE", at_once)
    rows = compiled_json.KEPT_BYTES // 18
    got = read(table(("id", "bigint")), b'{"id": 1234567890}\n' * rows, lines=True, rows_max=rows)
    assert got is not None
    assert got.ends == [rows]


def test_bodies_that_would_need_too_much_room_are_not_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schema = table(("id", "bigint"), ("note", "varchar"))
    text = json.dumps([{"id": 1, "note": "x" * compiled_json.KEPT_BYTES}])
    assert read(schema, text) is not None
    monkeypatch.setattr(compiled_json, "ROOM_BYTES_MAX", len(text))
    assert read(schema, text) is None
    assert read(schema, *['{"id":1}'] * (compiled_json.BODIES_MAX + 1)) is None


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    schema = table(("a", "tinyint"))
    small = "[" + ",".join(["{}"] * compiled_json.KEPT_ROWS) + "]"
    more = small.replace("[", "[{},")
    got = read(schema, small, rows_max=10**6)
    assert got is not None
    assert got.ends == [compiled_json.KEPT_ROWS]
    assert read(schema, more, rows_max=10**6) is None


@pytest.mark.parametrize("kind", ["float", "json", "uuid", "blob", "time", "integer[]"])
def test_tables_with_other_types_are_not_for_it(kind: str) -> None:
    assert compiled_rig.plan_for(table(("a", "bigint"), ("b", kind))) is None
    assert compiled_rig.plan_for(table(("a", "bigint"))) is not None


def test_it_is_optional(tmp_path: Path) -> None:
    assert load(tmp_path / "not_built.so") is None
    other = tmp_path / "other.c"
    other.write_text("long long json_columns_layout(void) { return 0; }\n")
    assert load(compiled_rig.build(other, tmp_path / "other.so")) is None
    assert compiled_plan((), TableShape((), pa.schema([])), None) is None


def test_A9_A10_bodies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_together, "plan_of", compiled_rig.plan_with)
    usual = [ROWS[0], f"[{ROWS[4]}, {ROWS[3]}]", ROWS[2], f"[{ROWS[5]}]"]
    unusual, spoils, bad = '[{"id":1,"value":1e100}]', '[{"id":1,"amount":1e0}]', '[{"id":"x"}]'
    texts = [usual[0], bad, usual[1], unusual, usual[2], spoils, usual[3]]
    group = [JsonBody(text.encode(), lines=False) for text in texts]
    together = decode_together.decode_together(EVENTS, group, rows_max=ROWS_MAX)
    assert [rows is None for rows in together.found] == [text in (bad, spoils) for text in texts]
    assert together.spoilers == [1, 5]
    for body, rows in zip(group, together.found, strict=True):
        if rows is not None:
            assert_exact(EVENTS, rows.batch, body.content, lines=False)
            assert rows.fingerprint == fingerprint([EntryPart(EVENTS.table_id, 1, rows.batch)])
            assert rows.size_bytes > 0
    (alone,) = decode_together.decode_together(EVENTS, group[:1], rows_max=ROWS_MAX).found
    assert alone is not None
    assert together.found[0] is not None
    assert alone.fingerprint == together.found[0].fingerprint


def test_A10_decoding_falls_back_on_the_other_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_json, "plan_of", compiled_rig.plan_with)
    usual, unusual = '[{"id":1}]', '[{"ID":1e0}]'
    for body in (usual, unusual):
        got = decode_json.decode_json(EVENTS, body.encode(), on_invalid="reject", rows_max=ROWS_MAX)
        assert got.batch.column(0).to_pylist() == [1]
    with pytest.raises(LakebusError):
        decode_json.decode_json(EVENTS, b'[{"id":"x"}]', on_invalid="reject", rows_max=ROWS_MAX)


def test_installing_builds_it_where_a_compiler_is() -> None:
    try:
        importlib.metadata.distribution("lakebus")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lakebus is not installed here")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    assert compiled_json.READER is not None
