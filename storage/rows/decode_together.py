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
from typing import Any

import pyarrow as pa

from lakebus.errors import LakebusError
from lakebus.schemas import TableSchema
from storage.rows.columns import REFUSALS
from storage.rows.compiled_json import CompiledPlan, read_bodies
from storage.rows.decode_json import (
    DecodePlan,
    build_from_values,
    plan_of,
    rows_of_array,
    rows_of_lines,
    values_of,
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
    if plan.compiled is None:
        return _through_objects(plan, schema.table_id, bodies, rows_max)
    found = _compiled(plan.compiled, schema.table_id, bodies, rows_max)
    left = [number for number, rows in enumerate(found) if rows is None]
    if not left:
        return Together(found)
    others = _through_objects(plan, schema.table_id, [bodies[n] for n in left], rows_max)
    for number, rows in zip(left, others.found, strict=True):
        found[number] = rows
    return Together(found, [left[place] for place in others.spoilers])


def _compiled(
    plan: CompiledPlan, table_id: int, bodies: Sequence[JsonBody], rows_max: int
) -> list[IdentifiedRows | None]:
    """What the compiled reader takes; it judges each body by itself."""

    found: list[IdentifiedRows | None] = [None] * len(bodies)
    contents = [body.content for body in bodies]
    read = read_bodies(plan, contents, [body.lines for body in bodies], rows_max=rows_max)
    if read is not None:
        numbers = [number for number, end in enumerate(read.ends) if end >= 0]
        ends = [read.ends[number] for number in numbers]
        identified = _identified(table_id, read.batch, ends, read.size_bytes)
        for number, rows in zip(numbers, identified, strict=True):
            found[number] = rows
    return found


def _through_objects(
    plan: DecodePlan, table_id: int, bodies: Sequence[JsonBody], rows_max: int
) -> Together:
    try:
        return Together(_decode(plan, table_id, bodies, rows_max))
    except REFUSALS:
        if len(bodies) == 1:
            return Together([None])
    found: list[IdentifiedRows | None] = []
    spoilers = []
    for number, body in enumerate(bodies):
        try:
            found += _decode(plan, table_id, [body], rows_max)
        except REFUSALS:
            found.append(None)
            spoilers.append(number)
    return Together(found, spoilers)


def _decode(
    plan: DecodePlan, table_id: int, bodies: Sequence[JsonBody], rows_max: int
) -> list[IdentifiedRows | None]:
    """Raises one of REFUSALS when the columns cannot be made."""

    found: list[IdentifiedRows | None] = [None] * len(bodies)
    values: list[Any] = []
    rows = 0
    numbers: list[int] = []
    ends: list[int] = []
    for number, body in enumerate(bodies):
        read = rows_of_lines if body.lines else rows_of_array
        try:
            read_rows = read(plan, body.content, rows_max=rows_max)
        except (*REFUSALS, LakebusError):
            continue
        # At once, while the rows are in the cache; nothing but their values outlives this turn.
        values += values_of(read_rows)
        rows += len(read_rows)
        numbers.append(number)
        ends.append(rows)
    if not rows:
        return found
    built = build_from_values(plan, values, ends)
    identified = _identified(table_id, built.batch, ends, built.batch.nbytes)
    for place, (number, identified_rows) in enumerate(zip(numbers, identified, strict=True)):
        try:
            built.check_keys(place, bodies[number].content)
        except ValueError:
            continue
        found[number] = identified_rows
    return found


def _identified(
    table_id: int, batch: pa.RecordBatch, ends: Sequence[int], size_bytes: int
) -> Sequence[IdentifiedRows]:
    """The rows of each body out of those of all."""

    if len(ends) == 1:
        return [IdentifiedRows(batch, fingerprint([EntryPart(table_id, 0, batch)]), size_bytes)]
    row_bytes = size_bytes / batch.num_rows
    identities = fingerprints(table_id, batch, ends)
    start = 0
    identified = []
    for end, identity in zip(ends, identities, strict=True):
        rows = batch.slice(start, end - start)
        identified.append(IdentifiedRows(rows, identity, round(row_bytes * (end - start))))
        start = end
    return identified
