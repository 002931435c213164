"""Collection: the job that deletes objects nobody can name any more (contract E3, E4, E5).

What is authoritative: the catalog. This job asks it to condemn, and later which files it may
delete; it deletes their objects and says so. It never decides by what lies in the store: an object
that the catalog does not know is counted and reported, and left alone (E4), because only an expired
write intent or a data file's own record tells that nobody is about to name it.

Why it is safe to die anywhere: a file is `deleting` only after the transaction in which everybody
who could need it was excluded, and it stays so until its object is gone, so the next run goes on
where this one stopped. Why two runs at once do no harm: each step is one transaction, and an object
that is deleted twice was gone after the first time.

What is checked before anything is given up, each time: that the catalog is not behind what the
object store's marker has seen of it, that the marker is this lake's, and that there is one at all
(`storage.postgres.upkeep`). So a database that was put back, and a store that was exchanged, stop
the collection. What cannot be told from here is a store of the same lake that lost objects; the
validator looks for that.

A late writer: a process that was paused in the middle of a put may bring its object after the
collection has deleted the name. Nobody can publish it, its intent is gone, so it only takes space.
The sweep (parameter `sweep`) lists the store and deletes objects whose names are recorded as
deleted, as long as the record is kept.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lakebus.clock import format_time
from lakebus.errors import MalformedRequest, Unavailable
from storage.files.objects import ObjectStore
from storage.maintenance.interface import CondemnedFile
from storage.maintenance.jobs import Job, JobContext

#: Objects deleted at once, and how many of them are noted together.
DELETES_AT_ONCE = 8
BATCH = 500
#: Files, and keys of strangers, that a report names; the counts are of all.
NAMED_MAX = 100
#: Where the objects of the lake lie that collection may know.
SWEPT = ("tables/", "bus/", "canary/")
_LISTED_AT_ONCE = 2_000


async def collect(context: JobContext, job: Job) -> Mapping[str, Any]:
    """One collection within the limits of the settings. Parameters: `sweep` (bool) also lists the
    store. A dry run changes nothing and reports what each step would do now.

    Raises Unavailable, HistoryRewound, OutcomeUnknown (run it again), MalformedRequest.
    """

    sweeping = _sweeping(job.parameters)
    started_s = context.clock.monotonic_s()
    report = await (_preview(context) if job.dry_run else _run(context))
    if sweeping:
        report["sweep"] = await _sweep(context, dry_run=job.dry_run)
    report["dry_run"] = job.dry_run
    report["seconds"] = round(context.clock.monotonic_s() - started_s, 3)
    return report


def _sweeping(parameters: Mapping[str, Any]) -> bool:
    value = parameters.get("sweep", False)
    unknown = sorted(set(parameters) - {"sweep"})
    if unknown or not isinstance(value, bool):
        raise MalformedRequest('a collection has one parameter, {"sweep": true} or false')
    return value


# --- the steps ------------------------------------------------------------------------------------


async def _run(context: JobContext) -> dict[str, Any]:
    upkeep, settings = context.upkeep, context.settings
    condemned = await upkeep.condemn(limit=settings.deletes_max)
    # failpoint: collection.after_condemn
    orphans = await upkeep.condemn_orphans(
        older_than_s=settings.orphan_window_s, limit=settings.deletes_max
    )
    # failpoint: collection.after_orphans
    await context.note({"step": "delete", "condemned": len(condemned), "orphans": len(orphans)})
    deleting = await upkeep.begin_deletes(
        window_s=settings.safety_window_s, limit=settings.deletes_max
    )
    # failpoint: collection.after_begin
    deleted = await _delete_all(context, deleting)
    forgotten = await upkeep.forget_deleted(
        older_than_s=settings.deleted_keep_s, limit=settings.deletes_max
    )
    return {
        **_told("condemned", condemned),
        **_told("orphans", orphans),
        **_told("deleted", deleted.files),
        "deletes_failed": deleted.failed,
        "records_forgotten": forgotten,
        "limits": _limits(context),
    }


async def _preview(context: JobContext) -> dict[str, Any]:
    upkeep, settings = context.upkeep, context.settings
    condemned = await upkeep.condemn(limit=settings.deletes_max, dry_run=True)
    orphans = await upkeep.condemn_orphans(
        older_than_s=settings.orphan_window_s, limit=settings.deletes_max, dry_run=True
    )
    deleting = await upkeep.begin_deletes(
        window_s=settings.safety_window_s, limit=settings.deletes_max, dry_run=True
    )
    return {
        **_told("condemned", condemned),
        **_told("orphans", orphans),
        **_told("deleted", deleting),
        "limits": _limits(context),
    }


@dataclass(slots=True)
class _Deleted:
    """`failed`: files whose objects the store did not delete now; they stay `deleting`."""

    files: list[CondemnedFile] = field(default_factory=list)
    failed: int = 0


async def _delete_all(context: JobContext, files: Sequence[CondemnedFile]) -> _Deleted:
    """A batch is noted before the next begins, so a crash repeats one batch at most."""

    done = _Deleted()
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        gone = await _delete_objects(context.store, batch)
        # failpoint: collection.after_objects
        await context.upkeep.note_deleted([one.file_id for one in gone])
        # failpoint: collection.after_noted
        done.files += gone
        if not gone:
            break  # the store is away
        await context.note({"step": "delete", "deleted": len(done.files), "of": len(files)})
    done.failed = len(files) - len(done.files)
    return done


async def _delete_objects(
    store: ObjectStore, files: Sequence[CondemnedFile]
) -> list[CondemnedFile]:
    """Those whose objects are gone now. One that was gone before is no error."""

    permits = asyncio.Semaphore(DELETES_AT_ONCE)

    async def delete(one: CondemnedFile) -> bool:
        async with permits:
            return await _delete(store, one.object_key)

    gone = await asyncio.gather(*(delete(one) for one in files))
    return [one for one, is_gone in zip(files, gone, strict=True) if is_gone]


async def _delete(store: ObjectStore, key: str) -> bool:
    """False when the store cannot do it now, or does not say: the next run is answered it again."""

    try:
        await store.delete(key)
    except Unavailable:
        return False
    return True


# --- the sweep ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Swept:
    """What lay in the store: all, what came back after its deletion, and what nobody knows."""

    all: _Objects
    late: _Objects
    unknown: _Objects
    late_failed: int = 0


@dataclass(slots=True)
class _Objects:
    count: int = 0
    size_bytes: int = 0
    keys: list[str] = field(default_factory=list)

    def add(self, key: str, size_bytes: int) -> None:
        self.count += 1
        self.size_bytes += size_bytes
        if len(self.keys) < NAMED_MAX:
            self.keys.append(key)


async def _sweep(context: JobContext, *, dry_run: bool) -> dict[str, Any]:
    """Objects that came back after they were deleted go again; strangers are only reported."""

    swept = _Swept(_Objects(), _Objects(), _Objects())
    for prefix in SWEPT:
        batch: list[tuple[str, int]] = []
        async for item in context.store.list(prefix):
            batch.append(item)
            if len(batch) >= _LISTED_AT_ONCE:
                await _judge(context, batch, swept, dry_run=dry_run)
                batch = []
        await _judge(context, batch, swept, dry_run=dry_run)
    return {
        "objects": swept.all.count,
        "bytes": swept.all.size_bytes,
        "late": swept.late.count,
        "late_bytes": swept.late.size_bytes,
        "late_keys": swept.late.keys,
        "late_failed": swept.late_failed,
        "unknown": swept.unknown.count,
        "unknown_bytes": swept.unknown.size_bytes,
        "unknown_keys": swept.unknown.keys,
    }


async def _judge(
    context: JobContext, listed: Sequence[tuple[str, int]], swept: _Swept, *, dry_run: bool
) -> None:
    """Asks for the names after they were listed: what began or ended meanwhile is known so."""

    names = {key: _name(key) for key, _ in listed}
    # failpoint: collection.after_listing
    known = await context.upkeep.known_names([name for name in names.values() if name is not None])
    for key, size_bytes in listed:
        swept.all.add(key, size_bytes)
        name = names[key]
        state = known.get(name) if name is not None else None
        if state is None:
            swept.unknown.add(key, size_bytes)
        elif state == "deleted" and swept.late.count < context.settings.deletes_max:
            swept.late.add(key, size_bytes)
            if not dry_run and not await _delete(context.store, key):
                swept.late_failed += 1


def _name(key: str) -> uuid.UUID | None:
    """The file id in an object's key, or None for a key that lakebus does not make."""

    stem = key.rpartition("/")[2].partition(".")[0]
    try:
        return uuid.UUID(stem)
    except ValueError:
        return None


# --- what is told ---------------------------------------------------------------------------------


def _told(what: str, files: Sequence[CondemnedFile]) -> dict[str, Any]:
    return {
        what: len(files),
        f"{what}_bytes": sum(one.size_bytes or 0 for one in files),
        f"{what}_files": [
            {
                "file_id": str(one.file_id),
                "object_key": one.object_key,
                "table_id": one.table_id,
                "reason": one.reason,
                "size_bytes": one.size_bytes,
                "condemned_at": format_time(one.condemned_at),
            }
            for one in files[:NAMED_MAX]
        ],
    }


def _limits(context: JobContext) -> dict[str, Any]:
    settings = context.settings
    return {
        "deletes_max": settings.deletes_max,
        "safety_window_s": settings.safety_window_s,
        "orphan_window_s": settings.orphan_window_s,
    }
