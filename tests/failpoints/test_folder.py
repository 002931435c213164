"""Failpoints of other processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.failpoints.actions import Crash, Delay, Pause, Raise, Run, Stop
from tests.failpoints.folder import FailpointFolder, FolderReader
from tests.failpoints.markers import ROOT

A, B = "group_commit.before_append", "group_commit.after_append"
_PROGRAM = f"""
import asyncio, sys
from tests.failpoints.points import reach, reach_sync
async def main():
    await reach({A!r})
    print("first", flush=True)
    reach_sync({A!r})
    print("second", flush=True)
asyncio.run(main())
"""


def start(folder: FailpointFolder) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        env=folder.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=30)
    return child.returncode, out, err


async def test_a_child_is_killed_at_its_failpoint(failpoint_folder: FailpointFolder) -> None:
    failpoint_folder.arm(A, Crash(), skip=1)
    child = start(failpoint_folder)
    assert await failpoint_folder.reached(A) == child.pid
    assert end(child)[:2] == (-signal.SIGKILL, "first\n")


async def test_a_child_is_stopped_and_goes_on(failpoint_folder: FailpointFolder) -> None:
    failpoint_folder.arm(A, Stop())
    child = start(failpoint_folder)
    pid = await failpoint_folder.reached(A)
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    os.kill(pid, signal.SIGCONT)
    assert end(child)[:2] == (0, "first\nsecond\n")


async def test_a_child_is_paused_in_async_and_plain_functions(
    failpoint_folder: FailpointFolder,
) -> None:
    failpoint_folder.arm(A, Pause(), times=None)
    child = start(failpoint_folder)
    for turn in (1, 2):
        await failpoint_folder.reached(A, turn)
        assert child.poll() is None
        failpoint_folder.resume(A)
    assert end(child)[0] == 0


async def test_a_child_meets_the_error(failpoint_folder: FailpointFolder) -> None:
    failpoint_folder.arm(A, Raise(ConnectionResetError("gone")))
    code, out, err = end(start(failpoint_folder))
    assert (code, out) == (1, "")
    assert err.rstrip().endswith("ConnectionResetError: gone")


async def test_a_pause_that_nobody_ends_fails(failpoint_folder: FailpointFolder) -> None:
    failpoint_folder.arm(A, Pause(within_s=0.05))
    code, _, err = end(start(failpoint_folder))
    assert code == 1
    assert "nobody resumed" in err


async def test_each_shot_is_fired_once_whoever_meets(failpoint_folder: FailpointFolder) -> None:
    failpoint_folder.arm(A, Crash(), skip=1, times=2)
    codes = [end(child)[0] for child in [start(failpoint_folder) for _ in range(4)]]
    # Six or more arrivals: the first passes, two are killed, the others pass.
    assert sorted(codes) == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    assert failpoint_folder.shots(A) == 2


def test_armed_and_never_reached_is_a_failure(tmp_path: Path) -> None:
    def forget_one() -> None:
        with FailpointFolder(tmp_path) as folder:
            folder.arm(A, Delay(0))
            folder.arm(B, Delay(0))
            assert FolderReader(str(tmp_path)).take(B) is not None

    with pytest.raises(AssertionError, match=f"never reached: {A}"):
        forget_one()


def test_disarming_lets_the_paused_go_on(tmp_path: Path) -> None:
    folder = FailpointFolder(tmp_path)
    reader = FolderReader(str(tmp_path))
    folder.arm(A, Pause())
    shot = reader.take(A)
    assert shot is not None
    assert not reader.resumed(shot)
    folder.disarm(A)
    assert reader.resumed(shot)
    assert reader.take(A) is None
    folder.arm(A, Pause())
    again = reader.take(A)
    assert again is not None
    assert not reader.resumed(again)


def test_what_cannot_travel_is_refused(tmp_path: Path) -> None:
    folder = FailpointFolder(tmp_path)
    with pytest.raises(ValueError, match="use Pause"):
        folder.arm(A, Run(lambda: None))
    with pytest.raises(ValueError, match="holds no marker"):
        folder.arm("no.after_such", Crash())
