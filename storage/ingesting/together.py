"""Small JSON requests that wait in the same turn of the event loop are decoded together.

Answers of a group commit go out at once, so the next requests of many clients arrive at once, and
making columns of many small bodies together costs a good deal less than one by one
(`storage.rows.decode_together`, which also says why no request can suffer from its neighbours).
Nobody waits for company: what has arrived when the loop comes round is the group, and while nothing
is on its way to the bus, a request does not even wait for that.

What one turn decodes is bounded, so that the loop is held no longer than by one larger request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lakebus.schemas import TableSchema
from storage.rows.decode import JSON, NDJSON
from storage.rows.decode_together import (
    IdentifiedRows,
    JsonBody,
    decode_together,
    goes_together,
)

_log = logging.getLogger(__name__)

#: A larger body gains nothing, and would be waited for by its neighbours.
BODY_BYTES_MAX = 64 * 1024
#: Of what is made into columns at once: more would not stay in a core's cache.
GROUP_BYTES_MAX = 256 * 1024
#: Of what is decoded before the loop goes on; those requests reach the bus together.
TURN_BYTES_MAX = 1024 * 1024
#: After a body that its neighbours had to be decoded twice for, so many of its sender's for that
#: table are decoded alone.
_ALONE_FOR = 100
_SENDERS_MAX = 1024

#: Who sends what to where: principal and table.
_Sender = tuple[int, int]


@dataclass(slots=True, eq=False)
class _Waiting:
    schema: TableSchema
    body: JsonBody
    sender: _Sender
    done: asyncio.Future[IdentifiedRows | None]


class GroupDecoder:
    """One a process, on its event loop. `rows_max`: of one body."""

    def __init__(self, *, rows_max: int) -> None:
        self._rows_max = rows_max
        self._waiting: deque[_Waiting] = deque()
        self._alone: dict[_Sender, int] = {}

    async def decode(
        self,
        schema: TableSchema,
        media_type: str,
        body: bytes,
        *,
        principal_id: int,
        at_once: bool = False,
    ) -> IdentifiedRows | None:
        """The rows of a body, or None when the caller has to decode it (and will hear why).

        `at_once`: no company is likely, so it is not waited for.
        """

        if media_type not in (JSON, NDJSON) or len(body) > BODY_BYTES_MAX:
            return None
        sender = (principal_id, schema.table_id)
        if self._stays_alone(sender) or not goes_together(schema):
            return None
        content = JsonBody(body, media_type == NDJSON)
        if at_once and not self._waiting:
            return decode_together(schema, [content], rows_max=self._rows_max).found[0]
        loop = asyncio.get_running_loop()
        waiting = _Waiting(schema, content, sender, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._decode_turn)
        self._waiting.append(waiting)
        return await waiting.done

    def _stays_alone(self, sender: _Sender) -> bool:
        left = self._alone.get(sender, 0)
        if left > 1:
            self._alone[sender] = left - 1
        elif left:
            del self._alone[sender]
        return left > 0

    def _decode_turn(self) -> None:
        size = 0
        while self._waiting and size < TURN_BYTES_MAX:
            tables: dict[tuple[int, int], list[_Waiting]] = {}
            group, taken = self._take_group()
            size += taken
            for waiting in group:
                # By identity: requests of one moment got their schema from one cache.
                schema = waiting.schema
                tables.setdefault((schema.table_id, id(schema)), []).append(waiting)
            for requests in tables.values():
                self._decode_table(requests)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._decode_turn)

    def _take_group(self) -> tuple[Sequence[_Waiting], int]:
        """The next requests, and how many bytes they have."""

        group: list[_Waiting] = []
        size = 0
        while self._waiting:
            waiting = self._waiting[0]
            if group and size + len(waiting.body.content) > GROUP_BYTES_MAX:
                break
            self._waiting.popleft()
            if not waiting.done.done():  # its request may have gone
                group.append(waiting)
                size += len(waiting.body.content)
        return group, size

    def _decode_table(self, group: Sequence[_Waiting]) -> None:
        try:
            together = decode_together(
                group[0].schema, [waiting.body for waiting in group], rows_max=self._rows_max
            )
        except Exception:  # noqa: BLE001 - a bug; each request meets it by itself
            _log.exception("rows could not be decoded together")
            for waiting in group:
                waiting.done.set_result(None)
            return
        for waiting, found in zip(group, together.found, strict=True):
            waiting.done.set_result(found)
        for number in together.spoilers:
            if len(self._alone) >= _SENDERS_MAX:
                self._alone.clear()
            self._alone[group[number].sender] = _ALONE_FOR
