"""The historian: asks deterministic questions, and asks them again at the snapshot that answered.

An answer may never change (D8), whatever maintenance did to the files meanwhile. Every other
snapshot is tagged: it must answer to the end. The others may expire, and never answer differently.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos import source
from tests.chaos.soak.calls import Caller, Found, GaveUp, Refused, Trouble
from tests.chaos.soak.tables import LEDGER, READINGS, RECENT

_WIDE = "request, row_number, check_value, label, amount, ratio, happened_at"
_COLUMNS = {
    **dict.fromkeys(source.TABLES, _WIDE),
    READINGS: "request, row_number, check_value, sensor, noted_at, value",
    RECENT: "request, row_number, check_value, noted_at, value",
    LEDGER: "request, row_number, check_value, grp, amount, note",
}
_NUMBERS = {**dict.fromkeys(source.TABLES, "ratio"), READINGS: "value", RECENT: "value"}
_AGAIN_PAUSE_S = (0.05, 0.4)


@dataclass(frozen=True, slots=True)
class Question:
    sql: str
    deterministic: bool = False


@dataclass(slots=True)
class Pair:
    """A question and the snapshot that answered it."""

    number: int
    question: Question
    snapshot_id: int
    digest: str
    rows: int
    recorded_s: float
    tag: str | None = None
    asked: int = 0
    expired: bool = False
    wrong: bool = False


class Historian:
    """`every_s`: how often a pair is recorded."""

    def __init__(
        self,
        caller: Callable[[str], Caller],
        admin: Caller,
        trouble: Trouble,
        *,
        randomness: random.Random,
        stopping: asyncio.Event,
        every_s: float,
        newest: Callable[[], int],
    ) -> None:
        self._caller = caller
        self._admin = admin
        self._trouble = trouble
        self._random = randomness
        self._stopping = stopping
        self._every_s = every_s
        self._newest = newest
        self.pairs: list[Pair] = []

    async def run(self) -> None:
        await asyncio.gather(self._record_all(), self._ask_all())

    async def finish(self) -> dict[str, Any]:
        """Every pair once more; the figures."""
        caller = self._caller("historian-end")
        for pair in self.pairs:
            if not pair.expired:
                await self._ask(caller, pair)
        return self.told()

    def told(self) -> dict[str, Any]:
        ages = [pair.asked for pair in self.pairs if pair.tag is not None]
        return {
            "pairs": len(self.pairs),
            "tagged": len(ages),
            "expired": sum(pair.expired for pair in self.pairs),
            "kept_to_the_end": sum(not pair.expired and not pair.wrong for pair in self.pairs),
            "changed": sum(pair.wrong for pair in self.pairs),
            "asked_again": sum(pair.asked for pair in self.pairs),
            "asked_again_least_of_a_tagged": min(ages, default=0),
            "deterministic": sum(pair.question.deterministic for pair in self.pairs),
            "rows_of_answers": sum(pair.rows for pair in self.pairs),
        }

    # --- during ---------------------------------------------------------------------------------

    async def _record_all(self) -> None:
        caller = self._caller("historian")
        while not self._stopping.is_set():
            began_s = time.monotonic()
            try:
                await self._record(caller)
            except GaveUp as error:
                self._trouble.add(str(error))
            await self._pause(max(0.0, self._every_s - (time.monotonic() - began_s)))

    async def _record(self, caller: Caller) -> None:
        question = self._question()
        found = await caller.query(question.sql, deterministic=question.deterministic)
        if isinstance(found, Refused):
            self._trouble.add(f"historian: {found.code}: {found.detail}: {question.sql}")
            return
        number = len(self.pairs)
        pair = Pair(number, question, found.snapshot_id, found.digest, found.rows, time.monotonic())
        self.pairs.append(pair)
        if number % 2 == 0:
            await self._tag(pair)

    async def _tag(self, pair: Pair) -> None:
        name = f"pair-{pair.number}"
        document = {"name": name, "snapshot_id": pair.snapshot_id}
        said = await self._admin.ask(
            "POST", "/v1/admin/tags", document, headers={"Idempotency-Key": name}, kind="tag"
        )
        if not isinstance(said, Refused):
            pair.tag = name
        elif said.code != "snapshot_expired":  # a fault may have lasted longer than the retention
            self._trouble.add(f"historian: tag {name}: {said.code}: {said.detail}")

    async def _ask_all(self) -> None:
        caller = self._caller("historian-again")
        while not self._stopping.is_set():
            pair = self._chosen()
            if pair is not None:
                try:
                    await self._ask(caller, pair)
                except GaveUp as error:
                    self._trouble.add(str(error))
            await self._pause(self._random.uniform(*_AGAIN_PAUSE_S))

    def _chosen(self) -> Pair | None:
        living = [pair for pair in self.pairs if not pair.expired]
        if self._random.random() < 0.4:  # those that expire soon
            living = [pair for pair in living if pair.tag is None] or living
        elif self._random.random() < 0.4:
            living = sorted(living, key=lambda pair: pair.asked)[:10]
        return self._random.choice(living) if living else None

    async def _ask(self, caller: Caller, pair: Pair) -> None:
        question = pair.question
        found = await caller.query(
            question.sql, snapshot_id=pair.snapshot_id, deterministic=question.deterministic
        )
        if isinstance(found, Refused):
            if found.code == "snapshot_expired" and pair.tag is None:
                pair.expired = True
                return
            self._trouble.add(
                f"pair {pair.number} at snapshot {pair.snapshot_id} (tag {pair.tag}) is answered "
                f"{found.code}: {found.detail}"
            )
            return
        pair.asked += 1
        if (found.snapshot_id, found.digest) != (pair.snapshot_id, pair.digest):
            self._changed(pair, found)

    def _changed(self, pair: Pair, found: Found) -> None:
        pair.wrong = True
        self._trouble.add(
            f"pair {pair.number} at snapshot {pair.snapshot_id}: {pair.rows} rows became "
            f"{found.rows} (snapshot {found.snapshot_id}, first {found.lines[:1]!r}): "
            f"{pair.question.sql}"
        )

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    # --- questions ------------------------------------------------------------------------------

    def _question(self) -> Question:
        makers = (
            self._digest_of_all,
            self._list,
            self._join,
            self._groups,
            self._floats,
            self._in_order,
            self._pruned,
            self._ranked,
        )
        return makers[len(self.pairs) % len(makers)]()

    def _table(self, *, floats: bool = False) -> str:
        return self._random.choice(list(_NUMBERS if floats else _COLUMNS))

    def _window(self) -> tuple[int, int]:
        newest = max(100, self._newest())
        low = self._random.randrange(newest)
        return low, low + self._random.choice((200, 1000, 5000))

    def _digest_of_all(self) -> Question:
        table = self._table()
        return Question(
            f"SELECT count(*) AS n, sum(request) AS s, min(check_value) AS lo,"
            f" max(check_value) AS hi, bit_xor(hash({_COLUMNS[table]})) AS x FROM {table}"
        )

    def _list(self) -> Question:
        table = self._table()
        way = self._random.choice(("", " DESC"))
        skipped = self._random.choice((0, 0, 50, 500))
        return Question(
            f"SELECT {_COLUMNS[table]} FROM {table} ORDER BY request{way}, row_number"
            f" LIMIT 500 OFFSET {skipped}"
        )

    def _join(self) -> Question:
        left, right = self._random.sample(source.TABLES, 2)
        return Question(
            f"SELECT count(*) AS n, sum(a.check_value - b.check_value) AS s,"
            f" bit_xor(hash(a.label, b.amount)) AS x, min(a.happened_at) AS first"
            f" FROM {left} AS a JOIN {right} AS b USING (request, row_number)"
        )

    def _groups(self) -> Question:
        table = self._table()
        last = _COLUMNS[table].rpartition(", ")[2]
        return Question(
            f"SELECT request % 97 AS g, count(*) AS n, sum(check_value) AS s, min({last}) AS lo,"
            f" max({last}) AS hi FROM {table} GROUP BY g ORDER BY g"
        )

    def _floats(self) -> Question:
        table = self._table(floats=True)
        column = _NUMBERS[table]
        return Question(
            f"SELECT request % 7 AS g, sum({column}) AS s, avg({column} * 1.1) AS a,"
            f" stddev_samp({column}) AS d FROM {table} GROUP BY g ORDER BY g",
            deterministic=True,
        )

    def _in_order(self) -> Question:
        table = self._table()
        return Question(
            "SELECT md5(string_agg(CAST(request AS varchar) || '-' || CAST(row_number AS varchar),"
            f" ',')) AS m, first(check_value) AS f, last(check_value) AS l FROM {table}",
            deterministic=True,
        )

    def _pruned(self) -> Question:
        if self._random.random() < 0.5:
            sensor = self._random.randrange(40)
            day = self._random.randint(1, 3)
            return Question(
                f"SELECT count(*) AS n, min(value) AS lo, max(value) AS hi,"
                f" bit_xor(hash({_COLUMNS[READINGS]})) AS x FROM {READINGS}"
                f" WHERE sensor = 's{sensor}'"
                f" AND noted_at < TIMESTAMPTZ '2026-03-0{day + 1} 00:00:00Z'"
            )
        table = self._random.choice(source.TABLES)
        low, high = self._window()
        return Question(
            f"SELECT {_WIDE} FROM {table} WHERE request >= {low} AND request < {high}"
            " ORDER BY request, row_number LIMIT 2000"
        )

    def _ranked(self) -> Question:
        table = self._table()
        return Question(
            "SELECT request % 13 AS g, request, row_number FROM (SELECT request, row_number,"
            " row_number() OVER (PARTITION BY request % 13 ORDER BY check_value, request,"
            f" row_number) AS place FROM {table}) WHERE place <= 3 ORDER BY g, request, row_number"
        )
