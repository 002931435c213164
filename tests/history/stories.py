"""Stories: what a record and an end state tell of each logical request, before any judgement.

`gather` walks the record once and builds the index that the checks share: requests with their
attempts, the accepted one, its place on the bus, and every statement about its end. Contradictions
between statements of that level (two receipts, two ends) are found here, where they meet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.history.anomalies import Findings, Kind
from tests.history.end_state import EndState
from tests.history.record import (
    BatchSeen,
    Fail,
    History,
    Ingest,
    Ok,
    Operated,
    Read,
    Receipt,
    Receipted,
    RecordInvalid,
    Requeue,
    Requeued,
    Rows,
    Status,
    Wait,
)

Place = tuple[int, int]

_BATCH_ID = re.compile(r"b(\d{1,6})-(\d{1,5})-(\d{1,19})")


def parse_batch_id(batch_id: str) -> tuple[int, Place] | None:
    """(history serial, (shard, position)), read from the text without the product's help."""

    match = _BATCH_ID.fullmatch(batch_id)
    return None if match is None else (int(match[1]), (int(match[2]), int(match[3])))


@dataclass(slots=True)
class Story:
    """One logical request. `accepted` is the attempt whose payload is stored: known from a receipt,
    else from its rows. `maybe` are the payloads that may be stored. `snapshot` is where it was
    published, exactly; `visible_by` a snapshot that shows it at the latest. `excused`: lost with a
    line of history, so nothing is asked of it. `told`: the attempt that was answered as quarantined
    in place of a receipt, and the batch it named."""

    request: int
    begin: int
    first: Ingest
    attempts: list[Operated] = field(default_factory=list)
    acknowledged_at: int | None = None
    receipt: Receipt | None = None
    accepted: Ingest | None = None
    maybe: list[Ingest] = field(default_factory=list)
    serial: int = 0
    place: Place | None = None
    snapshot: int | None = None
    visible_by: int | None = None
    published: bool = False
    quarantined: bool = False
    successor: str | None = None
    excused: bool = False
    told: tuple[Operated, str] | None = None

    @property
    def settled(self) -> bool:
        """Nothing more can have come of it than its receipt says, or than nothing."""

        return self.place is not None or not self.maybe

    @property
    def stays_away(self) -> bool:
        """No reader must see its rows."""

        return self.quarantined or self.excused

    def tables(self) -> dict[str, int]:
        return (self.accepted or self.first).tables


@dataclass(slots=True)
class Knowledge:
    """What all checks share. `quarantined`: place → successor; empty text when it was sent again
    with an unknown outcome. `requeues_unknown` counts those: each may be an entry."""

    history: History
    end_state: EndState | None
    findings: Findings
    stories: dict[int, Story] = field(default_factory=dict)
    by_place: dict[Place, Story] = field(default_factory=dict)
    reads: list[tuple[Operated, Read, Rows]] = field(default_factory=list)
    quarantined: dict[Place, str | None] = field(default_factory=dict)
    requeues_unknown: int = 0

    @property
    def unresolved(self) -> int:
        """How many requests may have an entry that nobody was told of."""

        requests = sum(not story.settled for story in self.stories.values())
        return requests + self.requeues_unknown


def may_be_stored(operated: Operated) -> bool:
    """Whether an ingest may have had an effect. A typed refusal says no, but one: with
    `wait=visible` an entry that was stored and then quarantined is answered as `quarantined`."""

    return not isinstance(operated.end, Fail) or operated.end.code == "quarantined"


def gather(history: History, end_state: EndState | None, findings: Findings) -> Knowledge:
    """Raises RecordInvalid when the record contradicts the rules of logging."""

    known = Knowledge(history, end_state, findings)
    statuses: list[tuple[Operated, Status]] = []
    requeues: list[tuple[Operated, Requeue]] = []
    for operated in history.operations:
        operation = operated.operation
        if isinstance(operation, Ingest):
            _take_attempt(known, operated, operation)
        elif isinstance(operation, Read):
            if isinstance(operated.end, Ok) and isinstance(operated.end.result, Rows):
                known.reads.append((operated, operation, operated.end.result))
        elif isinstance(operation, Status):
            statuses.append((operated, operation))
        elif isinstance(operation, Requeue):
            requeues.append((operated, operation))
    for story in known.stories.values():
        _take_place(known, story)
    if end_state is not None:
        _take_end_state(known, end_state)
    _take_statuses(known, statuses)
    if end_state is None:
        _take_told_quarantine(known)
    _take_requeues(known, requeues)
    return known


