"""`python -m benchmarks.compaction [--quick]`: the rewrite of many files into few, and what a query
gains by it.

Each contender compacts the same files in a process of its own, one after another in each
repetition, so that a drift of the machine meets all of them. MB are 10^6 bytes of our input files,
for peers too, whatever size their own files have. `--peers PYTHON` names the interpreter of an
environment made from `requirements/peers.txt`; peers get the same rows (our hidden columns among
them, as plain ones), one commit a file, and only their merge is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from benchmarks import machine
from benchmarks.compaction_data import table, write_files
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.files.parquet import scan_expression
from storage.files.pruning import prune, table_predicates
from storage.maintenance.rewrite import rewrite
from storage.maintenance.rewriting import RewriteInput, RewriteRequest

MIB = 1024 * 1024
QUERIES = {
    "point": "select * from telemetry where event_id = {event_id}",
    "range": "select count(*), sum(value) from telemetry where event_id between {low} and {high}",
    "device": "select count(*), max(amount) from telemetry where device = {device}",
    "whole": "select region, avg(value) from telemetry group by region",
}


@dataclass(frozen=True, slots=True)
class Task:
    schema: TableSchema
    inputs: tuple[RewriteInput, ...]
    folder: Path
    threads: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Compacted:
    files: tuple[DataFile, ...]
    paths: tuple[Path, ...]
    notes: dict[str, Any]


def lakebus_rewrite(task: Task) -> Compacted:
    """Every row verified: read, summed, written in order, read back and summed again."""

    found = rewrite(
        RewriteRequest(
            schema=task.schema,
            inputs=task.inputs,
            target_file_bytes=128 * MIB,
            memory_bytes=task.memory_bytes,
            threads=task.threads,
            temp_dir=task.folder,
        )
    )
    files = tuple(
        DataFile(
            uuid.UUID(int=number),
            task.schema.table_id,
            task.schema.version,
            file.path.name,
            file.rows,
            file.size_bytes,
            file.sha256,
            file.statistics,
        )
        for number, file in enumerate(found.files)
    )
    notes = {**found.notes, "spilled_mb": round(found.spilled_bytes / 1e6, 1)}
    return Compacted(files, tuple(file.path for file in found.files), notes)


def duckdb_copy(task: Task) -> Compacted:
    """DuckDB's own COPY in the same order, unverified, with its own encodings and no statistics."""

    out = task.folder / "copy.parquet"
    with duckdb.connect(
        config={
            "threads": task.threads,
            "memory_limit": f"{task.memory_bytes}B",
            "temp_directory": str(task.folder / "spill"),
        }
    ) as connection:
        connection.execute("SET enable_progress_bar = false").fetchall()
        relation = scan_expression(task.schema, [str(one.path) for one in task.inputs], hidden=True)
        order = f" ORDER BY {', '.join(task.schema.sort_by)}" if task.schema.sort_by else ""
        connection.execute(
            f"COPY (FROM {relation}{order}) TO '{out}' "
            "(FORMAT parquet, COMPRESSION zstd, FILE_SIZE_BYTES '128MiB')"
        ).fetchall()
    paths = sorted(out.iterdir()) if out.is_dir() else [out]
    return Compacted((), tuple(paths), {})


CONTENDERS: dict[str, Callable[[Task], Compacted]] = {
    "lakebus rewrite": lakebus_rewrite,
    "DuckDB COPY (unverified)": duckdb_copy,
}


PEERS = {"ducklake": "DuckLake merge_adjacent_files", "delta": "delta-rs optimize.compact"}
_PEER_PROGRAM = Path(__file__).parent / "peers" / "compaction.py"


