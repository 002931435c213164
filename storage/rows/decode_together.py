"""Several JSON bodies for one table at once: parsed one by one, made into columns together.

Of a small body most is spent on making its columns, and most of that is the same for 100 rows as
for 2,000. So the rows of several bodies become one batch, and each body gets its slice of it, which
copies nothing; the payloads' identities are taken from the whole in the same way.

Why no request can suffer from another. This only ever accepts: a body that the fast path would not
take by itself gets None, and whoever asked decodes it alone, as always, and hears what is wrong
with it. What is refused in parsing or by its keys leaves before or after the columns are made; when
the columns themselves cannot be made, each body is tried by itself. And what a body is given is
what it would be given alone: builders judge and convert each value without regard to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from lakebus.errors import LakebusError
from lakebus.schemas import TableSchema
from storage.rows.columns import REFUSALS
from storage.rows.decode_json import (
    DecodePlan,
    build_columns,
    plan_of,
    rows_of_array,
    rows_of_lines,
)
from storage.rows.fingerprint import fingerprint, fingerprints
from storage.rows.segment import EntryPart


@dataclass(frozen=True, slots=True)
class JsonBody:
    """`lines`: one object a line, instead of one array."""

    content: bytes
    lines: bool


@dataclass(frozen=True, slots=True)
class IdentifiedRows:
    """What a body holds, whole and right, `fingerprint` of it as the only part, and about what it
    takes in memory."""

    batch: pa.RecordBatch
    fingerprint: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Together:
    """`found[n]` is for body n, None when it has to be decoded alone. `spoilers`: numbers of the
    bodies for whose sake the others had to be decoded twice."""

    found: list[IdentifiedRows | None]
    spoilers: Sequence[int] = ()


def goes_together(schema: TableSchema) -> bool:
    """Whether bodies for this table can be decoded together."""

    return plan_of(schema).counts_keys_by_body


def decode_together(schema: TableSchema, bodies: Sequence[JsonBody], *, rows_max: int) -> Together:
    """The rows of each body, as `decode_rows` would give them. Raises nothing for any body."""

    plan = plan_of(schema)
    try:
        return Together(_decode(plan, schema.table_id, bodies, rows_max))
    except REFUSALS:
        if len(bodies) == 1:
            return Together([None])
    found: list[IdentifiedRows | None] = []
    spoilers = []
    for number, body in enumerate(bodies):
        try:
            found += _decode(plan, schema.table_id, [body], rows_max)
        except REFUSALS:
            found.append(None)
            spoilers.append(number)
    return Together(found, spoilers)


def _decode(
    plan: DecodePlan, table_id: int, bodies: Sequence[JsonBody], rows_max: int
) -> list[IdentifiedRows | None]:
    """Raises one of REFUSALS when the columns cannot be made."""

    found: list[IdentifiedRows | None] = [None] * len(bodies)
    rows: list[object] = []
    numbers: list[int] = []
    ends: list[int] = []
    for number, body in enumerate(bodies):
        read = rows_of_lines if body.lines else rows_of_array
        try:
            rows += read(plan, body.content, rows_max=rows_max)
        except (*REFUSALS, LakebusError):
            continue
        numbers.append(number)
        ends.append(len(rows))
    if not rows:
        return found
    built = build_columns(plan, rows, ends)
    if len(ends) == 1:
        identities = [fingerprint([EntryPart(table_id, 0, built.batch)])]
    else:
        identities = fingerprints(table_id, built.batch, ends)
    start = 0
    row_bytes = built.batch.nbytes / len(rows)
    for place, (number, end) in enumerate(zip(numbers, ends, strict=True)):
        try:
            built.check_keys(place, bodies[number].content)
        except ValueError:
            pass
        else:
            slice_ = built.batch if len(ends) == 1 else built.batch.slice(start, end - start)
            size = round(row_bytes * (end - start))
            found[number] = IdentifiedRows(slice_, identities[place], size)
        start = end
    return found
