"""What must be true of a lake's database whatever happened to it, read from the tables themselves.

It uses nothing of the product but the table names: positions dense and each published once, every
range of the bus in exactly one hand, every snapshot's files the rows of its ranges, watermarks the
longest terminal prefix and never falling, no live entry without its bytes, keys and entries one to
one.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import asyncpg

from tests.conformance.worker import Place

#: Contents of the stand-in files: rows of every (shard, position) by file id.
Contents = Mapping[uuid.UUID, Mapping[Place, int]]

_BOOKS = {
    "head": "SELECT * FROM lake",
    "snapshots": "SELECT * FROM snapshot ORDER BY snapshot_id",
    "files": "SELECT * FROM data_file",
    "intents": "SELECT file_id FROM write_intent",
    "shards": "SELECT * FROM bus_shard JOIN bus_claim USING (shard) JOIN bus_done USING (shard)"
    " ORDER BY shard",
    "log": "SELECT l.*, s.segment_id IS NOT NULL AS has_bytes FROM bus_log l"
    " LEFT JOIN bus_segment s USING (segment_id) ORDER BY shard, lo",
    "leases": "SELECT * FROM bus_lease ORDER BY shard, lo",
    "ranges": "SELECT * FROM published_range ORDER BY shard, lo",
    "quarantined": "SELECT * FROM bus_quarantine WHERE kind = 'entry'",
    "keys": "SELECT i.key_hash, l.shard, l.lo + array_position(l.ordinals, i.ordinal) - 1"
    " AS position FROM idem i LEFT JOIN bus_log l USING (segment_id)",
}


@dataclass(frozen=True, slots=True)
class Books:
    """One consistent look at the control plane."""

    rows: Mapping[str, list[asyncpg.Record]]

    def __getitem__(self, name: str) -> list[asyncpg.Record]:
        return self.rows[name]

    @property
    def shards(self) -> list[int]:
        return [row["shard"] for row in self["shards"]]

    def terminal(self) -> dict[Place, int]:
        """The snapshot that made each position terminal."""
        return {
            (row["shard"], position): row["snapshot_id"]
            for row in self["ranges"]
            for position in range(row["lo"], row["hi"])
        }

    def entries(self) -> dict[Place, tuple[asyncpg.Record, int]]:
        """Each position's log row, and its place in the row's arrays."""
        return {
            (row["shard"], row["lo"] + n): (row, n)
            for row in self["log"]
            for n in range(row["hi"] - row["lo"])
        }


async def read_books(dsn: str) -> Books:
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "lakebus"})
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return Books({name: await connection.fetch(sql) for name, sql in _BOOKS.items()})
    finally:
        connection.terminate()


async def read_everything(dsn: str) -> dict[str, list[str]]:
    """Every row of every table of the lake as text, to compare before and after."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "lakebus"})
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            names = await connection.fetch(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'lakebus'"
                " AND tablename <> 'failpoint' ORDER BY 1"
            )
            return {
                name: [row[0] for row in await connection.fetch(f"SELECT t::text FROM {name} t")]
                for (name,) in names
            }
    finally:
        connection.terminate()


def check_books(books: Books, contents: Contents) -> None:
    """All that must hold at every moment, whether entries wait or not."""
    _positions_are_dense(books)
    _ranges_are_in_one_hand(books)
    _live_entries_have_their_bytes(books)
    _snapshots_form_one_line(books)
    _watermarks_are_terminal_prefixes(books)
    _files_are_their_ranges(books, contents)
    _keys_and_entries_are_one_to_one(books)
    _backlog_is_counted(books)


def check_drained(books: Books) -> None:
    """Nothing waits: every position is terminal and every watermark at its end."""
    assert not books["leases"], "a range is still leased or waits"
    ends = {(row["shard"], n) for row in books["shards"] for n in range(row["next_append"])}
    assert set(books.terminal()) == ends, "an accepted entry is not terminal"
    head = books["head"][0]["watermark"]
    assert head == [row["next_append"] for row in books["shards"]], "a watermark is behind"


def _positions_are_dense(books: Books) -> None:
    for shard in books["shards"]:
        end = None
        for row in books["log"]:
            if row["shard"] == shard["shard"]:
                assert end is None or row["lo"] == end, f"positions skip at {dict(row)}"
                assert row["hi"] > row["lo"], "an empty group"
                end = row["hi"]
                count = row["hi"] - row["lo"]
                assert count == len(row["ordinals"]) == len(row["entry_bytes"]), "a torn group"
        assert end is None or end == shard["next_append"], "the counter is not the end of the log"


def _ranges_are_in_one_hand(books: Books) -> None:
    """[0, next_append) is published, leased or waiting, or not claimed yet: one of them, once."""
    held: Counter[Place] = Counter()
    for row in (*books["ranges"], *books["leases"]):
        held.update((row["shard"], n) for n in range(row["lo"], row["hi"]))
    for shard in books["shards"]:
        assert shard["next_claim"] <= shard["next_append"], "claimed beyond the end"
        unclaimed = range(shard["next_claim"], shard["next_append"])
        held.update((shard["shard"], n) for n in unclaimed)
    twice = [place for place, times in held.items() if times > 1]
    assert not twice, f"in two hands at once, or published twice: {twice}"
    whole = {(row["shard"], n) for row in books["shards"] for n in range(row["next_append"])}
    assert set(held) == whole, f"in nobody's hands: {whole - set(held)}"


