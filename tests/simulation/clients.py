"""The workload: clients that write, read, wait and change tables, and log what they were told.

A client is a process of its own, so that its calls survive it no better than a real caller's. What
clients know of each other (tables, requests to repeat, tokens, snapshots) they find in `Shared`, as
if they had told each other out of band; that is when stale answers show.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from lakebus.clock import parse_time
from lakebus.errors import LakebusError, OutcomeUnknown, Quarantined, Unavailable
from lakebus.tokens import VisibilityToken
from storage.ingesting.definitions import ColumnDefinition, TableChangeRequest, TableDefinition
from storage.ingesting.requests import IngestAnswer, IngestRequest
from storage.reading.resolve import LATEST, SnapshotChoice
from storage.rows.decode import JSON
from tests.history.record import (
    BatchSeen,
    Changed,
    Covered,
    Ddl,
    Ingest,
    Operation,
    Read,
    Receipt,
    Receipted,
    Result,
    Rows,
    Status,
    Token,
    Wait,
)
from tests.history.rows import COLUMNS, rows_of
from tests.simulation.replicas import Replica, principal

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")

_ATTEMPTS_MAX = 6
_TABLES_MAX = 6


@dataclass(frozen=True, slots=True)
class Sent:
    """A logical request, enough to send it again."""

    request: int
    principal: int
    tables: dict[str, int]
    key: str | None
    ordering_key: str | None
    bad_rows: int

    @property
    def target(self) -> str:
        return next(iter(self.tables)) if len(self.tables) == 1 else "*"

    def body(self, variant: int) -> bytes:
        rows: dict[str, list[dict[str, object]]] = {
            table: [dict(row) for row in rows_of(self.request, table, count, variant=variant)]
            for table, count in self.tables.items()
        }
        first = next(iter(rows.values()))
        first += [{"request": self.request, "row_number": "bad"} for _ in range(self.bad_rows)]
        return msgspec.json.encode(rows if len(rows) > 1 else first)


@dataclass(slots=True)
class Shared:
    """What clients know of each other."""

    requests: int = 0
    tables_made: int = 0
    tables: list[str] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    tokens: list[VisibilityToken] = field(default_factory=list)
    snapshots: list[tuple[int, str]] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)

    def next_request(self) -> int:
        self.requests += 1
        return self.requests

    def attempt(self, sent: Sent) -> int:
        self.attempts[sent.request] = self.attempts.get(sent.request, 0) + 1
        return self.attempts[sent.request]


class Client:
    def __init__(self, world: World, number: int, source: random.Random) -> None:
        self.name = f"c{number}"
        self._world = world
        self._random = source
        self._shared = world.shared
        self._principal = 1 + number % 2
        self._tokens: list[VisibilityToken] = []
        self.process = world.loop.new_process(f"client {self.name}")
        self._actions: list[tuple[float, Callable[[], Coroutine[Any, Any, None]]]] = [
            (8, self._write),
            (2.5, self._burst),
            (3, self._repeat),
            (1, self._contradict),
            (5, self._read_latest),
            (2, self._read_old),
            (2, self._wait),
            (1, self._ask_status),
            (0.7, self._create),
            (0.7, self._alter),
            (0.4, self._drop),
        ]

    async def run(self, operations: int) -> None:
        weights = [weight for weight, _ in self._actions]
        actions = [action for _, action in self._actions]
        for _ in range(operations):
            await self._world.sleep_s(self._random.expovariate(1 / self._world.plan.think_s))
            await self._random.choices(actions, weights)[0]()

    # --- writing ------------------------------------------------------------------------------

    async def _write(self) -> None:
        tables = self._some_tables(2 if self._random.random() < 0.3 else 1)
        if not tables:
            return
        draw = self._random.random
        number = self._shared.next_request()
        sent = Sent(
            request=number,
            principal=self._principal,
            tables={table: self._random.randint(1, 3) for table in tables},
            key=f"k{number}" if draw() < 0.75 else None,
            ordering_key=self._random.choice("ab") if draw() < 0.4 else None,
            bad_rows=1 if draw() < 0.06 else 0,
        )
        if sent.key is not None:
            self._shared.sent.append(sent)
        self._world.maybe_poison(number)
        attempts = _ATTEMPTS_MAX if sent.key is not None else 1
        await self._send(sent, variant=0, attempts=attempts)

    async def _burst(self) -> None:
        """Many at once: they share group commits, and ranges hold several entries."""

        await asyncio.gather(*(self._write() for _ in range(self._random.randint(2, 8))))

    async def _repeat(self) -> None:
        """Sends somebody's request again, whatever became of it."""

        sent = self._some_sent()
        if sent is not None:
            await self._send(sent, variant=0, attempts=2)

    async def _contradict(self) -> None:
        """Other rows under a key that is taken, or was tried."""

        sent = self._some_sent()
        if sent is not None:
            await self._send(sent, variant=1, attempts=2)

    async def _send(self, sent: Sent, *, variant: int, attempts: int) -> None:
        wait = self._random.random() < 0.3
        body = sent.body(variant)
        for _ in range(attempts):
            operation = Ingest(
                request=sent.request,
                principal=f"p{sent.principal}",
                target=sent.target,
                tables=sent.tables,
                key=sent.key,
                attempt=self._shared.attempt(sent),
                variant=variant,
                ordering_key=sent.ordering_key,
                bad_rows=sent.bad_rows,
                wait="visible" if wait else "durable",
            )
            timeout_s = self._random.choice((0.5, 2.0, 5.0))

            async def ask(replica: Replica, timeout_s: float = timeout_s) -> IngestAnswer:
                request = IngestRequest(
                    principal=principal(sent.principal),
                    table=None if sent.target == "*" else sent.target,
                    media_type=JSON,
                    body=body,
                    deadline_s=replica.deadline_s(timeout_s),
                    idempotency_key=sent.key,
                    ordering_key=sent.ordering_key,
                    wait_visible=wait,
                    on_invalid="quarantine" if sent.bad_rows else "reject",
                )
                return await replica.ingest.ingest(request)

            error = await self._do(operation, ask, self._receipted, timeout_s=timeout_s)
            if error is None or not isinstance(error, Unavailable | OutcomeUnknown):
                return
            await self._world.sleep_s(self._random.random() * 0.5)

    def _receipted(self, answer: IngestAnswer) -> Receipted:
        receipt = answer.receipt
        token = self._world.lake.codec.decode(receipt.visibility_token)
        self._learn(token)
        self._shared.batches.append(receipt.batch_id)
        return Receipted(
            Receipt.of(receipt.as_json(), token),
            answer.replayed,
            answer.visible,
            answer.snapshot_id,
        )

    # --- reading ------------------------------------------------------------------------------

    async def _read_latest(self) -> None:
        tables = self._some_tables(self._random.randint(1, 2))
        staleness_s = 0.5 if self._random.random() < 0.1 else 0.0
        await self._read(tables, LATEST, self._some_tokens(), staleness_s)

    async def _read_old(self) -> None:
        if not self._shared.snapshots:
            return
        tables = self._some_tables(self._random.randint(1, 2))
        number, time = self._random.choice(self._shared.snapshots)
        choice = SnapshotChoice(snapshot_id=number)
        if self._random.random() < 0.4:
            choice = SnapshotChoice(time=parse_time(time))
        tokens = self._some_tokens() if self._random.random() < 0.2 else ()
        await self._read(tables, choice, tokens, 0.0, time=time)

    async def read_everything(self) -> list[LakebusError | None]:
        """A look at each table that should be there."""

        tables = tuple(self._shared.tables)
        return [await self._read((table,), LATEST, (), 0.0) for table in tables]

    async def _read(
        self,
        tables: tuple[str, ...],
        choice: SnapshotChoice,
        tokens: tuple[VisibilityToken, ...],
        staleness_s: float,
        time: str | None = None,
    ) -> LakebusError | None:
        if not tables:
            return None
        timeout_s = self._random.choice((0.2, 1.0, 5.0))
        operation = Read(
            tables=tables,
            tokens=tuple(map(Token.of, tokens)),
            snapshot_id=choice.snapshot_id,
            time=time if choice.time is not None else None,
            max_staleness_ms=round(staleness_s * 1e3) if staleness_s else None,
        )

        async def ask(replica: Replica) -> Rows:
            answer = await replica.query(
                tables, choice=choice, tokens=tokens, timeout_s=timeout_s, staleness_s=staleness_s
            )
            self._learn(answer.token)
            self._shared.snapshots.append((answer.snapshot_id, answer.snapshot_time))
            return Rows(
                answer.snapshot_id, answer.tables, Token.of(answer.token), answer.snapshot_time
            )

        return await self._do(operation, ask, _same, timeout_s=timeout_s)

    async def _wait(self) -> None:
        tokens = self._some_tokens()
        if not tokens:
            return
        timeout_s = self._random.choice((0.2, 2.0))
        operation = Wait(tuple(map(Token.of, tokens)), round(timeout_s * 1e3))

        async def ask(replica: Replica) -> Covered:
            number, token = await replica.wait(tokens, timeout_s=timeout_s)
            self._learn(token)
            return Covered(number, Token.of(token))

        await self._do(operation, ask, _same, timeout_s=timeout_s)

    async def _ask_status(self) -> None:
        if not self._shared.batches:
            return
        batch_id = self._random.choice(self._shared.batches)
        number = int(batch_id.split("-")[1])

        async def ask(replica: Replica) -> BatchSeen:
            owner = self._world.owner_of(batch_id)
            status = await replica.batches.status(principal(owner), batch_id)
            return BatchSeen(
                status.state.value, status.snapshot_id, status.reason, status.successor_batch_id
            )

        assert number >= 0
        await self._do(Status(batch_id), ask, _same, timeout_s=2.0)

    # --- tables -------------------------------------------------------------------------------

    async def _create(self) -> None:
        if len(self._shared.tables) >= _TABLES_MAX:
            return
        self._shared.tables_made += 1
        await self.create(f"t{self._shared.tables_made}")

    async def create(self, name: str) -> LakebusError | None:
        """A new table; its name is known to all from now on, whatever becomes of the call."""

        self._shared.tables.append(name)
        columns = tuple(ColumnDefinition(column, kind) for column, kind in COLUMNS)

        async def ask(replica: Replica) -> Changed:
            answer = await replica.tables.create(
                principal(self._principal), TableDefinition(name, columns), keyed=True
            )
            return self._changed(answer.snapshot_id or None)

        return await self._do(Ddl("create", name), ask, _same, timeout_s=3.0)

    async def _alter(self) -> None:
        tables = self._some_tables(1)
        if not tables:
            return
        (name,) = tables
        more = ColumnDefinition(f"more{self._random.getrandbits(30)}", "bigint")

        async def ask(replica: Replica) -> Changed:
            answer = await replica.tables.alter(
                principal(self._principal),
                name,
                TableChangeRequest(add_columns=(more,)),
                expected_version=None,
            )
            return self._changed(answer.snapshot_id)

        await self._do(Ddl("alter", name), ask, _same, timeout_s=3.0)

    async def _drop(self) -> None:
        if len(self._shared.tables) < 2:
            return
        (name,) = self._some_tables(1)
        self._shared.tables.remove(name)

        async def ask(replica: Replica) -> Changed:
            answer = await replica.tables.drop(
                principal(self._principal), name, deadline_s=replica.deadline_s(3.0)
            )
            return self._changed(answer.snapshot_id)

        await self._do(Ddl("drop", name), ask, _same, timeout_s=3.0)

    def _changed(self, snapshot_id: int | None) -> Changed:
        if snapshot_id is None:
            return Changed()
        token = VisibilityToken(self._world.lake.history, snapshot_id)
        self._learn(token)
        return Changed(snapshot_id, Token.of(token))

    # --- what all share -----------------------------------------------------------------------

    async def _do(
        self,
        operation: Operation,
        ask: Callable[[Replica], Coroutine[Any, Any, T]],
        told: Callable[[T], Result],
        *,
        timeout_s: float,
    ) -> LakebusError | None:
        """One operation by one call to a replica, logged; returns the error that ended it."""

        replica = self._world.some_replica(self._random)
        with self._world.recorder.begin(self.name, operation) as op:
            try:
                answer = await self._world.network.call(
                    replica.endpoint,
                    lambda: ask(replica),
                    lost=_lost,
                    refused=_refused,
                    timeout_s=timeout_s + 1.0,
                )
            except LakebusError as error:
                if isinstance(error, Quarantined) and isinstance(operation, Ingest):
                    op.unknown(error.detail)  # accepted, and then set aside: not "no effect"
                else:
                    op.error(error)
                self._world.outcomes[f"{type(operation).__name__.lower()} {error.code}"] += 1
                return error
            op.ok(told(answer))
        self._world.outcomes[f"{type(operation).__name__.lower()} ok"] += 1
        return None

    def _learn(self, token: VisibilityToken) -> None:
        self._tokens.append(token)
        self._shared.tokens.append(token)

    def _some_tables(self, count: int) -> tuple[str, ...]:
        tables = self._shared.tables
        return tuple(self._random.sample(tables, min(count, len(tables))))

    def _some_sent(self) -> Sent | None:
        return self._random.choice(self._shared.sent) if self._shared.sent else None

    def _some_tokens(self) -> tuple[VisibilityToken, ...]:
        """Usually the own newest one: read your writes; sometimes others' too."""

        tokens = []
        if self._tokens and self._random.random() < 0.6:
            tokens.append(self._tokens[-1])
        if self._shared.tokens and self._random.random() < 0.4:
            tokens.append(self._random.choice(self._shared.tokens))
        return tuple(tokens)


def _same(answer: T) -> T:
    return answer


def _lost() -> Exception:
    return OutcomeUnknown("the connection to the replica was lost")


def _refused() -> Exception:
    return Unavailable("the replica refused the connection; nothing was sent")
