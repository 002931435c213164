"""The short way for small answers in JSON, for statements that gave one before.

Streaming by Arrow binds a statement twice and makes arrays and kernels ready for a handful of
values: of a look-up that reads one file it was more than half. So a statement whose like gave few
rows of plain types, and gave them quickly, is executed directly, and its Python values are written
here. What is alike: the text but for its literals, and the names of its tables, whatever snapshot
they are read at.

The bytes are the same as `child_rows` would write (a test compares them). What Python's values
cannot tell (DuckDB gives an infinite timestamp as the last one that Python has, and later ones as
text), and an answer that is not small this time, go the long way, and statements like this one from
then on: so at most one execution is lost, and it was one that used to be quick.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from storage.engine.child_rows import encode
from storage.engine.child_scopes import Sources
from storage.engine.child_texts import ESCAPED
from storage.engine.child_types import Form, json_form, spell, type_id

SMALL_ROWS = 200
#: Of an answer that takes longer, the way it takes is not what matters.
QUICK_S = 0.25
_SQL_LENGTH_MAX = 8192
_LITERALS = re.compile(r"'(?:[^']|'')*+'|\b\d[\w.]*+")
_HARMFUL = re.compile(r'[\x00-\x1f"\\]')
_ESCAPES = str.maketrans({**ESCAPED, "\\": "\\\\"})
_FLOATS = {"float": pa.float32(), "double": pa.float64()}
#: Between these, in which no exponent is written, Python's text of a double is Arrow's.
_ALIKE = 1e-4, 1e10
#: What a value must be, exactly, to be what DuckDB has: more types than these come as text.
_TIMES: dict[str, type] = {"date": dt.date, "time": dt.time, "timestamp": dt.datetime}
_AMBIGUOUS: frozenset[Any] = frozenset(
    {dt.date.min, dt.date.max, dt.datetime.min, dt.datetime.max}  # noqa: DTZ901 (as DuckDB's)
)
_PLAIN = frozenset(
    {
        "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger",
        "ubigint", "decimal", "float", "double", "varchar", "json", "uuid", "date", "time",
        "timestamp",
    }
)  # fmt: skip

Shape = tuple[str, tuple[str, ...]]
Write = Callable[[Any], str]


class SmallAnswers:
    """Which statements gave small plain answers. Any thread may ask."""

    def __init__(self, *, entries_max: int) -> None:
        self._entries_max = entries_max
        self._known: OrderedDict[Shape, bool] = OrderedDict()

    def expects(self, shape: Shape | None) -> bool:
        return shape is not None and self._known.get(shape, False)

    def learn(self, shape: Shape | None, types: Sequence[Any], rows: int, took_s: float) -> None:
        """What the long way gave. Whoever has disappointed once is not tried again."""

        small = rows <= SMALL_ROWS and took_s <= QUICK_S and all(map(is_plain, types))
        if shape is None or self._known.get(shape) is False:
            return
        self._keep(shape, small)

    def disappointed(self, shape: Shape | None) -> None:
        if shape is not None:
            self._keep(shape, False)

    def _keep(self, shape: Shape, small: bool) -> None:
        self._known[shape] = small
        while len(self._known) > self._entries_max:
            try:
                self._known.popitem(last=False)
            except KeyError:  # another lane emptied it
                return


def shape_of(sql: str, sources: Sources) -> Shape | None:
    """What statements have in common that differ in their literals only; a guess is enough."""

    if len(sql) > _SQL_LENGTH_MAX:
        return None
    return _without_literals(sql), tuple(source.name for source in sources)


@functools.lru_cache(maxsize=256)
def _without_literals(sql: str) -> str:
    return _LITERALS.sub("?", sql)


def is_plain(kind: Any) -> bool:
    """Whether Python's values of the type tell all that DuckDB has, or tell that they do not."""

    return type_id(kind) in _PLAIN


def are_whole(rows: Sequence[tuple[Any, ...]], types: Sequence[Any]) -> bool:
    """Whether the rows, of plain types, tell all that DuckDB has."""

    for index, kind in enumerate(types):
        wanted = _TIMES.get(type_id(kind))
        if wanted is None:
            continue
        for row in rows:
            value = row[index]
            if value is not None and (type(value) is not wanted or value in _AMBIGUOUS):
                return False
    return True


def columns_of(description: Sequence[Sequence[Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(column[0]), spell(column[1])) for column in description)


def encode_small(rows: Sequence[tuple[Any, ...]], types: Sequence[Any], *, integers: str) -> bytes:
    """`[[…],[…]]`, of rows that are whole."""

    if not rows:
        return b"[]"
    columns = [
        _texts(values, kind, json_form(kind, integers=integers))
        for values, kind in zip(zip(*rows, strict=True), types, strict=True)
    ]
    lines = map(",".join, zip(*columns, strict=True))
    return ("[[" + "],[".join(lines) + "]]").encode()


def _texts(values: Sequence[Any], kind: Any, form: Form) -> list[str]:
    """The JSON text of each value of a column."""

    name = type_id(kind)
    if name in _FLOATS:
        return _floats(values, name, form)
    write = _digits if name == "decimal" else _WRITERS.get(form.kind, str)
    if form.kind in ("quoted", "fraction_quoted"):
        return ["null" if value is None else f'"{write(value)}"' for value in values]
    return ["null" if value is None else write(value) for value in values]


def _floats(values: Sequence[float | None], name: str, form: Form) -> list[str]:
    """Both write the fewest digits that tell the number; Arrow chooses another exponent's form."""

    if name == "double" and all(v is None or _ALIKE[0] <= abs(v) < _ALIKE[1] for v in values):
        return ["null" if value is None else repr(value).removesuffix(".0") for value in values]
    found: list[str] = encode(pa.array(values, _FLOATS[name]), form).to_pylist()
    return found


def _digits(value: Any) -> str:
    return format(value, "f")


def _text(value: str) -> str:
    if _HARMFUL.search(value) is not None:
        value = value.translate(_ESCAPES)
    return f'"{value}"'


def _clock(value: dt.time | dt.datetime) -> str:
    return f'"{value.isoformat(timespec="microseconds")}"'


def _plain(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


_WRITERS: dict[str, Write] = {
    "plain": _plain,
    "text": _text,
    "date": lambda value: f'"{value.isoformat()}"',
    "time": _clock,
    "timestamp": _clock,
}
