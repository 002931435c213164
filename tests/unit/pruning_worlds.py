"""Seeded worlds for the pruning tests: tables of adversarial values in real files, and queries.

A world has two tables. The files of `t` were written under two schema versions: one column came
late, one was renamed, two may have swapped their names, and numeric columns were widened in
between. Half of the writes are cut into partitions, by transforms that change from write to write.
Constants of predicates are
drawn from the values in the files and their neighbours, so that they fall on and beside bounds.
"""

from __future__ import annotations

import datetime as dt
import decimal
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from lakebus.errors import SchemaInvalid
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.files.parquet import encode_data_file
from storage.files.partition_pruning import Versions
from storage.files.partitions import PartitionSpec, parse_partition_by
from storage.rows.types import ColumnType, Family, parse_type

INFINITY = 2**63 - 1
_EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 -- a timestamp without zone is meant
WIDENED = {
    "integer": "bigint",
    "smallint": "integer",
    "tinyint": "bigint",
    "utinyint": "integer",
    "uinteger": "bigint",
    "float": "double",
    "decimal(9,2)": "decimal(18,4)",
}
KINDS = (
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint",
    "uinteger", "ubigint", "float", "double",
    "decimal(9,2)", "decimal(18,4)", "decimal(38,5)", "varchar", "varchar", "blob", "date", "time",
    "timestamp", "timestamp", "timestamptz", "uuid", "json",
)  # fmt: skip

_TEXTS = [
    "", "a", "A", "ab", "abc", "abd", "b", "z", "é", "ö", "~", "\x7f", "a\0", "a\0b", "\0", "%",
    "_", "x" * 63, "x" * 64, "x" * 65, "x" * 64 + "y", "x" * 64 + "\U0010ffff", "\U0010ffff",
    "\U0010ffff" * 17, "\U0010ffff" * 15 + "abcd" + "z", "\ud7ff" * 30, "\ue000", "😀" * 16,
    "😀" * 17, "é" * 32 + "x", "x" + "é" * 32, "ÿ" * 40, "a" * 5000, "\U0010ffff" * 2000,
]  # fmt: skip
_BLOBS = [b"", b"\0", b"a", b"ab", b"\xff", b"\xff" * 64, b"\xff" * 65, b"a" * 70, b"\x7f\x80"]
_FLOATS = [
    0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, 16777216.0, 16777217.0, 2.0**53, 2.0**53 + 2, 1e-45, -1e-45,
    3.4028234663852886e38, 1e300, -1e300, 5e-324, float("inf"), float("-inf"), float("nan"), 1e5,
]  # fmt: skip
_DAYS = [0, 1, -1, 18262, -719162, -719163, 2932896, 2932897, 2**31 - 1, -(2**31) + 1, 5_000_000]
_INSTANTS = [
    0, 1, -1, 1577836800000000, 1577836800000001, 1577923200000000, -62135596800000000,
    -62135596800000001, 253402300799999999, 253402300800000000, INFINITY, -INFINITY, 2**62,
]  # fmt: skip
_TIMES = [0, 1, 36_000_000_000, 36_000_500_000, 86_399_999_999, 86_400_000_000]
_UUIDS = [0, 1, 2**127 - 1, 2**127, 2**127 + 1, 2**128 - 1, 0x0123456789ABCDEF << 64]


@dataclass(slots=True)
class World:
    """`files` and `rows` by table name; `path_of` gives a file's path."""

    random: random.Random
    schemas: dict[str, TableSchema]
    files: dict[str, list[DataFile]] = field(default_factory=dict)
    rows: dict[str, pa.Table] = field(default_factory=dict)
    values: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    path_of: dict[uuid.UUID, str] = field(default_factory=dict)
    versions: dict[str, Versions] = field(default_factory=dict)
    parameters: list[Any] = field(default_factory=list)


def make_world(seed: int, folder: Path) -> World:
    chance = random.Random(seed)
    old_t = _schema(chance, 1, "t", "c", columns=chance.randint(2, 4))
    new_t = _evolved(chance, old_t)
    new_s = _schema(chance, 2, "s", "d", columns=2)
    world = World(chance, {"t": new_t, "s": new_s})
    world.versions = {"t": {1: old_t, 2: new_t}.get, "s": {1: new_s}.get}
    written = [(new_t, chance.choice((old_t, new_t))) for _ in range(chance.randint(2, 6))]
    written += [(new_s, new_s) for _ in range(chance.randint(1, 3))]
    for number, (table, schema) in enumerate(written):
        _write_file(world, table, schema, folder / f"{seed}-{number}.parquet", number)
    return world


