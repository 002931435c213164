"""What the demo found out: checks that can fail and numbers with their conditions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lakebus
from cluster.demo_screen import Screen


@dataclass(slots=True)
class Report:
    """Filled step by step. `ok` holds when every check did, and the demo came to its end."""

    screen: Screen
    checks: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    began_s: float = field(default_factory=time.monotonic)

    @property
    def ok(self) -> bool:
        return self.finished and bool(self.checks) and all(check["ok"] for check in self.checks)

    def check(self, name: str, ok: bool, text: str) -> None:
        """Notes a check and prints it. `text` is a sentence that is true when it holds."""

        self.checks.append({"name": name, "ok": ok, "text": text})
        self.screen.check(ok, text)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.timings_s[name] = round(time.monotonic() - began_s, 3)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "finished": self.finished,
            "version": lakebus.__version__,
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
            "checks": self.checks,
            "numbers": self.numbers,
            "timings_s": self.timings_s,
            "answers": self.answers,
        }

    def print_summary(self) -> None:
        """The short end: what was done, how fast and under which conditions, what held."""

        found, times = self.numbers, self.timings_s
        held = sum(check["ok"] for check in self.checks)
        screen = self.screen
        screen.title("Summary")
        lines = [
            ("rows in", f"{found['rows']:,} flights, {found['weather_rows']:,} hours of weather, "
             f"{found['airports_rows']:,} airports"),
            ("ingest", f"{found['acknowledged_rows_per_s']:,} acknowledged flights/s over "
             f"{found['connections']} connections, {found['batch_rows']:,} a request"),
            ("published", f"{found['published_rows_per_s']:,} flights/s, the time of recovery "
             "included"),
            ("visible", f"one row, written and seen: {found['write_to_visible_ms_p50']:.0f} ms "
             f"(median of {found['write_to_visible_count']}), "
             f"{found['write_to_visible_ms_max']:.0f} ms at most"),
            ("recovery", f"{found['recovery_s']:.1f} s from SIGKILL until new rows were visible"),
            ("storage", f"{found['snapshots']} snapshots, {found['files']} data files, "
             f"{found['bytes'] / 1e6:.1f} MB of Parquet"),
            ("time", f"{times['start']:.0f} s start, {times['flights']:.0f} s flights, "
             f"{time.monotonic() - self.began_s:.0f} s up to here, on {os.cpu_count()} CPUs"),
            ("checks", f"{held} of {len(self.checks)} hold"),
        ]  # fmt: skip
        for name, text in lines:
            screen.line(f"{name:<10}{text}")
