"""Small breaks of the product, one promise each: what a simulation that is worth something finds.

Each break replaces one function by one that lacks a check or a step. The test runs seeds until one
shows an anomaly; `seeds_max` bounds how many it may take.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from actors import staging, wake
from actors.range_files import entries_of
from lakebus.snapshots import DataFile
from storage.bus import memory_door, memory_ranges
from storage.bus.interface import Claim, KeyRecord, LeaseRef
from storage.catalog import memory_publish
from storage.catalog.interface import Commit, CommitOutcome, Head
from storage.memory_lake import MemoryLake
from storage.memory_state import KeyScope, RangeRow, ShardRow
from storage.reading import barrier, manifest, own_entries, resolve, watcher


@dataclass(frozen=True, slots=True)
class Breakage:
    """`target.name` is replaced by `broken`, which gets the original first."""

    says: str
    target: Any
    name: str
    broken: Callable[..., Any]
    seeds_max: int = 60

    @contextmanager
    def applied(self) -> Iterator[None]:
        original = getattr(self.target, self.name)

        def instead(*arguments: Any, **named: Any) -> Any:
            return self.broken(original, *arguments, **named)

        with mock.patch.object(self.target, self.name, instead):
            yield


def _any_epoch(_: object, lake: MemoryLake, lease: LeaseRef) -> RangeRow | None:
    return lake.state.ranges.get(lease.lease_id)


def _last_range(_: object, shard: ShardRow) -> None:
    for _lo, hi in shard.done.items():
        shard.watermark = hi
    shard.done.clear()


def _every_fifth_twice(
    original: Callable[..., Any], lake: MemoryLake, shard: int, *rest: Any
) -> Any:
    accepted = original(lake, shard, *rest)
    row = lake.state.shards[shard]
    if row.end % 5 == 0:
        row.end -= 1
    return accepted


async def _no_wait(_: object, __: object, ___: object, head: Head, deadline_s: float) -> Head:
    return head


def _without_files(original: Callable[..., Any], lake: MemoryLake, commit: Commit, *r: Any) -> None:
    original(lake, dataclasses.replace(commit, files=()), *r)


def _first_file(original: Callable[..., Any], lake: MemoryLake, commit: Commit, *r: Any) -> None:
    original(lake, dataclasses.replace(commit, files=commit.files[:1]), *r)


def _forgets_when_terminal(
    original: Callable[..., KeyRecord | None], lake: MemoryLake, scope: KeyScope
) -> KeyRecord | None:
    record = original(lake, scope)
    if record is not None:
        for shard in lake.state.shards:
            for entry in shard.log.values():
                if entry.batch_id == record.receipt.batch_id and entry.terminal_at is not None:
                    return None
    return record


def _other_receipt(
    original: Callable[..., KeyRecord | None], lake: MemoryLake, scope: KeyScope
) -> KeyRecord | None:
    record = original(lake, scope)
    if record is None:
        return None
    now = dataclasses.replace(record.receipt, accepted_at=lake.now())
    return dataclasses.replace(record, receipt=now)


async def _known_head(original: Callable[..., Any], self: watcher.HeadWatcher) -> Head:
    known = self.current
    return known if known is not None else await original(self)


def _reaches_anything(original: Callable[..., bool], self: Any, *rest: Any) -> bool:
    return self._copy is not None or original(self, *rest)


async def _asks_nobody(_: object, __: object, ___: object) -> None:
    return


async def _names_without_put(
    original: Callable[..., Any], self: Any, claim: Claim, file: Any
) -> DataFile:
    class Nowhere:
        async def put_new(self, key: str, data: bytes) -> None:
            return

    with mock.patch.object(self, "_store", Nowhere()):
        found: DataFile = await original(self, claim, file)
    return found


def _nothing_expires(_: object, __: MemoryLake) -> None:
    return None


def _publishes_anything(_: object, __: object, ___: object, ____: object) -> CommitOutcome:
    return CommitOutcome.PUBLISHED


async def _next_best(original: Callable[..., Any], self: Any, choice: Any, *, head: Head) -> Any:
    """A fixed snapshot that is answered by the newest one."""

    newest = resolve.SnapshotChoice(snapshot_id=head.snapshot_id)
    return await original(self, newest, head=head)


def _same_time(original: Callable[..., Any], lake: MemoryLake) -> Any:
    return max(lake.now(), lake.head.published_at)


def _first_batch(_: object, segments: Sequence[Any]) -> Any:
    return [e for e in entries_of(segments) if e.place == 0]


async def _never_wakes(_: object, __: object, ___: float) -> bool:
    await asyncio.get_running_loop().create_future()
    return False


BREAKAGES = (
    Breakage("the epoch is not checked at publish", memory_publish, "held", _any_epoch, 150),
    Breakage("no requirement is checked at publish", memory_publish, "_judge", _publishes_anything),
    Breakage(
        "the watermark follows the last range", memory_publish, "advance_watermark", _last_range
    ),
    Breakage("acked without its files", memory_publish, "_apply", _without_files),
    Breakage("one of two tables is published", memory_publish, "_apply", _first_file),
    Breakage("two snapshots have one time", MemoryLake, "next_publish_time", _same_time, 120),
    Breakage("a position is given twice", memory_door, "_accept", _every_fifth_twice),
    Breakage("keys end with their entry", memory_door, "find_record", _forgets_when_terminal),
    Breakage("a replay makes a new receipt", memory_door, "find_record", _other_receipt),
    Breakage("expired leases stay", memory_ranges, "_expired", _nothing_expires),
    Breakage("a reader does not wait for its token", barrier.Barrier, "_wait", _no_wait),
    Breakage("latest is what was known", watcher.HeadWatcher, "fresh_head", _known_head),
    Breakage("the manifest does not follow", manifest.Manifest, "_reaches", _reaches_anything),
    Breakage("an old snapshot is answered by a new one", resolve.Resolver, "fixed", _next_best),
    Breakage(
        "quarantine is not asked", own_entries.OwnEntries, "refuse_quarantined", _asks_nobody, 120
    ),
    Breakage("files are named before they exist", staging.Stager, "_put", _names_without_put),
    Breakage("a segment's other entries are skipped", staging, "entries_of", _first_batch),
    Breakage("a wake-up is lost for ever", wake.Wake, "wait", _never_wakes),
)
