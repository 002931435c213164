"""A cage that a process keeps between its jobs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest

from storage.engine.settings import EngineSettings
from storage.maintenance import cages
from storage.maintenance.cages import WarmCage, caged_engine
from tests.unit.compaction_rig import memory_lake


class FakeEngine:
    made: ClassVar[list[FakeEngine]] = []

    def __init__(self, settings: EngineSettings) -> None:
        self.settings, self.ready, self.stopped = settings, False, False
        FakeEngine.made.append(self)

    async def start(self) -> None:
        assert Path(self.settings.allowed_directory).is_dir()
        self.ready = True

    async def stop(self) -> None:
        self.ready, self.stopped = False, True

    def status(self) -> dict[str, Any]:
        return {"ready": self.ready}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine.made = []
    monkeypatch.setattr(cages, "QueryEngine", FakeEngine)


async def test_jobs_of_a_process_share_a_cage_that_reads_the_store(tmp_path: Path) -> None:
    lake, _ = memory_lake(tmp_path)
    warm = WarmCage(tmp_path / "cage-1")
    for _ in range(3):
        async with caged_engine(lake.context(cage=warm)):
            pass
    (made,) = FakeEngine.made
    assert not made.stopped
    assert made.settings.temp_directory == str(tmp_path / "cage-1")
    assert made.settings.concurrent_queries == 1
    # One that died, and one that reads another folder, are made anew.
    made.ready = False
    async with caged_engine(lake.context(cage=warm)):
        assert made.stopped
    (tmp_path / "elsewhere").mkdir()
    other = dataclasses.replace(
        lake.context(cage=warm).engine, allowed_directory=str(tmp_path / "elsewhere")
    )
    async with caged_engine(lake.context(cage=warm, engine=other)):
        pass
    assert [one.stopped for one in FakeEngine.made] == [True, True, False]
    await warm.stop()
    assert FakeEngine.made[-1].stopped


async def test_E7_a_cage_for_files_of_one_job_is_the_jobs_own(tmp_path: Path) -> None:
    lake, _ = memory_lake(tmp_path)
    warm = WarmCage(tmp_path / "cage-1")
    context = lake.context(cage=warm)
    async with caged_engine(context, own_files=True):
        (made,) = FakeEngine.made
        assert made.settings.allowed_directory == str(context.temp_dir / "matches")
    assert made.stopped
    async with caged_engine(lake.context()):
        pass
    assert FakeEngine.made[-1].stopped


async def test_a_folder_in_use_is_not_old(tmp_path: Path) -> None:
    lake, _ = memory_lake(tmp_path)
    warm = WarmCage(tmp_path / "cage-1")
    async with caged_engine(lake.context(cage=warm)):
        pass
    os.utime(tmp_path / "cage-1", (0, 0))
    async with caged_engine(lake.context(cage=warm)):
        assert (tmp_path / "cage-1").stat().st_mtime > 0
