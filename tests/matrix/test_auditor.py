"""The auditor finds damage: each of its rules, broken by hand in a sound lake."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.harness import entry_of
from tests.matrix.auditor import Books, check_books, check_drained, read_books
from tests.matrix.conftest import OpenMatrixLake
from tests.matrix.rig import MatrixLake, keyed_entries

Rows = dict[str, list[dict[str, Any]]]
Damage = Callable[[Rows], object]


def of_busy(rows: Rows, name: str) -> list[dict[str, Any]]:
    """The rows of the shard with three entries; `sound` puts its number into "busy"."""
    return [row for row in rows[name] if row["shard"] == rows["busy"][0]["shard"]]


def of_quiet(rows: Rows, name: str) -> list[dict[str, Any]]:
    """The rows of the shard with the one entry that waits."""
    return [row for row in rows[name] if row["shard"] == rows["busy"][0]["quiet"]]


def first_place(rows: Rows) -> dict[str, Any]:
    return {"shard": rows["busy"][0]["shard"], "position": 0}


DAMAGES: dict[str, Damage] = {
    "positions skip": lambda r: r["log"].remove(of_busy(r, "log")[1]),
    "counter is not the end": lambda r: r["log"].remove(of_busy(r, "log")[2]),
    "empty group": lambda r: of_busy(r, "log")[0].update(lo=1),
    "torn group": lambda r: of_busy(r, "log")[0].update(entry_bytes=[]),
    "in two hands": lambda r: r["leases"].append(r["ranges"][0]),
    "published twice: ": lambda r: r["ranges"].append(r["ranges"][0]),
    "nobody's hands": lambda r: r["ranges"].pop(),
    "claimed beyond": lambda r: of_busy(r, "shards")[0].update(next_claim=99),
    "bytes of .* are gone": lambda r: of_quiet(r, "log")[0].update(has_bytes=False),
    "log lost the live": lambda r: r["log"].remove(of_quiet(r, "log")[0]),
    "snapshots skip": lambda r: r["snapshots"].pop(1),
    "follow their parents": lambda r: r["snapshots"][3].update(parent_id=1),
    "times do not increase": lambda r: r["snapshots"][2].update(
        published_at=r["snapshots"][1]["published_at"]
    ),
    "head's snapshot_id": lambda r: r["head"][0].update(snapshot_id=1),
    "head's watermark": lambda r: r["head"][0].update(watermark=[0, 0, 0]),
    "publishes are not counted": lambda r: r["head"][0].update(publish_count=9),
    "came in parts": lambda r: r["snapshots"][-1].update(operation="create"),
    "watermark of": lambda r: r["snapshots"][2].update(watermark=[9, 9, 9]),
    "nobody wrote": lambda r: r["files"][0].update(file_id=uuid.UUID(int=7)),
    "other rows than recorded": lambda r: r["files"][0].update(rows=2),
    "in another snapshot": lambda r: r["files"][0].update(first_snapshot=99),
    r"\) was published twice": lambda r: r["files"].append(r["files"][0]),
    "has 0 rows, not 1": lambda r: r["files"].pop(0),
    "has 1 rows, not 0": lambda r: r["quarantined"].append(first_place(r)),
    "quarantined twice": lambda r: r["quarantined"].extend([first_place(r)] * 2),
    "and not terminal": lambda r: r["quarantined"].append({**first_place(r), "position": 77}),
    "still has its write intent": lambda r: r["intents"].append(r["files"][0]),
    "names no entry": lambda r: r["keys"][0].update(shard=None, position=None),
    "two keys name": lambda r: r["keys"][1].update({**r["keys"][0], "key_hash": b"other"}),
    "two generations": lambda r: r["keys"][1].update(key_hash=r["keys"][0]["key_hash"]),
    "appended bytes": lambda r: r["shards"][0].update(appended_bytes=1),
    "terminal bytes": lambda r: r["shards"][0].update(terminal_bytes=1),
}


async def sound(lake: MatrixLake) -> Rows:
    """Three published entries on one shard, one that waits on another."""
    table = await lake.create()
    for entry in keyed_entries(table, range(3), ordering_key="one"):
        await lake.accept(entry)
        await lake.drain()
    await lake.accept(entry_of(table, [9], ordering_key="two"))
    books = await lake.audit(drained=False)
    rows = {name: [dict(row) for row in found] for name, found in books.rows.items()}
    busy, quiet = lake.promised[0][1].shard, lake.promised[-1][1].shard
    assert busy != quiet
    rows["busy"] = [{"shard": busy, "quiet": quiet}]
    return rows


async def test_every_rule_of_the_auditor_finds_its_damage(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake()
    rows = await sound(lake)
    for words, damage in DAMAGES.items():
        copy = {name: [dict(row) for row in found] for name, found in rows.items()}
        damage(copy)
        with pytest.raises(AssertionError) as caught:
            check_books(Books(copy), lake.files.contents)
        assert re.search(words, str(caught.value)), f"{words}: {caught.value}"
    check_books(Books(rows), lake.files.contents)


async def test_what_waits_and_what_nobody_promised_is_seen(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake()
    await sound(lake)
    with pytest.raises(AssertionError, match="not terminal"):
        check_drained(await read_books(lake.dsn))
    with pytest.raises(AssertionError, match="nobody sent"):
        await lake.audit(others=1, drained=False)
    entry, accepted = lake.promised.pop()
    with pytest.raises(AssertionError, match="nobody sent"):
        await lake.audit(drained=False)
    lake.promised.append((entry, accepted))
    await lake.drain()
    await lake.audit()
    before = await lake.everything()
    await lake.execute(
        "DELETE FROM lakebus.idem_0 WHERE key_hash IN (SELECT min(key_hash) FROM lakebus.idem_0)"
    )
    with pytest.raises(AssertionError, match="a key was forgotten"):
        await lake.audit()
    with pytest.raises(AssertionError, match="not as they were: idem_0"):
        await lake.unchanged_since(before)
