"""Staging: writes the files of a claimed range, which nobody sees before they are published (C6).

An entry is set aside only on a deterministic verdict about it (B8): decoding or encoding fails for
that entry alone, twice in the same way, while a canary of known good rows goes through the same
code. When the canary fails, or more entries fail than is likely, the fault is taken to be ours and
the range is given back whole. Whatever the object store raises never counts against an entry.

Every file gets a name that was never used: the id of its write intent, fresh with each claim. A
claim brings one intent a table; the further files of a partitioned table get theirs from
`Intents`, before their first byte. When that fails nothing has been written, and the range is
released (B7). All files of a range are one commit, so a partitioned entry, too, appears whole (A8).
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa

from actors.extract_entry import EXTRACT_MODULE, pack_request
from actors.range_files import (
    EncodeFile,
    RangeEntry,
    SchemaKey,
    SchemasNeeded,
    TableFile,
    bad_entries,
    encode_range,
    entries_of,
    single_payload,
)
from actors.settings import RoleSettings
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock
from lakebus.errors import Corrupt, Fault, FixRequest
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from lakebus.telemetry import Metrics
from storage.bus.interface import Claim, ClaimedSegment
from storage.catalog.interface import Catalog, QuarantinedEntry
from storage.files.objects import ObjectStore

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

#: What decoding and encoding raise because of the bytes they were given. Anything else (a missing
#: attribute, no memory) says more about us than about the entry, and goes the slow way: nack.
VERDICTS: tuple[type[Exception], ...] = (
    Corrupt,
    FixRequest,
    ValueError,
    ArithmeticError,
    pa.ArrowException,
)

#: The share of the time a range may be held: one that hangs its extraction, too, must still be set
#: aside before its worker is taken to be stuck, or it would be tried for ever (B8).
_EXTRACT_SHARE = 0.5
_NOBODY = uuid.UUID(int=0)
_CANARY_SCHEMA = TableSchema(
    table_id=0, name="canary", version=1, columns=(Column(column_id=1, name="n", type="bigint"),)
)


class Intents(Protocol):
    """Where write intents beyond those of a claim come from; `storage.maintenance.interface.Upkeep`
    is one."""

    async def register_intents(
        self, table_id: int, count: int, *, owner: uuid.UUID, ttl_s: float
    ) -> Sequence[uuid.UUID]: ...

    async def register_canary(self, *, owner: uuid.UUID, ttl_s: float) -> uuid.UUID: ...

    async def forget_canary(self, file_id: uuid.UUID) -> None: ...


class EncoderUnsound(Fault):
    """Known good rows cannot be encoded or stored here: this process is at fault, not the rows."""


@dataclass(frozen=True, slots=True)
class Staged:
    """The files of a range, and the entries left out of them for good."""

    files: tuple[DataFile, ...]
    quarantined: tuple[QuarantinedEntry, ...]
    entries: int
    range_bytes: int

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


class Stager:
    """Shared by all ranges of one coordinator, whose instance is the `owner` of further intents.
    `encode` is `storage.files.parquet`'s. Without `intents`, partitioned tables get one file a
    range like all others, and compaction cuts it."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        store: ObjectStore,
        encode: EncodeFile,
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        chance: Chance = SYSTEM_CHANCE,
        intents: Intents | None = None,
        owner: uuid.UUID = _NOBODY,
    ) -> None:
        self._chance = chance
        self._intents = intents
        self._owner = owner
        self._partitions_max = settings.partitions_per_range_max if intents is not None else 1
        self._catalog = catalog
        self._store = store
        self._encode = encode
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._schemas: dict[SchemaKey, TableSchema] = {}
        self._pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")

    def close(self) -> None:
        """Ends the threads; one that is stuck in native code is not waited for."""

        self._pool.shutdown(wait=False, cancel_futures=True)

    async def stage(self, claim: Claim, segments: Sequence[ClaimedSegment]) -> Staged:
        """Writes the files of the range.

        Raises Unavailable (store or catalog), EncoderUnsound, and what a range raises that fails
        only as a whole.
        """

        began_s = self._clock.monotonic_s()
        entries = entries_of(segments)
        quarantined: tuple[QuarantinedEntry, ...] = ()
        try:
            encoded = await self._encode_entries(claim.lease.shard, entries)
        except VERDICTS as error:
            if isinstance(error, MemoryError):
                raise
            quarantined = await self._judge(claim, entries, error)
            bad = {entry.position for entry in quarantined}
            rest = [entry for entry in entries if entry.position not in bad]
            encoded = await self._encode_entries(claim.lease.shard, rest)
        files = await self._put_all(claim, encoded)
        self._metrics.observe("lakebus_stage_seconds", self._clock.monotonic_s() - began_s)
        return Staged(files, quarantined, len(entries), _range_bytes(segments))

    async def set_aside(self, claim: Claim, segments: Sequence[ClaimedSegment]) -> Staged:
        """The doomed entry of a claim as a quarantined one, without ever decoding it in here."""

        reason = claim.last_error or "it ended every worker that tried it"
        attempts = claim.attempt
        timeout_s = self._settings.hold_s(claim.ttl_s) * _EXTRACT_SHARE
        quarantined = [
            QuarantinedEntry(
                entry.position,
                reason,
                attempts,
                await self._extract_apart(entry, timeout_s),
                by_crash=True,
            )
            for entry in entries_of(segments)  # a doomed claim has one
        ]
        return Staged((), tuple(quarantined), len(quarantined), _range_bytes(segments))

    async def warm_up(self) -> None:
        """Encodes a little once: what codecs load at first use must not fall on the first range,
        whose lease may be short. Raises EncoderUnsound."""

        await self._run(self._canary_bytes)

    async def prove(self) -> None:
        """The canary: known good rows through the encoder and the store (B8). Its object has a
        write intent as long as it may be there, so that collection finds what a crash leaves (E4).

        Raises EncoderUnsound, or Unavailable when the store or the catalog does not answer.
        """

        encoded = await self._run(self._canary_bytes)
        intents, file_id = self._intents, self._chance.new_uuid()
        if intents is not None:
            file_id = await intents.register_canary(
                owner=self._owner, ttl_s=self._settings.intent_ttl_s
            )
        key = f"canary/{file_id}.parquet"
        await self._store.put_new(key, encoded)
        # failpoint: stager.after_canary_put
        await self._store.delete(key)
        # failpoint: stager.after_canary_delete
        if intents is not None:
            await intents.forget_canary(file_id)

    async def _encode_entries(self, shard: int, entries: Sequence[RangeEntry]) -> list[TableFile]:
        while True:
            try:
                # In a thread however small it is: that costs 0.13 ms, and an entry that makes a
                # codec spin must not stop the renewals of its neighbours.
                return await self._run(self._encode_range, shard, entries)
            except SchemasNeeded as needed:
                await self._learn(needed.members["keys"])

    def _encode_range(self, shard: int, entries: Sequence[RangeEntry]) -> list[TableFile]:
        return encode_range(
            shard, entries, self._schemas, self._encode, partitions_max=self._partitions_max
        )

    async def _learn(self, keys: set[SchemaKey]) -> None:
        """Fetches schema versions; they never change, so they are kept."""

        for table_id, version in keys:
            schema = await self._catalog.schema_version(table_id, version)
            if schema is None:
                raise Fault(f"the catalog does not know version {version} of table {table_id}")
            self._schemas[table_id, version] = schema

    async def _judge(
        self, claim: Claim, entries: Sequence[RangeEntry], error: Exception
    ) -> tuple[QuarantinedEntry, ...]:
        """Which entries are at fault. Raises `error` when none is, alone."""

        await self._run(self._canary_bytes)
        shard = claim.lease.shard

        def trial(group: Sequence[RangeEntry]) -> object:
            return self._encode_range(shard, group)

        while True:
            try:
                reasons = await self._run(self._find_bad, entries, trial)
                break
            except SchemasNeeded as needed:  # of entries behind the one that failed
                await self._learn(needed.members["keys"])
        if not reasons:
            raise error
        for position, reason in reasons.items():
            _LOG.error("entry %d of shard %d cannot be stored: %s", position, shard, reason)
        found = [
            QuarantinedEntry(
                position=entry.position,
                reason=reasons[entry.position],
                attempts=claim.attempt + 1,
                payload=await self._run(_single_payload, entry),
            )
            for entry in entries
            if entry.position in reasons
        ]
        return tuple(found)

    def _find_bad(
        self, entries: Sequence[RangeEntry], trial: Callable[[Sequence[RangeEntry]], object]
    ) -> dict[int, str]:
        return bad_entries(entries, trial, verdicts=VERDICTS, limit=self._settings.verdicts_max)

    def _canary_bytes(self) -> bytes:
        rows = pa.table({"1": pa.array([1, 2, 3], pa.int64())})
        hidden = {"$shard": pa.int16(), "$position": pa.int64(), "$row": pa.int32()}
        for name, kind in hidden.items():
            field = pa.field(name, kind, nullable=False)
            rows = rows.append_column(field, pa.array([0, 0, 0], kind))
        try:
            return self._encode(_CANARY_SCHEMA, rows).data
        except Exception as error:
            raise EncoderUnsound(f"known good rows cannot be encoded: {error}") from error

    async def _put_all(self, claim: Claim, encoded: Sequence[TableFile]) -> tuple[DataFile, ...]:
        if len(encoded) == 1:
            return (await self._put(claim.file_ids[encoded[0].table_id], encoded[0]),)
        names = await self._names(claim, encoded)
        puts = (self._put(next(names[file.table_id]), file) for file in encoded)
        return tuple(await asyncio.gather(*puts))

    async def _names(
        self, claim: Claim, encoded: Sequence[TableFile]
    ) -> dict[int, Iterator[uuid.UUID]]:
        """A registered name for each file, by table: the claim's own, then further ones."""

        names = {table_id: [file_id] for table_id, file_id in claim.file_ids.items()}
        for table_id, count in Counter(file.table_id for file in encoded).items():
            if count > 1 and self._intents is not None:
                names[table_id] += await self._intents.register_intents(
                    table_id, count - 1, owner=self._owner, ttl_s=self._settings.intent_ttl_s
                )
                # failpoint: stager.after_intents
        return {table_id: iter(found) for table_id, found in names.items()}

    async def _put(self, file_id: uuid.UUID, file: TableFile) -> DataFile:
        key = f"tables/{file.table_id}/{file_id}.parquet"
        # failpoint: stager.before_put
        await self._store.put_new(key, file.encoded.data)
        # failpoint: stager.after_put
        self._metrics.count("lakebus_staged_files_total")
        self._metrics.count("lakebus_staged_bytes_total", file.encoded.size_bytes)
        return DataFile(
            file_id=file_id,
            table_id=file.table_id,
            schema_version=file.schema_version,
            object_key=key,
            rows=file.encoded.rows,
            size_bytes=file.encoded.size_bytes,
            sha256=file.encoded.sha256,
            statistics=file.encoded.statistics,
            partition=file.partition,
        )

    async def _extract_apart(self, entry: RangeEntry, timeout_s: float) -> bytes:
        """The entry's bytes, cut out of its segment in a process of its own: what ended workers
        before would end this one too. If that process ends or hangs, the whole segment is kept."""

        return await self._run(_extract_in_child, entry, timeout_s)

    async def _run(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


def _extract_in_child(entry: RangeEntry, timeout_s: float) -> bytes:
    program = f"import sys; sys.path[:] = {sys.path!r}; import {EXTRACT_MODULE} as m; m.main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=pack_request(entry.segment.payload, entry.index),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.SubprocessError:
        return entry.segment.payload
    return done.stdout or entry.segment.payload


def _single_payload(entry: RangeEntry) -> bytes:
    try:
        return single_payload(entry.segment.payload, entry.index)
    except VERDICTS:  # damaged as a whole: then the whole is what is kept (B9)
        return entry.segment.payload


def _range_bytes(segments: Sequence[ClaimedSegment]) -> int:
    return sum(sum(segment.entry_bytes) for segment in segments)
