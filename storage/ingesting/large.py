"""Large bodies are decoded in threads, so that the event loop serves the others meanwhile.

For formats whose reader needs no interpreter's lock: Arrow streams, Parquet files, and JSON where
the compiled reader is built. Like decoding together (`storage.ingesting.together`) this only ever
accepts: of a body that does not fit as it is, the ordinary way decides, and says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from lakebus.errors import LakebusError
from lakebus.schemas import TableSchema
from storage.rows.compiled_json import KEPT_BYTES
from storage.rows.decode import ARROW_STREAM, JSON, NDJSON, PARQUET, decode_rows
from storage.rows.decode_json import compiled_batch, plan_of
from storage.rows.decode_together import IdentifiedRows
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart

#: A smaller body is decoded sooner than it is handed over, and its JSON is read with the lock held.
BODY_BYTES_MIN = KEPT_BYTES
#: A body takes some times its bytes while it is decoded, so few are at a time; more threads than
#: cores would only take turns.
THREADS = 2

_Decode = Callable[[], pa.RecordBatch | None]


class LargeBodies:
    """One a process, used from its event loop. `rows_max`: of one body."""

    def __init__(self, *, rows_max: int) -> None:
        self._rows_max = rows_max
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")

    def takes(self, media_type: str, body: bytes) -> bool:
        return len(body) >= BODY_BYTES_MIN and media_type in (ARROW_STREAM, PARQUET, JSON, NDJSON)

    async def decode(
        self, schema: TableSchema, media_type: str, body: bytes
    ) -> IdentifiedRows | None:
        """The rows of a body that `takes` them, or None when the caller has to decode it (and will
        hear why)."""

        rows_max = self._rows_max
        if media_type in (JSON, NDJSON):
            # Plans belong to the loop; without compiled code, reading needs the lock anyway.
            plan, lines = plan_of(schema), media_type == NDJSON
            if plan.compiled is None:
                return None

            def decode() -> pa.RecordBatch | None:
                return compiled_batch(plan, body, lines=lines, rows_max=rows_max)
        else:

            def decode() -> pa.RecordBatch | None:
                return decode_rows(schema, media_type, body, rows_max=rows_max).batch

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _identified, schema.table_id, decode)


def _identified(table_id: int, decode: _Decode) -> IdentifiedRows | None:
    try:
        batch = decode()
    except LakebusError:
        return None
    if batch is None:
        return None
    return IdentifiedRows(batch, fingerprint([EntryPart(table_id, 0, batch)]), batch.nbytes)
