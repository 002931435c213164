"""Concurrent writers of one store: processes that each append batch after batch for a window.

Speaks the protocol of `benchmarks.windows`. A window's time runs from the moment all writers are
told to go until the last one's last commit has returned; a commit that is begun before the end
counts.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import windows
from benchmarks.peers.stores import STORES

_POOL_ROWS = 100_000
_NUMBERS = 10**8


def writer(orders: Connection, number: int, order: dict[str, Any]) -> None:
    """One process. Batches of its own seed; request numbers of its own range."""

    kind, rows = STORES[order["store"]], order["rows"]
    store = kind(dsn=order["dsn"], folder=order["folder"], threads=order["threads"])
    store.open()
    pool = max(4, _POOL_ROWS // rows // order["writers"])
    batches = kind.batches(rows=rows, seed=number, pool=pool)
    step = -(-rows // 1_000)
    at = number * _NUMBERS
    end = at + _NUMBERS
    _, _, tried = store.run(range(at, end, step), batches.batch, 0.0)
    orders.send("ready")
    while (seconds := orders.recv()) is not None:
        at += tried * step
        cpu = _cpu()
        until = time.perf_counter() + seconds
        latencies, failures, tried = store.run(range(at, end, step), batches.batch, until)
        orders.send((latencies, failures, time.perf_counter(), _cpu() - cpu))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Writers:
    def __init__(self, order: dict[str, Any]) -> None:
        Path(order["folder"]).mkdir(parents=True, exist_ok=True)
        kind = STORES[order["store"]]
        kind(dsn=order["dsn"], folder=order["folder"], threads=1).create()
        context = multiprocessing.get_context("spawn")
        self._rows = order["rows"]
        self._pipes: list[Connection] = []
        for number in range(order["writers"]):
            ours, theirs = context.Pipe()
            process = context.Process(target=writer, args=(theirs, number, order), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()  # EOFError when a writer died, which ends the program

    def window(self, *, seconds: float) -> dict[str, Any]:
        began = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(seconds)
        found = [pipe.recv() for pipe in self._pipes]
        took = max(ended for _, _, ended, _ in found) - began
        latencies = sorted(ms for one, _, _, _ in found for ms in one)
        failures: Counter[str] = sum((one for _, one, _, _ in found), Counter())
        cpu = sum(one for _, _, _, one in found)
        commits = len(latencies)
        return {
            "requests": commits,
            "rows": commits * self._rows,
            "published_s": round(took, 3),
            "rows_per_s": round(commits * self._rows / took),
            "commits_per_s": round(commits / took, 1),
            "ack_ms_p50": _percentile(latencies, 0.5),
            "ack_ms_p99": _percentile(latencies, 0.99),
            "ack_ms_max": round(latencies[-1], 3) if latencies else None,
            "failures": dict(failures),
            "client_cpu_s": round(cpu, 3),
            "client_cpu_us_per_request": round(cpu * 1e6 / max(commits, 1), 1),
        }

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


def _percentile(ordered: list[float], share: float) -> float:
    if not ordered:
        return 0.0
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3)


def main() -> None:
    writers = Writers(json.loads(sys.stdin.readline()))
    windows.serve_plain(writers.window)
    writers.stop()


if __name__ == "__main__":
    main()
