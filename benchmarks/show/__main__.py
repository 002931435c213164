"""`python -m benchmarks.show [scenario …]`: runs the scenarios at full size and writes the report.

Each stack is a fresh one. The exit code is 1 when a verdict is not "held".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.show import crash, exactly_once, read_after_write, time_travel
from benchmarks.stacks import RunningStack, running_stack

RESULTS = Path(__file__).parent.parent / "results"
Scenario = Callable[[RunningStack], Coroutine[Any, Any, dict[str, Any]]]

SCENARIOS: dict[str, tuple[dict[str, str], Scenario]] = {
    "exactly_once": ({}, lambda stack: exactly_once.run(stack.url, stack.api_key)),
    "read_after_write": ({}, lambda stack: read_after_write.run(stack.url, stack.api_key)),
    "time_travel": ({}, lambda stack: time_travel.run(stack.url, stack.api_key)),
    "crash": (
        {"bus_lease_ttl_ms": "2000"},
        lambda stack: crash.run(stack.url, stack.api_key, supervisor=stack.supervisor),
    ),
    "crash_spread": (
        {"bus_lease_ttl_ms": "2000", "actors_placement": "spread", "actors_coordinators": "2"},
        lambda stack: crash.run(
            stack.url, stack.api_key, supervisor=stack.supervisor, kinds=crash.SPREAD
        ),
    ),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show", description=__doc__)
    parser.add_argument("scenario", nargs="*", choices=[[], *SCENARIOS], default=[])
    chosen = parser.parse_args(arguments).scenario or list(SCENARIOS)
    RESULTS.mkdir(exist_ok=True)
    held = True
    for name in chosen:
        settings, scenario = SCENARIOS[name]
        with running_stack(**settings) as stack:
            report = {"machine": machine.describe(), "settings": settings}
            report |= asyncio.run(scenario(stack))
        held = held and report["verdict"] == "held"
        text = json.dumps(report, indent=1, ensure_ascii=False)
        (RESULTS / f"show_{name}.json").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
