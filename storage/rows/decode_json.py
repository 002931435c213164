"""JSON bodies: fast readers for each table version, and the exact one behind them.

What `compiled_json.py` takes, it has read. Else the fast path is a msgspec struct class generated
from the schema; the values of all rows are read out in one sweep, and cut into columns that
`columns.py` builds. Anything it refuses, for whatever reason, goes to the slow pass, which alone
decides what is wrong and says so row by row (contract A10). So both are safe as long as they never
accept more than the slow pass does.

One thing msgspec does not see is a key that appears twice in a row. Every key is followed by
`":`, so their count in the body is at least the number of keys; if it equals the number of values
that arrived, no key can have appeared twice. False hits in text only send the body to the slow
pass. Likewise two objects on one NDJSON line are found by counting line ends.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from lakebus.errors import MalformedRequest
from lakebus.schemas import Column, TableSchema
from storage.rows import columns as column_builders
from storage.rows import json_text, slow_pass
from storage.rows.compiled_json import CompiledPlan, compiled_plan, read_bodies
from storage.rows.decoded import DecodedRows, OnInvalid
from storage.rows.names import fold
from storage.rows.nested_columns import KeysSeen, NestedPlan, nested_plan
from storage.rows.shapes import shape_of
from storage.rows.types import ColumnType, Family

PLANS_MAX = 512

_UNSET = msgspec.UNSET
_COLON, _QUOTE, _SPACE = b':" '
_SPACED_COLON = re.compile(rb'"[ \t\n\r]+:')
_KEY = re.compile(rb'"[ \t\n\r]*:')
_FALSE_KEY = re.compile(rb'\\"[ \t\n\r]*:')
_RAW_FAMILIES = (Family.DECIMAL, Family.JSON)


@dataclass(frozen=True, slots=True)
class _ColumnPlan:
    """`nested`: how to build a column of a nested type; for scalars `build` does."""

    build: column_builders.Builder
    nested: NestedPlan | None
    kind: ColumnType
    nullable: bool
    is_raw: bool


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """All that is derived from one schema version. `counts_keys_by_body`: False where keys are
    inside of values, because these are counted for all rows together. `compiled`: None where the
    compiled reader is not built, or does not know a type."""

    columns: tuple[Column, ...]
    kinds: tuple[ColumnType, ...]
    arrow: pa.Schema
    plans: tuple[_ColumnPlan, ...]
    rows: msgspec.json.Decoder[Any]
    row: msgspec.json.Decoder[Any]
    counts_keys_by_body: bool
    compiled: CompiledPlan | None


class PlanCache:
    """Plans by (table id, version), the least recently used dropped beyond `plans_max`."""

    def __init__(self, plans_max: int = PLANS_MAX) -> None:
        self._plans: OrderedDict[tuple[int, int], DecodePlan] = OrderedDict()
        self._plans_max = plans_max

    def plan(self, schema: TableSchema) -> DecodePlan:
        key = (schema.table_id, schema.version)
        plan = self._plans.get(key)
        # Ids are never reused within a lake; comparing the columns keeps two lakes apart too.
        if plan is None or not (plan.columns is schema.columns or plan.columns == schema.columns):
            plan = self._plans[key] = make_plan(schema)
            if len(self._plans) > self._plans_max:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan

    def __len__(self) -> int:
        return len(self._plans)


_CACHE = PlanCache()


def plan_of(schema: TableSchema) -> DecodePlan:
    """The cached plan of a schema version. Decoding runs on one event loop; no lock is needed."""

    return _CACHE.plan(schema)


def make_plan(schema: TableSchema) -> DecodePlan:
    shape = shape_of(schema)
    fields: list[Any] = []
    rename: dict[str, str] = {}
    plans = []
    for column, kind in zip(schema.columns, shape.kinds, strict=True):
        attribute = f"c{column.column_id}"
        rename[attribute] = column.name
        nested = nested_plan(kind) if kind.is_nested else None
        decoded_type = nested.field_type if nested else column_builders.field_type(kind)
        if column.nullable:
            optional = decoded_type | msgspec.UnsetType
            if kind.family not in _RAW_FAMILIES:
                optional = optional | None
            fields.append((attribute, optional, _UNSET))
        else:
            fields.append((attribute, decoded_type))
        plans.append(
            _ColumnPlan(
                column_builders.builder_of(kind),
                nested,
                kind,
                column.nullable,
                kind.family in _RAW_FAMILIES,
            )
        )
    row_type = msgspec.defstruct(
        "Row", fields, kw_only=True, rename=rename, forbid_unknown_fields=True, gc=False
    )
    return DecodePlan(
        columns=schema.columns,
        kinds=shape.kinds,
        arrow=shape.arrow,
        plans=tuple(plans),
        rows=msgspec.json.Decoder(list[row_type]),  # type: ignore[valid-type]
        row=msgspec.json.Decoder(row_type),
        counts_keys_by_body=not any(kind.is_nested for kind in shape.kinds),
        compiled=compiled_plan(schema.columns, shape),
    )


def decode_json(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """An application/json body: an array of objects, or one object."""

    plan = plan_of(schema)
    compiled = compiled_batch(plan, body, lines=False, rows_max=rows_max)
    if compiled is not None:
        return DecodedRows(compiled)
    try:
        return DecodedRows(fast_json(plan, body, rows_max=rows_max))
    except column_builders.REFUSALS:
        return exact_json(schema, body, on_invalid=on_invalid, rows_max=rows_max)


def decode_ndjson(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """An application/x-ndjson body: one object a line."""

    plan = plan_of(schema)
    compiled = compiled_batch(plan, body, lines=True, rows_max=rows_max)
    if compiled is not None:
        return DecodedRows(compiled)
    try:
        return DecodedRows(fast_ndjson(plan, body, rows_max=rows_max))
    except column_builders.REFUSALS:
        return exact_ndjson(schema, body, on_invalid=on_invalid, rows_max=rows_max)


def compiled_batch(
    plan: DecodePlan, body: bytes, *, lines: bool, rows_max: int
) -> pa.RecordBatch | None:
    """The compiled reader alone. None when another one must decide."""

    if plan.compiled is None:
        return None
    rows = read_bodies(plan.compiled, [body], [lines], rows_max=rows_max)
    return None if rows is None else rows.batch


def fast_json(plan: DecodePlan, body: bytes, *, rows_max: int) -> pa.RecordBatch:
    """The fast path alone. Raises one of `columns.REFUSALS` when the exact reader must decide."""

    return _fast_batch(plan, rows_of_array(plan, body, rows_max=rows_max), body)


def fast_ndjson(plan: DecodePlan, body: bytes, *, rows_max: int) -> pa.RecordBatch:
    """As `fast_json`, for one object a line."""

    return _fast_batch(plan, rows_of_lines(plan, body, rows_max=rows_max), body)


def exact_json(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """The slow pass alone: the authority on what a body means."""

    rows = json_text.read_rows(json_text.body_text(body))
    return _exact(schema, rows, on_invalid, rows_max)


def exact_ndjson(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """As `exact_json`, for one object a line."""

    rows = json_text.read_lines(json_text.body_text(body))
    return _exact(schema, rows, on_invalid, rows_max)


def _exact(
    schema: TableSchema,
    rows: Iterator[json_text.JsonRow],
    on_invalid: OnInvalid,
    rows_max: int,
) -> DecodedRows:
    plan = plan_of(schema)
    return slow_pass.decode_exactly(
        schema, plan.kinds, plan.arrow, rows, on_invalid=on_invalid, rows_max=rows_max
    )


def split_tables(body: bytes) -> dict[str, bytes]:
    """A body `{table: [rows]}` as table name (folded to lower case) to that table's raw JSON.

    Raises MalformedBody, and MalformedRequest for no table or for names that fold alike.
    """

    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        parts = [(name, bytes(value)) for name, value in raw.items()]
        # A compact body is as long as its parts; if not, a repeated name may have been dropped.
        length = 1 + sum(len(n.encode()) + len(v) + len('"":,') for n, v in parts)
        if length != len(body):
            parts = _split_exactly(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        parts = _split_exactly(body)
    if not parts:
        raise MalformedRequest('the body names no table; send {"table": [rows]}')
    tables: dict[str, bytes] = {}
    for name, value in parts:
        folded = fold(name)
        if folded in tables:
            raise MalformedRequest(f"the body names the table {folded[:80]!r} twice")
        tables[folded] = value
    return tables


def _split_exactly(body: bytes) -> list[tuple[str, bytes]]:
    members = json_text.read_object(json_text.body_text(body))
    return [(member.key, member.text.encode("utf-8")) for member in members]


def rows_of_array(plan: DecodePlan, body: bytes, *, rows_max: int) -> Sequence[Any]:
    """What `fast_json` makes columns of. Raises as it does."""

    if body.lstrip(b" \t\n\r")[:1] == b"{":
        rows: list[Any] = [plan.row.decode(body)]
    else:
        rows = plan.rows.decode(body)
    slow_pass.check_row_count(len(rows), rows_max=rows_max)
    return rows


def rows_of_lines(plan: DecodePlan, body: bytes, *, rows_max: int) -> Sequence[Any]:
    """What `fast_ndjson` makes columns of. Raises as it does."""

    rows: list[Any] = plan.row.decode_lines(body)
    # Outside of strings (which cannot hold a line feed) these only stand between two rows.
    boundaries = body.count(b"}\n{") or body.count(b"}\r\n{")
    if boundaries != len(rows) - 1 or body.count(b"\n") - body.endswith(b"\n") != boundaries:
        raise ValueError("rows and lines may not be the same")
    slow_pass.check_row_count(len(rows), rows_max=rows_max)
    return rows


def _fast_batch(plan: DecodePlan, rows: Sequence[Any], body: bytes) -> pa.RecordBatch:
    built = build_columns(plan, rows, (len(rows),))
    built.check_keys(0, body)
    return built.batch


@dataclass(frozen=True, slots=True)
class BuiltRows:
    """The rows of one body after the other as one batch, whose keys are still to be checked.

    `ends[n]`: where the rows of body n end. `missing[n]`: values that it left out. `raws`: all
    values of each column of JSON. `seen`: what is inside of nested values, of a single body only.
    """

    batch: pa.RecordBatch
    ends: Sequence[int]
    missing: Sequence[int]
    raws: Sequence[Sequence[Any]]
    seen: KeysSeen

    def check_keys(self, number: int, body: bytes) -> None:
        """Of body `number`. Raises ValueError as the function of this name does."""

        start, end = self.ends[number - 1] if number else 0, self.ends[number]
        raws = [*self.seen.raws]
        for column in self.raws:
            raws += column[start:end]
        values = (end - start) * self.batch.num_columns - self.missing[number]
        check_keys(body, values + self.seen.present, raws)


def values_of(rows: Iterable[Any]) -> Iterable[Any]:
    """The values of rows one after the other, each row's in the order of columns."""

    # Half of what one attrgetter a column costs; and a row's tuple is gone before the next one.
    return chain.from_iterable(map(msgspec.structs.astuple, rows))


