"""One JSON value into a list, struct or map, exactly or not at all: `cells.py` for nested types.

The text is read again level by level, because only so every key is seen, also one that comes twice,
and a json value inside keeps its own text. What comes back is what `nested_columns.array_of_cells`
takes: a list of cells, a tuple of a struct's fields in their order, a list of a map's pairs.

A refusal says where: `.b` is a field, `[0]` an element counted from 0, `['k']` the value of a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lakebus.errors import MalformedBody
from storage.rows import json_text
from storage.rows.cells import CellRefused, cell_of
from storage.rows.decoded import shorten, shorten_name
from storage.rows.json_text import Member
from storage.rows.names import fold
from storage.rows.text_columns import json_value
from storage.rows.types import ColumnType, Family

_KEY_SHOWN = 40


def nested_cell(kind: ColumnType, value: Any, text: str) -> Any:
    """The column value for a JSON value of a nested type. Raises CellRefused."""

    if value is None:
        return None
    try:
        return _cell(kind, value, text)
    except MalformedBody as fault:
        # Of a CSV field; a JSON body has been read as a whole before.
        raise CellRefused(fault.detail) from None


def _cell(kind: ColumnType, value: Any, text: str) -> Any:
    if value is None:
        return None
    reader = _READERS.get(kind.family)
    return cell_of(kind, value, text) if reader is None else reader(kind, text)


def _inside(kind: ColumnType, member: Member, step: str) -> Any:
    try:
        return _cell(kind, member.value, member.text)
    except CellRefused as refusal:
        raise refusal.inside(step, member.text) from None


def _list(kind: ColumnType, text: str) -> list[Any]:
    if not text.startswith("["):
        raise CellRefused(f"expected a JSON array for {shorten(kind.sql)}")
    (element,) = kind.children
    return [
        _inside(element, member, f"[{place}]")
        for place, member in enumerate(json_text.read_elements(text))
    ]


def _struct(kind: ColumnType, text: str) -> tuple[Any, ...]:
    if not text.startswith("{"):
        raise CellRefused(f"expected a JSON object for {shorten(kind.sql)}")
    return tuple(_fields(dict(zip(kind.names, kind.children, strict=True)), text, "the struct"))


def _fields(fields: dict[str, ColumnType], text: str, whose: str) -> list[Any]:
    """The values of an object's members in the order of `fields`; null for what it leaves out."""

    found: dict[str, Any] = {}
    for member in json_text.read_object(text):
        name = fold(member.key)
        step = f".{shorten_name(name)}"
        kind = fields.get(name)
        if kind is None:
            raise CellRefused(f"{whose} has no such field").inside(step, member.text)
        if name in found:
            raise CellRefused("the field is named twice (names fold to lower case)").inside(
                step, member.text
            )
        found[name] = _inside(kind, member, step)
    return [found.get(name) for name in fields]


def _map(kind: ColumnType, text: str) -> list[tuple[Any, Any]]:
    key, value = kind.children
    pairs: list[tuple[Any, Any]] = []
    seen: set[Any] = set()
    if text.startswith("{"):
        for member in json_text.read_object(text):
            step = f"[{shorten_name(member.key)[:_KEY_SHOWN]!r}]"
            try:
                known = _of_text(key, member.key)
            except CellRefused as refusal:
                raise CellRefused(f"the key: {refusal}").inside(step, member.text) from None
            _refuse_repeated(known, seen, step, member.text)
            pairs.append((known, _inside(value, member, step)))
        return pairs
    if not text.startswith("["):
        raise CellRefused(
            f'expected a JSON object, or a list of {{"key", "value"}}, for {shorten(kind.sql)}'
        )
    for place, member in enumerate(json_text.read_elements(text)):
        step = f"[{place}]"
        if not member.text.startswith("{"):
            reason = 'expected {"key": …, "value": …}'
            raise CellRefused(reason).inside(step, member.text)
        try:
            known, held = _fields({"key": key, "value": value}, member.text, "an entry of a map")
        except CellRefused as refusal:
            raise refusal.inside(step, member.text) from None
        if known is None:
            raise CellRefused("the key of a map is never null").inside(step, member.text)
        _refuse_repeated(known, seen, step, member.text)
        pairs.append((known, held))
    return pairs


def _of_text(key: ColumnType, text: str) -> Any:
    value = json_value(key.family, text)
    return cell_of(key, value, text)


def _refuse_repeated(key: Any, seen: set[Any], step: str, text: str) -> None:
    # -0.0 is 0.0 already; no NaN is another one.
    known = "NaN" if isinstance(key, float) and key != key else key
    if known in seen:
        raise CellRefused("the key comes twice").inside(step, text)
    seen.add(known)


_READERS: dict[Family, Callable[[ColumnType, str], Any]] = {
    Family.LIST: _list,
    Family.STRUCT: _struct,
    Family.MAP: _map,
}