# --- attempts ------------------------------------------------------------------------------------


def _take_attempt(known: Knowledge, operated: Operated, attempt: Ingest) -> None:
    story = known.stories.get(attempt.request)
    if story is None:
        story = Story(attempt.request, operated.begin, attempt)
        known.stories[attempt.request] = story
    else:
        _same_request(story, attempt)
    story.attempts.append(operated)
    end = operated.end
    if not may_be_stored(operated):
        return
    if not story.maybe:
        story.begin = operated.begin  # refused attempts before it had no effect
    story.maybe.append(attempt)
    if isinstance(end, Fail) and end.batch_id is not None and story.told is None:
        story.told = (operated, end.batch_id)
    if isinstance(end, Ok):
        assert isinstance(end.result, Receipted)
        if story.acknowledged_at is None or end.at < story.acknowledged_at:
            story.acknowledged_at = end.at
            story.receipt, story.accepted = end.result.receipt, attempt
        if end.result.visible and end.result.snapshot_id is not None:
            by = story.visible_by
            shown = end.result.snapshot_id
            story.visible_by = shown if by is None else min(by, shown)


def _same_request(story: Story, attempt: Ingest) -> None:
    first = story.first
    if attempt.key is None:
        raise RecordInvalid(f"request {attempt.request} has no key and was sent twice")
    same = (first.principal, first.target, first.key, first.ordering_key)
    if same != (attempt.principal, attempt.target, attempt.key, attempt.ordering_key):
        raise RecordInvalid(f"request {attempt.request} has attempts under different keys")


def _take_place(known: Knowledge, story: Story) -> None:
    batch_id = None if story.receipt is None else story.receipt.batch_id
    if batch_id is None and story.told is not None:
        operated, batch_id = story.told
        assert isinstance(operated.operation, Ingest)
        assert operated.end is not None
        story.accepted, story.acknowledged_at = operated.operation, operated.end.at
    parsed = None if batch_id is None else parse_batch_id(batch_id)
    if parsed is None:
        return  # a receipt that names no batch is reported by its own check
    story.serial, story.place = parsed
    other = known.by_place.setdefault(story.place, story)
    if other is not story:
        known.findings.add(
            Kind.SHARED_POSITION,
            f"requests {other.request} and {story.request} both have position {story.place[1]} "
            f"of shard {story.place[0]}",
            [other.attempts[0], story.attempts[0]],
        )


# --- ends ----------------------------------------------------------------------------------------


def _take_end_state(known: Knowledge, end_state: EndState) -> None:
    _take_lost_lines(known, end_state)
    for fact in end_state.quarantined:
        place = (fact.shard, fact.position)
        known.quarantined[place] = fact.successor_batch_id
        story = known.by_place.get(place)
        if story is not None:
            story.quarantined, story.successor = True, fact.successor_batch_id
    for row in end_state.ranges:
        for position in range(row.lo, row.hi):
            story = known.by_place.get((row.shard, position))
            if story is not None and not story.quarantined:
                story.snapshot, story.published = row.snapshot_id, True


def lost_snapshots(end_state: EndState | None) -> list[tuple[int, int]]:
    """For each fork (newest snapshot that was kept, first one of the new line): what lies between
    belonged to a line that was lost, as far as anybody was told of it."""

    lost: list[tuple[int, int]] = []
    if end_state is None:
        return lost
    for line in end_state.lines[1:]:
        ids = [f.snapshot_id for f in end_state.snapshots if f.serial == line.serial]
        if ids:
            lost.append((line.fork_snapshot_id, min(ids)))
    return lost


def is_lost(snapshot_id: int | None, lost: list[tuple[int, int]]) -> bool:
    return snapshot_id is not None and any(lo < snapshot_id < hi for lo, hi in lost)


def _take_lost_lines(known: Knowledge, end_state: EndState) -> None:
    """What was accepted after a fork on the line that was left is excused; when the same request
    was accepted again on a later line, that is its story."""

    lost = lost_snapshots(end_state)
    if not lost:
        return
    for story in list(known.by_place.values()):
        if is_lost(story.visible_by, lost):
            story.visible_by = None
        if story.place is None or not _given_up(end_state, story.serial, story.place):
            continue
        for operated in story.attempts:
            if not isinstance(operated.end, Ok) or not isinstance(operated.end.result, Receipted):
                continue
            parsed = parse_batch_id(operated.end.result.receipt.batch_id)
            if parsed is not None and not _given_up(end_state, *parsed):
                assert isinstance(operated.operation, Ingest)
                del known.by_place[story.place]
                story.serial, story.place = parsed
                story.receipt, story.accepted = operated.end.result.receipt, operated.operation
                story.acknowledged_at = operated.end.at
                known.by_place[story.place] = story
                break
        else:
            story.excused = True


