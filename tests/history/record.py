"""The record of a run: what every client asked, when, and what it was told. The checker judges it.

One format for all writers: the chaos run (many processes, HTTP), the seeded simulation (one
process, virtual time) and tests. A record is JSON lines: first a `header`, then events. It is
append-only, and a last line that was cut by a crash is left out when it is read.

How a workload must log
-----------------------
1. Log `invoke` BEFORE the first byte of the request leaves, and the end AFTER the last byte of the
   answer was read and understood. Then `end of a < invoke of b` proves that a was over before b
   began; everything about real time rests on it. `Recorder.begin` does both in the right order.
2. Each operation has one `invoke` and then at most one of
   `ok` (the server said yes), `fail` (a typed code that says: definitely no effect) or
   `unknown` (a lost connection, `outcome_unknown`, an answer that is no typed error of ours).
   None at all, because the client was killed, means `unknown` too. Never log `fail` on a guess.
   (One `fail` has an effect: an ingest with `wait=visible` that is told `quarantined`. Log it with
   the batch id that the answer names.)
3. A logical request has one `request` number in the whole run, over all processes. Its attempts
   (same principal, target, key, and rows) share the number; sending again WITHOUT a key is another
   request with another number, because it may be stored twice. Sending other rows under the same
   key is the same request with another `variant` (the server must answer with a conflict).
4. Every row says whose it is: `tests.history.rows` makes the rows of (request, variant, table) and
   the SQL that groups a table by request. A table's rows all come from recorded requests. The name
   of a dropped table is never used again.
5. Reads list every table they read, and what they were told of each: request → (rows, sum of
   checks). Reads of a part state their `window` of request numbers, [low, high).
6. Tokens are logged decoded (`Token.of`); give `tokens` exactly those that were sent.
7. Times are nanoseconds of one clock: `time.monotonic_ns()` of one machine since one boot, or the
   virtual time of a simulation. A `Recorder` never gives two of its events the same time.
8. `client` names one logical session. A process that starts again opens a new file under a new
   process name; the header keeps records of different boots from being mixed.
9. When the run is over, wait until the bus is drained if you can, do a last read of every table,
   and attach the catalog's truth (`tests.history.end_state`). Without it much less can be decided,
   and then ask the status of every batch, else a quarantined entry looks like a lost one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lakebus.tokens import VisibilityToken

FORMAT = 1

#: A table's rows as a read saw them: request → (rows, sum of their checks).
Groups = dict[int, tuple[int, int]]


class RecordInvalid(Exception):
    """The record breaks its own rules (a bug of the workload), so nothing can be decided."""


class Token(msgspec.Struct, frozen=True, gc=False):
    """A visibility token, decoded. Positions are exclusive."""

    history: str
    floor: int = 0
    positions: dict[int, int] = {}
    own: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(token: VisibilityToken) -> Token:
        return Token(
            str(token.history), token.floor, dict(token.positions), tuple(sorted(token.own))
        )


# --- what a client asks --------------------------------------------------------------------------


class Ingest(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="ingest"):
    """One attempt of a logical request. `tables`: good rows by table; `bad_rows`: rows sent with
    `on_invalid=quarantine` that do not fit. `attempt` counts from 1."""

    request: int
    principal: str
    target: str
    tables: dict[str, int]
    key: str | None = None
    attempt: int = 1
    variant: int = 0
    ordering_key: str | None = None
    bad_rows: int = 0
    wait: str = "durable"


class Read(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="read"):
    """A query over whole tables, or over a `window` of request numbers. At `snapshot_id`, or at
    `time` (RFC 3339), or latest when both are None."""

    tables: tuple[str, ...]
    tokens: tuple[Token, ...] = ()
    snapshot_id: int | None = None
    time: str | None = None
    window: tuple[int, int] | None = None
    max_staleness_ms: int | None = None


class Wait(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="wait"):
    """Waits until a snapshot covers the tokens."""

    tokens: tuple[Token, ...]
    timeout_ms: int | None = None


class Status(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="status"):
    """Asks what became of a batch."""

    batch_id: str


class Ddl(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="ddl"):
    """`action`: create, alter or drop."""

    action: str
    table: str


class Requeue(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="requeue"):
    """An operator sends a quarantined entry again, perhaps with fixed rows (B9)."""

    batch_id: str


Operation = Ingest | Read | Wait | Status | Ddl | Requeue


# --- what it is told -----------------------------------------------------------------------------


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The receipt of an entry; `digest` is over the whole JSON object as it was received (A2)."""

    batch_id: str
    target: str
    rows: int
    rows_rejected: int
    payload_fingerprint: str
    token: Token
    digest: str

    @staticmethod
    def of(answer: Mapping[str, Any], token: VisibilityToken | Token) -> Receipt:
        """From the receipt's JSON object and its token, decoded."""

        canonical = json.dumps(answer, sort_keys=True, separators=(",", ":")).encode()
        return Receipt(
            batch_id=answer["batch_id"],
            target=answer["target"],
            rows=answer["rows"],
            rows_rejected=answer["rows_rejected"],
            payload_fingerprint=answer["payload_fingerprint"],
            token=token if isinstance(token, Token) else Token.of(token),
            digest=hashlib.sha256(canonical).hexdigest()[:32],
        )


