"""`python -m benchmarks.show.cli_ingest --gb 10`: a folder of mixed files by the command line, with
two kills and a resume.

Makes the files, starts a stack, runs `lakebus ingest FOLDER --table t`, ends it twice by SIGKILL
when so much of the rows can be read, runs the same command again until it ends well, and compares
what the table holds with what was made, column by column. Nothing is kept between the runs but the
files; `--keep` keeps them afterwards, too. The exit code is 1 when a verdict is not "held".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.show import processes
from benchmarks.show.cli_ingest_files import CHECKS, COLUMNS, Made, make
from benchmarks.stacks import RunningStack, running_stack
from lakebus.client import Client, connect

RESULT = Path(__file__).parent.parent / "results" / "show_cli_ingest.json"
TABLE = "t"
#: The shares of the rows at whose sight the command is killed.
KILLS = (0.15, 0.4)
SEED = 20261123
_LOOK_S = 0.5
_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
#: Whose processor time is told apart: words of the command line.
_KINDS = {
    "ingest replica": ("ServeReplica:api",),
    "query replica and its SQL": ("ServeReplica:query",),
    "PostgreSQL": ("postgres",),
    "roles (coordinator, publisher, …)": ("RoleActor",),
    "jobs (compaction)": ("job_process",),
}


def run(stack: RunningStack, folder: Path, made: Made, kills: Sequence[float]) -> dict[str, Any]:
    """Kills and resumes; the report's part of it."""

    with connect(stack.url, stack.api_key, timeout_s=100) as lake:
        lake.create_table(TABLE, COLUMNS)
        began_s = time.monotonic()
        runs = [_killed(stack, folder, lake, int(made.sums["rows"] * share)) for share in kills]
        document, last = _whole(stack, folder)
        runs.append(last)
        seconds = time.monotonic() - began_s
        before_s = time.monotonic()
        tokens = document["visibility_tokens"]
        found = _checked(lake, tokens)
    problems = [
        f"{name}: {found[name]} in the table, {value} in the files"
        for name, value in made.sums.items()
        if found[name] != value
    ]
    if document["rows"] != made.sums["rows"]:
        problems.append(f"the last run counted {document['rows']} rows")
    if not document["rows_replayed"] and kills:
        problems.append("the last run met nothing that was stored before")
    return {
        "runs": runs,
        "seconds_of_all_runs": round(seconds, 1),
        "file_mb_per_s_with_kills": round(made.file_bytes / 1e6 / seconds, 1),
        "visible_and_checked_s": round(time.monotonic() - before_s, 1),
        "rows_replayed_in_the_last_run": document["rows_replayed"],
        "checks": {name: {"files": made.sums[name], "table": found[name]} for name in CHECKS},
        "verdict": problems or "held",
    }


def _killed(stack: RunningStack, folder: Path, lake: Client, rows: int) -> dict[str, Any]:
    """One run of the command, killed when so many rows can be read."""

    began_s = time.monotonic()
    with _command(stack, folder) as process:
        while (seen := _count(lake)) < rows:
            if process.poll() is not None:
                raise RuntimeError(f"the command ended by itself: {process.returncode}")
            time.sleep(_LOOK_S)
        process.kill()
        code = process.wait()
    return {
        "ended_by": "SIGKILL" if code == -9 else str(code),
        "rows_to_be_seen_then": seen,
        "seconds": round(time.monotonic() - began_s, 1),
    }


def _whole(stack: RunningStack, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run that ends: what it says, and what it took."""

    before, began_s = _cpu_s(stack), time.monotonic()
    with _command(stack, folder) as process:
        text, _ = process.communicate()
        children = os.times().children_user + os.times().children_system
    seconds = time.monotonic() - began_s
    if process.returncode:
        raise RuntimeError(f"the command ended with {process.returncode}: {text[-2000:]!r}")
    document = json.loads(text)
    new = document["rows"] - document["rows_replayed"]
    used = {name: round(spent - before.get(name, 0), 1) for name, spent in _cpu_s(stack).items()}
    return document, {
        "ended_by": "itself",
        "seconds": round(seconds, 1),
        "rows": document["rows"],
        "rows_new": new,
        "rows_per_s": round(document["rows"] / seconds),
        "requests": document["requests"],
        "processor_s": used,
        "processor_s_of_all_commands_until_now": round(children, 1),
    }


def _command(stack: RunningStack, folder: Path) -> subprocess.Popen[bytes]:
    arguments = ["ingest", str(folder), "--table", TABLE, "--json", "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "lakebus", *arguments, "--data-dir", str(stack.data_dir)],
        stdout=subprocess.PIPE,
    )


def _count(lake: Client) -> int:
    return int(lake.query(f"SELECT count(*) FROM {TABLE}").value())


def _checked(lake: Client, tokens: Sequence[str]) -> dict[str, int]:
    """One question for each check: the largest fits the engine's memory by itself."""

    lake.wait_visible(tokens, timeout_s=100)
    return {
        name: int(lake.query(f"SELECT ({sql})::varchar FROM {TABLE}", after=tokens).value())
        for name, sql in CHECKS.items()
    }


def _cpu_s(stack: RunningStack) -> dict[str, float]:
    """Processor seconds so far of the stack's processes that live, by kind."""

    found: dict[str, float] = {}
    for pid, title in processes.descendants(stack.supervisor):
        named = (kind for kind, words in _KINDS.items() if all(word in title for word in words))
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        kind = next(named, "the rest")
        found[kind] = found.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) * _TICKS_S
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show.cli_ingest")
    parser.add_argument("--gb", type=float, default=10.0, help="size of the files together")
    parser.add_argument("--files", type=Path, help="where to make them (default: a temp folder)")
    parser.add_argument("--make-only", action="store_true", help="make the files and stop")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--write", type=Path, default=RESULT, help="where the result goes")
    asked = parser.parse_args(arguments)
    folder = asked.files or Path(tempfile.mkdtemp(prefix="lakebus-files-"))
    try:
        began_s = time.monotonic()
        made = make(folder, total_bytes=int(asked.gb * 1e9), seed=SEED)
        made_s = time.monotonic() - began_s
        print(f"{made.files} files made in {made_s:.0f} s", file=sys.stderr, flush=True)
        if asked.make_only:
            return 0
        with running_stack() as stack:
            report = {
                "machine": machine.describe(),
                "files": made.files,
                "file_bytes": made.file_bytes,
                "bytes_by_form": made.by_form,
                "made_s": round(made_s, 1),
                **run(stack, folder, made, KILLS),
            }
    finally:
        if not (asked.keep or asked.make_only):
            shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    asked.write.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return 0 if report["verdict"] == "held" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
