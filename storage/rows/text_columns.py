"""Columns from texts: each value as the text that a CSV field or the key of a JSON object holds.

Vectorised like `columns.py`, whose builders do most of the work, and as strict: what is refused
here, the exact rules of `cells.py` judge again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import pyarrow as pa

from storage.rows import cells
from storage.rows import columns as column_builders
from storage.rows.json_text import NumberText
from storage.rows.types import ColumnType, Family

Texts = Sequence[str | None]

NUMBERS: Final = frozenset({Family.INTEGER, Family.FLOAT, Family.DECIMAL})
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = str.maketrans("", "", "0123456789+-.eE,")
_BOOLEANS = {"true": True, "false": False, None: None}


def text_builder(kind: ColumnType) -> Callable[[Texts], pa.Array]:
    """The vectorised builder of a scalar column. It gives the array or raises a REFUSAL."""

    match kind.family:
        case Family.VARCHAR:
            return functools.partial(_varchars, kind.arrow)
        case Family.BOOLEAN:
            return _booleans
        case Family.INTEGER:
            return functools.partial(column_builders.integers_from_text, kind.arrow)
        case Family.FLOAT:
            return functools.partial(_floats, column_builders.builder_of(kind))
        case Family.DECIMAL:
            return functools.partial(_decimals, column_builders.builder_of(kind))
        case Family.JSON:
            return functools.partial(_documents, column_builders.builder_of(kind))
        case _:
            return column_builders.builder_of(kind)


def json_value(family: Family, text: str) -> Any:
    """The text as the JSON value that says the same, for `cells.cell_of`."""

    if family in NUMBERS and _NUMBER.fullmatch(text):
        return NumberText(text)
    if family is Family.BOOLEAN and text in _BOOLEANS:
        return _BOOLEANS[text]
    return text


def _varchars(arrow: pa.DataType, texts: Texts) -> pa.Array:
    return pa.array(texts, arrow)


def _booleans(texts: Texts) -> pa.Array:
    try:
        return pa.array([_BOOLEANS[text] for text in texts], pa.bool_())
    except KeyError:
        raise ValueError("a text is neither true nor false") from None


def _floats(build: Callable[[Sequence[Any]], pa.Array], texts: Texts) -> pa.Array:
    words = cells.FLOAT_WORDS
    plain = ["null" if t is None else "0" if t in words else t for t in texts]
    joined = ",".join(plain)
    rest = joined.translate(_NUMBER_CHARACTERS)
    if rest and rest != "null" * sum(t is None for t in texts):
        raise ValueError("a text is not a plain number")
    numbers: list[Any] = msgspec.json.decode(f"[{joined}]", type=list[float | None])
    if len(numbers) != len(texts):
        raise ValueError("a text is not one number")
    return build([t if t in words else n for t, n in zip(texts, numbers, strict=True)])


def _decimals(build: Callable[[Sequence[Any]], pa.Array], texts: Texts) -> pa.Array:
    # As JSON strings, whose inside the builder checks; of a bare number it believes the decoder.
    return build([None if text is None else b'"%b"' % text.encode("utf-8") for text in texts])


def _documents(build: Callable[[Sequence[Any]], pa.Array], texts: Texts) -> pa.Array:
    return build([None if text is None else text.strip().encode("utf-8") for text in texts])
