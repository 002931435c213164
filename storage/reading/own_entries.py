"""Was one of the caller's own entries quarantined? Asked once for many callers, remembered if not.

What is safe to remember: an entry below the watermark is terminal for ever (C2), so once it is
known to be published or skipped it can never become quarantined. A quarantined one may be replayed
later, so that verdict is asked again each time.

What is safe to share: the question must start after the entry was seen covered, else a verdict
that came with the covering snapshot could be missed. Callers ask only then, and a batch takes only
callers that came before it departed. A batch that finds nothing clears all its entries at once;
only when it finds something are its callers asked for one by one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from lakebus.errors import Quarantined
from storage.bus.interface import IngestBus
from storage.reading.shared_read import SharedRead

Entry = tuple[int, int]


class OwnEntries:
    """`remembered_max` entries known to be clean are kept (about 150 bytes each)."""

    def __init__(
        self, bus: IngestBus, *, remembered_max: int = 65_536, batch_max: int = 4_096
    ) -> None:
        self._bus = bus
        self._remembered_max = remembered_max
        self._batch_max = batch_max
        self._clean: OrderedDict[Entry, None] = OrderedDict()
        self._boarding: set[Entry] = set()
        self._batches: SharedRead[frozenset[Entry]] = SharedRead(
            self._ask_batch, what="the quarantine"
        )

    async def close(self) -> None:
        await self._batches.close()

    def forget(self) -> None:
        """Everything remembered was of another line of history."""

        self._clean.clear()

    def known_clean(self, own: Collection[Entry]) -> bool:
        """True when no question is needed."""

        return all(entry in self._clean for entry in own)

    async def refuse_quarantined(self, own: Collection[Entry]) -> None:
        """Raises Quarantined when one of these entries was quarantined and not replayed.

        All of them must be covered by a snapshot that was published before this call.
        """

        unknown = [entry for entry in own if entry not in self._clean]
        if not unknown:
            return
        if len(unknown) <= self._batch_max - len(self._boarding):
            self._boarding.update(unknown)
            cleared = await self._batches.fresh()
            if cleared.issuperset(unknown):
                return
        verdict = await self._bus.quarantined_of(unknown)
        if verdict is not None:
            batch_id, reason = verdict
            raise Quarantined(
                f"the rows of batch {batch_id} were set aside: {reason}",
                batch_id=batch_id,
                reason=reason,
            )
        self._remember(unknown)

    async def _ask_batch(self) -> frozenset[Entry]:
        asked, self._boarding = frozenset(self._boarding), set()
        if await self._bus.quarantined_of(tuple(asked)) is not None:
            return frozenset()
        self._remember(asked)
        return asked

    def _remember(self, entries: Collection[Entry]) -> None:
        for entry in entries:
            self._clean[entry] = None
        while len(self._clean) > self._remembered_max:
            self._clean.popitem(last=False)
