"""One logical client: sends an operation, understands the answer, and records both.

The invoke is recorded before the first byte leaves and the end after the answer was understood
(`tests.history.record`). Nothing is retried here: an attempt is an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http1 import Answer, Connection, Dropped
from lakebus.errors import MalformedToken
from lakebus.tokens import TokenCodec
from tests.chaos.answers import Says, judge
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
from tests.history.recorder import Recorder
from tests.history.rows import group_sql, groups_of

#: Notes in the record that begin like this are findings of their own.
FINDING = "finding: "


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: `says` is YES with `answer`, or CODE with `code`, or anything else,
    which means that nobody knows."""

    says: Says
    code: str = ""
    answer: Any = None

    @property
    def ok(self) -> bool:
        return self.says is Says.YES


@dataclass(frozen=True, slots=True)
class Place:
    """Where the stack is, and who asks."""

    url: str
    api_key: str
    principal: str


class Session:
    """Not for concurrent use: one operation at a time, as the record wants it.

    :param timeout_s: how long an answer may take before the connection is given up.
    """

    def __init__(
        self,
        place: Place,
        *,
        name: str,
        recorder: Recorder,
        codec: TokenCodec,
        timeout_s: float = 25.0,
    ) -> None:
        self.place = place
        self.name = name
        self._recorder = recorder
        self._codec = codec
        self._connection = Connection(place.url, place.api_key, timeout_s=timeout_s)

    def close(self) -> None:
        self._connection.close()

    # --- operations -----------------------------------------------------------------------------

    async def ingest(
        self,
        operation: Ingest,
        *,
        headers: Mapping[str, str],
        body: bytes,
        timeout_ms: int = 10_000,
    ) -> Outcome:
        path = "/v1/rows" if operation.target == "*" else f"/v1/tables/{operation.target}/rows"
        path += f"?wait={operation.wait}&timeout_ms={timeout_ms}"
        if operation.bad_rows:
            path += "&on_invalid=quarantine"
        sent = dict(headers)
        if operation.key is not None:
            sent["Idempotency-Key"] = operation.key
        if operation.ordering_key is not None:
            sent["Lakebus-Ordering-Key"] = operation.ordering_key
        return await self._do(
            operation,
            lambda: self._connection.request("POST", path, body=body, headers=sent),
            self._receipted,
        )

    async def read(
        self, operation: Read, *, tokens: Sequence[str] = (), timeout_ms: int = 15_000
    ) -> Outcome:
        """`tokens` are those of the operation, as they were received."""
        document: dict[str, Any] = {
            "sql": group_sql(operation.tables, operation.window),
            "timeout_ms": timeout_ms,
        }
        if tokens:
            document["min_visibility_token"] = list(tokens)
        if operation.snapshot_id is not None:
            document["snapshot"] = {"id": operation.snapshot_id}
        elif operation.time is not None:
            document["snapshot"] = {"timestamp": operation.time}
        if operation.max_staleness_ms is not None:
            document["max_staleness_ms"] = operation.max_staleness_ms

        def understood(answer: Any) -> Result:
            return Rows(
                snapshot_id=answer["snapshot_id"],
                tables=groups_of(operation.tables, answer["rows"]),
                token=self.decoded(answer["visibility_token"]),
                snapshot_time=answer["snapshot_time"],
            )

        return await self._do(
            operation, lambda: self._connection.post_json("/v1/query", document), understood
        )

    async def wait(self, operation: Wait, *, tokens: Sequence[str]) -> Outcome:
        document = {"token": list(tokens), "timeout_ms": operation.timeout_ms}
        return await self._do(
            operation,
            lambda: self._connection.post_json("/v1/visibility", document),
            lambda answer: Covered(answer["snapshot_id"], self.decoded(answer["visibility_token"])),
        )

    async def status(self, operation: Status, *, timeout_ms: int = 0) -> Outcome:
        path = f"/v1/batches/{operation.batch_id}?timeout_ms={timeout_ms}"
        return await self._do(
            operation,
            lambda: self._connection.request("GET", path),
            lambda answer: BatchSeen(
                answer["state"],
                answer["snapshot_id"],
                answer["reason"],
                answer["successor_batch_id"],
            ),
        )

    async def create_table(
        self, table: str, columns: Sequence[Mapping[str, Any]], **more: Any
    ) -> Outcome:
        """`more`: partition_by and other members of the call."""
        document = {"name": table, "columns": list(columns), **more}

        def understood(answer: Any) -> Result:
            token = self.decoded(answer["visibility_token"])
            return Changed(token.floor, token)

        return await self._do(
            Ddl("create", table),
            lambda: self._connection.post_json("/v1/tables", document),
            understood,
        )

    async def post(self, path: str, document: Any) -> Outcome:
        """Something that is not recorded."""
        try:
            answer = await self._connection.post_json(path, document)
        except Dropped as error:
            return Outcome(Says.UNTYPED, str(error))
        found = judge(answer)
        return Outcome(
            found.says,
            found.code or found.detail,
            answer.json() if found.says is Says.YES else None,
        )

    def decoded(self, text: str) -> Token:
        return Token.of(self._codec.decode(text))

    # --- inside ---------------------------------------------------------------------------------

    def _receipted(self, answer: Any) -> Result:
        receipt = answer["receipt"]
        return Receipted(
            Receipt.of(receipt, self.decoded(receipt["visibility_token"])),
            replayed=answer["replayed"],
            visible=answer["visible"],
            snapshot_id=answer["snapshot_id"],
        )

    async def _do(
        self,
        operation: Operation,
        send: Callable[[], Any],
        understood: Callable[[Any], Result],
    ) -> Outcome:
        with self._recorder.begin(self.name, operation) as op:
            try:
                answer: Answer = await send()
            except Dropped as error:
                op.unknown(f"dropped: {error}")
                return Outcome(Says.FRONT, "dropped")
            verdict = judge(answer)
            if verdict.finding is not None:
                self._recorder.note(f"{FINDING}{op.id} {self.name} {verdict.finding}")
            if verdict.says is Says.YES:
                return self._yes(op, answer, understood)
            if verdict.says is Says.CODE:
                batch_id = answer.json().get("batch_id")
                op.fail(verdict.code, verdict.detail, batch_id=batch_id)
            else:
                op.unknown(f"{verdict.code}: {verdict.detail}")
            return Outcome(verdict.says, verdict.code)

    def _yes(self, op: Any, answer: Answer, understood: Callable[[Any], Result]) -> Outcome:
        try:
            document = answer.json()
            result = understood(document)
        except (ValueError, KeyError, TypeError, MalformedToken) as error:
            shown = f"{type(error).__name__}: {error} in {answer.body[:200]!r}"
            self._recorder.note(f"{FINDING}{op.id} {self.name} an answer not understood: {shown}")
            op.unknown(f"an answer that is not understood: {shown}")
            return Outcome(Says.UNTYPED, "not_understood")
        op.ok(result)
        return Outcome(Says.YES, answer=document)