def peer_measured(
    python: str, peer: str, inputs: Path, work: Path, threads: int, megabytes: float
) -> dict[str, Any]:
    """The peer loads the files anew in each run: what it merged once is merged."""

    command = [python, str(_PEER_PROGRAM), peer, str(inputs), str(work), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(work)
    found = json.loads(done.stdout)
    return {
        "engine": found["engine"],
        "seconds": round(found["seconds"], 2),
        "cpu_seconds": round(found["cpu_seconds"], 2),
        "mb_per_s": round(megabytes / found["seconds"], 1),
        "peak_rss_mib": found["peak_rss_mib"],
        "files_out": found["files_out"],
        "mb_out": round(found["bytes_out"] / 1e6, 1),
        "rows": found["rows"],
    }


def measured(name: str, task: Task) -> tuple[Compacted, dict[str, Any]]:
    """Runs in a process of its own."""

    started, cpu = time.perf_counter(), time.process_time()
    found = CONTENDERS[name](task)
    seconds = time.perf_counter() - started
    megabytes = sum(one.file.size_bytes for one in task.inputs) / 1e6
    return found, {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "mb_per_s": round(megabytes / seconds, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "files_out": len(found.paths),
        "mb_out": round(sum(path.stat().st_size for path in found.paths) / 1e6, 1),
        **found.notes,
    }


def compare(
    folder: Path, schema: TableSchema, inputs: tuple[RewriteInput, ...], options: Any
) -> tuple[dict[str, Any], Compacted]:
    """Figures by contender and threads, and our files of the last repetition."""

    figures: dict[str, list[dict[str, Any]]] = {}
    ours: Compacted | None = None
    for repetition in range(options.repetitions):
        for threads in options.threads:
            for name in CONTENDERS:
                place = folder / f"{repetition}-{threads}-{len(figures)}-{name.split()[0]}"
                place.mkdir()
                task = Task(schema, inputs, place, threads, options.memory_mib * MIB)
                context = multiprocessing.get_context("spawn")
                with context.Pool(1, maxtasksperchild=1) as pool:
                    found, figure = pool.apply(measured, (name, task))
                figures.setdefault(f"{name}, {threads} threads", []).append(figure)
                if name == "lakebus rewrite":
                    if ours is not None:
                        shutil.rmtree(ours.paths[0].parent)
                    ours = found
                else:
                    shutil.rmtree(place)
            for peer, name in PEERS.items() if options.peers else ():
                megabytes = sum(one.file.size_bytes for one in inputs) / 1e6
                work = folder / f"{repetition}-{threads}-{peer}"
                figure = peer_measured(
                    options.peers, peer, inputs[0].path.parent, work, threads, megabytes
                )
                figures.setdefault(f"{name}, {threads} threads", []).append(figure)
    assert ours is not None
    return {name: _median(runs) for name, runs in figures.items()}, ours


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle, with the extremes of its speed."""

    ordered = sorted(runs, key=lambda run: run["mb_per_s"])
    speeds = [run["mb_per_s"] for run in ordered]
    return {
        **ordered[len(ordered) // 2],
        "repetitions": len(runs),
        "mb_per_s_spread": [speeds[0], speeds[-1]],
    }


@dataclass(frozen=True, slots=True)
class Layout:
    """Files that hold the table."""

    files: Sequence[DataFile]
    paths: Sequence[Path]


def query_times_ms(
    schema: TableSchema, layouts: dict[str, Layout], *, threads: int, repeats: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Times of each query over each layout, in turns, as a replica runs it: files pruned by the
    catalog's statistics, then DuckDB with footers kept. `cold_ms`: the first, which reads the
    footers; it is in no other figure."""

    found: dict[str, dict[str, dict[str, Any]]] = {}
    rows = sum(file.rows for file in next(iter(layouts.values())).files)
    with ExitStack() as stack:
        connections = {
            name: stack.enter_context(duckdb.connect(config={"threads": threads}))
            for name in layouts
        }
        for connection in connections.values():
            connection.execute("SET enable_progress_bar = false").fetchall()
            connection.execute("SET parquet_metadata_cache = true").fetchall()
        for query, text in QUERIES.items():
            taken: dict[str, list[float]] = {name: [] for name in layouts}
            kept: dict[str, int] = dict.fromkeys(layouts, 0)
            for number in range(repeats + 1):
                middle = rows * 4 * (number + 1) // (repeats + 2)
                sql = text.format(
                    event_id=middle, low=middle, high=middle + rows // 25, device=number * 37
                )
                for name, layout in layouts.items():
                    ms, files = _asked(schema, connections[name], layout, sql)
                    taken[name].append(ms)
                    kept[name] = max(kept[name], files)
            for name, times in taken.items():
                found.setdefault(name, {})[query] = {
                    "p50_ms": round(statistics.median(times[1:]), 2),
                    "quartiles_ms": [
                        round(one, 2) for one in statistics.quantiles(times[1:], n=4)[::2]
                    ],
                    "cold_ms": round(times[0], 2),
                    "files_read_max": kept[name],
                }
    return found


def _asked(
    schema: TableSchema, connection: duckdb.DuckDBPyConnection, layout: Layout, sql: str
) -> tuple[float, int]:
    """Milliseconds, and how many files were read."""

    path_of = {
        file.file_id: str(path) for file, path in zip(layout.files, layout.paths, strict=True)
    }
    started = time.perf_counter()
    tree = json.loads(connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0])
    predicates = table_predicates(tree, [], {schema.name: schema})
    kept = prune(list(layout.files), predicates[schema.name])
    relation = scan_expression(schema, [path_of[file.file_id] for file in kept])
    connection.execute(f"WITH telemetry AS (FROM {relation}) {sql}").fetchall()
    return (time.perf_counter() - started) * 1000, len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compaction", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, once")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--query-repetitions", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--sort-by", default="")
    parser.add_argument("--small-only", action="store_true", help="only the 2,000 small files")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peers' environment")
    options = parser.parse_args()
    share = 10 if options.quick else 1
    if options.quick:
        options.repetitions, options.query_repetitions = 1, 5
    schema = table(sort_by=(options.sort_by,) if options.sort_by else ())
    found: dict[str, Any] = {"machine": machine.describe(), "sort_by": options.sort_by}
    found["memory_limit_mib"] = options.memory_mib
    with tempfile.TemporaryDirectory(prefix="lakebus-compaction-") as scratch:
        for name, files, rows in (
            ("many small files", 2_000, 1_000 // share),
            ("64 files of 13 MB", 64, 440_000 // share),
        )[: 1 if options.small_only else 2]:
            folder = Path(scratch) / name.replace(" ", "-")
            inputs = write_files(folder / "inputs", schema, files=files, rows_per_file=rows)
            figures, ours = compare(folder, schema, inputs, options)
            found[name] = {
                "files_in": files,
                "rows_in": files * rows,
                "mb_in": round(sum(one.file.size_bytes for one in inputs) / 1e6, 1),
                "rewrite": figures,
            }
            layouts = {
                "before": Layout([one.file for one in inputs], [one.path for one in inputs]),
                "after": Layout(ours.files, ours.paths),
            }
            for threads in options.threads:
                found[name][f"query, {threads} threads"] = query_times_ms(
                    schema, layouts, threads=threads, repeats=options.query_repetitions
                )
            shutil.rmtree(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
