"""Lists, structs and maps as Arrow arrays: made from their parts, and taken apart.

Parts are flat: the values of all rows, and where each row's begin. A null row has none, whatever
an array of somebody else may hide behind a null. All maps that are made here have keys that differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import types as pt

from storage.rows.types import ColumnType, Family

Offsets = NDArray[np.int32]
Mask = NDArray[np.bool_] | None
_LENGTH_MAX = 2**31 - 1


def flatten(values: Sequence[Any]) -> tuple[Offsets, list[Any], Mask]:
    """Where each row's items begin, the items of all rows, and which rows are null."""

    mask = null_mask(values)
    present: Iterable[Any] = values
    if mask is not None:
        present = [value for value in values if value is not None]
        lengths = [0 if value is None else len(value) for value in values]
    else:
        lengths = list(map(len, values))
    items = list(itertools.chain.from_iterable(present))
    return offsets_of(np.array(lengths, np.int64)), items, mask


def null_mask(values: Sequence[Any]) -> Mask:
    if None not in values:
        return None
    return np.fromiter((value is None for value in values), np.bool_, len(values))


def offsets_of(lengths: NDArray[np.int64]) -> Offsets:
    """Raises ValueError for more items than one array holds."""

    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > _LENGTH_MAX:
        raise ValueError("there are too many values in the lists of one column")
    return offsets.astype(np.int32)


def list_array(kind: ColumnType, offsets: Offsets, items: pa.Array, mask: Mask) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind.arrow, mask=_mask(mask))


def struct_array(kind: ColumnType, fields: Sequence[pa.Array], mask: Mask) -> pa.Array:
    return pa.StructArray.from_arrays(list(fields), fields=list(kind.arrow), mask=_mask(mask))


def map_array(
    kind: ColumnType, offsets: Offsets, keys: pa.Array, values: pa.Array, mask: Mask
) -> pa.Array:
    return pa.MapArray.from_arrays(
        pa.array(offsets), keys, values, type=kind.arrow, mask=_mask(mask)
    )


def _mask(mask: Mask) -> pa.Array | None:
    return None if mask is None else pa.array(mask)


# --- apart ----------------------------------------------------------------------------------------


def mask_of(array: pa.Array) -> Mask:
    if not array.null_count:
        return None
    mask: NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return mask


def items_of(array: pa.Array) -> tuple[Offsets, pa.Array]:
    """Where the items of each row of a list or map begin, and all of them. A map's items are
    structs. Whatever lies behind a null row, or outside of a slice, is left out."""

    starts = _starts(array)
    lengths = np.diff(starts)
    first, count = int(starts[0]), int(starts[-1] - starts[0])
    values = array.values.slice(first, count)
    mask = mask_of(array)
    if mask is not None and lengths[mask].any():
        shown = np.repeat(~mask, lengths)
        values = values.take(pa.array(np.flatnonzero(shown)))
        lengths[mask] = 0
    return offsets_of(lengths), values


def _starts(array: pa.Array) -> NDArray[np.int64]:
    """Where each row begins in the values that lie under the array, and where the last one ends."""

    if pt.is_fixed_size_list(array.type):
        size = array.type.list_size
        rows = np.arange(array.offset, array.offset + len(array) + 1, dtype=np.int64)
        fixed: NDArray[np.int64] = rows * size
        return fixed
    starts: NDArray[np.int64] = array.offsets.to_numpy().astype(np.int64)
    return starts


def rows_of_items(offsets: Offsets) -> NDArray[np.int64]:
    """The row that each item belongs to."""

    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


# --- keys of maps ---------------------------------------------------------------------------------


def repeated_keys(kind: ColumnType, offsets: Offsets, keys: pa.Array) -> NDArray[np.int64]:
    """The rows of maps in which a key comes twice, in order. Keys are equal as values are: -0.0 is
    0.0, and there is one NaN."""

    if len(keys) < 2:
        return np.empty(0, np.int64)
    rows = rows_of_items(offsets)
    codes = _codes(kind, keys)
    # Equal keys of one row are neighbours now.
    order = np.lexsort((codes, rows))
    rows, codes = rows[order], codes[order]
    again = (rows[1:] == rows[:-1]) & (codes[1:] == codes[:-1])
    return np.unique(rows[1:][again])


def _codes(kind: ColumnType, keys: pa.Array) -> NDArray[np.int64]:
    """A number for each key, the same for equal ones."""

    if isinstance(keys, pa.ExtensionArray):
        keys = keys.storage
    if kind.family is Family.FLOAT:
        numbers = keys.to_numpy(zero_copy_only=False).astype(np.float64) + 0.0
        numbers[np.isnan(numbers)] = np.nan
        keys = pa.array(numbers.view(np.int64))
    encoded = keys.dictionary_encode()
    codes: NDArray[np.int64] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


# --- into another layout --------------------------------------------------------------------------


def relaid(
    kind: ColumnType, array: pa.Array, leaf: Callable[[ColumnType, pa.Array], pa.Array]
) -> pa.Array:
    """`array`, whose values are those of `kind`, with its scalars as `leaf` gives them: the layout
    of lists and the names of their items become those that columns have."""

    if not kind.is_nested:
        return leaf(kind, array)
    mask = mask_of(array)
    if kind.family is Family.STRUCT:
        # By place: these arrays come from the type itself.
        fields = [
            relaid(child, field, leaf)
            for child, field in zip(kind.children, array.flatten(), strict=True)
        ]
        named = [pa.field(name, field.type) for name, field in zip(kind.names, fields, strict=True)]
        return pa.StructArray.from_arrays(fields, fields=named, mask=_mask(mask))
    offsets, items = items_of(array)
    starts = pa.array(offsets)
    if kind.family is Family.LIST:
        items = relaid(kind.children[0], items, leaf)
        return pa.ListArray.from_arrays(starts, items, mask=_mask(mask))
    keys, values = (
        relaid(child, field, leaf)
        for child, field in zip(kind.children, items.flatten(), strict=True)
    )
    return pa.MapArray.from_arrays(starts, keys, values, mask=_mask(mask))


def relaid_column(
    kind: ColumnType,
    column: pa.Array | pa.ChunkedArray,
    leaf: Callable[[ColumnType, pa.Array], pa.Array],
) -> pa.Array | pa.ChunkedArray:
    if not isinstance(column, pa.ChunkedArray):
        return relaid(kind, column, leaf)
    chunks = [relaid(kind, chunk, leaf) for chunk in column.chunks]
    if not chunks:
        return pa.chunked_array([relaid(kind, pa.nulls(0, column.type), leaf)])
    return pa.chunked_array(chunks)