class Receipted(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="receipted"):
    """The answer to an ingest. `snapshot_id` only when the answer named one."""

    receipt: Receipt
    replayed: bool = False
    visible: bool = False
    snapshot_id: int | None = None


class Rows(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="rows"):
    """The answer to a read; an empty table has an empty mapping."""

    snapshot_id: int
    tables: dict[str, Groups]
    token: Token | None = None
    snapshot_time: str | None = None


class Covered(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="covered"):
    """The answer to a wait that ended well."""

    snapshot_id: int
    token: Token | None = None


class BatchSeen(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="batch"):
    """`state`: accepted, published or quarantined."""

    state: str
    snapshot_id: int | None = None
    reason: str | None = None
    successor_batch_id: str | None = None


class Changed(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="changed"):
    """The answer to a schema statement; `snapshot_id` None when it changed nothing."""

    snapshot_id: int | None = None
    token: Token | None = None


class Requeued(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="requeued"):
    """The answer to a requeue: the new entry."""

    successor_batch_id: str


Result = Receipted | Rows | Covered | BatchSeen | Changed | Requeued

#: Which answer belongs to which question.
RESULT_OF: dict[type[Operation], type[Result]] = {
    Ingest: Receipted,
    Read: Rows,
    Wait: Covered,
    Status: BatchSeen,
    Ddl: Changed,
    Requeue: Requeued,
}


# --- events: the lines of a record ---------------------------------------------------------------


class Header(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="header"):
    """First line of each file. `clock`: what `at` is measured by; records are merged only when it
    is the same. `base`: shard → first position of this run, when the lake was used before.
    `closed`: every writer of the lake during the run is recorded."""

    process: str
    clock: str
    seed: int | None = None
    base: dict[int, int] = {}
    closed: bool = True
    format: int = FORMAT


class Invoke(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="invoke"):
    id: str
    at: int
    client: str
    operation: Operation


class Ok(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="ok"):
    id: str
    at: int
    result: Result


class Fail(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="fail"):
    """Definitely no effect. `batch_id`: the one that a conflict or `quarantined` named."""

    id: str
    at: int
    code: str
    detail: str = ""
    batch_id: str | None = None


class Unknown(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="unknown"):
    id: str
    at: int
    reason: str = ""


class Note(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag="note"):
    """Something that happened to the system: a fault, a restart. For people, not judged."""

    at: int
    text: str


Event = Invoke | Ok | Fail | Unknown | Note
Line = Header | Event
End = Ok | Fail | Unknown


