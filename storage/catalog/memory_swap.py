"""The swap transaction of the in-memory catalog: judge first, change after, in one step."""

from __future__ import annotations

import dataclasses

from storage.maintenance.interface import Swap, SwapOutcome, Swapped
from storage.memory_lake import MemoryLake
from storage.memory_state import FileRow


def publish_swap(lake: MemoryLake, swap: Swap) -> Swapped:
    """One that happened answers as before (C5); one that changed nothing leaves no record."""

    earlier = lake.state.swaps.get(swap.publication_id)
    if earlier is not None:
        return earlier
    found = [lake.state.files.get(file_id) for file_id in set(swap.inputs)]
    inputs = [row for row in found if row is not None and _is_live(row, swap.table_id)]
    outcome = _judge(lake, swap, inputs)
    return Swapped(outcome) if outcome is not None else _apply(lake, swap, inputs)


def _is_live(row: FileRow, table_id: int) -> bool:
    return row.last_snapshot is None and row.file.table_id == table_id


def _judge(lake: MemoryLake, swap: Swap, inputs: list[FileRow]) -> SwapOutcome | None:
    """Why it cannot be published, or None."""

    if len(inputs) != len(swap.inputs):
        return SwapOutcome.INPUTS_LOST
    rows_in = sum(row.file.rows for row in inputs)
    if sum(file.rows for file in swap.files) != rows_in - swap.rows_removed:
        return SwapOutcome.ROWS_DIFFER
    names = {file.file_id for file in swap.files}
    intents = [lake.state.intents.get(name) for name in names]
    honest = all(intent is not None and intent.kind == "data" for intent in intents)
    return None if honest and len(names) == len(swap.files) else SwapOutcome.INTENT_LOST


def _apply(lake: MemoryLake, swap: Swap, inputs: list[FileRow]) -> Swapped:
    state = lake.state
    snapshot_id = state.head_id + 1  # everything is there before the watchers hear of it
    for row in inputs:
        row.last_snapshot = snapshot_id
    for file in swap.files:
        del state.intents[file.file_id]
        named = dataclasses.replace(file, first_snapshot=snapshot_id, last_snapshot=None)
        state.files[file.file_id] = FileRow(named, snapshot_id)
    counts = {
        **swap.summary,
        "files_added": len(swap.files),
        "rows_added": sum(file.rows for file in swap.files),
        "bytes_added": sum(file.size_bytes for file in swap.files),
        "files_removed": len(inputs),
        "rows_removed": sum(row.file.rows for row in inputs),
        "bytes_removed": sum(row.file.size_bytes for row in inputs),
    }
    summary = {"tables": {str(swap.table_id): counts}}
    at = lake.next_publish_time()
    snapshot = lake.next_snapshot(swap.operation.value, summary, at=at)
    swapped = Swapped(SwapOutcome.PUBLISHED, snapshot.snapshot_id, snapshot.published_at)
    state.swaps[swap.publication_id] = swapped
    return swapped
