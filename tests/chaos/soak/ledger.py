"""The table that is deleted from, and the model of it: what must be there at which snapshot.

One task deletes, others write meanwhile. The model is exact all the same: an entry is published in
one snapshot (C2), which `GET /v1/batches` tells, and a delete takes away what its condition meets
among the rows of the snapshot that it was evaluated at, and nothing else (E7).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.soak.calls import Caller, GaveUp, Refused, Trouble
from tests.chaos.soak.tables import LEDGER, LedgerRow, ledger_models

_CHECK_SQL = (
    "SELECT count(*) AS n, coalesce(sum(check_value), 0) AS c,"
    " coalesce(sum(request * 31 + row_number), 0) AS k, coalesce(sum(grp), 0) AS g,"
    f" count(note) AS notes FROM {LEDGER}"
)
_RESOLVED_S = 200.0
_KEPT_SNAPSHOTS = 40


@dataclass(frozen=True, slots=True)
class Condition:
    """As SQL with parameters, and as the model has it."""

    where: str
    parameters: tuple[Any, ...]
    holds: Callable[[LedgerRow], bool]


@dataclass(slots=True)
class Batch:
    """A write. `snapshot_id` is None until it is known where it was published; `over`: nothing
    more will be known (it was refused, or nobody could tell)."""

    rows: list[LedgerRow]
    snapshot_id: int | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Delete:
    condition: Condition
    evaluated_at: int
    snapshot_id: int
    deleted: int


class Ledger:
    """The model. Rows that are gone are kept with their end, until `forget`."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._ends: dict[tuple[int, int], int] = {}
        self.uncertain = False

    def begin(self, request: int, count: int) -> Batch:
        batch = Batch(ledger_models(request, count))
        self._batches.append(batch)
        return batch

    async def resolved(self) -> bool:
        """Waits until every write begun until now has its snapshot. False: one has none."""
        waited = list(self._batches)
        try:
            async with asyncio.timeout(_RESOLVED_S):
                for batch in waited:
                    await batch.over.wait()
        except TimeoutError:
            return False
        return not self.uncertain

    def forget(self, before: int) -> None:
        """Nobody will ask for a snapshot before this one."""
        for batch in self._batches:
            if batch.snapshot_id is not None and batch.snapshot_id < before:
                batch.rows = [row for row in batch.rows if not self._gone(row, before)]
        self._batches = [batch for batch in self._batches if batch.rows or not batch.over.is_set()]

    def _gone(self, row: LedgerRow, before: int) -> bool:
        place = (row.request, row.row)
        if self._ends.get(place, before + 1) > before:
            return False
        del self._ends[place]
        return True

    def rows_at(self, snapshot_id: int) -> Iterable[LedgerRow]:
        for batch in self._batches:
            if batch.snapshot_id is None or batch.snapshot_id > snapshot_id:
                continue
            for row in batch.rows:
                end = self._ends.get((row.request, row.row))
                if end is None or end > snapshot_id:
                    yield row

    def apply(self, delete: Delete) -> int:
        """Ends what the delete took away; returns how many rows that must have been."""
        doomed = [row for row in self.rows_at(delete.evaluated_at) if delete.condition.holds(row)]
        for row in doomed:
            self._ends[row.request, row.row] = delete.snapshot_id
        return len(doomed)

    def check_at(self, snapshot_id: int) -> dict[str, int]:
        """As `_CHECK_SQL` answers."""
        rows = list(self.rows_at(snapshot_id))
        return {
            "n": len(rows),
            "c": sum(row.check for row in rows),
            "k": sum(row.request * 31 + row.row for row in rows),
            "g": sum(row.grp for row in rows),
            "notes": sum(row.note is not None for row in rows),
        }


