"""Repairing named findings, without inventing data (contract E6: never silently, never by itself).

A repair is planned first: it looks at its finding once more and says exactly what it would change.
Only then, when somebody agreed, it is made; each change checks its reason in its own transaction
and is recorded in the audit log. What would need data that is not there has no repair, and the plan
says what an operator can do.

How readers learn of statistics that were repaired: the catalog's row is corrected, which whoever
loads the manifest from now on reads; and because replicas keep the rows they know, a live file is
also swapped for a copy of itself under a new name, so every reader of `latest` reads the corrected
claims with the next snapshot. A replica that runs keeps the false ones for older snapshots, until
it is started anew.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lakebus.clock import new_uuid
from lakebus.errors import Corrupt, MalformedRequest
from lakebus.snapshots import DataFile
from storage.catalog.interface import Catalog
from storage.files.objects import ObjectExists, ObjectStore
from storage.files.statistics import statistics_to_json
from storage.maintenance.checks.bus import payload_fault
from storage.maintenance.checks.contents import read_contents, sha256_of, true_statistics
from storage.maintenance.checks.strays import file_id_of
from storage.maintenance.findings import KINDS
from storage.maintenance.inspection import InspectedFile, Inspection, Repairs, WaitingPayload
from storage.maintenance.interface import Swap, SwapOperation, SwapOutcome, Upkeep
from storage.rows.segment import decode_segment

_INTENT_TTL_S = 3_600.0
_PLACE = re.compile(r"(\d{1,5})-(\d{1,18})")
_SWAP_ATTEMPTS = 3
#: What the callers of such entries are told.
_GIVEN_UP = "the bytes of these rows were lost before they were published, and they were given up"


@dataclass(frozen=True, slots=True)
class FindingName:
    """`code:name`, as `lakebus repair` takes it: the name is the subject without its kind."""

    code: str
    name: str

    @classmethod
    def parse(cls, text: str) -> FindingName:
        """Takes `code:name`, `code:kind name` and `code kind name`. Raises MalformedRequest."""

        code, _, subject = text.partition(":" if ":" in text else " ")
        if code not in KINDS or not subject:
            raise MalformedRequest(
                f"{text[:80]!r} is not a finding: write CODE:NAME, like"
                " leftover_intent:0b1c… ; the report of a validation has both"
            )
        return cls(code, subject.rpartition(" ")[2])

    def __str__(self) -> str:
        return f"{self.code}:{self.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """`changes`: what would be done, a sentence each. Empty: there is no repair, or nothing to
    repair, and `reason` says which and what else helps. `apply` answers what was done."""

    finding: FindingName
    changes: tuple[str, ...] = ()
    reason: str = ""
    apply: Callable[[], Awaitable[str]] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "finding": str(self.finding),
            "changes": list(self.changes),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Repairer:
    """`by` is who asks, for the audit log; `copies`: a folder with copies of lost objects."""

    inspection: Inspection
    repairs: Repairs
    catalog: Catalog
    upkeep: Upkeep
    store: ObjectStore
    temp_dir: Path
    by: str
    copies: Path | None = None

    async def plan(self, finding: FindingName) -> Plan:
        """Changes nothing. Raises MalformedRequest for a name that cannot be, Unavailable."""

        makers: dict[str, Callable[[FindingName], Awaitable[Plan]]] = {
            "leftover_intent": self._leftover_intent,
            "tag_without_snapshot": self._tag,
            "stray_object": self._stray,
            "missing_object": self._missing,
            "payload_missing": self._payload,
            "statistics_false": self._statistics,
        }
        maker = makers.get(finding.code)
        if maker is None:
            kind = KINDS[finding.code]
            return Plan(finding, reason=f"There is no repair of {kind.code}. {kind.hint}")
        return await maker(finding)

    # --- rows of the catalog ------------------------------------------------------------------

    async def _leftover_intent(self, finding: FindingName) -> Plan:
        found = await self._file(finding)
        if found is None or not found.has_intent:
            return _nothing(finding)

        async def apply() -> str:
            done = await self.repairs.drop_intent(found.file.file_id, by=self.by)
            return _done(done, "the intent was removed")

        return Plan(
            finding,
            (f"remove the write intent of the published file {found.file.file_id}",),
            apply=apply,
        )

    async def _tag(self, finding: FindingName) -> Plan:
        async with self.inspection.look() as view:
            tags = {tag.name: tag for tag in await view.tags()}
        tag = tags.get(finding.name)
        if tag is None or tag.readable:
            return _nothing(finding)

        async def apply() -> str:
            done = await self.repairs.drop_tag_without_snapshot(tag.name, by=self.by)
            return _done(done, "the tag was dropped")

        return Plan(
            finding,
            (f"drop the tag {tag.name}, whose snapshot {tag.snapshot_id} cannot be read",),
            apply=apply,
        )

    # --- objects ------------------------------------------------------------------------------

    async def _stray(self, finding: FindingName) -> Plan:
        key, file_id = finding.name, file_id_of(finding.name)
        if await self.store.size(key) is None:
            return _nothing(finding)
        unknown = {} if file_id is None else await self.inspection.unknown([file_id])
        if file_id is not None and file_id not in unknown:
            return _nothing(finding)
        if file_id is None or unknown[file_id] != "deleted":
            return Plan(
                finding,
                reason=f"Nobody knows what {key} is, and that alone is no reason to delete it."
                " Remove it by hand if you know where it comes from.",
            )

        async def apply() -> str:
            if (await self.inspection.unknown([file_id])).get(file_id) != "deleted":
                return _done(False, "")
            await self.store.delete(key)
            await self.repairs.note("repair.stray_object", f"object {key}", {}, by=self.by)
            return "the object was deleted"

        return Plan(finding, (f"delete the object {key} again; nothing refers to it",), apply=apply)

    async def _missing(self, finding: FindingName) -> Plan:
        found = await self._file(finding)
        if found is None or await self.store.size(found.file.object_key) is not None:
            return _nothing(finding)
        file = found.file
        if self.copies is None:
            return Plan(
                finding,
                reason=f"The bytes of {file.object_key} are needed: name a folder that has a copy"
                " with --from, or restore a backup.",
            )
        copy = await asyncio.to_thread(_copy_of, self.copies, file)
        if copy is None:
            return Plan(
                finding,
                reason=f"No file below {self.copies} named like {file.object_key} has its SHA-256,"
                f" {file.sha256}. Restore a backup, if no other copy is to be found.",
            )

        async def apply() -> str:
            data = await asyncio.to_thread(copy.read_bytes)
            try:
                await self.store.put_new(file.object_key, data)
            except ObjectExists:
                return _done(False, "")
            await self.repairs.note(
                "repair.missing_object",
                finding_subject(file),
                {"object_key": file.object_key, "sha256": file.sha256, "from": str(copy)},
                by=self.by,
            )
            return "the object was put back"

        return Plan(
            finding,
            (f"put {copy}, which has the published SHA-256, back as {file.object_key}",),
            apply=apply,
        )

    # --- bytes on the bus ---------------------------------------------------------------------

    async def _payload(self, finding: FindingName) -> Plan:
        waiting = await self._waiting(finding)
        fault = None if waiting is None else await self._payload_fault(waiting)
        if waiting is None or fault is None:
            return _nothing(finding)
        if self.copies is not None:
            return await self._payload_back(finding, waiting, self.copies)

        async def apply() -> str:
            if await self._payload_fault(waiting) is None:
                return _done(False, "")
            given_up = await self.repairs.give_up(waiting, reason=_GIVEN_UP, by=self.by)
            if given_up is None:
                return (
                    "nothing was changed: nobody has tried to publish them yet, or they have ended"
                )
            return (
                f"{given_up.rows} rows of {given_up.entries} requests were given up with snapshot"
                f" {given_up.snapshot_id}; lakebus quarantine list has them"
            )

        return Plan(
            finding,
            (
                f"give up the rows of the requests at the positions [{waiting.lo}, {waiting.hi}) of"
                f" shard {waiting.shard} that are not published ({fault}): they are lost, their"
                " batches become quarantined, without bytes, and the shard goes on",
            ),
            apply=apply,
        )

    async def _payload_back(
        self, finding: FindingName, waiting: WaitingPayload, copies: Path
    ) -> Plan:
        key = waiting.payload_key
        copy = None if key is None else await asyncio.to_thread(_segment_of, copies, key)
        if key is None or copy is None:
            return Plan(
                finding,
                reason=f"No file below {copies} is a whole copy of {key or 'them'}. Without --from"
                " this gives their rows up.",
            )

        async def apply() -> str:
            if await self._payload_fault(waiting) is None:
                return _done(False, "")
            data = await asyncio.to_thread(copy.read_bytes)
            await self.store.delete(key)  # what is there is damaged, and objects do not change
            await self.store.put_new(key, data)
            await self.repairs.note(
                "repair.payload_missing",
                f"entries {finding.name}",
                {"object_key": key, "from": str(copy)},
                by=self.by,
            )
            return "the object was put back"

        return Plan(finding, (f"put {copy}, which is whole, back as {key}",), apply=apply)

    async def _payload_fault(self, waiting: WaitingPayload) -> str | None:
        return await payload_fault(waiting, self.store, contents=True)

    async def _waiting(self, finding: FindingName) -> WaitingPayload | None:
        found = _PLACE.fullmatch(finding.name)
        if found is None:
            raise MalformedRequest(
                f"{finding.name[:80]!r} is not SHARD-POSITION; {finding.code} needs one"
            )
        return await self.inspection.waiting_payload(int(found[1]), int(found[2]))

    # --- statistics ---------------------------------------------------------------------------

    async def _statistics(self, finding: FindingName) -> Plan:
        found = await self._file(finding)
        if found is None:
            return _nothing(finding)
        file = found.file
        schema = await self.catalog.schema_version(file.table_id, file.schema_version)
        if schema is None:
            return Plan(finding, reason="The schema of the file is not known. Restore a backup.")
        try:
            path = await self._local(file)
            told = await asyncio.to_thread(read_contents, file, schema, path)
            codes = {code for code, _ in told.findings}
            if codes - {"statistics_false", "places_differ"}:
                return Plan(
                    finding,
                    reason="The object is not what was published, so it cannot tell its own"
                    f" statistics ({', '.join(sorted(codes))}). Restore it first.",
                )
            if "statistics_false" not in codes:
                return _nothing(finding)
            statistics = await asyncio.to_thread(true_statistics, schema, path)
        except (Corrupt, FileNotFoundError):
            return Plan(finding, reason="The object of the file is gone. Restore it first.")

        async def apply() -> str:
            if not await self.repairs.replace_statistics(file, statistics, by=self.by):
                return _done(False, "")
            if file.last_snapshot is not None:
                return "the statistics were replaced"
            return f"the statistics were replaced; {await self._swap_copy(file.file_id)}"

        changes = [
            f"replace the statistics of file {file.file_id}, now"
            f" {statistics_to_json(file.statistics)}, with {statistics_to_json(statistics)}"
        ]
        if file.last_snapshot is None:
            changes.append("swap the file for a copy of itself, so that running replicas learn it")
        return Plan(finding, tuple(changes), apply=apply)

    async def _swap_copy(self, file_id: uuid.UUID) -> str:
        """The same bytes under a new name, in the place of the file, from the next snapshot on."""

        for _ in range(_SWAP_ATTEMPTS):
            found = await self.inspection.file(file_id)
            if found is None or found.file.last_snapshot is not None:
                return "a swap of others has taken its place meanwhile"
            file = found.file
            (copy_id,) = await self.upkeep.register_intents(
                file.table_id, 1, owner=new_uuid(), ttl_s=_INTENT_TTL_S
            )
            key = f"tables/{file.table_id}/{copy_id}.parquet"
            await self.store.put_new(key, await self.store.get(file.object_key))
            copy = DataFile(
                file_id=copy_id,
                table_id=file.table_id,
                schema_version=file.schema_version,
                object_key=key,
                rows=file.rows,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                statistics=file.statistics,
                partition=file.partition,
                layout=file.layout,
            )
            swap = Swap(
                publication_id=new_uuid(),
                table_id=file.table_id,
                operation=SwapOperation.COMPACT,
                inputs=(file_id,),
                files=(copy,),
                summary={"repaired": "statistics_false"},
            )
            swapped = await self.upkeep.publish_swap(swap)
            if swapped.outcome is SwapOutcome.PUBLISHED:
                return f"snapshot {swapped.snapshot_id} has a copy with them"
        return "a copy could not be swapped in; start running replicas anew"

    # --- plumbing -----------------------------------------------------------------------------

    async def _file(self, finding: FindingName) -> InspectedFile | None:
        try:
            file_id = uuid.UUID(finding.name)
        except ValueError:
            raise MalformedRequest(
                f"{finding.name[:80]!r} is not the id of a file; {finding.code} needs one"
            ) from None
        return await self.inspection.file(file_id)

    async def _local(self, file: DataFile) -> Path:
        path = self.store.local_path(file.object_key)
        if path is None:
            path = self.temp_dir / f"{file.file_id}.parquet"
            data = await self.store.get(file.object_key)
            await asyncio.to_thread(path.write_bytes, data)
        return path


def finding_subject(file: DataFile) -> str:
    return f"file {file.file_id}"


def _nothing(finding: FindingName) -> Plan:
    return Plan(finding, reason="It is not so (any more): there is nothing to repair.")


def _done(done: bool, words: str) -> str:
    return words if done else "nothing was changed: it is not so any more"


def _segment_of(folder: Path, key: str) -> Path | None:
    """A file of the same name, anywhere below the folder, whose own checksum is right."""

    for candidate in sorted(folder.rglob(key.rpartition("/")[2])):
        with suppress(Corrupt):
            if candidate.is_file():
                decode_segment(candidate.read_bytes())
                return candidate
    return None


def _copy_of(folder: Path, file: DataFile) -> Path | None:
    """A file of the same name, anywhere below the folder, with the published bytes."""

    name = file.object_key.rpartition("/")[2]
    for candidate in sorted(folder.rglob(name)):
        if candidate.is_file() and sha256_of(candidate) == file.sha256:
            return candidate
    return None
