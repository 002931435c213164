"""The fast path never accepts what the exact pass refuses, and never gives other values (A10)."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import LakebusError
from lakebus.schemas import Column, TableSchema
from storage.rows.columns import REFUSALS
from storage.rows.decode_json import exact_json, exact_ndjson, fast_json, fast_ndjson, plan_of
from tests.json_reader.judge import storage_of

ROWS_MAX = 50

_number = st.one_of(
    st.integers(-(2**65), 2**65).map(str),
    st.integers(-300, 300).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(allow_nan=False, allow_infinity=False, places=4).map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(
        [
            "-0",
            "-0.0",
            "1.0",
            "1.50",
            "1e2",
            "1e400",
            "0e9",
            "9" * 38,
            "9" * 39,
            "9" * 77,
            "0.00005",
        ]
    ),
)
_quoted_number = st.one_of(
    _number,
    st.from_regex(r"[-+0-9.eE_ ,]{0,6}", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "null", "007", "", "-", "1.", ".5", "1,2"]),
).map(lambda text: f'"{text}"')
_clock = st.from_regex(r"[0-2][0-9](:[0-6][0-9]){0,2}(\.[0-9]{0,9})?", fullmatch=True)
_day = st.one_of(
    st.dates().map(str),
    st.from_regex(r"[0-9]{4}-[01][0-9]-[0-3][0-9]", fullmatch=True),
)
_zone = st.one_of(
    st.sampled_from(
        ["", "Z", "z", "+05:30", "-00:00", "+0530", "+05", "+24:00", "+5:30", "+23:59"]
    ),
    st.from_regex(r"[-+][0-9:]{0,6}", fullmatch=True),
)
_moment = st.builds("{}{}{}{}".format, _day, st.sampled_from(["T", " ", "t", ""]), _clock, _zone)
_time_text = st.one_of(_moment, _day, _clock, st.datetimes().map(lambda d: d.isoformat()))
_uuid_text = st.one_of(
    st.uuids().map(str),
    st.uuids().map(lambda u: str(u).upper()),
    st.uuids().map(lambda u: u.hex),
    st.from_regex(r"[0-9a-f -]{36}", fullmatch=True),
)
_base64_text = st.one_of(
    st.binary(max_size=8).map(lambda b: base64.b64encode(b).decode()),
    st.from_regex(r"[A-Za-z0-9+/=]{0,8}", fullmatch=True),
)
_text = st.one_of(
    st.text(max_size=8).map(lambda t: t.replace("\\", "").replace('"', "")),
    st.sampled_from(
        ['\\":', "\\\\", ":", ": ", " :", "\\u0061", "\\ud800", "\\ud83d\\ude00", "{a"]
    ),
).filter(lambda t: all(ord(c) >= 32 for c in t))
_quoted_text = st.one_of(_time_text, _uuid_text, _base64_text, _text).map(lambda t: f'"{t}"')
_space = st.sampled_from(["", "", "", " ", "  ", "\t", "\n"])
_scalar = st.one_of(
    _number, _quoted_number, _quoted_text, st.sampled_from(["null", "true", "false"])
)
_nested = st.recursive(
    _scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + " , ".join(items) + "]"),
        st.lists(
            st.tuples(st.sampled_from(['"a"', '"b" ', '"\\\\"', '"a:"']), inner), max_size=3
        ).map(lambda members: "{" + ", ".join(f"{k}:{v}" for k, v in members) + "}"),
    ),
    max_leaves=6,
)

#: What mostly fits a column of each type, so that examples get past the fast path often.
FITTING = {
    "boolean": st.sampled_from(["true", "false"]),
    "tinyint": _number,
    "integer": _number,
    "ubigint": st.one_of(_number, _quoted_number),
    "bigint": st.one_of(_number, _quoted_number),
    "float": st.one_of(_number, _quoted_number),
    "double": st.one_of(_number, _quoted_number),
    "decimal(9,2)": st.one_of(_number, _quoted_number),
    "decimal(38,10)": st.one_of(_number, _quoted_number),
    "varchar": _text.map(lambda t: f'"{t}"'),
    "blob": _base64_text.map(lambda t: f'"{t}"'),
    "date": _day.map(lambda t: f'"{t}"'),
    "time": _time_text.map(lambda t: f'"{t}"'),
    "timestamp": _moment.map(lambda t: f'"{t}"'),
    "timestamptz": _moment.map(lambda t: f'"{t}"'),
    "uuid": _uuid_text.map(lambda t: f'"{t}"'),
    "json": _nested,
}


@st.composite
def bodies(
    draw: st.DrawFn, among: Sequence[str] = tuple(sorted(FITTING))
) -> tuple[TableSchema, str, bool]:
    """A schema of one or two columns, and a body that is nearly or fully right for it."""

    kinds = draw(st.lists(st.sampled_from(among), min_size=1, max_size=2))
    columns = tuple(
        Column(i + 1, f"c{i}", kind, draw(st.sampled_from([True, True, False])))
        for i, kind in enumerate(kinds)
    )
    lines = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        members = []
        for column in columns:
            times = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 0, 2]))
            for _ in range(times):
                value = draw(
                    st.one_of(FITTING[column.type], FITTING[column.type], st.just("null"), _nested)
                    if draw(st.integers(0, 5)) == 0
                    else FITTING[column.type]
                )
                key = draw(st.sampled_from([column.name] * 12 + [column.name.upper(), "c\\u0030"]))
                space = draw(_space)
                members.append(f'"{key}"{draw(_space)}:{space}{value}')
        rows.append("{" + ",".join(members) + "}")
    if lines:
        body = draw(st.sampled_from(["\n", "\n", "\n", "\r\n", "\n\n", " ", ""])).join(rows)
        body += draw(st.sampled_from(["", "\n", "\n\n"]))
    else:
        body = "[" + ",".join(rows) + "]"
    return TableSchema(1, "t", 1, columns), body, lines


@settings(max_examples=200, deadline=None)
@given(bodies())
def test_A10_fast_path_equals_the_exact_pass(case: tuple[TableSchema, str, bool]) -> None:
    schema, text, lines = case
    body = text.encode("utf-8", "surrogatepass")
    fast, exact = (fast_ndjson, exact_ndjson) if lines else (fast_json, exact_json)
    try:
        batch = fast(plan_of(schema), body, rows_max=ROWS_MAX)
    except (*REFUSALS, LakebusError):
        return
    expected = exact(schema, body, on_invalid="reject", rows_max=ROWS_MAX).batch
    assert batch.schema == expected.schema
    for got, wanted in zip(batch.columns, expected.columns, strict=True):
        assert storage_of(got).equals(storage_of(wanted)), text
    batch.validate(full=True)


@pytest.mark.parametrize("kind", sorted(FITTING))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_A10_single_values_agree(kind: str, data: st.DataObject) -> None:
    schema = TableSchema(1, "t", 1, (Column(1, "v", kind),))
    values = data.draw(st.lists(FITTING[kind], min_size=1, max_size=2))
    body = ("[" + ",".join(f'{{"v":{v}}}' for v in values) + "]").encode("utf-8", "surrogatepass")
    try:
        batch = fast_json(plan_of(schema), body, rows_max=ROWS_MAX)
    except REFUSALS:
        return
    expected = exact_json(schema, body, on_invalid="reject", rows_max=ROWS_MAX).batch
    assert storage_of(batch.column(0)).equals(storage_of(expected.column(0)))