class Operated(msgspec.Struct, frozen=True, gc=False):
    """One operation as a whole. `end` is None when the client died."""

    id: str
    client: str
    begin: int
    operation: Operation
    end: End | None


class History(msgspec.Struct, frozen=True):
    """Everything that was recorded, in order of `begin`."""

    operations: tuple[Operated, ...]
    notes: tuple[Note, ...] = ()
    base: dict[int, int] = {}
    closed: bool = True
    seed: int | None = None


# --- reading and writing -------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Line)


def encode_line(line: Line) -> bytes:
    return _encode(line) + b"\n"


def read_lines(path: Path) -> list[Line]:
    """The lines of one file; a last line that was cut short is left out.

    Raises RecordInvalid for damage anywhere else.
    """

    raw = path.read_bytes().split(b"\n")
    tail = raw.pop()  # empty when the last line is whole
    lines: list[Line] = []
    for number, text in enumerate(raw, 1):
        try:
            lines.append(_decoder.decode(text))
        except msgspec.DecodeError as error:
            raise RecordInvalid(f"{path.name}:{number} is no line of a record: {error}") from None
    if not lines:
        # A process that was killed before its header was whole recorded nothing.
        if tail or not raw:
            return []
    elif not isinstance(lines[0], Header):
        raise RecordInvalid(f"{path.name} does not begin with a header")
    return lines


def load(paths: Iterable[Path]) -> History:
    """One history from the files of all processes. Raises RecordInvalid."""

    return assemble([read_lines(path) for path in paths])


def assemble(parts: Sequence[Sequence[Line]]) -> History:
    """One history from the lines of all recorders. Raises RecordInvalid."""

    headers: list[Header] = []
    events: list[Event] = []
    for lines in parts:
        for line in lines:
            if isinstance(line, Header):
                headers.append(line)
            else:
                events.append(line)
    _check_headers(headers)
    seeds = {header.seed for header in headers if header.seed is not None}
    base: dict[int, int] = {}
    for header in headers:
        base |= header.base
    return History(
        operations=_pair(events),
        notes=tuple(sorted((e for e in events if isinstance(e, Note)), key=lambda n: n.at)),
        base=base,
        closed=all(header.closed for header in headers),
        seed=seeds.pop() if len(seeds) == 1 else None,
    )


def _check_headers(headers: Sequence[Header]) -> None:
    if any(header.format != FORMAT for header in headers):
        raise RecordInvalid("a record of another format cannot be read")
    if len({header.clock for header in headers}) > 1:
        raise RecordInvalid("the records were made by different clocks; check them one by one")
    names = [header.process for header in headers]
    if len(set(names)) != len(names):
        raise RecordInvalid("two records have the same process name; give each its own")


def _pair(events: Sequence[Event]) -> tuple[Operated, ...]:
    ends: dict[str, End] = {}
    invokes: dict[str, Invoke] = {}
    for event in events:
        if isinstance(event, Note):
            continue
        into: dict[str, Any] = invokes if isinstance(event, Invoke) else ends
        if event.id in into:
            raise RecordInvalid(f"operation {event.id} has two events of one sort")
        into[event.id] = event
    operations = []
    for invoke in invokes.values():
        end = ends.pop(invoke.id, None)
        if end is not None:
            _check_end(invoke, end)
        operations.append(Operated(invoke.id, invoke.client, invoke.at, invoke.operation, end))
    if ends:
        raise RecordInvalid(f"operation {min(ends)} ended but was never invoked")
    operations.sort(key=lambda operated: operated.begin)
    return tuple(operations)


def _check_end(invoke: Invoke, end: End) -> None:
    if end.at < invoke.at:
        raise RecordInvalid(f"operation {invoke.id} ended before it began")
    if isinstance(end, Ok) and type(end.result) is not RESULT_OF[type(invoke.operation)]:
        raise RecordInvalid(f"operation {invoke.id} has an answer of another kind")
