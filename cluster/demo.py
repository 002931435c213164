"""`lakebus demo`: the whole system shown on real data, with checks that can fail.

It starts a stack of its own, streams the flights of `cluster.demo_data` in over HTTP, kills the
commit coordinator on the way, and compares every answer with the source: with counts made of the
files, and with the same SQL run by a DuckDB of its own over them. The exit code is 0 only if every
check held.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.demo_report import Report
from cluster.demo_screen import Screen
from cluster.demo_stack import DemoStack
from cluster.demo_steps import Demo
from lakebus.errors import LakebusError

DATA_DIR = Path(".lakebus-demo")
_INTERRUPTED = 130


def main(
    *,
    as_json: bool = False,
    data_dir: Path | None = None,
    keep: bool = False,
    flights: int | None = None,
) -> int:
    """Runs the demo; returns its exit code. With `as_json` only JSON goes to standard output.

    :param flights: send only so many of the flights.
    """

    report = Report(Screen(sys.stderr if as_json else sys.stdout))
    stack = DemoStack(data_dir or DATA_DIR, keep=keep)
    code = 1
    with _signals_as_interrupts():
        try:
            Demo(report, stack, flights).run()
        except KeyboardInterrupt:
            report.screen.title("Interrupted; stopping the stack …")
            code = _INTERRUPTED
        except LakebusError as error:
            report.checks.append({"name": "no_error", "ok": False, "text": str(error)})
            report.screen.title(f"The demo failed: {error}")
            if keep:
                report.screen.line(f"The logs are in {stack.files.logs}.")
        finally:
            # From here on the way out is the only way: a second Ctrl-C must not leave a stack.
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            with report.timed("stop"):
                stack.close()
    if report.finished:
        report.screen.line(
            f"{'stopped':<10}in {report.timings_s['stop']:.1f} s" + _kept(stack, keep)
        )
        code = 0 if report.ok else 1
    report.timings_s["total"] = round(time.monotonic() - report.began_s, 3)
    if as_json:
        sys.stdout.write(json.dumps(report.to_json(), indent=1) + "\n")
    return code


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Whatever asks the demo to end, it ends its stack first."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kept(stack: DemoStack, keep: bool) -> str:
    return f"; data kept, `lakebus up --data-dir {stack.files.root}` serves it" if keep else ""