def _schema(
    chance: random.Random, table_id: int, name: str, prefix: str, *, columns: int
) -> TableSchema:
    made = [Column(1, "id", "integer")]
    made += [Column(i + 2, f"{prefix}{i}", chance.choice(KINDS)) for i in range(columns)]
    return TableSchema(table_id, name, 1, tuple(made))


def _evolved(chance: random.Random, old: TableSchema) -> TableSchema:
    columns = [
        Column(c.column_id, c.name, WIDENED.get(c.type, c.type)) if c.name != "id" else c
        for c in old.columns
    ]
    last = columns[-1]
    columns[-1] = Column(last.column_id, "renamed", last.type)
    if chance.random() < 0.5:
        one, two = columns[1], columns[2]
        columns[1] = Column(one.column_id, two.name, one.type)
        columns[2] = Column(two.column_id, one.name, two.type)
    columns.append(Column(90, "late", chance.choice(KINDS)))
    return TableSchema(old.table_id, old.name, 2, tuple(columns))


def _write_file(
    world: World, table: TableSchema, schema: TableSchema, path: Path, number: int
) -> None:
    chance = world.random
    count = chance.choice((1, 2, 5, 9, 24, 24))
    columns: dict[str, pa.Array] = {}
    for column in schema.columns:
        kind = parse_type(column.type)
        values = _file_values(chance, kind, count, is_id=column.name == "id", number=number)
        columns[str(column.column_id)] = array(kind, values)
        name = next(c.name for c in table.columns if c.column_id == column.column_id)
        world.values.setdefault((table.name, name), []).extend(values)
    rows = pa.table(columns)
    hidden = pa.table(
        {
            "$shard": pa.array([number % 2] * count, pa.int16()),
            "$position": pa.array([number] * count, pa.int64()),
            "$row": pa.array(range(count), pa.int32()),
        }
    )
    for name in hidden.column_names:
        rows = rows.append_column(name, hidden.column(name))
    parts: list[tuple[str | None, pa.Table]] = [(None, rows)]
    if count > 9 or chance.random() < 0.5:
        parts = list(_partitioning(chance, schema).split(rows) or parts)
    for place, (partition, part) in enumerate(parts):
        encoded = encode_data_file(schema, part, row_group_rows=chance.choice((2, 122_880)))
        part_path = path.with_name(f"{path.stem}-{place}.parquet")
        part_path.write_bytes(encoded.data)
        file = DataFile(
            uuid.UUID(int=number * 100 + place),
            table.table_id,
            schema.version,
            part_path.name,
            encoded.rows,
            encoded.size_bytes,
            encoded.sha256,
            encoded.statistics,
            partition=partition,
        )
        world.files.setdefault(table.name, []).append(file)
        world.path_of[file.file_id] = str(part_path)
    widened = _in_schema(table, columns, count)
    before = world.rows.get(table.name)
    world.rows[table.name] = widened if before is None else pa.concat_tables([before, widened])


def _partitioning(chance: random.Random, schema: TableSchema) -> PartitionSpec:
    """One or two random transforms that fit columns of the schema."""

    wanted = chance.randint(1, 2)
    texts: list[str] = []
    while len(texts) < wanted:
        name = chance.choice(schema.columns).name
        shape = chance.choice((
            "{c}", "bucket(2, {c})", "bucket(3, {c})", "bucket(4, {c})", "bucket(50, {c})",
            "truncate(1, {c})", "truncate(10, {c})", "day({c})", "year({c})", "hour({c})",
        ))  # fmt: skip
        try:
            found = parse_partition_by([*texts, shape.format(c=name)], schema.columns)
        except SchemaInvalid:
            continue
        texts = list(found.texts)
    return parse_partition_by(texts, schema.columns)


def array(kind: ColumnType, values: list[Any]) -> pa.Array:
    if kind.family is Family.FLOAT and kind.bits == 32:
        plain = pa.array(values, pa.float64()).cast(pa.float32(), safe=False)
    else:
        plain = pa.array(values, kind.storage)
    if kind.arrow == kind.storage:
        return plain
    return pa.ExtensionArray.from_storage(kind.arrow, plain)


