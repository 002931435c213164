"""Random nested types, and JSON texts that fit them or nearly do."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from storage.rows.types import ColumnType, Family, list_type, map_type, parse_type, struct_type
from tests.unit.test_rows_agreement import FITTING

_NAMES = ("a", "b", "key", "value", "order", "x_1")
_KEYS = [name for name in FITTING if name != "json"]


def nested_types(depth: int = 3) -> st.SearchStrategy[ColumnType]:
    """Lists, structs and maps, at most so deep."""

    scalars = st.sampled_from(sorted(FITTING)).map(parse_type)
    inner = scalars if depth == 1 else st.one_of(scalars, nested_types(depth - 1))
    return st.one_of(
        inner.map(list_type),
        st.lists(st.tuples(st.sampled_from(_NAMES), inner), min_size=1, max_size=3).map(
            lambda fields: struct_type(list(dict(fields)), list(dict(fields).values()))
        ),
        st.tuples(st.sampled_from(_KEYS).map(parse_type), inner).map(lambda pair: map_type(*pair)),
    )


@st.composite
def texts_of(draw: st.DrawFn, kind: ColumnType, *, wrong: bool = False) -> str:
    """JSON text of one value; `wrong`: now and then one that no type of this shape holds."""

    if wrong and draw(st.integers(0, 15)) == 0:
        return draw(st.sampled_from(["1", '"x"', "[]", "{}", "[[]]", '{"a":1}', "[{}]", "null"]))
    if draw(st.integers(0, 6)) == 0:
        return "null"
    space = draw(st.sampled_from(["", "", "", " "]))
    match kind.family:
        case Family.LIST:
            count = draw(st.integers(0, 3))
            items = [draw(texts_of(kind.children[0], wrong=wrong)) for _ in range(count)]
            return "[" + f",{space}".join(items) + "]"
        case Family.STRUCT:
            return _struct(draw, kind, space, wrong)
        case Family.MAP:
            return _map(draw, kind, space, wrong)
        case _:
            text: str = draw(FITTING[kind.sql])
            return text


def _struct(draw: st.DrawFn, kind: ColumnType, space: str, wrong: bool) -> str:
    fields = [*zip(kind.names, kind.children, strict=True)]
    chosen = draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda f: f[0]))
    if wrong and fields and draw(st.integers(0, 9)) == 0:
        chosen.append(fields[0])
    members = []
    for name, child in chosen:
        key = draw(st.sampled_from([name] * 9 + [name.upper()]))
        members.append(f'"{key}"{space}:{draw(texts_of(child, wrong=wrong))}')
    if wrong and draw(st.integers(0, 15)) == 0:
        members.append('"other":1')
    return "{" + ",".join(members) + "}"


def _map(draw: st.DrawFn, kind: ColumnType, space: str, wrong: bool) -> str:
    key, value = kind.children
    count = draw(st.integers(0, 3))
    keys = [draw(FITTING[key.sql]) for _ in range(count)]
    if not wrong:
        keys = list(dict.fromkeys(keys))
    values = [draw(texts_of(value, wrong=wrong)) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    if draw(st.booleans()):
        entries = (f'{{"key":{space}{one},"value":{held}}}' for one, held in pairs)
        return "[" + ",".join(entries) + "]"
    quoted = [(one if one.startswith('"') else json.dumps(one), held) for one, held in pairs]
    return "{" + ",".join(f"{one}:{space}{held}" for one, held in quoted) + "}"


def plain(kind: ColumnType, value: Any) -> Any:
    """What `to_pylist` gives, with bits that count: -0.0 differs from 0.0, and NaN equals NaN."""

    if value is None:
        return None
    match kind.family:
        case Family.LIST:
            return [plain(kind.children[0], one) for one in value]
        case Family.STRUCT:
            fields = zip(kind.names, kind.children, strict=True)
            return {name: plain(child, value[name]) for name, child in fields}
        case Family.MAP:
            return [tuple(map(plain, kind.children, pair)) for pair in value]
        case Family.FLOAT:
            return repr(value)
        case _:
            return value
