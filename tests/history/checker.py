"""The checker: does a recorded history keep the contract?

::

    verdict = check(load(paths), end_state)
    assert verdict.ok, str(verdict)

It decides by what clients were told and, with an end state, by what the catalog says; it never
asks the running system. Each anomaly names the statement of the contract that it breaks.

What it decides without an end state: whole, doubled, refused, unsent and too early rows; that rows
once shown stay; that tokens and answers chain in real time; receipts, conflicts and order on the
bus. With one also: that every receipt's entry exists and ends once, ranges, watermarks, times,
files, and that a token's positions were really covered.

What it cannot see:

* a lost entry that no read, token or end state ever asks for; rows of requests that nobody reads;
* an entry that was accepted for a request of unknown outcome, and then lost: no one may complain;
* whether `unknown` was `fail` (latency, availability): that is not judged, only counted;
* values beyond `request`, `row_number`, `check_value`, and the order of rows inside an answer;
* a quarantined entry that nobody asked about, when there is no end state: it looks like a loss;
* the bytes of files; leases and epochs (their effects are seen, not they);
* what happens on a line of history that a restore gave up, beyond that it is not asked for.
"""

from __future__ import annotations

import time
from collections import Counter

import msgspec

from tests.history.anomalies import CONTRACT, Anomaly, Findings, Kind
from tests.history.catalog import check_catalog
from tests.history.chains import check_chains
from tests.history.end_state import EndState
from tests.history.files import check_files
from tests.history.positions import check_positions
from tests.history.reads import check_reads
from tests.history.receipts import check_receipts
from tests.history.record import Fail, History, Ok
from tests.history.stories import gather

#: Typed answers that a client of a healthy or a restarting system has to expect, by operation. Any
#: other is listed as information: it is no broken promise, but somebody should look at it.
EXPECTED_CODES: dict[str, frozenset[str]] = {
    "ingest": frozenset(
        {"unavailable", "backpressure", "rate_limited", "idempotency_conflict", "quarantined"}
    ),
    "read": frozenset({"unavailable", "visibility_timeout", "query_timeout", "quarantined"}),
    "wait": frozenset({"unavailable", "visibility_timeout", "quarantined"}),
    "status": frozenset({"unavailable"}),
    "ddl": frozenset({"unavailable", "table_exists", "table_not_found"}),
    "requeue": frozenset({"unavailable"}),
}


class Verdict(msgspec.Struct, frozen=True):
    """`anomalies` holds the first of each kind, `counts` counts all. `outcomes`: how operations
    ended, as "ingest ok" or "read fail unavailable". `unexpected`: typed codes to look at."""

    anomalies: tuple[Anomaly, ...]
    counts: dict[Kind, int]
    outcomes: dict[str, int]
    unexpected: dict[str, int]
    seed: int | None
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.counts

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(self.counts)

    def __str__(self) -> str:
        lines = [f"{sum(self.outcomes.values())} operations judged in {self.seconds:.1f} s"]
        lines += [f"  {count:>8}  {outcome}" for outcome, count in sorted(self.outcomes.items())]
        if self.unexpected:
            lines.append("typed answers that were not expected (no anomaly, but look at them):")
            lines += [f"  {count:>8}  {code}" for code, count in sorted(self.unexpected.items())]
        if self.ok:
            return "\n".join([*lines, "no anomaly"])
        seed = "" if self.seed is None else f" (seed {self.seed})"
        lines.append(f"ANOMALIES{seed}:")
        for kind, count in sorted(self.counts.items()):
            lines.append(f"{count} x {kind.value}: {CONTRACT[kind][1]}")
        lines += [str(anomaly) for anomaly in self.anomalies]
        return "\n".join(lines)


def check(history: History, end_state: EndState | None = None, *, kept_max: int = 100) -> Verdict:
    """Judges a history; O(n log n) in events and groups seen.

    Raises RecordInvalid when the record breaks its own rules, for then nothing is decided.
    """

    started = time.perf_counter()
    findings = Findings(kept_max=kept_max)
    known = gather(history, end_state, findings)
    check_receipts(known)
    check_positions(known)
    check_reads(known)
    check_chains(known)
    check_catalog(known)
    check_files(known)
    outcomes, unexpected = _count(history)
    return Verdict(
        anomalies=tuple(findings.kept),
        counts=dict(findings.counts),
        outcomes=outcomes,
        unexpected=unexpected,
        seed=history.seed,
        seconds=time.perf_counter() - started,
    )


def _count(history: History) -> tuple[dict[str, int], dict[str, int]]:
    outcomes: Counter[str] = Counter()
    unexpected: Counter[str] = Counter()
    for operated in history.operations:
        kind = type(operated.operation).__name__.lower()
        end = operated.end
        if isinstance(end, Ok):
            outcomes[f"{kind} ok"] += 1
        elif isinstance(end, Fail):
            outcomes[f"{kind} fail {end.code}"] += 1
            if end.code not in EXPECTED_CODES[kind]:
                unexpected[f"{kind} {end.code}"] += 1
        else:
            outcomes[f"{kind} unknown"] += 1
    return dict(outcomes), dict(unexpected)