def _in_schema(table: TableSchema, columns: dict[str, pa.Array], count: int) -> pa.Table:
    arrays = {}
    for column in table.columns:
        kind = parse_type(column.type)
        found = columns.get(str(column.column_id))
        if found is None:
            found = array(kind, [None] * count)
        arrays[column.name] = found if found.type == kind.arrow else found.cast(kind.arrow)
    return pa.table(arrays)


def _file_values(
    chance: random.Random, kind: ColumnType, count: int, *, is_id: bool, number: int
) -> list[Any]:
    if is_id:
        if count > 9:  # so that partitions by it overlap in their bounds
            return [chance.randint(0, 20) for _ in range(count)]
        return [chance.choice((number, number * 2, number + 1, None)) for _ in range(count)]
    if chance.random() < 0.1:
        return [None] * count
    pool = [_value(chance, kind) for _ in range(chance.randint(1, 3 if count < 9 else 12))]
    if chance.random() < 0.3:
        pool.append(None)
    return [chance.choice(pool) for _ in range(count)]


def _value(chance: random.Random, kind: ColumnType) -> Any:
    match kind.family:
        case Family.BOOLEAN:
            return chance.random() < 0.5
        case Family.INTEGER:
            near = [0, 1, -1, 5, 2**24 + 1, 2**53, 2**53 + 1, kind.low, kind.high, kind.high - 1]
            return min(max(chance.choice(near), kind.low), kind.high)
        case Family.FLOAT:
            return chance.choice(_FLOATS)
        case Family.DECIMAL:
            most = 10**kind.precision - 1
            unscaled = chance.choice((0, 1, -1, most, -most, 12345, 10**kind.scale, most // 3))
            return Decimal(unscaled).scaleb(-kind.scale, decimal.Context(prec=40))
        case Family.VARCHAR:
            return chance.choice(_TEXTS)
        case Family.BLOB:
            return chance.choice(_BLOBS)
        case Family.DATE:
            return chance.choice(_DAYS)
        case Family.TIME:
            return chance.choice(_TIMES)
        case Family.TIMESTAMP | Family.TIMESTAMPTZ:
            return chance.choice(_INSTANTS)
        case Family.UUID:
            return uuid.UUID(int=chance.choice(_UUIDS)).bytes
        case Family.JSON:
            return chance.choice(('{"a":1}', "null", "1", '"x"'))


# --- predicates ----------------------------------------------------------------------------


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def constant(world: World, kind: ColumnType, value: Any) -> str:
    """A value beside a column of this type, in one of its SQL spellings; may be a parameter."""

    spellings = _SPELLINGS[kind.family](kind, value)
    chosen = world.random.choice(spellings)
    if isinstance(chosen, _Parameter):
        world.parameters.append(chosen.value)
        return "?" + chosen.suffix
    return chosen


@dataclass(frozen=True, slots=True)
class _Parameter:
    value: Any
    suffix: str = ""


_Spelling = str | _Parameter


def _booleans(kind: ColumnType, value: bool) -> list[_Spelling]:
    return [str(value).lower(), _Parameter(value), quote(str(value).lower()), str(int(value))]


def _integers(kind: ColumnType, value: int) -> list[_Spelling]:
    return [
        str(value), str(value), str(value + 1), f"{value}.0", f"{value}.5", f"{float(value)!r}",
        "1e5", "9007199254740993", str(10**30), f"{value}::bigint" if abs(value) < 2**63 else "0",
        quote(str(value)), _Parameter(value), _Parameter(float(value)), _Parameter(Decimal(value)),
        _Parameter(Decimal(f"{value}.25")), _Parameter(2**53), _Parameter(float(2**53)), "1.5e0",
    ]  # fmt: skip


def _floats(kind: ColumnType, value: float) -> list[_Spelling]:
    spelled: list[_Spelling] = [_Parameter(value), quote(str(value)), "0", "0.1", "0.333333333333",
        "16777217", "1e5", "0.1::float", _Parameter(Decimal("0.1")), _Parameter(2**53 + 1),
        "-0.0", f"{quote(repr(value))}::double", "9007199254740993", "1e300"]  # fmt: skip
    if value == value and abs(value) < 1e30 and abs(value) > 1e-5:
        spelled += [repr(value), f"{value:.7f}", f"{value:.6e}"]
    return spelled


def _decimals(kind: ColumnType, value: Decimal) -> list[_Spelling]:
    plain = format(value, "f")
    return [
        plain, plain, plain, quote(plain), _Parameter(value), _Parameter(float(value)),
        f"{float(value)!r}", str(int(value)), f"{int(value)}.123456789", "1e3", "0.000001",
        f"{plain}::double", str(10**25), _Parameter(int(value)),
    ]  # fmt: skip


def _texts(kind: ColumnType, value: str) -> list[_Spelling]:
    # A NUL cannot stand in SQL text.
    plain: list[_Spelling] = [] if "\0" in value else [quote(value), f"{quote(value)}::varchar"]
    return [
        *plain, _Parameter(value), _Parameter(value[:3]), _Parameter(value + "a"),
        quote("abc"), "'a' collate nocase", "'m'",
    ]  # fmt: skip


def _blobs(kind: ColumnType, value: bytes) -> list[_Spelling]:
    escaped = "".join(f"\\x{byte:02X}" for byte in value)
    return [_Parameter(value), quote(escaped), f"{quote(escaped)}::blob", "'ab'", "'a'"]


def _date_texts(days: int) -> str:
    if -719162 <= days <= 2932896:
        return (dt.date(1970, 1, 1) + dt.timedelta(days=days)).isoformat()
    return {2**31 - 1: "infinity", -(2**31) + 1: "-infinity"}.get(days, "15000-01-01")


def _dates(kind: ColumnType, value: int) -> list[_Spelling]:
    text = _date_texts(value)
    spelled: list[_Spelling] = [
        quote(text), f"date {quote(text)}", f"{quote(text)}::date", _Parameter(text),
        _Parameter(text, "::date"), f"timestamp {quote('2020-01-01 10:00:00')}",
        "'2020-01-01 23:00:00'", "timestamptz '2020-01-01 00:00:00Z'",
        "timestamptz '2020-01-01 05:00:00+05'",
    ]  # fmt: skip
    if -719162 <= value <= 2932896:
        spelled.append(_Parameter(dt.date(1970, 1, 1) + dt.timedelta(days=value)))
    return spelled


def _time_of(value: int) -> dt.time:
    value = min(value, 86_399_999_999)
    return (_EPOCH + dt.timedelta(microseconds=value)).time()


def _times(kind: ColumnType, value: int) -> list[_Spelling]:
    text = _time_of(value).isoformat()
    return [quote(text), f"time {quote(text)}", _Parameter(_time_of(value)), _Parameter(text),
        "'24:00:00'", "'10:00:00.5'"]  # fmt: skip


def _instant_texts(value: int) -> str:
    if -62135596800000000 <= value <= 253402300799999999:
        moment = _EPOCH + dt.timedelta(microseconds=value)
        return moment.isoformat(sep=" ")
    return {INFINITY: "infinity", -INFINITY: "-infinity"}.get(value, "15000-01-01 00:00:00")


def _instants(kind: ColumnType, value: int) -> list[_Spelling]:
    text = _instant_texts(value)
    zoned = text if text.endswith("infinity") else text + "+00:00"
    spelled: list[_Spelling] = [
        quote(text), quote(text.replace(" ", "T")), f"timestamp {quote(text)}", _Parameter(text),
        f"timestamptz {quote(zoned)}", quote(text[:10]), f"date {quote('2020-01-01')}",
        "'2020-01-01 05:30:00+05:30'", "'2020-01-01T00:00:00Z'", _Parameter(text, "::timestamp"),
        "'2020-01-01 00:00:00.000001'", "'2020-01-01 00:00:00.5'", "timestamp '2020-01-02'",
        _Parameter(zoned, "::timestamptz"), _Parameter("2020-01-01T00:00:00.000001Z"),
    ]  # fmt: skip
    if -62135596800000000 <= value <= 253402300799999999:
        moment = _EPOCH + dt.timedelta(microseconds=value)
        spelled += [_Parameter(moment), _Parameter(moment.replace(tzinfo=dt.UTC))]
    return spelled


def _uuids(kind: ColumnType, value: bytes) -> list[_Spelling]:
    text = str(uuid.UUID(bytes=value))
    return [quote(text), quote(text.upper()), f"uuid {quote(text)}", _Parameter(text),
        _Parameter(uuid.UUID(bytes=value)), f"{quote(text)}::uuid"]  # fmt: skip


def _jsons(kind: ColumnType, value: str) -> list[_Spelling]:
    return [quote(value), _Parameter(value)]


_SPELLINGS: dict[Family, Callable[[ColumnType, Any], list[_Spelling]]] = {
    Family.BOOLEAN: _booleans,
    Family.INTEGER: _integers,
    Family.FLOAT: _floats,
    Family.DECIMAL: _decimals,
    Family.VARCHAR: _texts,
    Family.BLOB: _blobs,
    Family.DATE: _dates,
    Family.TIME: _times,
    Family.TIMESTAMP: _instants,
    Family.TIMESTAMPTZ: _instants,
    Family.UUID: _uuids,
    Family.JSON: _jsons,
}


def predicate(world: World, table: str, qualifier: str = "", *, depth: int = 0) -> str:
    """A random condition on one table; columns are written behind `qualifier`."""

    chance = world.random
    if depth < 2 and chance.random() < 0.35:
        left = predicate(world, table, qualifier, depth=depth + 1)
        right = predicate(world, table, qualifier, depth=depth + 1)
        joined = f"({left} {chance.choice(('and', 'and', 'or'))} {right})"
        return f"not {joined}" if chance.random() < 0.1 else joined
    column = chance.choice(world.schemas[table].columns)
    kind = parse_type(column.type)
    name = qualifier + chance.choice((column.name, column.name, column.name.upper()))
    if not qualifier and column.name == "id" and table == "s":
        name = "s.id"

    def one() -> str:
        known = [v for v in world.values.get((table, column.name), ()) if v is not None]
        return constant(world, kind, chance.choice(known) if known else _value(chance, kind))

    text = kind.family is Family.VARCHAR
    return _special(chance, name, text=text) or _ordinary(chance, kind, name, one)


def equality(world: World, table: str) -> str:
    """A condition that one column equals one or several of the values in the files."""

    chance = world.random
    column = chance.choice(world.schemas[table].columns)
    kind = parse_type(column.type)
    known = [v for v in world.values.get((table, column.name), ()) if v is not None]
    wanted = [chance.choice(known) if known else _value(chance, kind) for _ in range(2)]
    texts = [constant(world, kind, value) for value in wanted[: chance.randint(1, 2)]]
    if len(texts) == 1:
        return f"{column.name} = {texts[0]}"
    return f"{column.name} in ({', '.join(texts)})"


def _special(chance: random.Random, name: str, *, text: bool) -> str | None:
    if text and chance.random() < 0.15:
        pattern = chance.choice(("a%", "x%", "_b%", "%", "ab_", "é%", "\U0010ffff%", "a\\%"))
        return f"{name} {chance.choice(('like', 'like', 'not like', 'ilike'))} {quote(pattern)}"
    if text and chance.random() < 0.1:
        return chance.choice(
            (f"starts_with({name}, 'x')", f"{name} ^@ 'ab'", f"prefix({name}, 'é')")
        )
    if chance.random() < 0.15:
        return f"{name} is {chance.choice(('', 'not '))}null"
    return None


def _ordinary(chance: random.Random, kind: ColumnType, name: str, one: Callable[[], str]) -> str:
    """Parameters are numbered by their order in the text, so parts are made in that order."""

    match chance.randrange(11):
        case 0 | 1:
            low = one()
            return f"{name} between {low} and {one()}"
        case 2:
            some = ", ".join(one() for _ in range(chance.randint(1, 4)))
            return f"{name} {chance.choice(('in', 'in', 'not in'))} ({some})"
        case 3:
            return f"{one()} {chance.choice(('<', '<=', '>', '>=', '='))} {name}"
        case 4 if kind.family is Family.BOOLEAN:
            return chance.choice((name, f"not {name}"))
        case 4:
            return f"{name} is not distinct from {one()}"
        case 5:
            return f"coalesce({name}, {one()}) = {one()}"
        case _:
            return f"{name} {chance.choice(('=', '<', '<=', '>', '>=', '=', '<>'))} {one()}"
