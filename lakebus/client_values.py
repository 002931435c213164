"""Values of an answer: from the JSON of the API to Python's own, without losing a digit.

The type decides, never the value (http-api.md), with one exception: dates and times that Python
cannot hold (years beyond 9999, infinities, 24:00:00) stay the text that the API gives.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from lakebus.client_types import SqlType, parse_type

Convert = Callable[[Any], Any]

_FLOATS = frozenset({"float", "double"})
_NOT_NUMBERS = frozenset({"NaN", "Infinity", "-Infinity"})


def load_rows(body: bytes) -> dict[str, Any]:
    """The JSON of an answer with `integers=number`. Decimals come as numbers there, and reading
    them as floats would lose digits: they become text, as in the API without that parameter.
    Raises ValueError."""

    head = body[: max(body.find(b'"rows":'), 0)]
    if b"decimal(" not in head:
        plain: dict[str, Any] = json.loads(body)
        return plain
    document: dict[str, Any] = json.loads(body, parse_float=str)
    fixes = [_spelling(parse_type(column["type"])) for column in document["columns"]]
    chosen = [(place, fix) for place, fix in enumerate(fixes) if fix is not None]
    for row in document["rows"]:
        for place, fix in chosen:
            if row[place] is not None:
                row[place] = fix(row[place])
    # What stands behind the rows has floats too, and no decimals.
    whole = document.get("statistics")
    if isinstance(whole, dict):
        document["statistics"] = {name: _number(value) for name, value in whole.items()}
    return document


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _spelling(kind: SqlType) -> Convert | None:
    """Puts right what `parse_float=str` made of a value; None: nothing is to be done."""

    if kind.name == "decimal":
        return str
    if kind.name in _FLOATS:
        return _float_or_word
    return _inside(kind, _spelling)


def _float_or_word(value: Any) -> Any:
    return value if value in _NOT_NUMBERS else float(value)


# --- Python's own --------------------------------------------------------------------------


def python_rows(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]]
) -> list[tuple[Any, ...]]:
    """The rows as tuples of Python values."""

    converts = [(n, convert) for n, (_, kind) in enumerate(columns) if (convert := _of(kind))]
    if not converts:
        return [tuple(row) for row in rows]
    found = []
    for row in rows:
        values = list(row)
        for place, convert in converts:
            if values[place] is not None:
                values[place] = convert(values[place])
        found.append(tuple(values))
    return found


def _of(kind: str) -> Convert | None:
    return convert_of(parse_type(kind))


def convert_of(kind: SqlType) -> Convert | None:
    """From the API's JSON to Python; None: it is the same."""

    return _CONVERTS.get(kind.name) or _inside(kind, convert_of)


def is_object(kind: SqlType) -> bool:
    """True for maps that are JSON objects: their keys are text. Others are lists of pairs."""

    return kind.name == "map" and kind.children[0].name in _TEXTS


def is_hashable(kind: SqlType) -> bool:
    """True when Python's dicts take its values as keys."""

    return not kind.children


def _inside(kind: SqlType, of: Callable[[SqlType], Convert | None]) -> Convert | None:
    """The same for what holds others. What Python has for it is decided by `of`: `_spelling` leaves
    maps as JSON has them."""

    if kind.name == "union":
        return None
    inner = [of(child) for child in kind.children]
    converts = [_nullable(convert) if convert else _same for convert in inner]
    if kind.name == "map" and kind.children:
        if of is convert_of:
            return _map(kind, *converts) if any(inner) or not is_object(kind) else None
        return _pairs(kind, *converts) if any(inner) else None
    if not any(inner):
        return None
    if kind.name == "list":
        item = converts[0]
        return lambda found: [item(value) for value in found]
    if kind.name == "tuple":
        return lambda found: [c(v) for c, v in zip(converts, found, strict=True)]
    named = dict(zip(kind.names, converts, strict=False))
    return lambda found: {name: named.get(name, _same)(value) for name, value in found.items()}


def _map(kind: SqlType, key: Convert, value: Convert) -> Convert:
    """A dict, or a list of tuples where a dict takes no such keys."""

    if is_object(kind):
        return lambda found: {k: value(v) for k, v in found.items()}
    if is_hashable(kind.children[0]):
        return lambda found: {key(pair["key"]): value(pair["value"]) for pair in found}
    return lambda found: [(key(pair["key"]), value(pair["value"])) for pair in found]


def _pairs(kind: SqlType, key: Convert, value: Convert) -> Convert:
    if is_object(kind):
        return lambda found: {k: value(v) for k, v in found.items()}
    return lambda found: [{"key": key(p["key"]), "value": value(p["value"])} for p in found]


def _nullable(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _same(value: Any) -> Any:
    return value


def _decimal(value: Any) -> Any:
    return Decimal(value)


def _text_or(parse: Callable[[str], Any]) -> Convert:
    """What Python cannot hold stays text."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            return text

    return convert


_TEXTS = frozenset({"varchar", "enum", "json"})
_INSTANT = _text_or(dt.datetime.fromisoformat)
_CONVERTS: dict[str, Convert] = {
    "float": float,
    "double": float,
    "decimal": _decimal,
    "blob": base64.b64decode,
    "uuid": uuid.UUID,
    "date": _text_or(dt.date.fromisoformat),
    "time": _text_or(dt.time.fromisoformat),
    "timestamp": _INSTANT,
    "timestamp_s": _INSTANT,
    "timestamp_ms": _INSTANT,
    "timestamptz": _INSTANT,
}
