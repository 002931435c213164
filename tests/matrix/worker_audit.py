"""The auditor of the workers' rows: the shared one over real files, and the folder of the store.

It knows nothing of the faults, and uses nothing of the product: it reads the database and the
objects themselves and compares them with what was accepted.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pyarrow.parquet as pq

from tests.conformance.worker import Place
from tests.matrix.auditor import Books, check_books, check_drained, read_books

#: Objects that live by being named: data files and spilled payloads.
_REFERRED = ("tables/", "bus/")
_COLUMNS = ("id", "$shard", "$position", "$row")


@dataclass(frozen=True, slots=True)
class Audit:
    """`orphans`: objects that no snapshot and no bus entry names; `torn`: temporary files."""

    snapshots: int
    files: tuple[str, ...]
    quarantined: Mapping[Place, asyncpg.Record]
    orphans: frozenset[str]
    torn: frozenset[str]


async def audit(
    dsn: str, root: Path, accepted: Mapping[Place, Sequence[int]], *, drained: bool = True
) -> Audit:
    """Checks the lake against the ids of every accepted entry; returns what it found.

    :param drained: every entry must be terminal by now.
    """

    objects = _objects(root)  # before the books: an intent is older than its object (C6)
    books = await read_books(dsn)
    contents, ids = read_files(root, books)
    check_books(books, contents)
    if drained:
        check_drained(books)
    quarantined = {(row["shard"], row["position"]): row for row in books["quarantined"]}
    assert set(books.entries()) == set(accepted), "an entry nobody sent, or one that was lost"
    assert {place: sorted(found) for place, found in ids.items()} == {
        place: sorted(accepted[place]) for place in books.terminal() if place not in quarantined
    }
    named = {row["object_key"] for row in books["files"]}
    named |= {row["payload_key"] for row in books["log"]}
    torn = {key for key in objects if Path(key).name.startswith(".")}
    orphans = {key for key in objects if key.startswith(_REFERRED)} - named - torn
    intents = {str(row["file_id"]) for row in books["intents"]}
    for key in orphans:
        assert Path(key).stem in intents, f"no write intent tells that {key} is an orphan (E4)"
    return Audit(
        snapshots=len(books["snapshots"]),
        files=tuple(sorted(row["object_key"] for row in books["files"])),
        quarantined=quarantined,
        orphans=frozenset(orphans),
        torn=frozenset(torn),
    )


def read_files(
    root: Path, books: Books
) -> tuple[dict[uuid.UUID, dict[Place, int]], dict[Place, list[int]]]:
    """Rows by entry of each file, and ids by entry, out of the objects that the catalog names:
    each is there, whole, and holds each row once."""

    contents: dict[uuid.UUID, dict[Place, int]] = {}
    ids: dict[Place, list[int]] = {}
    for file in books["files"]:
        path = root / file["object_key"]
        assert path.exists(), f"a snapshot names a missing object: {file['object_key']}"
        data = path.read_bytes()
        assert len(data) == file["size_bytes"], f"{path.name} is torn"
        assert hashlib.sha256(data).hexdigest() == file["sha256"], f"{path.name} is damaged"
        table = pq.read_table(io.BytesIO(data))
        rows = contents.setdefault(file["file_id"], {})
        seen: set[tuple[Place, int]] = set()
        columns = [table[name].to_pylist() for name in _COLUMNS]
        for row_id, shard, position, row in zip(*columns, strict=True):
            place = (shard, position)
            assert (place, row) not in seen, f"row {row} of {place} is there twice"
            seen.add((place, row))
            rows[place] = rows.get(place, 0) + 1
            ids.setdefault(place, []).append(row_id)
    return contents, ids


def _objects(root: Path) -> set[str]:
    """The keys of all objects; hidden names are unfinished ones."""

    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in found}
