"""What a soak came to, kept as JSON and shown as Markdown."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.results import is_kill
from tests.chaos.run import Report
from tests.chaos.soak.settings import SETTINGS
from tests.chaos.soak.side import Told


def write_soak(path: Path, report: Report) -> None:
    """The JSON file, and beside it the same in Markdown; each in one step."""
    document = as_document(report)
    for target, text in (
        (path, json.dumps(document, indent=1, default=str)),
        (path.with_suffix(".md"), "\n".join(markdown(document))),
    ):
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        draft.write_text(text + "\n")
        os.replace(draft, target)


def as_document(report: Report) -> dict[str, Any]:
    told = report.soak or Told()
    struck = [row for row in report.faults if not row["missed"]]
    kinds = Counter(row["kind"] for row in struck)
    return {
        "machine": report.machine,
        "seed": report.options.seed,
        "placement": report.options.placement.value,
        "minutes": round(report.options.seconds / 60, 2),
        "settings": dict(SETTINGS),
        "held": report.held,
        "problems": report.problems[:40],
        "operations": report.operations,
        "faults": dict(sorted(kinds.items())),
        "kills": sum(count for kind, count in kinds.items() if is_kill(kind)),
        "served_after_s": report.served_after_s,
        "drained_after_s": report.drained_after_s,
        "rows_per_s": round(told.rows_acknowledged / max(1.0, told.load_s), 1),
        "evidence": report.evidence,
        **{name: value for name, value in asdict(told).items() if name != "problems"},
    }


def markdown(document: Mapping[str, Any]) -> Iterable[str]:
    machine, historian = document["machine"], document["clients"].get("historian", {})
    packages = ", ".join(f"{name} {v}" for name, v in machine.get("packages", {}).items())
    operations = sum(sum(ends.values()) for ends in document["operations"].values())
    files = document["files"]
    yield "# Soak: all of maintenance at work, with kills"
    yield ""
    yield (
        f"{document['minutes']} minutes of faults, seed {document['seed']}, placement"
        f" {document['placement']}, commit {machine.get('commit')}:"
        f" **{'held' if document['held'] else 'did not hold'}**."
    )
    yield ""
    yield (
        f"Machine: {machine.get('cores')} cores ({machine.get('cpu')}), {machine.get('memory_gib')}"
        f" GiB; clients, stack and PostgreSQL on the same cores. {packages}."
    )
    yield ""
    yield "| what | |"
    yield "|---|---:|"
    commits = document["publications"].get("commits", {})
    snapshots = document["publications"].get("snapshots", {})
    rows: list[tuple[str, object]] = [
        ("recorded operations of clients", operations),
        ("rows acknowledged", document["rows_acknowledged"]),
        ("rows a second", document["rows_per_s"]),
        ("kills", document["kills"]),
        ("other faults", sum(document["faults"].values()) - document["kills"]),
        ("questions recorded at a snapshot", historian.get("pairs")),
        ("… tagged, all of which answered to the end", historian.get("tagged")),
        ("… whose snapshot expired", historian.get("expired")),
        ("… asked again, times", historian.get("asked_again")),
        ("… with another answer", historian.get("changed")),
        ("append commits that lost their write intent", commits.get("intent_lost", 0)),
        ("reads that met a missing file", document["missing_file_reads"]),
        ("snapshots published", sum(snapshots.values())),
        ("… by appends", snapshots.get("append", 0)),
        ("errors of the full validation at the end", document["validation"].get("errors")),
        ("objects in the store, most / at the end", _most(files, "objects")),
        ("bytes in the store, most / at the end", _most(files, "stored_bytes")),
        ("data files deleted", files.get("lake_at_end", {}).get("deleted")),
    ]
    ledger = document["clients"].get("ledger", {})
    rows += [(name.replace("_", " "), value) for name, value in ledger.items()]
    streams = document["clients"].get("streams", [])
    ends: Counter[str] = Counter()
    for one in streams:
        ends.update(one["ends"])
    rows += [(f"slow streams: {end}", count) for end, count in sorted(ends.items())]
    rows += [
        (f"change feed of {table}: rows, each once (windows)", f"{one['rows']} ({one['windows']})")
        for table, one in document["clients"].get("feed", {}).items()
    ]
    for name, value in rows:
        yield f"| {name} | {value} |"
    yield from _jobs(document["jobs"])
    yield from _tables(files.get("tables", {}))
    yield from _latencies(document["latencies"])
    yield ""
    yield "| fault | times |"
    yield "|---|---:|"
    for kind, count in document["faults"].items():
        yield f"| {kind} | {count} |"
    if document["problems"]:
        yield ""
        yield "What did not hold:"
        yield ""
        for problem in document["problems"]:
            yield f"- {problem}"


def _jobs(jobs: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield ""
    yield "| job | runs | done | failed | begun again | what they did |"
    yield "|---|---:|---:|---:|---:|---|"
    counted = ("jobs", "done", "failed", "begun_again")
    for kind, sums in jobs.items():
        rest = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in sums.items() if k not in counted)
        cells = " | ".join(str(sums.get(name, 0)) for name in counted)
        yield f"| {kind} | {cells} | {rest} |"


def _tables(tables: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield ""
    yield (
        "| table | rows at the end | partitions | live files, most | at the end | small, most"
        " | at the end | median, first third | last third | below 8 MiB |"
    )
    yield f"|---|{'---:|' * 9}"
    for name, one in tables.items():
        yield (
            f"| {name} | {one['rows_at_end']} | {one['partitions_at_end']} | {one['live_max']} |"
            f" {one['live_at_end']} | {one['small_max']} | {one['small_at_end']} |"
            f" {one['small_typical_first']} | {one['small_typical_last']} |"
            f" {one['below_8_mib_at_end']} |"
        )


def _latencies(latencies: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield ""
    yield "| while faults were made | times | p50 ms | p99 ms |"
    yield "|---|---:|---:|---:|"
    for name, one in latencies.items():
        yield f"| {name.replace('_', ' ')} | {one['count']} | {one['p50_ms']} | {one['p99_ms']} |"


def _most(files: Mapping[str, Any], what: str) -> str:
    return f"{files.get(f'{what}_max')} / {files.get(f'{what}_at_end')}"
