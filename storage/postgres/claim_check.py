"""Claim check: large payloads lie in the object store, and the bus carries their names.

An entry is large from a quarter of what one group may hold. It is encoded in a thread and its bytes
are put beside the queue of its shard, so its neighbours wait for neither; it then takes its turn as
a group of its own, whose append is small. `claim_check_bytes` decides, by the encoded size, whether
a payload travels in the database or by its name; 0 keeps all of them in the database.

The life of an object, and why it is there as long as anybody may need it:

* A write intent comes before the first byte (C6). The append consumes it in its own transaction;
  whichever of append and collection commits first wins.
* An append that was refused leaves its intent where it was. That the intent is still there after
  the answer is the proof that nothing names the object: only then is it deleted at once. After a
  crash or an unknown outcome nobody decides here; the intent expires and tells collection (E4).
* While the log names it, nothing removes it. From the moment its entries are terminal it is
  condemned, and collection deletes it after the safety window like every other file (E3), so a
  catalog that is put back by less than the window still finds it.
* What is read back is compared with the segment's own checksum. A missing or damaged object is a
  fault of the store and no verdict about the entry: the read fails, and nothing is set aside (B8).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lakebus.clock import new_uuid
from lakebus.errors import Corrupt, Unavailable
from storage.bus.settings import BusSettings
from storage.files.objects import ObjectStore
from storage.postgres.failures import reading
from storage.postgres.pool import Pool
from storage.rows.segment import EncodedSegment, EntryPart, decode_segment, encode_segment

_log = logging.getLogger(__name__)

#: An entry of this part of a group's bytes gains nothing from company.
ALONE_SHARE = 4
#: Payloads that one read gets at a time.
READS_AT_ONCE = 4
#: Log rows looked at for each shard in one pass of a purge.
RELEASED_A_PASS = 5_000

_INTEND = "INSERT INTO write_intent VALUES ($1, 'payload', $1, clock_timestamp() + $2)"
_INTENDED = "SELECT EXISTS (SELECT 1 FROM write_intent WHERE file_id = $1)"
_FORGET_INTENT = "DELETE FROM write_intent WHERE file_id = $1"
# Rows from where the last pass ended to the watermark: each is looked at once.
_RELEASE = """
WITH seen AS MATERIALIZED (
    SELECT l.lo, l.hi, l.payload_key FROM lake h JOIN bus_log l
        ON l.shard = $1 AND l.lo >= $2 AND l.lo < h.watermark[$1 + 1]
     WHERE l.hi <= h.watermark[$1 + 1] ORDER BY l.lo LIMIT $3),
freed AS (
    UPDATE bus_log l SET payload_key = NULL FROM seen s
     WHERE l.shard = $1 AND l.lo = s.lo AND s.payload_key IS NOT NULL RETURNING s.payload_key),
noted AS (
    INSERT INTO condemned_file (file_id, object_key, reason, state, condemned_at)
    SELECT substring(f.payload_key FROM '^bus/(.*)[.]segment$')::uuid, f.payload_key,
           'payload', 'condemned', clock_timestamp()
      FROM freed f
    ON CONFLICT ON CONSTRAINT condemned_file_pkey DO NOTHING)
