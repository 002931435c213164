"""One rewrite from files to a published swap: what compaction, retention and deletes share.

The steps: pin a snapshot, see that the inputs are still live and that the schema is not older than
they are, read them, write the new files into the job's folder with no transaction open, register
intents, put the objects under names never used, publish. Why it is safe:

* Nobody sees anything before the publish, which checks in its own transaction that every input is
  still live (E2). So a loser only loses work (C7): whoever took an input first wins.
* The schema is read after the inputs are known to be live, so it knows every column they have.
* Inputs are compared with their recorded checksum before they are read (downloads here, files of
  this machine by the rewrite), so damage is found and not copied under a checksum of its own.
* A crash leaves a pin that expires, and intents that expire with what was put under them (E4).
* A lost reply is read back, then the same publication is sent again: it happens once (C5).
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from lakebus.errors import Fault, OutcomeUnknown, Unavailable
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.maintenance.input_files import FilePin, locate
from storage.maintenance.interface import Swap, SwapOperation, SwapOutcome, Swapped
from storage.maintenance.jobs import JobContext
from storage.maintenance.patience import ATTEMPTS, patiently, wait
from storage.maintenance.rewrite import rewrite
from storage.maintenance.rewriting import (
    RewriteInput,
    RewriteRequest,
    Rewritten,
    RewrittenFile,
    RowSum,
)

NOTHING: Final = RowSum(0, 0)


Keep = Callable[[TableSchema], str]


@dataclass(frozen=True, slots=True)
class RewritePart:
    """Inputs that are rewritten together. Not `split`: into one place, although the table is
    partitioned (see `planning.RewritePlan`)."""

    inputs: tuple[DataFile, ...]
    split: bool = True
    drop_places: Path | None = None


@dataclass(frozen=True, slots=True)
class SwapWork:
    """One swap of one table: parts that are rewritten, and files of which no row is kept.

    :param keep: what rows are kept, as SQL over the columns of the schema it is given, which is the
        table's newest; raises SwapLost when that no longer asks for what this swap does. None: all.
    :param publication_id: of a swap that happens once however often it is tried. None: a new one.
    """

    table: TableSchema
    operation: SwapOperation
    parts: tuple[RewritePart, ...]
    dropped: tuple[DataFile, ...] = ()
    keep: Keep | None = None
    summary: Mapping[str, object] = field(default_factory=dict)
    publication_id: uuid.UUID | None = None

    @property
    def inputs(self) -> tuple[DataFile, ...]:
        return (*(file for part in self.parts for file in part.inputs), *self.dropped)


@dataclass(frozen=True, slots=True)
class SwapDone:
    """A published swap. `removed` and `before` count rewritten parts only; `dropped_rows` are those
    of files that went whole, which nobody read."""

    snapshot_id: int
    file_ids: tuple[uuid.UUID, ...]
    files_in: int
    files_out: int
    bytes_in: int
    bytes_out: int
    rows_in: int
    rows_out: int
    before: RowSum
    removed: RowSum
    after: RowSum
    dropped_rows: int
    seconds: float
    spilled_bytes: int

    @property
    def rows_removed(self) -> int:
        return self.removed.rows + self.dropped_rows


class SwapLost(Exception):
    """Somebody else took an input, or the table is gone: the work is lost and nothing else."""


#: Looks at one part's inputs and what was made of them, in a thread; raises Fault.
Check = Callable[[TableSchema, Sequence[RewriteInput], Rewritten], None]


async def newest_schema(context: JobContext, table: TableSchema) -> TableSchema | None:
    """The table as it is now; None when it was dropped."""

    state = await patiently(context, lambda: context.catalog.table(table.name))
    if state is None or state.schema.table_id != table.table_id:
        return None
    return state.schema


async def run_swap(context: JobContext, work: SwapWork, *, check: Check | None = None) -> SwapDone:
    """Rewrites and publishes. `check` may look at inputs and results before anything is put; it
    raises Fault. Raises SwapLost when an input or the table is gone, Corrupt for a damaged input,
    Fault when rows do not add up, and Unavailable or OutcomeUnknown for the caller's caller."""

    folder = context.temp_dir / context.chance.new_uuid().hex
    pin = FilePin(context, f"{work.operation} of table {work.table.table_id}")
    started = time.monotonic()
    try:
        try:
            await pin.hold()
            # failpoint: swapping.after_pin
            schema = await _still_there(context, work)
            made = []
            keep_sql = None if work.keep is None else work.keep(schema)
            for number, part in enumerate(work.parts):
                await pin.hold()
                place = folder / str(number)
                made.append(await _rewrite(context, schema, part, keep_sql, place, check))
        finally:
            await pin.release()
        # failpoint: swapping.after_rewrite
        files = await _put(context, work, schema, made)
        swapped = await _publish(context, work, files, made)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    return _done(work, files, made, swapped, time.monotonic() - started)


async def _rewrite(
    context: JobContext,
    schema: TableSchema,
    part: RewritePart,
    keep_sql: str | None,
    folder: Path,
    check: Check | None,
) -> Rewritten:
    """One part, in the job's folder, with no transaction open."""

    located = await locate(context, part.inputs, folder / "inputs")
    # failpoint: swapping.after_locate
    request = _request(context, schema, part, keep_sql, located, folder)
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    made = await asyncio.to_thread(rewrite, request)
    _check_sums(made, request)
    if check is not None:
        await asyncio.to_thread(check, schema, located, made)
    await asyncio.to_thread(shutil.rmtree, folder / "inputs", ignore_errors=True)
    return made


# --- before ----------------------------------------------------------------------------------