class Deleter:
    """Deletes, and looks."""

    def __init__(
        self,
        ledger: Ledger,
        caller: Callable[[str], Caller],
        trouble: Trouble,
        *,
        randomness: random.Random,
        stopping: asyncio.Event,
        newest: Callable[[], int],
        token: Callable[[], str | None],
        pause_s: tuple[float, float] = (1.0, 5.0),
    ) -> None:
        self._ledger = ledger
        self._caller = caller("deleter")
        self._looker = caller("ledger-reader")
        self._trouble = trouble
        self._random = randomness
        self._stopping = stopping
        self._newest = newest
        self._token = token
        self._pause_s = pause_s
        self._numbers = itertools.count(1)
        self._snapshots: list[int] = []
        self.deletes = self.rows = self.empty = self.checks = self.expired = 0

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._delete()
                for _ in range(2):
                    await self._check(self._random.choice([None, *self._snapshots[-30:]]))
            except GaveUp as error:
                self._trouble.add(str(error))
                self._ledger.uncertain = True
            await self._pause()

    async def finish(self) -> dict[str, Any]:
        for snapshot_id in (None, *self._snapshots[-20:]):
            await self._check(snapshot_id)
        return {
            "deletes": self.deletes,
            "deletes_of_nothing": self.empty,
            "deleted_rows": self.rows,
            "checks_against_the_model": self.checks,
            "checks_of_expired_snapshots": self.expired,
        }

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._random.uniform(*self._pause_s)):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _delete(self) -> None:
        condition, key = self._condition(), f"delete-{next(self._numbers)}"
        document: dict[str, Any] = {
            "where": condition.where,
            "parameters": list(condition.parameters),
            "timeout_ms": 30_000,
        }
        token = self._token()
        if token is not None and self._random.random() < 0.7:
            document["min_visibility_token"] = token
        path = f"/v1/tables/{LEDGER}/delete"
        while True:
            said = await self._caller.ask(
                "POST", path, document, headers={"Idempotency-Key": key}, kind="delete"
            )
            if isinstance(said, Refused):
                self._trouble.add(f"{key} ({condition.where}): {said.code}: {said.detail}")
                self._ledger.uncertain = True
                return
            answer = said.json()
            if answer["state"] == "done":
                break
        await self._take(
            Delete(
                condition,
                answer["evaluated_at_snapshot_id"],
                answer["snapshot_id"],
                answer["deleted_rows"],
            ),
            key,
        )

    async def _take(self, delete: Delete, key: str) -> None:
        self.deletes += 1
        self.rows += delete.deleted
        self.empty += delete.deleted == 0
        self._remember(delete.evaluated_at, delete.snapshot_id)
        if not await self._ledger.resolved():
            self._trouble.counts["ledger not resolved"] += 1
            self._ledger.uncertain = True
        expected = self._ledger.apply(delete)
        if expected != delete.deleted and not self._ledger.uncertain:
            self._trouble.add(
                f"{key} ({delete.condition.where} {delete.condition.parameters}) says "
                f"{delete.deleted} rows, evaluated at {delete.evaluated_at}, in "
                f"{delete.snapshot_id}; the model has {expected}"
            )
        if (delete.deleted == 0) != (delete.snapshot_id == delete.evaluated_at):
            self._trouble.add(
                f"{key} took {delete.deleted} rows and names the snapshots "
                f"{delete.evaluated_at}, {delete.snapshot_id}"
            )

    def _remember(self, *snapshot_ids: int) -> None:
        self._snapshots += snapshot_ids
        del self._snapshots[:-_KEPT_SNAPSHOTS]
        self._ledger.forget(min(self._snapshots))

    async def _check(self, snapshot_id: int | None) -> None:
        """One look at the table, compared with the model; None: now."""
        found = await self._looker.query(_CHECK_SQL, snapshot_id=snapshot_id)
        if isinstance(found, Refused):
            if found.code == "snapshot_expired" and snapshot_id is not None:
                self.expired += 1
            else:
                self._trouble.add(f"the ledger at {snapshot_id}: {found.code}: {found.detail}")
            return
        self._remember(found.snapshot_id)
        if not await self._ledger.resolved():
            return
        seen = {name: int(value) for name, value in found.first().items()}
        expected = self._ledger.check_at(found.snapshot_id)
        self.checks += 1
        if seen != expected:
            self._trouble.add(
                f"the ledger at snapshot {found.snapshot_id} has {seen}, the model {expected}"
            )

    def _condition(self) -> Condition:
        draw = self._random
        kind = draw.randrange(7)
        if kind == 0:
            modulus = draw.choice((2, 3, 5))
            rest = draw.randrange(modulus)
            return Condition(
                "request % ? = ?", (modulus, rest), lambda row: row.request % modulus == rest
            )
        if kind == 1:
            grp = draw.randrange(12)  # 10 and 11 are never there
            return Condition("grp = ?", (grp,), lambda row: row.grp == grp)
        if kind == 2:
            cents = draw.randrange(100_000)
            return Condition(
                "amount < CAST(? AS decimal(18,2))",
                (f"{cents / 100:.2f}",),
                lambda row: row.cents < cents,
            )
        if kind == 3:
            high = self._newest()
            low = high - draw.choice((20, 200, 2000))
            return Condition(
                "request BETWEEN ? AND ? AND row_number % 2 = 0",
                (low, high),
                lambda row: low <= row.request <= high and row.row % 2 == 0,
            )
        if kind == 4:
            note = f"n{draw.randint(1, 6)}"
            return Condition(
                "note IS NULL OR note = ?", (note,), lambda row: row.note in (None, note)
            )
        if kind == 5:
            note = f"n{draw.randint(1, 6)}"
            # Null is not true: rows without a note stay.
            return Condition(
                "note <> ? AND grp < 5",
                (note,),
                lambda row: row.note not in (None, note) and row.grp < 5,
            )
        row_number = draw.randrange(5)
        return Condition(
            "row_number = ? AND note LIKE 'n%'",
            (row_number,),
            lambda row: row.row == row_number and row.note is not None,
        )
