"""What a soak proves beyond a chaos run: pure functions to lists of problems."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.chaos.recovery import cycles, quantile
from tests.chaos.soak.calls import MISSING, RETRYABLE
from tests.chaos.soak.settings import SMALL_FILES_MAX
from tests.history.end_state import EndState, Range
from tests.history.record import Fail, Groups, History, Ingest, Ok, Receipted
from tests.history.rows import group_of

PAIRS_MIN = 200
#: Typed answers to a write that are no failure: ask again, or a verdict that the client provoked.
_WRITE_CODES = RETRYABLE | {"idempotency_conflict", "quarantined"}
#: Small files of a table, in times of what it may keep at rest: the most (files come while jobs are
#: killed), and at the end. In the last third of a run there may not be many more than in the first.
_PEAK_FACTOR, _END_FACTOR, _GROWTH_FACTOR = 40, 2, 2
_SHOWN = 5
#: In runs of so many minutes some slow stream has to come to its end.
_STREAM_MINUTES = 2.0


def feed_problems(
    history: History,
    end_state: EndState,
    table: str,
    groups: Groups,
    *,
    gaps: Sequence[tuple[int, int]] = (),
) -> list[str]:
    """Every acknowledged request of the table is in the feed, whole and once; nobody else's is.
    What was published in one of the `gaps` (first, last] may be missing, and only whole."""
    published = _Published(end_state)
    quarantined = {(fact.shard, fact.position) for fact in end_state.quarantined}
    acknowledged: dict[int, tuple[int, int]] = {}
    possible: set[int] = set()
    for operated in history.operations:
        operation, end = operated.operation, operated.end
        if not isinstance(operation, Ingest) or not operation.tables.get(table):
            continue
        request = operation.request
        possible.add(request)
        if not isinstance(end, Ok) or not isinstance(end.result, Receipted):
            continue
        places = end.result.receipt.token.own
        excused = request not in groups and any(
            first < published.at(place) <= last for place in places for first, last in gaps
        )
        if quarantined.isdisjoint(places) and not excused:
            acknowledged[request] = group_of(
                request, table, operation.tables[table], variant=operation.variant
            )
    wrong = [
        f"request {request}: sent {sent}, fed {groups.get(request, (0, 0))}"
        for request, sent in acknowledged.items()
        if groups.get(request) != sent
    ]
    strange = sorted(groups.keys() - possible)
    problems = []
    if wrong:
        problems.append(f"feed of {table}: {len(wrong)} requests are not whole: {wrong[:_SHOWN]}")
    if strange:
        problems.append(f"feed of {table}: {len(strange)} requests nobody sent: {strange[:_SHOWN]}")
    return problems


class _Published:
    """In which snapshot a position was published; 0 for one that was not."""

    def __init__(self, end_state: EndState) -> None:
        self._ranges: dict[int, list[Range]] = defaultdict(list)
        for row in sorted(end_state.ranges, key=lambda row: row.lo):
            self._ranges[row.shard].append(row)

    def at(self, place: tuple[int, int]) -> int:
        shard, position = place
        rows = self._ranges[shard]
        index = bisect_right(rows, position, key=lambda row: row.lo) - 1
        if index < 0 or rows[index].hi <= position:
            return 0
        return rows[index].snapshot_id


def write_problems(history: History) -> list[str]:
    """Typed refusals of writes that no client provoked."""
    found = [
        f"{operated.client}: {end.code}: {end.detail}"
        for operated in history.operations
        if isinstance(operated.operation, Ingest)
        and isinstance(end := operated.end, Fail)
        and end.code not in _WRITE_CODES
    ]
    if not found:
        return []
    return [f"{len(found)} writes were refused: {found[:_SHOWN]}"]


def missing_reads(history: History) -> list[str]:
    """Reads of the record that met a file that is not there."""
    return [
        f"{operated.id} {operated.client} read a missing file: {operated.end.detail}"
        for operated in history.operations
        if isinstance(operated.end, Fail) and MISSING in operated.end.detail
    ]


def abort_problems(commits: Mapping[str, int], evidence: Mapping[str, int]) -> list[str]:
    """Appends that maintenance made impossible: their write intents were gone (E2, C6)."""
    lost = commits.get("intent_lost", 0) + sum(
        count for name, count in evidence.items() if "intent_lost" in name
    )
    return [f"{lost} append commits lost their intents"] if lost else []


def file_problems(sampled: Mapping[str, Any], *, minutes: float) -> list[str]:
    """Whether the small files of each table stayed bounded."""
    problems = []
    for name, table in sampled.get("tables", {}).items():
        parts = max(1, table["partitions_at_end"])
        bound = max(SMALL_FILES_MAX, 4 * parts)
        limits = {
            "small_max": _PEAK_FACTOR * bound,
            "small_typical_last": bound + _GROWTH_FACTOR * table["small_typical_first"],
            "small_at_end": _END_FACTOR * bound,
        }
        for what, most in limits.items():
            if table[what] > most:
                problems.append(
                    f"the table {name} had {table[what]} small files ({what}), bounded by {most}"
                )
    if not sampled.get("samples") or minutes * 60 / 20 > sampled["samples"]:
        problems.append(f"only {sampled.get('samples', 0)} samples were taken")
    return problems


def pair_problems(historian: Mapping[str, int], *, wanted: int) -> list[str]:
    problems = []
    if historian["pairs"] < wanted:
        problems.append(f"only {historian['pairs']} of {wanted} questions were recorded")
    if historian["changed"]:
        problems.append(f"{historian['changed']} answers changed")
    if historian["tagged"] and not historian["asked_again_least_of_a_tagged"]:
        problems.append("a tagged answer was never asked for again")
    return problems


def stream_problems(streams: Sequence[Mapping[str, Any]], *, minutes: float) -> list[str]:
    """Slow streams that never come to their end prove nothing."""
    ends: Counter[str] = Counter()
    for one in streams:
        ends.update(one["ends"])
    if minutes >= _STREAM_MINUTES and not ends["whole"]:
        return [f"no slow stream came to its end: {dict(ends)}"]
    return []


# --- figures -------------------------------------------------------------------------------------


def latencies(
    history: History, compacting: Sequence[tuple[float, float]], *, wall_less_monotonic_s: float
) -> dict[str, dict[str, float | int | None]]:
    """Milliseconds of durable writes of all clients, and of the probe's rows until they were read
    back; apart for while compaction was at work (`compacting`, by the wall clock)."""
    writes = [
        (operated.begin, operated.end.at)
        for operated in history.operations
        if isinstance(operated.operation, Ingest)
        and isinstance(operated.end, Ok)
        and operated.operation.wait == "durable"
    ]
    readback = [(cycle.began, cycle.ended) for cycle in cycles(history)]
    found: dict[str, dict[str, float | int | None]] = {}
    for name, spans in (("durable", writes), ("read_back", readback)):
        beside: list[float] = []
        alone: list[float] = []
        for began, ended in spans:
            at = (began / 1e9 + wall_less_monotonic_s, ended / 1e9 + wall_less_monotonic_s)
            during = any(lo < at[1] and at[0] < hi for lo, hi in compacting)
            (beside if during else alone).append((ended - began) / 1e6)
        for which, values in (("during_compaction", beside), ("otherwise", alone)):
            found[f"{name}_{which}"] = {
                "count": len(values),
                "p50_ms": _rounded(quantile(values, 0.5)),
                "p99_ms": _rounded(quantile(values, 0.99)),
            }
    return found


def load_s(history: History) -> float:
    """From the first write to the last."""
    begins = [one.begin for one in history.operations if isinstance(one.operation, Ingest)]
    return (max(begins) - min(begins)) / 1e9 if begins else 0.0


def acknowledged_rows(history: History) -> int:
    """Rows of requests that have a receipt, each counted once."""
    rows: dict[int, int] = {}
    for operated in history.operations:
        operation, end = operated.operation, operated.end
        if isinstance(operation, Ingest) and isinstance(end, Ok):
            rows[operation.request] = sum(operation.tables.values())
    return sum(rows.values())


def shown_problems(problems: Iterable[str], *, most: int = 40) -> list[str]:
    listed = list(problems)
    rest = len(listed) - most
    return [*listed[:most], *([f"… and {rest} more"] if rest > 0 else [])]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