async def _still_there(context: JobContext, work: SwapWork) -> TableSchema:
    table = work.table
    live = await patiently(context, lambda: context.upkeep.live_files(table.table_id))
    there = {file.file_id for file in live}
    if not all(file.file_id in there for file in work.inputs):
        raise SwapLost(f"files of table {table.table_id} were taken by somebody else")
    # After the inputs: whatever they hold was stored under a schema published before.
    schema = await newest_schema(context, table)
    if schema is None:
        raise SwapLost(f"table {table.table_id} was dropped")
    return schema


def _request(
    context: JobContext,
    schema: TableSchema,
    part: RewritePart,
    keep_sql: str | None,
    located: tuple[RewriteInput, ...],
    folder: Path,
) -> RewriteRequest:
    settings = context.settings
    return RewriteRequest(
        schema=schema if part.split else replace(schema, partition_by=()),
        inputs=located,
        target_file_bytes=settings.target_file_bytes,
        memory_bytes=settings.rewrite_memory_bytes,
        threads=settings.rewrite_threads,
        temp_dir=folder,
        drop_places=part.drop_places,
        keep_sql=keep_sql,
    )


def _check_sums(made: Rewritten, request: RewriteRequest) -> None:
    """E1, again: the rewrite has compared them, the catalog compares its own counts."""

    recorded = sum(one.file.rows for one in request.inputs)
    written = sum(file.rows for file in made.files)
    if made.before.rows != recorded:
        raise Fault(f"data files hold {made.before.rows} rows and the catalog says {recorded}")
    if made.before - made.removed != made.after or made.after.rows != written:
        raise Fault("a rewrite does not hold the rows that it was given")
    whole = request.keep_sql is None and request.drop_places is None
    if whole and made.removed != NOTHING:
        raise Fault("a rewrite that keeps every row left some out")


# --- after -----------------------------------------------------------------------------------


async def _put(
    context: JobContext, work: SwapWork, schema: TableSchema, made: Sequence[Rewritten]
) -> tuple[DataFile, ...]:
    """The new files in the store, under names that their intents protect."""

    table_id = work.table.table_id
    written = [file for result in made for file in result.files if file.rows]
    if not written:
        return ()
    names = await patiently(
        context,
        lambda: context.upkeep.register_intents(
            table_id,
            len(written),
            owner=context.chance.new_uuid(),
            ttl_s=context.settings.intent_ttl_s,
        ),
    )
    # failpoint: swapping.after_intents
    files = []
    for file_id, file in zip(names, written, strict=True):
        key = f"tables/{table_id}/{file_id}.parquet"
        await context.store.put_new(key, await asyncio.to_thread(_take_bytes, file))
        # failpoint: swapping.after_put
        files.append(_data_file(file_id, key, schema, file))
    return tuple(files)


def _take_bytes(file: RewrittenFile) -> bytes:
    data = file.path.read_bytes()
    file.path.unlink()
    return data


def _data_file(file_id: uuid.UUID, key: str, schema: TableSchema, file: RewrittenFile) -> DataFile:
    return DataFile(
        file_id=file_id,
        table_id=schema.table_id,
        schema_version=schema.version,
        object_key=key,
        rows=file.rows,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        statistics=file.statistics,
        partition=file.partition,
        layout=",".join(schema.sort_by),
    )


async def _publish(
    context: JobContext, work: SwapWork, files: tuple[DataFile, ...], made: Sequence[Rewritten]
) -> Swapped:
    removed = sum(result.removed.rows for result in made) + _rows(work.dropped)
    swap = Swap(
        publication_id=work.publication_id or context.chance.new_uuid(),
        table_id=work.table.table_id,
        operation=work.operation,
        inputs=tuple(file.file_id for file in work.inputs),
        files=files,
        rows_removed=removed,
        summary=work.summary,
    )
    swapped = await publish_once(context, swap)
    # failpoint: swapping.after_publish
    if swapped.outcome in (SwapOutcome.INPUTS_LOST, SwapOutcome.INTENT_LOST):
        raise SwapLost(f"the swap of table {swap.table_id} lost: {swapped.outcome}")
    if swapped.outcome is SwapOutcome.ROWS_DIFFER:
        raise Fault(f"the rows of a rewrite of table {swap.table_id} do not add up")
    return swapped


async def publish_once(context: JobContext, swap: Swap) -> Swapped:
    """A swap whose reply is lost is looked up, and only then sent again (C5)."""

    for attempt in range(1, ATTEMPTS + 1):
        try:
            # failpoint: swapping.before_publish
            return await context.upkeep.publish_swap(swap)
        except OutcomeUnknown:
            found = await patiently(
                context, lambda: context.upkeep.swap_outcome(swap.publication_id)
            )
            if found is not None:
                return found
            if attempt == ATTEMPTS:
                raise
        except Unavailable:
            if attempt == ATTEMPTS:
                raise
        await wait(context, attempt)
    raise AssertionError("unreachable")


def _done(
    work: SwapWork,
    files: Sequence[DataFile],
    made: Sequence[Rewritten],
    swapped: Swapped,
    seconds: float,
) -> SwapDone:
    assert swapped.snapshot_id is not None
    return SwapDone(
        snapshot_id=swapped.snapshot_id,
        file_ids=tuple(file.file_id for file in files),
        files_in=len(work.inputs),
        files_out=len(files),
        bytes_in=sum(file.size_bytes for file in work.inputs),
        bytes_out=sum(file.size_bytes for file in files),
        rows_in=_rows(work.inputs),
        rows_out=_rows(files),
        before=sum((result.before for result in made), NOTHING),
        removed=sum((result.removed for result in made), NOTHING),
        after=sum((result.after for result in made), NOTHING),
        dropped_rows=_rows(work.dropped),
        seconds=seconds,
        spilled_bytes=sum(result.spilled_bytes for result in made),
    )


def _rows(files: Iterable[DataFile]) -> int:
    return sum(file.rows for file in files)
