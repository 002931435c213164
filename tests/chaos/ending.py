"""The end of a run: wait until the stack serves and is drained, read everything once more, and look
at every file that the catalog names."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tests.chaos import source
from tests.chaos.database import AWAY, Superuser
from tests.chaos.session import Session
from tests.history.end_state import EndState
from tests.history.record import Ingest, Read

_FILES = (
    "SELECT file_id::text, object_key, size_bytes, sha256, rows FROM lakebus.data_file"
    " ORDER BY first_snapshot, file_id"
)
_BACKLOG = (
    "SELECT coalesce(sum(s.next_append - l.watermark[s.shard + 1]), 0)::bigint"
    " + (SELECT count(*) FROM lakebus.bus_lease) FROM lakebus.bus_shard s, lakebus.lake l"
)


class Hangs(Exception):
    """Something that must end did not, within a generous time."""


async def served(session: Session, *, number: int, within_s: float) -> float:
    """Waits until a row is accepted and read back; returns the seconds. Raises Hangs."""
    began_s = time.monotonic()
    table = source.PROBE_TABLE
    headers, body = source.as_json(source.full_rows(number, table, 1))
    attempt, said = 0, ""
    while time.monotonic() - began_s < within_s:
        attempt += 1
        operation = Ingest(
            request=number,
            principal=session.place.principal,
            target=table,
            tables={table: 1},
            key=f"key-{number}",
            attempt=attempt,
        )
        written = await session.ingest(operation, headers=headers, body=body, timeout_ms=5000)
        said = f"write: {written.says} {written.code}"
        if written.ok:
            text = written.answer["receipt"]["visibility_token"]
            read = Read((table,), (session.decoded(text),), window=(number, number + 1))
            answer = await session.read(read, tokens=(text,), timeout_ms=5000)
            said = f"read: {answer.says} {answer.code}"
            if answer.ok:
                return time.monotonic() - began_s
        await asyncio.sleep(0.1)
    raise Hangs(f"nothing was served within {within_s:.0f} s after the last fault ({said})")


async def drained(superuser: Superuser, *, within_s: float) -> float:
    """Waits until every entry is terminal and no lease is left. Raises Hangs."""
    began_s = time.monotonic()
    left: object = "unknown"
    while time.monotonic() - began_s < within_s:
        try:
            (left,) = await superuser.values(_BACKLOG)
            if left == 0:
                return time.monotonic() - began_s
        except AWAY as error:
            left = repr(error)
        await asyncio.sleep(0.1)
    raise Hangs(f"the bus was not drained within {within_s:.0f} s (left: {left})")


async def last_reads(session: Session) -> list[str]:
    """One read of every table for the record, and a look for changed values."""
    problems = []
    for table in (*source.TABLES, source.PROBE_TABLE):
        answer = await session.read(Read((table,)), timeout_ms=100_000)
        if not answer.ok:
            problems.append(f"the last read of {table} failed: {answer.says} {answer.code}")
        found = await session.post(
            "/v1/query", {"sql": source.changed_rows_sql(table), "timeout_ms": 100_000}
        )
        if not found.ok:
            problems.append(f"the look for changed rows of {table} failed: {found.code}")
        elif int(found.answer["rows"][0][0]) != 0:
            problems.append(f"{table} has {found.answer['rows'][0][0]} rows with changed values")
    return problems


async def looked_at_files(
    superuser: Superuser, objects: Path, end_state: EndState
) -> tuple[EndState, list[str]]:
    """Every file of the catalog exists with its size and checksum (E6); the end state says which
    are there."""
    rows = await superuser.rows(_FILES)
    present: dict[str, bool] = {}
    found: dict[str, str] = {}
    for row in rows:
        problem = await asyncio.to_thread(_problem_of, objects, row)
        present[row["file_id"]] = (objects / row["object_key"]).is_file()
        if problem is not None:
            found[row["file_id"]] = problem
    # Collection goes on: a file that the catalog names no more may go while we look.
    named = {row["file_id"] for row in await superuser.rows(_FILES)} if found else set()
    for file_id in found.keys() - named:
        del present[file_id]
    problems = [problem for file_id, problem in found.items() if file_id in named]
    files = tuple(
        msgspec.structs.replace(file, present=present.get(file.file_id)) for file in end_state.files
    )
    return msgspec.structs.replace(end_state, files=files), problems


def _problem_of(objects: Path, row: Mapping[str, Any]) -> str | None:
    try:
        data = (objects / row["object_key"]).read_bytes()
    except OSError as error:
        return f"file {row['object_key']} of {row['rows']} rows cannot be read: {error.strerror}"
    if len(data) != row["size_bytes"]:
        return f"file {row['object_key']} has {len(data)} bytes, recorded {row['size_bytes']}"
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return f"file {row['object_key']} has another checksum than recorded"
    return None