def _given_up(end_state: EndState, serial: int, place: Place) -> bool:
    return any(
        serial < line.serial and place[1] >= line.fork_positions.get(place[0], 0)
        for line in end_state.lines[1:]
    )


def _take_statuses(known: Knowledge, statuses: list[tuple[Operated, Status]]) -> None:
    by_batch = {s.receipt.batch_id: s for s in known.stories.values() if s.receipt is not None}
    last: dict[str, tuple[Operated, BatchSeen]] = {}
    lost = lost_snapshots(known.end_state)
    for operated, status in sorted(statuses, key=lambda pair: _end_of(pair[0])):
        if not isinstance(operated.end, Ok):
            continue
        seen = operated.end.result
        assert isinstance(seen, BatchSeen)
        if is_lost(seen.snapshot_id, lost):
            continue
        before = last.get(status.batch_id)
        if before is not None and before[1].state != "accepted":
            if not _agree(before, (operated, seen)):
                known.findings.add(
                    Kind.UNSTABLE_END,
                    f"batch {status.batch_id} was {_words(before[1])} and later {_words(seen)}",
                    [before[0], operated],
                )
            continue
        last[status.batch_id] = (operated, seen)
        story = by_batch.get(status.batch_id)
        if story is not None and seen.state != "accepted":
            _take_end(known, story, operated, seen)


def _end_of(operated: Operated) -> int:
    return operated.begin if operated.end is None else operated.end.at


def _agree(before: tuple[Operated, BatchSeen], after: tuple[Operated, BatchSeen]) -> bool:
    """An `accepted` that was asked for before the end was known proves nothing."""

    if after[1].state == "accepted":
        return after[0].begin <= _end_of(before[0])
    return (before[1].state, before[1].snapshot_id) == (after[1].state, after[1].snapshot_id)


def _words(seen: BatchSeen) -> str:
    return seen.state if seen.snapshot_id is None else f"{seen.state} in {seen.snapshot_id}"


def _take_end(known: Knowledge, story: Story, operated: Operated, seen: BatchSeen) -> None:
    quarantined = seen.state == "quarantined"
    if story.published or story.quarantined:  # by the end state
        if quarantined != story.quarantined or (
            not quarantined and seen.snapshot_id != story.snapshot
        ):
            end = "quarantined" if story.quarantined else f"published in {story.snapshot}"
            known.findings.add(
                Kind.UNSTABLE_END,
                f"request {story.request} was told {_words(seen)}, the catalog says {end}",
                [operated],
            )
        return
    if quarantined:
        story.quarantined, story.successor = True, seen.successor_batch_id
        if story.place is not None:
            known.quarantined[story.place] = seen.successor_batch_id
    else:
        story.published, story.snapshot = True, seen.snapshot_id


def _take_told_quarantine(known: Knowledge) -> None:
    """Without the catalog's truth, a typed `quarantined` about an own entry is what there is."""

    for story in known.by_place.values():
        if story.told is not None and not story.published and not story.quarantined:
            assert story.place is not None
            story.quarantined = True
            known.quarantined.setdefault(story.place, None)
    for operated in known.history.operations:
        end, operation = operated.end, operated.operation
        if not isinstance(end, Fail) or end.code != "quarantined" or end.batch_id is None:
            continue
        parsed = parse_batch_id(end.batch_id)
        tokens = operation.tokens if isinstance(operation, Read | Wait) else ()
        if parsed is None or not any(parsed[1] in token.own for token in tokens):
            continue
        told = known.by_place.get(parsed[1])
        if told is None or told.published or told.quarantined:
            continue
        told.quarantined = True
        known.quarantined.setdefault(parsed[1], None)


def _take_requeues(known: Knowledge, requeues: list[tuple[Operated, Requeue]]) -> None:
    for operated, requeue in requeues:
        parsed = parse_batch_id(requeue.batch_id)
        if parsed is None or isinstance(operated.end, Fail):
            continue
        successor = ""
        if isinstance(operated.end, Ok):
            assert isinstance(operated.end.result, Requeued)
            successor = operated.end.result.successor_batch_id
        else:
            known.requeues_unknown += 1
        if known.quarantined.get(parsed[1]) is None and (successor or known.end_state is None):
            known.quarantined[parsed[1]] = successor
            story = known.by_place.get(parsed[1])
            if story is not None:
                story.quarantined, story.successor = True, successor
