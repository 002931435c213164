"""Small JSON requests that wait at the same time are decoded together.

Answers of a group commit go out at once, so the next requests of many clients arrive at once, and
making columns of many small bodies together costs a good deal less than one by one
(`storage.rows.decode_together`, which also says why no request can suffer from its neighbours).
What has arrived when the loop comes round is the group, and while nothing is on its way to the bus,
a request does not even wait for that. Where requests come often but not together, they wait for
each other for some milliseconds (`storage.ingesting.gathering`).

What one turn decodes is bounded, so that the loop is held no longer than by one larger request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lakebus.schemas import TableSchema
from storage.ingesting.gathering import WAIT_S_MAX, Crowd
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
_TABLES_MAX = 1024

#: Who sends what to where: principal and table.
_Sender = tuple[int, int]


@dataclass(slots=True, eq=False)
class _Waiting:
    schema: TableSchema
    body: JsonBody
    sender: _Sender
    done: asyncio.Future[IdentifiedRows | None]


@dataclass(slots=True, eq=False)
class _Table:
    """What goes on at one table. `held`: who waits for company, for `timer` at most."""

    crowd: Crowd = field(default_factory=Crowd)
    held: list[_Waiting] = field(default_factory=list)
    held_bytes: int = 0
    timer: asyncio.TimerHandle | None = None


class GroupDecoder:
    """One a process, on its event loop. `rows_max`: of one body."""

    def __init__(self, *, rows_max: int) -> None:
        self._rows_max = rows_max
        self._waiting: deque[_Waiting] = deque()
        self._alone: dict[_Sender, int] = {}
        self._tables: dict[int, _Table] = {}

    def takes(self, media_type: str, body: bytes) -> bool:
        """Whether a body is of those that are decoded together."""

        return media_type in (JSON, NDJSON) and len(body) <= BODY_BYTES_MAX

    def crowd(self, table_id: int) -> Crowd:
        """To be entered by each request that this `takes`, from before it is decoded until the bus
        has answered: who gathers wants to know how many there are."""

        table = self._tables.get(table_id)
        if table is None:
            if len(self._tables) >= _TABLES_MAX:
                self._tables = {n: t for n, t in self._tables.items() if t.crowd.under_way}
            table = self._tables[table_id] = _Table()
        return table.crowd

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

        if not self.takes(media_type, body):
            return None
        sender = (principal_id, schema.table_id)
        if self._stays_alone(sender) or not goes_together(schema):
            return None
        content = JsonBody(body, media_type == NDJSON)
        table = self._tables.get(schema.table_id)
        # Who comes while a turn is about to begin goes along with it.
        turning = bool(self._waiting)
        gathers = table is not None and (
            bool(table.held) or (not turning and table.crowd.should_gather())
        )
        if at_once and not gathers and not turning:
            return decode_together(schema, [content], rows_max=self._rows_max).found[0]
        waiting = _Waiting(schema, content, sender, asyncio.get_running_loop().create_future())
        if table is not None and gathers:
            self._hold(table, waiting)
        else:
            self._queue([waiting])
        return await waiting.done

    def _hold(self, table: _Table, waiting: _Waiting) -> None:
        if not table.held:
            loop = asyncio.get_running_loop()
            table.timer = loop.call_later(WAIT_S_MAX, self._release, table)
        table.held.append(waiting)
        table.held_bytes += len(waiting.body.content)
        if table.held_bytes >= GROUP_BYTES_MAX or table.crowd.complete(len(table.held)):
            self._release(table)

    def _release(self, table: _Table) -> None:
        assert table.timer is not None
        table.timer.cancel()
        held, table.held, table.held_bytes, table.timer = table.held, [], 0, None
        table.crowd.waited(len(held) - 1)
        self._queue(held)

    def _queue(self, requests: Iterable[_Waiting]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._decode_turn)
        self._waiting.extend(requests)

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
