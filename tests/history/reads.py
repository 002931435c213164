"""Checks of what reads saw: whole requests, of the right ones, as of the right snapshot.

Reads are walked in order of their snapshots. `must` grows on the way: per table, the requests that
every later snapshot has to show, because an earlier one did or because they are known to be
published in one. So a read costs one pass over what it saw, and only a wrong read costs more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from itertools import groupby

from tests.history.anomalies import Kind
from tests.history.record import Groups, Operated, Read, RecordInvalid, Rows
from tests.history.rows import group_of
from tests.history.stories import Knowledge, Story, is_lost, lost_snapshots

_Seen = tuple[Operated, Read, Rows]


def check_reads(known: Knowledge) -> None:
    _ReadCheck(known).run()


class _Shard:
    """The placed requests of one table on one shard, in order; all below `front` are visible."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, Story]] = []
        self.front = 0


class _ReadCheck:
    def __init__(self, known: Knowledge) -> None:
        self.known = known
        self.findings = known.findings
        self.valid: dict[str, Groups] = defaultdict(dict)
        self.seen_at: dict[str, dict[int, int]] = defaultdict(dict)
        self.must: dict[str, set[int]] = defaultdict(set)
        self.loose: set[str] = set()  # tables in which something was seen that `must` does not hold
        self.told: set[tuple[Kind, int, str]] = set()
        self.begins = {story.request: story.begin for story in known.stories.values()}
        self.requests: dict[str, list[int]] = defaultdict(list)
        self.placed: dict[tuple[int, str], _Shard] = defaultdict(_Shard)
        self.waiting: list[tuple[int, Story]] = []
        self.lost = lost_snapshots(known.end_state)
        self.forks = sorted(self.lost, key=lambda fork: fork[1], reverse=True)
        self._index()

    def _index(self) -> None:
        for request in sorted(self.known.stories):
            story = self.known.stories[request]
            tables = _tables(story.attempts[0])
            for attempt in story.attempts[1:]:
                tables = tables | _tables(attempt)
            for table in tables:
                self.requests[table].append(request)
            by = story.snapshot if story.snapshot is not None else story.visible_by
            if by is not None and not story.stays_away and story.place is not None:
                self.waiting.append((by, story))
        self.waiting.sort(key=lambda pair: pair[0], reverse=True)
        for (shard, position), story in sorted(
            self.known.by_place.items(), key=lambda item: item[0]
        ):
            for table, count in story.tables().items():
                if count:
                    self.placed[shard, table].entries.append((position, story))

    def run(self) -> None:
        reads = sorted(self.known.reads, key=lambda seen: (seen[2].snapshot_id, seen[0].begin))
        for snapshot_id, group in groupby(reads, key=lambda seen: seen[2].snapshot_id):
            together = list(group)
            while self.forks and self.forks[-1][1] <= snapshot_id:
                self._leave_line(self.forks.pop()[0])
            while self.waiting and self.waiting[-1][0] <= snapshot_id:
                self._must_show(self.waiting.pop()[1])
            for seen in together:
                self._take(seen)
            for seen in together:
                self._ask(seen, together)

    def _leave_line(self, fork: int) -> None:
        """A new line began at `fork`: what was seen only after it need not be there any more."""

        for table, seen_at in self.seen_at.items():
            for request in [q for q, at in seen_at.items() if at > fork]:
                story = self.known.stories[request]
                del seen_at[request]
                del self.valid[table][request]
                if story.snapshot is None or story.snapshot > fork:
                    self.must[table].discard(request)
                    self.loose.add(table)

    def _must_show(self, story: Story) -> None:
        if story.stays_away or story.successor is not None:
            return
        for table, count in story.tables().items():
            if count:
                self.must[table].add(story.request)

    def _add(self, kind: Kind, story_request: int, table: str, words: str, op: Operated) -> None:
        """Each kind is told once for a request and a table: one loss is one finding."""

        if (kind, story_request, table) not in self.told:
            self.told.add((kind, story_request, table))
            self.findings.add(kind, words, [*self._first(story_request), op])

    def _first(self, request: int) -> list[Operated]:
        story = self.known.stories.get(request)
        return [] if story is None else story.attempts[:1]

    # --- what was seen --------------------------------------------------------------------------

    def _take(self, seen: _Seen) -> None:
        operated, read, rows = seen
        if set(rows.tables) != set(read.tables):
            raise RecordInvalid(f"read {operated.id} answers other tables than it asked for")
        for table, groups in rows.tables.items():
            valid = self.valid[table]
            known = groups.items() <= valid.items()  # the usual case, decided without a loop here
            for request, group in groups.items() if not known else ():
                if valid.get(request) == group:
                    continue
                if self._judge(operated, rows.snapshot_id, table, request, group):
                    valid[request] = group
                    self.seen_at[table].setdefault(request, rows.snapshot_id)
                    self._must_show(self.known.stories[request])
                if request not in self.must[table]:
                    self.loose.add(table)
            self._check_time(operated, table, groups)
            if read.window is not None:
                self._check_window(operated, table, groups, read.window)

    def _check_time(self, operated: Operated, table: str, groups: Groups) -> None:
        assert operated.end is not None
        at = operated.end.at
        latest = max(map(self.begins.__getitem__, groups), default=0)
        if latest <= at:
            return
        for request in groups:
            if self.begins[request] > at:
                words = f"rows of request {request} in {table} were read before it was sent"
                self._add(Kind.FUTURE_READ, request, table, words, operated)

    def _check_window(
        self, operated: Operated, table: str, groups: Groups, window: tuple[int, int]
    ) -> None:
        for request in groups:
            if not window[0] <= request < window[1]:
                words = f"request {request} in {table} lies outside of the window that was asked"
                self._add(Kind.PHANTOM, request, table, words, operated)

    def _judge(
        self, operated: Operated, at: int, table: str, request: int, group: tuple[int, int]
    ) -> bool:
        """True when the group is what some payload of the request may have stored."""

        story = self.known.stories.get(request)
        self.begins.setdefault(request, 0)
        if story is None or not any(_tables(a).get(table) for a in story.attempts):
            words = f"{group[0]} rows of request {request} in {table}, which nobody sent there"
            self._add(Kind.PHANTOM, request, table, words, operated)
            return False
        if story.successor is not None:
            return False  # it was fixed on the way; what it holds now is not known here
        kind = self._misfit(story, table, group)
        if kind is not None:
            words = (
                f"request {request} shows {group[0]} rows in {table} at snapshot {at}, sent were "
                f"{story.tables().get(table, 0)}"
            )
            self._add(kind, request, table, words, operated)
            return False
        if story.quarantined:
            self._add(
                Kind.UNSTABLE_END,
                request,
                table,
                f"request {request} is quarantined, and its rows are in {table} at {at}",
                operated,
            )
            return False
        if story.snapshot is not None and at < story.snapshot and not is_lost(at, self.lost):
            words = (
                f"request {request} was published in {story.snapshot}, and its rows are in "
                f"{table} at {at}"
            )
            self._add(Kind.UNSTABLE_END, request, table, words, operated)
        return True

    def _misfit(self, story: Story, table: str, group: tuple[int, int]) -> Kind | None:
        """None when it fits; remembers which payload it was when no receipt says so."""

        candidates = [story.accepted] if story.accepted is not None else story.maybe
        for payload in candidates:
            count = payload.tables.get(table, 0)
            if count and group == group_of(story.request, table, count, variant=payload.variant):
                story.accepted = payload
                return None
        refused = [a for a in story.attempts if a.operation not in story.maybe]
        for attempt in refused:
            count = _tables(attempt).get(table, 0)
            variant = getattr(attempt.operation, "variant", 0)
            if count and group == group_of(story.request, table, count, variant=variant):
                return Kind.ABORTED_READ
        if not candidates:
            return Kind.ABORTED_READ
        counts = [payload.tables.get(table, 0) for payload in candidates]
        if group[0] > max(counts):
            return Kind.DUPLICATE
        return Kind.DAMAGED_ROWS if group[0] in counts else Kind.TORN_BATCH

    # --- what was missing -----------------------------------------------------------------------

    def _ask(self, seen: _Seen, together: list[_Seen]) -> None:
        operated, read, rows = seen
        missing = False
        for table, groups in rows.tables.items():
            for request in self._missing(read, table, groups):
                missing = True
                self._report_missing(seen, together, table, request)
        if not missing and read.tokens:
            self._ask_tokens(operated, read, rows)

    def _missing(self, read: Read, table: str, groups: Groups) -> list[int]:
        must = self.must[table]
        if read.window is not None:
            return [q for q in self._inside(table, read.window) if q in must and q not in groups]
        extra = sum(q not in must for q in groups) if table in self.loose else 0
        if len(groups) - extra == len(must):
            return []
        return [request for request in must if request not in groups]

    def _inside(self, table: str, window: tuple[int, int]) -> list[int]:
        requests = self.requests[table]
        return requests[bisect_left(requests, window[0]) : bisect_left(requests, window[1])]

    def _report_missing(self, seen: _Seen, together: list[_Seen], table: str, request: int) -> None:
        operated, _, rows = seen
        at = rows.snapshot_id
        others = {t for t, g in rows.tables.items() if request in g}
        witness = next((o for o, _, r in together if request in r.tables.get(table, {})), None)
        first = self.seen_at[table].get(request)
        elsewhere = [t for t, at_ in self.seen_at.items() if request in at_ and t != table]
        if others:
            kind = Kind.TORN_BATCH
            words = f"snapshot {at} shows request {request} in {min(others)} and not in {table}"
        elif witness is not None:
            kind = Kind.CHANGED_HISTORY
            words = f"snapshot {at} shows request {request} in {table} to one read, not to another"
            words += f" ({witness.id})"
        elif first is not None:
            kind = Kind.LOST_WRITE
            words = f"request {request} was in {table} at snapshot {first} and is gone at {at}"
        elif elsewhere:
            kind = Kind.TORN_BATCH
            words = f"request {request} is in {min(elsewhere)}, and not in {table} at {at}"
        else:
            story = self.known.stories[request]
            by = story.snapshot if story.snapshot is not None else story.visible_by
            kind = Kind.LOST_WRITE
            words = f"request {request} is published by snapshot {by}, and not in {table} at {at}"
        self._add(kind, request, table, words, operated)

    # --- what tokens asked for ------------------------------------------------------------------

    def _ask_tokens(self, operated: Operated, read: Read, rows: Rows) -> None:
        wanted: dict[int, int] = {}
        for token in read.tokens:
            for shard, position in token.positions.items():
                wanted[shard] = max(position, wanted.get(shard, 0))
        for table, groups in rows.tables.items():
            for shard, position in wanted.items():
                for story in self._unseen(read, table, shard, position, groups):
                    assert story.place is not None
                    words = (
                        f"a token asks for shard {shard} below {position}, and snapshot "
                        f"{rows.snapshot_id} lacks request {story.request} of position "
                        f"{story.place[1]} in {table}"
                    )
                    self._add(Kind.STALE_READ, story.request, table, words, operated)

    def _unseen(
        self, read: Read, table: str, shard: int, position: int, groups: Groups
    ) -> list[Story]:
        if read.window is not None:
            stories = [self.known.stories[q] for q in self._inside(table, read.window)]
            return [
                story
                for story in stories
                if story.place is not None
                and story.place[0] == shard
                and story.place[1] < position
                and story.tables().get(table)
                and not story.stays_away
                and story.request not in groups
            ]
        placed = self.placed[shard, table]
        entries = placed.entries
        while placed.front < len(entries) and self._is_fine(entries[placed.front][1], table):
            placed.front += 1
        unseen = []
        for place, story in entries[placed.front :]:
            if place >= position:
                break
            if story.request not in groups and not self._is_fine(story, table):
                unseen.append(story)
        return unseen

    def _is_fine(self, story: Story, table: str) -> bool:
        """Shown by every snapshot from here on, or not to be shown, or told already."""

        return (
            story.stays_away
            or story.request in self.must[table]
            or (Kind.STALE_READ, story.request, table) in self.told
        )


def _tables(attempt: Operated) -> dict[str, int]:
    tables: dict[str, int] = getattr(attempt.operation, "tables", {})
    return tables
