"""Whether the machine is busy: as the kernel counts, after seconds of calm, not while we work."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import processor_load
from actors.processor_load import BUSY_SHARE, CALM_S, ProcessorLoad, machine_times
from storage.memory_clock import ManualClock


class Machine:
    """Two processors that are used as the test says, looked at once a second."""

    def __init__(self, *, counts: bool = True) -> None:
        self.clock = ManualClock()
        self._counts = counts
        self._used = self._total = 0
        self.load = ProcessorLoad(clock=self.clock, read=self._read)

    def _read(self) -> tuple[int, int] | None:
        return (self._used, self._total) if self._counts else None

    def seconds(self, count: int, *, used: float, ours: bool = False) -> list[bool]:
        answers = []
        for _ in range(count):
            self.clock.advance_s(1)
            self._used += round(200 * used)
            self._total += 200
            answers.append(self.load.busy(ours=ours))
        return answers


IDLE, WRITING = 0.05, 0.6


def test_a_machine_is_calm_after_seconds_of_it() -> None:
    machine = Machine()
    assert machine.seconds(6, used=IDLE) == [True, True, True, False, False, False]
    assert machine.seconds(1, used=WRITING) == [True]


def test_a_pause_between_two_bursts_is_no_calm() -> None:
    machine = Machine()
    assert CALM_S > 2
    for _ in range(5):
        assert all(machine.seconds(4, used=WRITING))
        assert all(machine.seconds(2, used=IDLE))


def test_what_jobs_take_themselves_makes_nothing_busy_afterwards() -> None:
    machine = Machine()
    machine.seconds(5, used=IDLE)
    assert all(machine.seconds(9, used=0.5, ours=True))  # they could be all of it, or none
    assert machine.seconds(5, used=IDLE) == [True, True, False, False, False]


def test_questions_in_quick_succession_are_one_look() -> None:
    machine = Machine()
    machine.seconds(5, used=IDLE)
    machine.clock.advance_s(0.25)
    machine._used += 10**6
    machine._total += 10**6
    assert not machine.load.busy(ours=False)
    assert machine.seconds(1, used=0) == [True]


def test_from_a_third_on_it_is_busy() -> None:
    machine = Machine()
    machine.seconds(5, used=0.0)
    assert machine.seconds(3, used=BUSY_SHARE - 0.02) == [False] * 3
    assert machine.seconds(1, used=BUSY_SHARE + 0.02) == [True]


def test_where_nobody_counts_nobody_waits() -> None:
    machine = Machine(counts=False)
    assert not any(machine.seconds(5, used=WRITING))


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("cpu  100 20 30 800 50 1 2 3 40 5\ncpu0 1 1\n", (156, 1006)),
        ("cpu  100 20 30 800 50\n", (150, 1000)),
        ("cpu  100\n", None),
        ("something else\n", None),
        (None, None),
    ],
)
def test_times_are_read_as_linux_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, times: tuple[int, int] | None
) -> None:
    """Waiting for a disk is no use, and what guests take is within the rest."""

    path = tmp_path / "stat"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(processor_load, "_STAT", path)
    assert machine_times() == times
