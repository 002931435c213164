"""A chaos run at a size for every day: a whole stack, clients, and a seeded half minute of faults.

`python -m tests.chaos` runs longer ones, with more processes, and other placements.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.kinds import Placement
from tests.chaos.report import shown
from tests.chaos.run import Options, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

#: Those from which a stack on two busy cores comes back in a few seconds.
_KINDS = (
    "kill_coordinator", "kill_publisher", "kill_lease_manager", "kill_query_child",
    "kill_postmaster", "kill_backend", "end_backends", "full_pool", "held_tables",
    "freeze_coordinator", "freeze_publisher", "lost_publish_replies", "lost_append_replies",
    "lost_replies", "partition", "full_objects", "objects_away",
)  # fmt: skip


def test_F1_half_a_minute_of_chaos(tmp_path: Path) -> None:
    options = Options(
        seed=1,
        seconds=25.0,
        placement=Placement.SPREAD,
        gap_s=1.8,
        kinds=_KINDS,
        writers=2,
        readers=1,
        settings=(
            ("LAKEBUS_HTTP_INGEST_REPLICAS", "1"),
            ("LAKEBUS_HTTP_QUERY_REPLICAS_MIN", "1"),
            ("LAKEBUS_HTTP_QUERY_REPLICAS_MAX", "1"),
        ),
    )
    report = asyncio.run(run(options, tmp_path / "chaos"))
    assert report.held, shown(report)
