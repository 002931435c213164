"""What must hold of a lake whose connections failed: the shared audit of its tables, and every
receipt that somebody holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lakebus.receipts import Receipt
from storage.bus.interface import BatchState, NewEntry
from tests.conformance.harness import LakeHarness
from tests.matrix.auditor import check_books, check_drained, read_books


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An entry whose receipt somebody holds."""

    entry: NewEntry
    receipt: Receipt


async def audit(
    lake: LakeHarness, dsn: str, acknowledged: Sequence[Acknowledged], *, drained: bool
) -> None:
    """The tables agree among themselves and with the files, and every receipt is true.

    :param drained: everything accepted must be terminal by now.
    """

    books = await read_books(dsn)
    check_books(books, lake.files.contents)
    if drained:
        check_drained(books)
    ends = {row["shard"]: row["next_append"] for row in books["shards"]}
    seen: set[tuple[int, int]] = set()
    for one in acknowledged:
        receipt, entry = one.receipt, one.entry
        status = await lake.bus.batch(receipt.batch_id)
        assert status is not None, f"{receipt.batch_id} was acknowledged and is not there"
        assert status.position < ends[status.shard]
        assert (status.shard, status.position) not in seen, "two receipts for one entry"
        seen.add((status.shard, status.position))
        assert not drained or status.state in (BatchState.PUBLISHED, BatchState.QUARANTINED)
        if entry.idempotency_key is not None:
            record = await lake.bus.find_key(
                entry.principal_id, entry.target, entry.idempotency_key
            )
            assert record is not None, f"the key of {receipt.batch_id} is forgotten"
            assert record.receipt == receipt, "the key answers another receipt"
        if status.state is BatchState.PUBLISHED:
            assert status.snapshot_id is not None
            rows = await lake.files.rows_at(lake.catalog, status.snapshot_id)
            assert rows.get((status.shard, status.position)) == receipt.rows
    # Through the catalog, too: it raises when an entry lies in two files of the newest snapshot.
    await lake.rows_by_entry()
