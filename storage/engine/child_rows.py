"""Arrow batches to the JSON text of rows, column by column, in the forms of the HTTP API.

The form depends on the type, never on the value (http-api.md, "Query"). A column is turned to text
by kernels (child_texts), and the rows are glued together at the end: texts and what stands between
them (quotes, commas, names) are pieces of a row, so that each text is copied once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from storage.engine import child_texts as texts
from storage.engine.child_texts import EMPTY, TEXT
from storage.engine.child_types import Form

#: A text of each row, or the same text for all rows.
Piece: TypeAlias = "pa.StringArray | str"
_NULL = pa.scalar("null")
_BRACKETS = {"struct": ("{", "}"), "tuple": ("[", "]")}
#: How the text of a scalar is made, and whether it stands in quotes.
_SCALARS: dict[str, tuple[Callable[[pa.Array], pa.StringArray], bool]] = {
    "plain": (texts.plain, False),
    "quoted": (texts.plain, True),
    "fraction_plain": (texts.fraction, False),
    "fraction_quoted": (texts.fraction, True),
    "text": (texts.escaped, True),
    "blob": (texts.base64_text, True),
    "date": (texts.date, True),
    "time": (texts.time, True),
    "timestamp": (texts.local_time, True),
}


def encode_rows(batch: pa.RecordBatch, forms: tuple[Form, ...]) -> bytes:
    """`[…],[…]` without the outer brackets; empty for no rows."""

    if batch.num_rows == 0:
        return b""
    pieces: list[Piece] = []
    for index, form in enumerate(forms):
        pieces.append("," if index else "[")
        pieces.extend(pieces_of(batch.column(index), form))
    return glue(join([*pieces, "]"], batch.num_rows), ",")


def join(pieces: Iterable[Piece], rows: int) -> pa.StringArray:
    """Row by row one text of all pieces. Neighbours that are the same for all rows become one."""

    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    if len(merged) == 1:
        return pa.repeat(merged[0], rows) if isinstance(merged[0], str) else merged[0]
    return pc.binary_join_element_wise(*merged, EMPTY)


def glue(rows: pa.StringArray, separator: str) -> bytes:
    """All texts as one, the separator between them."""

    whole = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
    return bytes(pc.binary_join(whole, separator)[0].as_buffer())


def pieces_of(values: pa.Array, form: Form) -> list[Piece]:
    """What makes the JSON text of each value; `null` is one."""

    if form.kind == "null" or values.null_count == len(values):
        return ["null"]
    pieces = _pieces(values, form)
    if not values.null_count:
        return pieces
    encoded = join(pieces, len(values))
    if encoded.null_count:  # a kernel makes null of null
        return [pc.fill_null(encoded, _NULL)]
    return [pc.if_else(values.is_null(), _NULL, encoded)]


def encode(values: pa.Array, form: Form) -> pa.StringArray:
    """The JSON text of each value; never null."""

    return join(pieces_of(values, form), len(values))


def bare(values: pa.Array, form: Form) -> pa.StringArray:
    """The texts of a column as CSV has them: without the quotes of JSON, nothing escaped, null
    where the value is. Lists, structs and maps are their JSON."""

    if form.kind == "text":
        return pc.cast(values, TEXT)
    if form.kind == "float":
        return texts.floating(values)[0]
    if form.kind == "timestamptz":
        found, zone = texts.instant(values)
        return join([found, zone], len(values)) if zone else found
    if form.kind in _SCALARS:
        return _SCALARS[form.kind][0](values)
    encoded = join(_pieces(values, form), len(values))
    return pc.if_else(values.is_null(), None, encoded) if values.null_count else encoded


def _pieces(values: pa.Array, form: Form) -> list[Piece]:
    if form.kind in _SCALARS:
        write, quoted = _SCALARS[form.kind]
        return ['"', write(values), '"'] if quoted else [write(values)]
    if form.kind == "float":
        return [_float(values)]
    if form.kind == "timestamptz":
        found, zone = texts.instant(values)
        return ['"', found, zone + '"']
    if form.kind in _BRACKETS:
        return _members(values, form)
    return _items(values, form)


def _float(values: pa.Array) -> pa.StringArray:
    """Numbers, and the names of what JSON has no numbers for in quotes."""

    found, named = texts.floating(values)
    if not named:
        return found
    return pc.if_else(pc.is_finite(values), found, join(['"', found, '"'], len(values)))


def _members(values: pa.StructArray, form: Form) -> list[Piece]:
    """Structs as objects; tuples, whose members have no names, as arrays."""

    left, right = _BRACKETS[form.kind]
    labels = [json.dumps(name, ensure_ascii=False) + ":" for name in form.names]
    pieces: list[Piece] = [left]
    members = values.flatten()
    for index, (member, child) in enumerate(zip(members, form.children, strict=True)):
        pieces.append(("," if index else "") + (labels[index] if labels else ""))
        pieces.extend(pieces_of(member, child))
    return [*pieces, right]


def _items(values: pa.Array, form: Form) -> list[Piece]:
    """Lists; maps, as objects when their keys are text, otherwise as lists of key and value."""

    offsets = values.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    items = values.values.slice(first, last - first)
    if form.kind == "list":
        pieces = pieces_of(items, form.children[0])
    else:
        key, value = (pieces_of(items.field(n), child) for n, child in enumerate(form.children))
        if form.kind == "object":
            pieces = [*key, ":", *value]
        else:
            pieces = ['{"key":', *key, ',"value":', *value, "}"]
    left, right = ("{", "}") if form.kind == "object" else ("[", "]")
    lists = pa.ListArray.from_arrays(
        pc.subtract(offsets, offsets[0]),
        join(pieces, len(items)),
        mask=values.is_null() if values.null_count else None,
    )
    return [left, pc.binary_join(lists, ","), right]
