"""What the benchmark of ingest beside compaction makes of its samples."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compaction_load import Window, ratio, verdict, window_figures


def windows(*p99s: tuple[bool, float]) -> list[dict[str, Any]]:
    return [{"compacting": compacting, "ack_ms_p99": p99} for compacting, p99 in p99s]


def test_the_ratio_is_that_of_neighbours_whichever_came_first() -> None:
    found = ratio(windows((False, 10.0), (True, 11.0), (True, 22.0), (False, 20.0)), "ack_ms_p99")
    assert found == {"ratio": 1.1, "interval_95": [1.1, 1.1]}


def test_the_interval_decides_and_not_the_median() -> None:
    even = windows(*[(False, 10.0), (True, 11.0)] * 6)
    assert verdict(ratio(even, "ack_ms_p99")) == "reached"
    slow = windows(*[(False, 10.0), (True, 13.0)] * 6)
    assert verdict(ratio(slow, "ack_ms_p99")) == "missed"
    mixed = windows(*[(False, 10.0), (True, 8.0), (True, 16.0), (False, 10.0)] * 3)
    found = ratio(mixed, "ack_ms_p99")
    assert verdict(found) == "not decided"
    assert found["interval_95"][0] < found["ratio"] < found["interval_95"][1]


def test_a_request_belongs_to_the_window_in_which_it_was_due() -> None:
    window = Window(compacting=False, began=10.0, ended=12.0)
    samples = [(9.9, 900.0, 900.0), (10.0, 1.0, None), (11.0, 3.0, 7.0), (12.0, 900.0, 900.0)]
    found = window_figures(window, samples)
    assert (found["requests"], found["ack_ms_p99"], found["visible_ms_p50"]) == (2, 3.0, 7.0)
    with pytest.raises(RuntimeError, match="beyond this machine"):
        window_figures(Window(compacting=False, began=20.0, ended=21.0), samples)
