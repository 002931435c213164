"""Lists, structs and maps of Arrow bodies as column values: `arrow_casts.py` for nested types.

A nested array is taken apart, its parts are cast by the rules of their own types, and what does not
fit there is told of the row that holds it, with its path. Lists may come in any layout but views;
a struct's fields are found by name, whatever their order, and what is left out is null; a map may
also come as a list of structs of `key` and `value`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from pyarrow import types as pt

from storage.rows import nested_arrays as arrays
from storage.rows.decoded import shorten_name
from storage.rows.names import fold
from storage.rows.refusals import Refusals
from storage.rows.types import ColumnType, Family, is_list

#: Casts an array of any type to a column's type; what does not fit is null, and named.
Cast = Callable[[pa.Array, ColumnType, Refusals], pa.Array]


def cast_nested(source: pa.Array, kind: ColumnType, found: Refusals, cast: Cast) -> pa.Array | None:
    """`source`, without encoding, as the column's type; rows that do not fit go into `found`, and
    what stands for them means nothing. None when no value of its type can become the column's."""

    match kind.family:
        case Family.LIST if is_list(source.type):
            return _list(source, kind, found, cast)
        case Family.STRUCT if pt.is_struct(source.type):
            return _struct(source, kind, found, cast)
        case Family.MAP if pt.is_map(source.type) or _is_pairs(source.type):
            return _map(source, kind, found, cast)
        case _:
            return None


def _list(source: pa.Array, kind: ColumnType, found: Refusals, cast: Cast) -> pa.Array:
    offsets, items = arrays.items_of(source)
    inner = found.of_items(offsets)
    cast_items = cast(items, kind.children[0], inner)
    found.take_items(inner.found, offsets)
    return arrays.list_array(kind, offsets, cast_items, arrays.mask_of(source))


def _struct(source: pa.Array, kind: ColumnType, found: Refusals, cast: Cast) -> pa.Array:
    parts: dict[str, pa.Array] = {}
    mask = arrays.mask_of(source)
    present = np.arange(len(source)) if mask is None else np.flatnonzero(~mask)
    for field, part in zip(source.type, source.flatten(), strict=True):
        name = fold(field.name)
        if name not in kind.names:
            reason = "the struct has no such field"
        elif name in parts:
            reason = "the field comes twice (names fold to lower case)"
        else:
            parts[name] = part
            continue
        found.add_all(present, reason, f".{shorten_name(name)}")
    fields = []
    for name, child in zip(kind.names, kind.children, strict=True):
        if name not in parts:
            fields.append(pa.nulls(len(source), child.arrow))
            continue
        inner = found.of_fields()
        fields.append(cast(parts[name], child, inner))
        found.take(inner.found, f".{name}")
    return arrays.struct_array(kind, fields, mask)


def _is_pairs(arrow: pa.DataType) -> bool:
    if not is_list(arrow) or not pt.is_struct(arrow.value_type):
        return False
    return sorted(fold(field.name) for field in arrow.value_type) == ["key", "value"]


def _map(source: pa.Array, kind: ColumnType, found: Refusals, cast: Cast) -> pa.Array:
    offsets, items = arrays.items_of(source)
    mask = arrays.mask_of(source)
    key, value = kind.children
    # A null entry of a list of pairs has a null key.
    parts = dict(zip((fold(field.name) for field in items.type), items.flatten(), strict=True))
    if pt.is_map(source.type):
        parts = dict(zip(("key", "value"), items.flatten(), strict=True))
    inner = found.of_items(offsets)
    keys = cast(parts["key"], key, inner)
    found.take_items(inner.found, offsets, ".key")
    missing = found.of_items(offsets)
    missing.add_all(np.flatnonzero(parts["key"].is_null()), "the key of a map is never null")
    found.take_items(missing.found, offsets)
    inner = found.of_items(offsets)
    values = cast(parts["value"], value, inner)
    found.take_items(inner.found, offsets, ".value")
    if keys.null_count:
        offsets, keys, values = _without_null_keys(offsets, keys, values)
    for row in arrays.repeated_keys(key, offsets, keys).tolist():
        found.add(row, "a key comes twice in the map")
    return arrays.map_array(kind, offsets, keys, values, mask)


def _without_null_keys(
    offsets: arrays.Offsets, keys: pa.Array, values: pa.Array
) -> tuple[arrays.Offsets, pa.Array, pa.Array]:
    """Such rows are refused, so their maps may as well be empty."""

    rows = arrays.rows_of_items(offsets)
    spoiled = np.unique(rows[np.flatnonzero(keys.is_null())])
    lengths = np.diff(offsets).astype(np.int64)
    lengths[spoiled] = 0
    kept = pa.array(~np.isin(rows, spoiled))
    return arrays.offsets_of(lengths), keys.filter(kept), values.filter(kept)
