"""Table definitions and their changes: partitions, sort orders, retention, widening."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from actors.range_files import bring_to
from lakebus.errors import LakebusError, SchemaChangeInvalid, SchemaInvalid
from lakebus.schemas import Column, TableSchema
from storage.ingesting.definitions import ColumnDefinition, TableChangeRequest, TableDefinition
from storage.ingesting.layouts import parse_sort_by, row_retention
from storage.rows.types import parse_type

COLUMNS = (
    Column(1, "id", "integer", nullable=False),
    Column(2, "ts", "timestamptz"),
    Column(3, "country", "varchar"),
    Column(4, "price", "decimal(9,2)"),
    Column(5, "raw", "blob"),
    Column(6, "doc", "json"),
)
TABLE = TableSchema(
    7,
    "events",
    3,
    COLUMNS,
    partition_by=("day(ts)", "bucket(16, id)"),
    sort_by=("zorder(country, id)",),
    retention={"rows": {"column": "ts", "for_s": 86_400}},
)


def changed(**request: Any) -> TableSchema:
    return TableChangeRequest(**request).applied_to(TABLE)


def defined(**given: Any) -> Any:
    columns = tuple(ColumnDefinition(c.name, c.type, c.nullable) for c in COLUMNS)
    return TableDefinition("events", columns, **given).checked()


# --- definitions -----------------------------------------------------------------------------


def test_a_definition_is_put_into_canonical_words() -> None:
    checked = defined(
        partition_by=("DAY(ts)", "bucket(16,Id)"),
        sort_by=(" ZORDER(Country,ID) ",),
        retention={"rows": {"column": "TS", "for": "2 Weeks"}},
    )
    assert checked.partition_by == ("day(ts)", "bucket(16, id)")
    assert checked.sort_by == ("zorder(country, id)",)
    assert checked.retention == {"rows": {"column": "ts", "for_s": 1_209_600}}
    assert defined(sort_by=("ts", "ID")).sort_by == ("ts", "id")
    assert defined(sort_by=("raw",)).sort_by == ("raw",)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1 second", 1), ("90 seconds", 90), ("5 minutes", 300), ("1 hour", 3_600),
     ("90 days", 7_776_000), ("2weeks", 1_209_600)],
)  # fmt: skip
def test_durations_are_words(text: str, seconds: int) -> None:
    rule = row_retention(defined(retention={"rows": {"column": "ts", "for": text}}).retention)
    assert rule is not None
    assert (rule.column, rule.for_s) == ("ts", seconds)


def test_the_stored_retention_is_taken_back_and_an_empty_one_is_none() -> None:
    stored = {"rows": {"column": "ts", "for_s": 60}}
    assert defined(retention=stored).retention == stored
    for empty in (None, {}, {"rows": None}):
        assert defined(retention=empty).retention == {}
        assert row_retention({}) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"retention": {"snapshots": 3}}, "one member, rows"),
        ({"retention": {"rows": "90 days"}}, "one member, rows"),
        ({"retention": {"rows": {"column": "ts"}}}, "a column and a duration"),
        ({"retention": {"rows": {"column": "ts", "for": "1 day", "for_s": 3}}}, "a column and a"),
        ({"retention": {"rows": {"column": "ts", "for": "0 days"}}}, "positive"),
        ({"retention": {"rows": {"column": "ts", "for": "999999 weeks"}}}, "1,000 years"),
        ({"retention": {"rows": {"column": "ts", "for": "1 month"}}}, "a whole number and a unit"),
        ({"retention": {"rows": {"column": "ts", "for": "1.5 days"}}}, "a whole number and a unit"),
        ({"retention": {"rows": {"column": "ts", "for": 90}}}, "a whole number and a unit"),
        ({"retention": {"rows": {"column": "ts", "for_s": True}}}, "positive"),
        ({"retention": {"rows": {"column": 3, "for": "1 day"}}}, "name of a column"),
        ({"retention": {"rows": {"column": "nothing", "for": "1 day"}}}, "no column"),
        ({"retention": {"rows": {"column": "id", "for": "1 day"}}}, "needs a date"),
        ({"sort_by": ("nothing",)}, "no column"),
        ({"sort_by": ("id", "ID")}, "twice"),
        ({"sort_by": ("doc",)}, "no order"),
        ({"sort_by": ("zorder(id, raw)",)}, "no order"),
        ({"sort_by": ("zorder(id)",)}, "2 to 4 columns"),
        ({"sort_by": ("zorder(id, ts, country, price, raw)",)}, "2 to 4 columns"),
        ({"sort_by": ("zorder(id, id)",)}, "twice"),
        ({"sort_by": ("hilbert(id, ts, country)",)}, "2 columns"),
        ({"sort_by": ("zorder(id, ts)", "country")}, "only entry"),
        ({"sort_by": ("gray(id, ts)",)}, "no sort order"),
        ({"sort_by": ("zorder(id, )",)}, "not a name"),
        ({"partition_by": ("week(ts)",)}, "not a transform"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_change(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaInvalid, match=said):
        defined(**given)
    with pytest.raises(SchemaInvalid, match=said):
        changed(**given)


# --- changes ---------------------------------------------------------------------------------


def test_renames_are_followed_by_everything_that_names_the_column() -> None:
    found = changed(rename_columns={"ts": "at", "ID": "key", "country": "land"})
    assert found.partition_by == ("day(at)", "bucket(16, key)")
    assert found.sort_by == ("zorder(land, key)",)
    assert found.retention == {"rows": {"column": "at", "for_s": 86_400}}
    swapped = changed(rename_columns={"country": "raw", "raw": "country"})
    assert swapped.sort_by == ("zorder(raw, id)",)
    assert [c.column_id for c in swapped.columns] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("column", "what"),
    [("id", "partition_by"), ("country", "sort_by"), ("ts", "partition_by")],
)
def test_a_column_that_is_used_is_not_dropped(column: str, what: str) -> None:
    with pytest.raises(SchemaChangeInvalid, match=f"{column} is used by {what}"):
        changed(drop_columns=(column,))


def test_a_column_can_be_dropped_with_its_last_use() -> None:
    found = changed(drop_columns=("ts",), partition_by=("country",), retention={})
    assert found.partition_by == ("country",)
    assert found.retention == {}
    with pytest.raises(SchemaChangeInvalid, match="ts is used by retention"):
        changed(drop_columns=("ts",), partition_by=("country",))


def test_layout_changes_are_replaced_removed_or_left() -> None:
    assert changed(sort_by=()).sort_by == ()
    assert changed(partition_by=()).partition_by == ()
    assert changed(sort_by=("ts",)).partition_by == TABLE.partition_by
    found = changed(rename_columns={"ts": "at"}, partition_by=("month(at)",))
    assert found.partition_by == ("month(at)",)
    with pytest.raises(SchemaInvalid, match="no column"):
        changed(rename_columns={"ts": "at"}, partition_by=("month(ts)",))
    with pytest.raises(SchemaChangeInvalid, match="empty"):
        changed()


def test_relaxing_drops_not_null() -> None:
    assert changed(relax_columns=("ID", "ts")).columns[:2] == (
        Column(1, "id", "integer"),
        Column(2, "ts", "timestamptz"),
    )
    with pytest.raises(SchemaChangeInvalid, match="no column"):
        changed(relax_columns=("nothing",))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tinyint", "smallint"), ("tinyint", "bigint"), ("integer", "bigint"),
        ("utinyint", "smallint"), ("uinteger", "bigint"), ("uinteger", "ubigint"),
        ("float", "double"), ("decimal(9,2)", "decimal(18,2)"), ("decimal(9,2)", "decimal(18,4)"),
        ("decimal(3,3)", "decimal(4,4)"), ("varchar", "text"), ("date", "date"),
    ],
)  # fmt: skip
def test_a_type_is_widened_where_nothing_is_lost(old: str, new: str) -> None:
    table = TableSchema(1, "t", 1, (Column(1, "c", parse_type(old).sql),))
    found = TableChangeRequest(widen_columns={"C": new}).applied_to(table)
    assert found.columns == (Column(1, "c", parse_type(new).sql),)
    kind = parse_type(old)
    values = [kind.low, kind.high, None] if kind.high else [None]
    brought = bring_to(pa.table({"1": pa.array(values, kind.arrow)}), found)
    assert brought.column("1").to_pylist() == values
    assert brought.schema.field("1").type == parse_type(new).arrow


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bigint", "integer"), ("integer", "uinteger"), ("ubigint", "bigint"), ("bigint", "double"),
        ("double", "float"), ("integer", "decimal(10,0)"), ("decimal(9,2)", "decimal(9,4)"),
        ("decimal(9,4)", "decimal(18,2)"), ("date", "timestamp"), ("timestamp", "timestamptz"),
        ("varchar", "json"), ("integer", "varchar"),
    ],
)  # fmt: skip
def test_a_type_is_not_changed_where_something_could_be_lost(old: str, new: str) -> None:
    table = TableSchema(1, "t", 1, (Column(1, "c", parse_type(old).sql),))
    with pytest.raises(SchemaChangeInvalid, match="cannot go from"):
        TableChangeRequest(widen_columns={"c": new}).applied_to(table)


def test_an_unknown_type_says_which_there_are() -> None:
    with pytest.raises(LakebusError, match="not a column type"):
        changed(widen_columns={"id": "huge"})


def test_sort_orders_are_read_back_as_they_are_stored() -> None:
    assert parse_sort_by(("hilbert(a, b)",)).columns == ("a", "b")
    assert parse_sort_by(("a", "b")).curve == ""