def build_columns(plan: DecodePlan, rows: Sequence[Any], ends: Sequence[int]) -> BuiltRows:
    """All rows as one batch. Raises one of `columns.REFUSALS` when some row does not fit, whichever
    it is. Of several bodies only when the plan `counts_keys_by_body`."""

    return build_from_values(plan, list(values_of(rows)), ends)


def build_from_values(plan: DecodePlan, cells: list[Any], ends: Sequence[int]) -> BuiltRows:
    """As `build_columns`, from the `values_of` all rows."""

    missing = [0] * len(ends)
    seen = KeysSeen()
    raws = []
    arrays = []
    for place, column in enumerate(plan.plans):
        values = cells[place :: len(plan.plans)]
        if column.nested is not None:
            missing[0] += sum(value is _UNSET for value in values)
            arrays.append(column.nested.build(values, seen))
            continue
        try:
            array = column.build(values)
        except column_builders.REFUSALS:
            # No builder takes UNSET, so a column that built had a value (or null) in every row.
            present = [None if value is _UNSET else value for value in values]
            if not _count_absent(values, ends, missing):
                raise
            array = column.build(present)
        if column.is_raw:
            if array.null_count and not column.nullable:
                raise ValueError("null where none may be")
            if column.kind.family is Family.JSON:
                raws.append(values)
        arrays.append(array)
    batch = pa.RecordBatch.from_arrays(arrays, schema=plan.arrow)
    return BuiltRows(batch, ends, missing, raws, seen)