def _live_entries_have_their_bytes(books: Books) -> None:
    entries, terminal = books.entries(), books.terminal()
    for shard in books["shards"]:
        for n in range(shard["next_append"]):
            place = (shard["shard"], n)
            if place not in terminal:
                assert place in entries, f"the log lost the live entry {place}"
                row, _ = entries[place]
                assert row["has_bytes"] or row["payload_key"], f"the bytes of {place} are gone"


def _snapshots_form_one_line(books: Books) -> None:
    snapshots, head = books["snapshots"], books["head"][0]
    ids = [row["snapshot_id"] for row in snapshots]
    assert ids == list(range(1, len(ids) + 1)), f"snapshots skip: {ids}"
    parents = [row["parent_id"] for row in snapshots]
    assert parents == [None, *ids[:-1]], f"snapshots do not follow their parents: {parents}"
    times = [row["published_at"] for row in snapshots]
    assert all(a < b for a, b in pairwise(times)), "times do not increase"
    newest = snapshots[-1]
    for name in ("snapshot_id", "published_at", "watermark"):
        assert head[name] == newest[name], f"the head's {name} is not its snapshot's"
    assert head["publish_count"] == len(snapshots), "publishes are not counted"
    appends = {row["snapshot_id"] for row in snapshots if row["operation"] == "append"}
    published = {row["snapshot_id"] for row in books["ranges"]}
    assert published == appends, f"a publish came in parts: {published ^ appends}"


def _watermarks_are_terminal_prefixes(books: Books) -> None:
    by_snapshot: dict[int, list[asyncpg.Record]] = {}
    for row in books["ranges"]:
        by_snapshot.setdefault(row["snapshot_id"], []).append(row)
    ends: dict[Place, int] = {}
    mark = dict.fromkeys(books.shards, 0)
    for snapshot in books["snapshots"]:
        for row in by_snapshot.get(snapshot["snapshot_id"], []):
            ends[row["shard"], row["lo"]] = row["hi"]
        for shard, reached in mark.items():
            while (shard, reached) in ends:
                reached = ends[shard, reached]
            mark[shard] = reached
        words = f"the watermark of {snapshot['snapshot_id']} is not the terminal prefix {mark}"
        assert dict(enumerate(snapshot["watermark"])) == mark, words


def _files_are_their_ranges(books: Books, contents: Contents) -> None:
    """What a snapshot adds is exactly the rows of the ranges that it made terminal."""
    entries, terminal = books.entries(), books.terminal()
    set_aside = Counter((row["shard"], row["position"]) for row in books["quarantined"])
    assert all(times == 1 for times in set_aside.values()), "quarantined twice"
    assert set(set_aside) <= set(terminal), "quarantined and not terminal"
    assert not {row["file_id"] for row in books["files"]} & {
        row["file_id"] for row in books["intents"]
    }, "a published file still has its write intent"
    found: Counter[Place] = Counter()
    seen: set[tuple[int, Place]] = set()
    for file in books["files"]:
        assert file["file_id"] in contents, "a snapshot names a file that nobody wrote"
        rows = contents[file["file_id"]]
        assert file["rows"] == sum(rows.values()), "a file has other rows than recorded"
        for place, count in rows.items():
            assert (file["table_id"], place) not in seen, f"{place} was published twice"
            seen.add((file["table_id"], place))
            assert terminal.get(place) == file["first_snapshot"], f"{place} is in another snapshot"
            found[place] += count
    for place in terminal:
        if place in entries:
            row, n = entries[place]
            wanted = 0 if place in set_aside else row["row_counts"][n]
            assert found[place] == wanted, f"{place} has {found[place]} rows, not {wanted}"


def _keys_and_entries_are_one_to_one(books: Books) -> None:
    places = Counter((row["shard"], row["position"]) for row in books["keys"])
    assert (None, None) not in places, "a key names no entry"
    assert all(times == 1 for times in places.values()), "two keys name one entry"
    hashes = Counter(bytes(row["key_hash"]) for row in books["keys"])
    assert all(times == 1 for times in hashes.values()), "a key is in two generations"


def _backlog_is_counted(books: Books) -> None:
    entries, terminal = books.entries(), books.terminal()
    if any(place not in entries for place in terminal):
        return  # the log was trimmed, so what its entries weighed is not known any more
    for shard in books["shards"]:
        mine = {
            place: int(row["entry_bytes"][n])
            for place, (row, n) in entries.items()
            if place[0] == shard["shard"]
        }
        assert shard["appended_bytes"] == sum(mine.values()), "appended bytes are not counted"
        done = sum(mine[p] for p in mine if p in terminal)
        assert shard["terminal_bytes"] == done, "terminal bytes are not counted"


def difference(before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> list[str]:
    """The tables whose rows are not the same, for the words of a failure."""
    names = before.keys() | after.keys()
    return sorted(n for n in names if sorted(before.get(n, [])) != sorted(after.get(n, [])))
