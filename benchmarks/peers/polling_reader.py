"""DuckLake: from the start of a write of 100 rows until a polling reader has seen them.

Writer and reader are two DuckDB instances, each attached to the lake, in two threads of one
process. The reader asks the question that a client of ours asks by token, again and again without
a pause. Speaks the protocol of `benchmarks.windows`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import windows
from benchmarks.peers import lake
from benchmarks.peers.batches import ArrowBatches, first_event
from benchmarks.peers.stores import DuckLake

_GIVE_UP_S = 30.0


class PollingReader:
    def __init__(self, order: dict[str, Any]) -> None:
        Path(order["folder"]).mkdir(parents=True, exist_ok=True)
        self._rows = order["rows"]
        self._store = DuckLake(dsn=order["dsn"], folder=order["folder"], threads=1)
        self._store.create()
        self._store.open()
        self._reader = lake.connect(order["dsn"], str(Path(order["folder"]) / "data"), threads=1)
        self._batches = ArrowBatches(rows=self._rows, seed=7, pool=100)
        self._number = 0
        self._once()

    def window(self, *, requests: int) -> dict[str, Any]:
        found = [self._once() for _ in range(requests)]
        visible = sorted(total for total, _ in found)
        writes = sorted(write for _, write in found)
        return {
            "requests": requests,
            "visible_ms_p50": _percentile(visible, 0.5),
            "visible_ms_p99": _percentile(visible, 0.99),
            "ack_ms_p50": _percentile(writes, 0.5),
            "ack_ms_p99": _percentile(writes, 0.99),
        }

    def _once(self) -> tuple[float, float]:
        """ms until seen, ms of the write call."""

        first = first_event(self._number)
        batch = self._batches.batch(self._number)
        self._number += 1
        seen: list[float] = []
        began_reading = threading.Event()
        reader = threading.Thread(target=self._poll, args=(first, seen, began_reading))
        reader.start()
        began_reading.wait()
        began = time.perf_counter()
        self._store.append(batch)
        written = time.perf_counter()
        reader.join(_GIVE_UP_S)
        if not seen:
            raise RuntimeError("the reader did not see a write")
        return (seen[0] - began) * 1000, (written - began) * 1000

    def _poll(self, first: int, seen: list[float], began: threading.Event) -> None:
        question = f"SELECT count(*), max(event_id) FROM lake.t WHERE event_id >= {first}"
        end = time.perf_counter() + _GIVE_UP_S
        began.set()
        while time.perf_counter() < end:
            [(count, _)] = self._reader.execute(question).fetchall()
            if count == self._rows:
                seen.append(time.perf_counter())
                return


def _percentile(ordered: list[float], share: float) -> float:
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3)


if __name__ == "__main__":
    windows.serve_plain(PollingReader(json.loads(sys.stdin.readline())).window)
