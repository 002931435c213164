"""What a soak looks at every few seconds: files, snapshots, condemned files, bytes in the store.

Asked of the database by its superuser and of the folder of objects; a look that a fault prevents is
left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.chaos.database import AWAY, Superuser

_EIGHT_MIB = 8 * 1024 * 1024
_FILES = """SELECT t.name, count(*) AS live, count(*) FILTER (WHERE f.size_bytes < $1) AS small,
       count(*) FILTER (WHERE f.size_bytes < $2) AS below_8_mib, sum(f.rows)::bigint AS rows,
       sum(f.size_bytes)::bigint AS bytes, count(DISTINCT f.partition) AS partitions
  FROM lakebus.data_file f JOIN lakebus.lake_table t USING (table_id)
 WHERE f.last_snapshot IS NULL GROUP BY t.name"""
_LAKE = """SELECT (SELECT count(*) FROM lakebus.snapshot WHERE expired_at IS NULL) AS retained,
       (SELECT max(snapshot_id) FROM lakebus.snapshot) AS head,
       (SELECT count(*) FROM lakebus.data_file) AS data_files,
       (SELECT count(*) FROM lakebus.condemned_file WHERE state = 'condemned') AS condemned,
       (SELECT count(*) FROM lakebus.condemned_file WHERE state = 'deleted') AS deleted,
       (SELECT count(*) FROM lakebus.pin) AS pins, (SELECT count(*) FROM lakebus.tag) AS tags,
       (SELECT count(*) FROM lakebus.write_intent) AS intents"""


@dataclass(frozen=True, slots=True)
class Sample:
    """`tables`: name → live, small, below_8_mib, rows, bytes, partitions. `stored`: objects and
    bytes in the store, when they were looked at."""

    at_s: float
    tables: Mapping[str, Mapping[str, int]]
    lake: Mapping[str, int]
    stored: tuple[int, int] | None = None


@dataclass(slots=True)
class Sampler:
    superuser: Superuser
    objects: Path
    small_bytes: int
    began_s: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    async def collect(self, *, every_s: float = 4.0) -> None:
        """Looks again and again until cancelled."""
        while True:
            with contextlib.suppress(*AWAY, ValueError, KeyError):
                self.samples.append(await self.look(store=len(self.samples) % 4 == 0))
            await asyncio.sleep(every_s)

    async def look(self, *, store: bool = True) -> Sample:
        files = await self.superuser.rows(_FILES, self.small_bytes, _EIGHT_MIB)
        (lake,) = await self.superuser.rows(_LAKE)
        stored = await asyncio.to_thread(stored_in, self.objects) if store else None
        return Sample(
            round(time.monotonic() - self.began_s, 1),
            {row["name"]: {k: v for k, v in row.items() if k != "name"} for row in files},
            lake,
            stored,
        )

    def told(self) -> dict[str, Any]:
        """Per table the most, and what there was at the end; the same of the lake."""
        if not self.samples:
            return {}
        last = self.samples[-1]
        tables = {
            name: {
                "live_max": self._most(name, "live"),
                "small_max": self._most(name, "small"),
                "small_typical_first": self._typical(name, 0),
                "small_typical_last": self._typical(name, 2),
                **{f"{what}_at_end": value for what, value in numbers.items()},
            }
            for name, numbers in sorted(last.tables.items())
        }
        lake = {name: max(one.lake[name] for one in self.samples) for name in last.lake}
        stored = [one.stored for one in self.samples if one.stored is not None]
        return {
            "samples": len(self.samples),
            "tables": tables,
            "lake_max": lake,
            "lake_at_end": dict(last.lake),
            "objects_max": max((n for n, _ in stored), default=0),
            "objects_at_end": stored[-1][0] if stored else 0,
            "stored_bytes_max": max((size for _, size in stored), default=0),
            "stored_bytes_at_end": stored[-1][1] if stored else 0,
        }

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(sample) for sample in self.samples]

    def _typical(self, table: str, third: int) -> int:
        """The median number of small files in a third of the run."""
        size = max(1, len(self.samples) // 3)
        part = self.samples[third * size : (third + 1) * size] or self.samples
        return round(median(one.tables.get(table, {}).get("small", 0) for one in part))

    def _most(self, table: str, what: str) -> int:
        return max(one.tables.get(table, {}).get(what, 0) for one in self.samples)


def stored_in(folder: Path) -> tuple[int, int]:
    """Objects below a folder, and their bytes."""
    count = size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if not name.startswith("."):
                with contextlib.suppress(OSError):  # deleted in this moment
                    size += os.stat(os.path.join(parent, name)).st_size
                    count += 1
    return count, size