def _count_absent(values: Sequence[Any], ends: Sequence[int], missing: list[int]) -> int:
    """Adds to `missing` what each body left out. Returns how many values they are."""

    start = total = 0
    for number, end in enumerate(ends):
        absent = sum(value is _UNSET for value in values[start:end])
        missing[number] += absent
        total += absent
        start = end
    return total


def check_keys(body: bytes, present: int, raw_values: Sequence[Any]) -> None:
    """Raises ValueError unless no row, and no object inside of one, can have a key twice; those in
    `raw_values` have their own. Sound, not complete."""

    # Sweeps with numpy: `bytes.count` and `in` cost several times as much on 20 kB.
    data = np.frombuffer(body, np.uint8)
    before, colon = data[:-1], data[1:] == _COLON
    # A key's colon comes after a quote or white space, so these are all keys and perhaps more.
    if not raw_values and np.count_nonzero((before <= _QUOTE) & colon) == present:
        return
    # Bytes up to the space are white space here: JSON strings hold no control characters.
    loose = np.count_nonzero((before <= _SPACE) & colon) > 0
    spaced = bool(loose) and _SPACED_COLON.search(body) is not None
    plain = not raw_values and not spaced
    if plain and np.count_nonzero((before == _QUOTE) & colon) == present:
        return
    nested = sum(_keys_at_most(bytes(raw), spaced) for raw in raw_values if raw is not _UNSET)
    if _keys_at_most(body, spaced) - nested != present:
        raise ValueError("a key may appear twice")


def _keys_at_most(data: bytes, spaced: bool) -> int:
    """At least the number of keys; more where a text holds what looks like one."""

    if spaced:
        return len(_KEY.findall(data)) - len(_FALSE_KEY.findall(data))
    return data.count(b'":') - data.count(b'\\":')
