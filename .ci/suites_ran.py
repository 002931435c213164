"""Fail unless every required suite ran, and nothing was skipped that is not expected to be."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

REQUIRED = (
    "unit",
    "conformance[memory]",
    "conformance[postgres]",
    "integration",
    "acceptance",
)
EXPECTED_REASONS = frozenset() if os.geteuid() == 0 else frozenset({"only root changes users"})
"""Why a test may be skipped here."""


def suites(file: str, name: str) -> list[str]:
    """The suites that a test belongs to: its folder, and for conformance its backend."""
    parts = file.split("/")
    folder = parts[1] if len(parts) > 2 else ""
    if folder != "conformance":
        return [folder]
    where = f"{parts[-1]} {name}"
    return [f"conformance[{backend}]" for backend in ("memory", "postgres") if backend in where]


def main(report: str) -> int:
    ran: Counter[str] = Counter()
    problems = []
    for case in ElementTree.parse(report).iter("testcase"):
        file, name = case.get("file", ""), case.get("name", "")
        if case.find("skipped") is None:
            ran.update(suites(file, name))
            continue
        reason = case.find("skipped")
        said = "" if reason is None else reason.get("message", "")
        if said not in EXPECTED_REASONS:
            problems.append(f"{file}::{name} was skipped: {said}")
    problems += [f"the suite {suite} ran no test" for suite in REQUIRED if not ran[suite]]
    print("tests per suite:", ", ".join(f"{name} {count}" for name, count in sorted(ran.items())))
    for problem in problems:
        print("ERROR:", problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
