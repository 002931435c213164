"""Calls of the soak's clients that are no operations of the record: asked until there is an answer.

Everything that went wrong is kept in one `Trouble`: what nobody may answer, and how often an answer
had to be waited for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.http1 import Answer, Connection, Dropped
from tests.chaos.answers import Says, judge
from tests.chaos.session import Place

RETRYABLE = frozenset(
    {
        "unavailable",
        "backpressure",
        "rate_limited",
        "visibility_timeout",
        "query_timeout",
        "outcome_unknown",
        "cancelled",
    }
)
#: How a query begins to say that a data file could not be read.
MISSING = "the data could not be read just now"
_PAUSE_S = 0.25


class GaveUp(Exception):
    """Nothing but retryable answers within the patience."""


@dataclass(slots=True)
class Trouble:
    """`problems` fail the run; `counts` are told."""

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, problem: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < 200:
            self.problems.append(problem)


@dataclass(frozen=True, slots=True)
class Found:
    """A query's whole answer: `digest` of all its bytes."""

    snapshot_id: int
    rows: int
    digest: str
    lines: tuple[bytes, ...]

    def first(self) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(self.lines[0])
        return row


@dataclass(frozen=True, slots=True)
class Refused:
    """A typed refusal that no retry will change."""

    code: str
    detail: str


class Caller:
    """One connection; one call at a time."""

    def __init__(
        self,
        place: Place,
        *,
        name: str,
        trouble: Trouble,
        patience_s: float = 150.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = place
        self.name = name
        self.trouble = trouble
        self._patience_s = patience_s
        self._now_s = now_s
        self._connection = Connection(place.url, place.api_key, timeout_s=105.0)

    def close(self) -> None:
        self._connection.close()

    async def ask(
        self,
        method: str,
        path: str,
        document: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        kind: str = "",
    ) -> Answer | Refused:
        """Raises GaveUp."""
        until_s = self._now_s() + self._patience_s
        body = b"" if document is None else json.dumps(document).encode()
        given = dict(headers or {})
        if body:
            given["Content-Type"] = "application/json"
        while True:
            said = await self._once(method, path, body, given, kind or path)
            if said is not None:
                return said
            if self._now_s() > until_s:
                raise GaveUp(f"{self.name}: {method} {path} had no answer")
            await asyncio.sleep(_PAUSE_S)

    async def query(
        self,
        sql: str,
        *,
        snapshot_id: int | None = None,
        deterministic: bool = False,
        tokens: list[str] | None = None,
        parameters: list[Any] | None = None,
    ) -> Found | Refused:
        """The answer as NDJSON, whole. Raises GaveUp."""
        document: dict[str, Any] = {"sql": sql, "timeout_ms": 60_000}
        if snapshot_id is not None:
            document["snapshot"] = {"id": snapshot_id}
        if deterministic:
            document["deterministic"] = True
        if tokens:
            document["min_visibility_token"] = tokens
        if parameters is not None:
            document["parameters"] = parameters
        while True:
            answer = await self.ask(
                "POST",
                "/v1/query",
                document,
                headers={"Accept": "application/x-ndjson"},
                kind="query",
            )
            if isinstance(answer, Refused):
                return answer
            found = whole(answer)
            if found is not None:
                return found
            self.trouble.add(f"{self.name}: an answer without its last line: {sql[:80]}")

    async def _once(
        self, method: str, path: str, body: bytes, headers: dict[str, str], kind: str
    ) -> Answer | Refused | None:
        counts = self.trouble.counts
        try:
            answer = await self._connection.request(method, path, body=body, headers=headers)
        except Dropped:
            counts[f"{kind} dropped"] += 1
            return None
        verdict = judge(answer)
        if verdict.finding is not None:
            self.trouble.add(f"{self.name}: {kind}: {verdict.finding}")
        if MISSING in verdict.detail:
            counts["missing_file_reads"] += 1
            self.trouble.add(f"{self.name}: a read met a missing file: {verdict.detail}")
        if verdict.says is Says.YES:
            counts[f"{kind} ok"] += 1
            return answer
        counts[f"{kind} {verdict.code}"] += 1
        if verdict.says is Says.CODE and verdict.code not in RETRYABLE:
            return Refused(verdict.code, verdict.detail)
        return None


def whole(answer: Answer) -> Found | None:
    """None when the end mark of NDJSON is missing."""
    *lines, last = answer.body.rstrip(b"\n").split(b"\n")
    try:
        mark = json.loads(last)
    except ValueError:
        return None
    if mark != {"complete": True, "row_count": len(lines)}:
        return None
    return Found(
        int(answer.headers["lakebus-snapshot-id"]),
        len(lines),
        hashlib.sha256(answer.body).hexdigest(),
        tuple(lines),
    )
