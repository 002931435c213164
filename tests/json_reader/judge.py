"""What the compiled reader made of a group of bodies, held against the exact pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa

from lakebus.errors import LakebusError
from storage.rows.compiled_json import CompiledPlan, CompiledReader, compiled_plan, read_bodies
from storage.rows.decode_json import exact_json, exact_ndjson
from storage.rows.fingerprint import fingerprint, fingerprints
from storage.rows.segment import EntryPart
from storage.rows.shapes import shape_of
from tests.json_reader.bodies import OTHERS, Group

_TABLE_ID = 1


def storage_of(array: pa.Array) -> pa.Array:
    """Buffers to compare bit by bit: floats as integers, so that NaN and -0.0 count."""

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_float32(array.type):
        return array.view(pa.int32())
    if pa.types.is_float64(array.type):
        return array.view(pa.int64())
    return array


@dataclass(slots=True)
class Findings:
    """`accepted`: bodies by the types of their columns. `values`: how many were compared."""

    groups: int = 0
    bodies: int = 0
    rows: int = 0
    values: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    accepted_bodies: int = 0
    not_for_it: int = 0
    faults: list[str] = field(default_factory=list)


def judge(group: Group, reader: CompiledReader, findings: Findings) -> None:
    """Adds what is wrong to the findings."""

    findings.groups += 1
    findings.bodies += len(group.bodies)
    plan = compiled_plan(group.schema.columns, shape_of(group.schema), reader)
    if plan is None:
        findings.not_for_it += 1
        if not any(column.type in OTHERS for column in group.schema.columns):
            findings.faults.append(f"no plan for {group.schema}")
        return
    for fault in _faults(group, plan, findings):
        findings.faults.append(f"{fault}\n{group.schema}")


def _faults(group: Group, plan: CompiledPlan, findings: Findings) -> list[str]:
    try:
        found = read_bodies(plan, group.bodies, group.lines, rows_max=group.rows_max)
    except Exception as error:  # noqa: BLE001 (whatever it raises is a fault)
        return [f"raised {error!r}"]
    if found is None:
        return []
    numbers = [number for number, end in enumerate(found.ends) if end >= 0]
    ends = [found.ends[number] for number in numbers]
    if len(found.ends) != len(group.bodies) or ends[-1] != found.batch.num_rows:
        return [f"{len(group.bodies)} bodies end at {found.ends} of {found.batch.num_rows} rows"]
    try:
        found.batch.validate(full=True)
    except pa.ArrowInvalid as error:
        return [f"no batch: {error}"]
    faults = []
    identities = fingerprints(_TABLE_ID, found.batch, ends)
    start = 0
    for number, end, identity in zip(numbers, ends, identities, strict=True):
        rows = found.batch.slice(start, end - start)
        difference = _difference(group, number, rows, identity)
        if difference:
            faults.append(f"{difference}: body {number}, {group.bodies[number][:2000]!r}")
        start = end
        findings.accepted_bodies += 1
        findings.rows += rows.num_rows
        findings.values += rows.num_rows * rows.num_columns
        findings.accepted.update({column.type.split("(")[0] for column in group.schema.columns})
    return faults


def _difference(group: Group, number: int, rows: pa.RecordBatch, identity: bytes) -> str:
    exact = exact_ndjson if group.lines[number] else exact_json
    try:
        wanted = exact(
            group.schema, group.bodies[number], on_invalid="reject", rows_max=group.rows_max
        ).batch
    except LakebusError as error:
        return f"accepted what is refused ({error.code})"
    if rows.schema != wanted.schema or rows.num_rows != wanted.num_rows:
        return f"{rows.num_rows} rows instead of {wanted.num_rows}"
    for column, mine, its in zip(group.schema.columns, rows.columns, wanted.columns, strict=True):
        if not storage_of(mine).equals(storage_of(its)):
            return f"another value of {column.name}"
    if identity != fingerprint([EntryPart(_TABLE_ID, 0, wanted)]):
        return "another identity"
    return ""
