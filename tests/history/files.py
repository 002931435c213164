"""Checks of data files: each publication's files hold its ranges' rows, each read the files' rows.

Only publications of entries are compared; what maintenance publishes has its own checks (E1).

Files that collection has removed are in the catalog no more. Then the summaries of snapshots stand
in for them, and what is missing must be exactly what collection has on record. Without collection
nothing may be missing, and files alone are looked at.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import accumulate

from tests.history.anomalies import Kind
from tests.history.end_state import EndState
from tests.history.stories import Knowledge

#: What these kinds found explains a wrong number of rows, so it is not told again.
EXPLAINED_BY = (
    Kind.ABORTED_READ,
    Kind.CHANGED_HISTORY,
    Kind.DANGLING_FILE,
    Kind.DUPLICATE,
    Kind.LOST_WRITE,
    Kind.PHANTOM,
    Kind.TORN_BATCH,
    Kind.UNSTABLE_END,
)


def check_files(known: Knowledge) -> None:
    end_state = known.end_state
    if end_state is None:
        return
    _check_references(known, end_state)
    if end_state.collected:
        _check_collected(known, end_state)
    if not end_state.purged:
        _check_publications(known, end_state)
    if known.history.closed and not any(known.findings.counts[kind] for kind in EXPLAINED_BY):
        _check_totals(known, end_state)


def _check_references(known: Knowledge, end_state: EndState) -> None:
    snapshots = {fact.snapshot_id for fact in end_state.snapshots}
    for file in end_state.files:
        gone = None
        if file.present is False:
            gone = "is not in the store"
        elif file.first_snapshot not in snapshots:
            gone = "is of no snapshot"
        if gone is not None:
            known.findings.add(
                Kind.DANGLING_FILE,
                f"file {file.file_id} of {file.table}, snapshot {file.first_snapshot}, {gone}",
            )


def _check_collected(known: Knowledge, end_state: EndState) -> None:
    """Every file that was ever published is in the catalog, or on record as collected."""

    missing: Counter[str] = Counter()
    for fact in end_state.snapshots:
        missing.update(fact.files_added)
    missing.subtract(Counter(file.table for file in end_state.files))
    for table in sorted(missing.keys() | end_state.collected.keys()):
        collected = end_state.collected.get(table, 0)
        if missing[table] != collected:
            known.findings.add(
                Kind.DANGLING_FILE,
                f"{missing[table]} published files of {table} are not in the catalog, and "
                f"{collected} were collected",
            )


class _Publication:
    """Rows by table, as files hold them and as the requests in the ranges sent them. `total` are
    the rows of its entries, None when an entry is not known; `known` is False when some entry has
    no recorded receipt, so that its rows cannot be told by table."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.files: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.total: int | None = 0
        self.known = True


def _check_publications(known: Knowledge, end_state: EndState) -> None:
    publications: dict[int, _Publication] = defaultdict(_Publication)
    for file in end_state.files:
        publications[file.first_snapshot].held[file.table] += file.rows
        publications[file.first_snapshot].files[file.table] += 1
    _take_ranges(known, end_state, publications)
    for fact in end_state.snapshots:
        publication = publications.get(fact.snapshot_id)
        if publication is None or fact.operation != "append":
            continue
        held, sent = publication.held, publication.sent
        for table, files in fact.files_added.items():
            if table in end_state.collected and publication.files[table] < files:
                held[table] = fact.rows_added[table]
        if publication.known:
            for table in sorted(held.keys() | sent.keys()):
                if held[table] != sent[table]:
                    _tell(known, fact.snapshot_id, f" of {table}", held[table], sent[table])
        elif publication.total is not None and held.total() != publication.total:
            _tell(known, fact.snapshot_id, "", held.total(), publication.total)


def _take_ranges(
    known: Knowledge, end_state: EndState, publications: dict[int, _Publication]
) -> None:
    entries = {(entry.shard, entry.position): entry for entry in end_state.entries}
    for row in end_state.ranges:
        publication = publications[row.snapshot_id]
        for position in range(row.lo, row.hi):
            place = (row.shard, position)
            if place in known.quarantined:
                continue
            story = known.by_place.get(place)
            entry = entries.get(place)
            if story is not None:
                publication.sent.update(story.tables())
            else:
                publication.known = False
            if entry is None and story is None:
                publication.total = None
            elif publication.total is not None:
                rows = entry.rows if entry is not None else 0
                if story is not None:
                    rows = sum(story.tables().values())
                publication.total += rows


def _tell(known: Knowledge, snapshot_id: int, which: str, held: int, sent: int) -> None:
    known.findings.add(
        Kind.DANGLING_FILE,
        f"the files{which} in snapshot {snapshot_id} hold {held} rows, its ranges {sent}",
    )


def _check_totals(known: Knowledge, end_state: EndState) -> None:
    """A read of whole tables sees as many rows as their files at its snapshot hold."""

    changes: dict[str, Counter[int]] = defaultdict(Counter)
    for file in end_state.files:
        changes[file.table][file.first_snapshot] += file.rows
        if file.last_snapshot is not None:
            changes[file.table][file.last_snapshot] -= file.rows
    snapshots = sorted(fact.snapshot_id for fact in end_state.snapshots)
    rows_at = {
        table: dict(zip(snapshots, accumulate(change[s] for s in snapshots), strict=True))
        for table, change in changes.items()
    }
    gone = {fact.snapshot_id for fact in end_state.snapshots if fact.expired}
    told_at = _told_at(end_state) if end_state.collected else {}
    for operated, read, rows in known.reads:
        if read.window is not None:
            continue
        for table, groups in rows.tables.items():
            seen = sum(count for count, _ in groups.values())
            told = told_at.get(table, {}).get(rows.snapshot_id)
            if told is not None and told != seen:
                known.findings.add(
                    Kind.LOST_WRITE if seen < told else Kind.PHANTOM,
                    f"{table} has {told} rows at snapshot {rows.snapshot_id} by the sums of all "
                    f"publications, a read saw {seen}",
                    [operated],
                )
            held = rows_at.get(table, {}).get(rows.snapshot_id)
            if end_state.collected and rows.snapshot_id in gone:
                continue  # its files may have been collected
            if held is not None and held != seen:
                known.findings.add(
                    Kind.LOST_WRITE if seen < held else Kind.PHANTOM,
                    f"the files of {table} at snapshot {rows.snapshot_id} hold {held} rows, a "
                    f"read saw {seen}",
                    [operated],
                )


def _told_at(end_state: EndState) -> dict[str, dict[int, int]]:
    """Table → snapshot → its rows, by what each publication says it added and removed."""

    running: Counter[str] = Counter()
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for fact in sorted(end_state.snapshots, key=lambda fact: fact.snapshot_id):
        running.update(fact.rows_added)
        running.subtract(fact.rows_removed)
        for table, rows in running.items():
            found[table][fact.snapshot_id] = rows
    return found
