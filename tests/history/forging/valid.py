"""Valid histories: clients that drive the model lake by a seed, and the record of it.

It is what the checker's own tests start from: everything that a record can hold happens here
(replays, conflicts, unknown outcomes, clients that die, restarts, several tables, quarantine and
its replay, schema changes, waits, reads at fixed snapshots and of windows), and nothing is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.history.end_state import (
    EndState,
)
from tests.history.forging.model_lake import Answer, ModelLake
from tests.history.record import (
    Changed,
    Covered,
    Ddl,
    Fail,
    Header,
    Ingest,
    Invoke,
    Line,
    Note,
    Ok,
    Operation,
    Read,
    Receipted,
    Requeue,
    Rows,
    Status,
    Token,
    Unknown,
    Wait,
)


@dataclass(slots=True)
class _Call:
    """An operation under way; `answer` is set once it took effect on the server."""

    id: str
    client: int
    operation: Operation
    effect: Callable[[], Answer | None]
    answer: Answer | None = None
    begun: bool = False


class Workload:
    """Clients, their record, and chance. `run` gives the lines and the end state."""

    def __init__(self, seed: int, *, steps: int = 400, clients: int = 4) -> None:
        self.random = random.Random(seed)
        self.lake = ModelLake()
        self.lines: list[Line] = [Header(process="model", clock="virtual", seed=seed)]
        self.steps = steps
        self.now = 0
        self.count = 0
        self.requests = 0
        self.sent: list[Ingest] = []
        self.batches: list[str] = []
        self.tables: list[str] = []
        self.generation = [0] * clients
        self.tokens: list[list[Token]] = [[] for _ in range(clients)]
        self.calls: dict[int, _Call] = {}

    def run(self) -> tuple[list[Line], EndState]:
        for table in ("t0", "t1"):
            self._finish(self._start(0, Ddl("create", table)))
            self.tables.append(table)
        for _ in range(self.steps):
            self._step()
        self._drain()
        return self.lines, self.lake.end_state()

    # --- one step -------------------------------------------------------------------------------

    def _step(self) -> None:
        chance = self.random.random()
        idle = [c for c in range(len(self.tokens)) if c not in self.calls]
        if chance < 0.40 and idle:
            client = self.random.choice(idle)
            self._start(client, self._choose(client))
        elif chance < 0.65:
            self._work()
        elif chance < 0.82:
            ready = [call for call in self.calls.values() if call.answer is not None]
            if ready:
                self._reply(self.random.choice(ready))
        elif chance < 0.96:
            self._publish()
        elif chance < 0.975:
            self._lose(self.random.choice([None, *self.calls.values()]))
        elif chance < 0.99:
            self.lines.append(Note(self._tick(), "restart"))
            for call in list(self.calls.values()):
                self._lose(call)
        else:
            self.generation[self.random.randrange(len(self.tokens))] += 1

    def _choose(self, client: int) -> Operation:
        pick = self.random.random()
        if pick < 0.35:
            return self._new_request()
        if pick < 0.50 and self.sent:
            return self._again()
        if pick < 0.80:
            return self._read(client)
        if pick < 0.88 and self.batches:
            return Status(self.random.choice(self.batches))
        if pick < 0.94 and self.tokens[client]:
            return Wait(tuple(self.tokens[client]))
        if pick < 0.97 and (bad := self._quarantined()):
            return Requeue(self.random.choice(bad))
        return self._ddl()

    def _quarantined(self) -> list[str]:
        entries = [entry for log in self.lake.logs for entry in log]
        return [entry.receipt.batch_id for entry in entries if entry.state == "quarantined"]

    def _new_request(self) -> Ingest:
        self.requests += 1
        known = sorted(self.tables)
        names = self.random.sample(known, self.random.choice([1, 1, 2]))
        keyed = self.random.random() < 0.8
        request = Ingest(
            request=self.requests,
            principal=self.random.choice(["ann", "bob"]),
            target=names[0] if len(names) == 1 else "*",
            tables={name: self.random.randint(1, 3) for name in sorted(names)},
            key=f"k{self.requests}" if keyed else None,
            ordering_key=self.random.choice([None, "o1", "o2"]),
            wait=self.random.choice(["durable", "durable", "visible"]),
        )
        if keyed:
            self.sent.append(request)
        return request

    def _again(self) -> Ingest:
        first = self.random.choice(self.sent[-6:])
        variant = int(self.random.random() < 0.2)
        return Ingest(
            request=first.request,
            principal=first.principal,
            target=first.target,
            tables=first.tables,
            key=first.key,
            attempt=2,
            variant=variant,
            ordering_key=first.ordering_key,
        )

    def _read(self, client: int) -> Read:
        tables = tuple(self.random.sample(["t0", "t1"], self.random.choice([1, 2, 2])))
        if len(self.tables) > 2 and self.random.random() < 0.3:
            tables = (self.random.choice(self.tables),)
        window = None
        if self.random.random() < 0.3:
            low = self.random.randint(0, self.requests)
            window = (low, low + self.random.randint(1, 8))
        how = self.random.random()
        head = self.lake.head
        if how < 0.2:
            number = self.random.randint(1, head.snapshot_id)
            return Read(tables, snapshot_id=number, window=window)
        if how < 0.3:
            return Read(tables, time=self.random.choice(self.lake.snapshots).time, window=window)
        tokens = tuple(self.tokens[client]) if self.random.random() < 0.8 else ()
        return Read(tables, tokens=tokens, window=window)

    def _ddl(self) -> Ddl:
        extra = [table for table in self.tables if table.startswith("x")]
        if extra and self.random.random() < 0.5:
            table = self.random.choice(extra)
            self.tables.remove(table)
            return Ddl("drop", table)
        if self.random.random() < 0.5:
            return Ddl("alter", "t0")
        self.count += 1
        self.tables.append(f"x{self.count}")
        return Ddl("create", self.tables[-1])

    # --- the life of a call ---------------------------------------------------------------------

    def _tick(self) -> int:
        self.now += self.random.randint(1, 1000)
        return self.now

    def _start(self, client: int, operation: Operation) -> _Call:
        self.count += 1
        call = _Call(f"op{self.count}", client, operation, self._effect(operation))
        name = f"c{client}.{self.generation[client]}"
        self.lines.append(Invoke(call.id, self._tick(), name, operation))
        self.calls[client] = call
        return call

    def _effect(self, operation: Operation) -> Callable[[], Answer | None]:
        lake = self.lake
        if isinstance(operation, Ingest):
            return self._ingest(operation)
        if isinstance(operation, Read):
            return lambda: lake.read(operation)
        if isinstance(operation, Wait):
            return lambda: lake.verdict_on(operation.tokens)
        if isinstance(operation, Status):
            return lambda: lake.status(operation.batch_id)
        if isinstance(operation, Requeue):
            return lambda: lake.requeue(operation.batch_id)
        return lambda: lake.ddl(operation)

    def _ingest(self, request: Ingest) -> Callable[[], Answer | None]:
        """Appends once; with `wait=visible` it then looks until its entry is covered."""

        first: list[Answer] = []

        def effect() -> Answer | None:
            if not first:
                first.append(self.lake.ingest(request))
            answer = first[0]
            if request.wait == "durable" or not isinstance(answer, Receipted):
                return answer
            verdict = self.lake.verdict_on((answer.receipt.token,))
            if isinstance(verdict, Covered):
                return Receipted(answer.receipt, answer.replayed, True, verdict.snapshot_id)
            return verdict

        return effect

    def _give_up(self, call: _Call) -> Answer:
        """What is answered when the wait runs out."""

        if isinstance(call.operation, Ingest):
            answer = self.lake.ingest(call.operation) if call.operation.key else None
            if isinstance(answer, Receipted):
                return answer  # 202: durable, not seen to be visible
            return "outcome_unknown", None
        return "unavailable" if isinstance(call.operation, Ddl) else "visibility_timeout", None

    def _work(self) -> None:
        waiting = [call for call in self.calls.values() if call.answer is None]
        if not waiting:
            return
        call = self.random.choice(waiting)
        if isinstance(call.operation, Ingest) and not call.begun and self.random.random() < 0.05:
            call.answer = "unavailable", None
        else:
            call.begun = True
            call.answer = call.effect()
        if call.answer is None and self.random.random() < 0.1:
            call.answer = self._give_up(call)

    def _reply(self, call: _Call) -> None:
        del self.calls[call.client]
        answer, at = call.answer, self._tick()
        if isinstance(answer, tuple):
            code, batch_id = answer
            if code == "outcome_unknown":
                self.lines.append(Unknown(call.id, at, code))
                return
            self.lines.append(Fail(call.id, at, code, "", batch_id))
            if code == "quarantined":
                self.tokens[call.client] = []
            return
        assert answer is not None
        self.lines.append(Ok(call.id, at, answer))
        if isinstance(answer, Receipted):
            self.batches.append(answer.receipt.batch_id)
            self.tokens[call.client] = [*self.tokens[call.client][-3:], answer.receipt.token]
        elif isinstance(answer, Rows | Covered | Changed) and answer.token is not None:
            self.tokens[call.client] = [*self.tokens[call.client][-3:], answer.token]

    def _lose(self, call: _Call | None) -> None:
        """The reply is lost, or the client dies and logs nothing."""

        if call is None:
            return
        if call.answer is None and self.random.random() < 0.5:
            call.answer = call.effect()  # it went through, and nobody will say so
        del self.calls[call.client]
        if self.random.random() < 0.6:
            self.lines.append(Unknown(call.id, self._tick(), "connection lost"))
        else:
            self.generation[call.client] += 1
            self.tokens[call.client] = []

    def _finish(self, call: _Call) -> None:
        while call.answer is None:
            call.answer = call.effect()
            if call.answer is None:
                self._publish()
        self._reply(call)

    # --- the server's own work ------------------------------------------------------------------

    def _publish(self) -> None:
        runs = self.lake.free_runs()
        if not runs:
            return
        shard, lo, hi = self.random.choice(runs)
        begin = self.random.randint(lo, hi - 1)
        end = self.random.randint(begin + 1, hi)
        bad = {begin} if self.random.random() < 0.1 else set()
        self.lake.publish(shard, begin, end, bad)

    def _drain(self) -> None:
        """Everything is answered and terminal; every table is read and every batch asked for a last
        time."""

        for call in list(self.calls.values()):
            self._finish(call)
        while self.lake.free_runs():
            self._publish()
        for batch_id in dict.fromkeys(self.batches):
            self._finish(self._start(0, Status(batch_id)))
        for client in range(len(self.tokens)):
            self._finish(self._start(client, Read(tuple(sorted(self.lake.head.tables)))))


def valid_history(seed: int, *, steps: int = 400) -> tuple[list[Line], EndState]:
    """The lines of one record and the end state of the lake that it is about."""

    return Workload(seed, steps=steps).run()