SELECT (SELECT max(s.hi) FROM seen s) AS until, (SELECT count(*) FROM freed) AS freed"""


@dataclass(frozen=True, slots=True)
class Carried:
    """An encoded group and where its bytes are: under `key`, written under `intent`, or in here."""

    segment: EncodedSegment
    key: str | None = None
    intent: uuid.UUID | None = None


class ClaimCheck:
    """Puts the payloads of a process's appends. Use from one event loop.

    One thread encodes, one entry after the other: several would take turns at the interpreter's
    lock and the cores, and cost half as much again for each row.
    """

    def __init__(
        self, *, pool: Pool, settings: BusSettings, object_store: ObjectStore | None
    ) -> None:
        self._pool = pool
        self._store = object_store if settings.claim_check_bytes else None
        self._bytes = settings.claim_check_bytes
        self._alone_bytes = max(1, settings.group_bytes_max // ALONE_SHARE)
        self._ttl = dt.timedelta(seconds=settings.intent_ttl_s)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode-segment")

    def close(self) -> None:
        """Ends the thread, once nobody appends any more."""

        self._encoder.shutdown(wait=False)

    def goes_alone(self, size_bytes: int) -> bool:
        """Whether an entry of so many bytes in memory is carried beside the queue."""

        return size_bytes >= self._alone_bytes

    async def carry(self, parts: Sequence[EntryPart]) -> Carried:
        """One entry, encoded in a thread and put where it belongs. Raises Unavailable, and whatever
        rows that cannot be encoded make the codec raise."""

        loop = asyncio.get_running_loop()
        return await self.put(await loop.run_in_executor(self._encoder, encode_segment, [parts]))

    async def put(self, segment: EncodedSegment) -> Carried:
        """Durable in the object store when it returns, unless it is small. Raises Unavailable:
        then nothing names what may have been written."""

        if self._store is None or len(segment.payload) <= self._bytes:
            return Carried(segment)
        intent = new_uuid()
        async with self._pool.connection() as connection:
            with reading():
                await connection.execute(_INTEND, intent, self._ttl)
        key = f"bus/{intent}.segment"
        await self._store.put_new(key, segment.payload)
        return Carried(segment, key, intent)

    async def discard(self, carried: Carried) -> None:
        """Removes what an append that was refused had put. Failing is no matter: the intent tells
        collection of it."""

        if carried.key is None or self._store is None:
            return
        try:
            async with self._pool.connection() as connection:
                with reading():
                    unused = await connection.fetchval(_INTENDED, carried.intent)
            if not unused:
                return
            # failpoint: claim_check.before_discard
            await self._store.delete(carried.key)
            async with self._pool.connection() as connection:
                with reading():
                    await connection.execute(_FORGET_INTENT, carried.intent)
        except Unavailable as error:
            _log.info("the object %s is left to collection: %s", carried.key, error)


class PayloadRelease:
    """Condemns the objects of entries that have become terminal.

    It remembers how far it has looked, so a pass costs what was appended since the last one. That
    is a cache: a process that begins looks again from the oldest row, and an object that nobody
    has released goes with its log row.
    """

    def __init__(self, *, pool: Pool, shards: int) -> None:
        self._pool = pool
        self._until = [0] * shards

    async def run_once(self) -> int:
        """How many objects were condemned. Raises Unavailable; repeating it is safe."""

        freed = 0
        for shard, lo in enumerate(self._until):
            async with self._pool.connection() as connection:
                with reading():
                    row = await connection.fetchrow(_RELEASE, shard, lo, RELEASED_A_PASS)
            # failpoint: payload_release.after_shard
            assert row is not None
            freed += row["freed"]
            if row["until"] is not None:
                self._until[shard] = row["until"]
        return freed


async def fetch_payloads(store: ObjectStore | None, keys: Iterable[str]) -> Mapping[str, bytes]:
    """The payloads that are there and whole, some at a time. One that is damaged is asked for
    twice, in case it was so only on its way. Raises Unavailable."""

    if store is None:
        return {}
    permits = asyncio.Semaphore(READS_AT_ONCE)

    async def fetch(key: str) -> bytes | None:
        async with permits:
            try:
                return await _whole(await store.get(key))
            except Corrupt as first:
                _log.warning("the payload %s is asked for again: %s", key, first)
            try:
                return await _whole(await store.get(key))
            except Corrupt as fault:
                _log.error("the payload %s cannot be read: %s", key, fault)
                return None

    wanted = list(keys)
    found = await asyncio.gather(*map(fetch, wanted))
    return {key: data for key, data in zip(wanted, found, strict=True) if data is not None}


async def _whole(payload: bytes) -> bytes:
    """Looked through in a thread: it is large, and leases are renewed meanwhile. Raises Corrupt
    unless the segment's checksum is right."""

    await asyncio.to_thread(decode_segment, payload)
    return payload
