"""The parts of payload identity that lists, structs and maps have; `fingerprint.py` says the form.

Whatever an array hides behind a null row is left out, so two arrays of equal values hash alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from storage.rows.nested_arrays import items_of, rows_of_items
from storage.rows.types import is_list

_FIELDS = struct.Struct("<H")

_Update = Callable[[Any], None]
#: Hashes the values of one place inside: its tag, its nulls, its values.
HashInside = Callable[[_Update, pa.Array], None]


def tag_of(kind: pa.DataType) -> bytes | None:
    """None for scalars."""

    if is_list(kind):
        return b"l"
    if pt.is_struct(kind):
        return b"r"
    return b"m" if pt.is_map(kind) else None


def hash_nested(update: _Update, array: pa.Array, inside: HashInside) -> None:
    if pt.is_struct(array.type):
        _hash_struct(update, array, inside)
        return
    offsets, items = items_of(array)
    update(np.diff(offsets).astype("<u4"))
    if not pt.is_map(array.type):
        inside(update, items)
        return
    keys, values = items.flatten()
    plain = keys.storage if isinstance(keys, pa.ExtensionArray) else keys
    order = pc.sort_indices(
        pa.table({"row": rows_of_items(offsets), "key": plain}),
        sort_keys=[("row", "ascending"), ("key", "ascending")],
    )
    inside(update, keys.take(order))
    inside(update, values.take(order))


def _hash_struct(update: _Update, array: pa.Array, inside: HashInside) -> None:
    fields = {
        field.name.encode("utf-8"): values
        for field, values in zip(array.type, array.flatten(), strict=True)
        if values.null_count != len(values)
    }
    update(_FIELDS.pack(len(fields)))
    for name in sorted(fields):
        update(bytes([len(name)]) + name)
        inside(update, fields[name])
