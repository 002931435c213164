"""Which partitions can hold a row whose column equals one of some constants (contract D11).

A file's partition says of every one of its rows what a transform makes of a column. Two equal
values have equal texts, so a file whose text is none of the constants' texts holds none of them.
That is the whole claim, and it is made only where each step is certain:

* The names in a file's partition are those of the schema version it was written with, and columns
  can since have swapped their names. So the transforms are read with that version, and compared by
  column id; when the version is not known here, the file is kept.
* What counts is the transforms in the partition itself, not what the table's `partition_by` is now.
* Only constants that compare exactly are used. Texts do not depend on the width of a type, so a
  column may have been widened since.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from lakebus.errors import SchemaInvalid
from lakebus.schemas import TableSchema
from storage.files.constants import Interval, Manner
from storage.files.partitions import Transform, partition_spec

#: The schema of one table at a version, if it is known here.
Versions = Callable[[int], TableSchema | None]
#: Schema version and partition of a file → whether it may hold a row that is looked for.
MayHold = Callable[[int, str], bool]


def may_equal_one_of(
    column_id: int, constants: Sequence[Interval], versions: Versions
) -> MayHold | None:
    """None when the constants say nothing certain."""

    if not all(c.exact and c.manner is not Manner.ROUNDED for c in constants):
        return None
    texts_of: dict[tuple[int, str], frozenset[str | None]] = {}

    def may_hold(version: int, partition: str) -> bool:
        schema = versions(version)
        if schema is None:
            return True
        pairs: dict[str, str | None] = json.loads(partition)
        try:
            spec = partition_spec(tuple(pairs), schema.columns)
        except SchemaInvalid:  # nothing that this version of the product has written
            return True
        for transform, text in zip(spec.transforms, pairs.values(), strict=True):
            if transform.column.column_id != column_id:
                continue
            key = (version, transform.text)
            if key not in texts_of:
                texts_of[key] = _texts(transform, constants)
            if None not in texts_of[key] and text not in texts_of[key]:
                return False
        return True

    return may_hold


def _texts(transform: Transform, constants: Sequence[Interval]) -> frozenset[str | None]:
    return frozenset(transform.value_text(constant.lower) for constant in constants)
