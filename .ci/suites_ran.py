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
LACKS = "this backend lacks: "
EXPECTED_LACKS = {
    # One process holds the memory backend: it has no server to kill and no socket to pause.
    "conformance[memory]": {"crash_server", "ends_paused_client"},
}
"""What a backend may lack, by suite; anything else that it lacks is a hole in the proof."""


def suite_of(classname: str) -> str:
    """The suite of a test: its folder below `tests`, or the backend of a conformance run."""
    parts = classname.split(".")
    for backend in ("memory", "postgres"):
        if f"test_conformance_{backend}" in parts:
            return f"conformance[{backend}]"
    return parts[1] if len(parts) > 2 else "other"


def main(report: str) -> int:
    ran: Counter[str] = Counter()
    problems = []
    for case in ElementTree.parse(report).iter("testcase"):
        classname, name = case.get("classname", ""), case.get("name", "")
        skipped = case.find("skipped")
        if skipped is None:
            ran[suite_of(classname)] += 1
            continue
        said = skipped.get("message", "")
        lack = said.removeprefix(LACKS) if said.startswith(LACKS) else None
        expected = said in EXPECTED_REASONS or lack in EXPECTED_LACKS.get(suite_of(classname), ())
        if not expected:
            problems.append(f"{classname}.{name} was skipped: {said}")
    problems += [f"the suite {suite} ran no test" for suite in REQUIRED if not ran[suite]]
    print("tests per suite:", ", ".join(f"{name} {count}" for name, count in sorted(ran.items())))
    for problem in problems:
        print("ERROR:", problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
