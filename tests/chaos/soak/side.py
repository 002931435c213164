"""The soak's side of a run: its tables, its client process, the sampling, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.children import Child
from tests.chaos.session import Session
from tests.chaos.soak import jobs, judging
from tests.chaos.soak.process import SoakConfig
from tests.chaos.soak.sampler import Sampler
from tests.chaos.soak.settings import SMALL_FILE_BYTES
from tests.chaos.soak.tables import TABLES
from tests.chaos.stack import ChaosStack, StackDown
from tests.history.end_state import EndState
from tests.history.record import History

_STOPPED_S, _FINISHED_S, _VALIDATED_S, _SETTLED_S = 300.0, 900.0, 600.0, 60.0


@dataclass(slots=True)
class Told:
    """What a soak came to; part of the run's report."""

    clients: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    jobs: Mapping[str, Any] = field(default_factory=dict)
    publications: Mapping[str, Any] = field(default_factory=dict)
    latencies: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    rows_acknowledged: int = 0
    load_s: float = 0.0
    missing_file_reads: int = 0
    problems: list[str] = field(default_factory=list)


class SoakSide:
    """The steps that a run takes in turn: `make_tables`, `start`, `stop`, `finish`, `judge`."""

    def __init__(
        self, stack: ChaosStack, folder: Path, *, seed: int, seconds: float, pairs: int
    ) -> None:
        self._stack = stack
        self._folder = folder
        self._seed = seed
        self._seconds = seconds
        self._pairs = pairs
        self._child: Child | None = None
        self._sampler = Sampler(stack.superuser, stack.objects.folder, SMALL_FILE_BYTES)
        self._sampling: asyncio.Task[None] | None = None
        self._facts: list[jobs.JobFact] = []
        self.told = Told()

    # --- before and during ----------------------------------------------------------------------

    async def make_tables(self, session: Session) -> None:
        for table in TABLES:
            made = await session.create_table(table.name, table.document_columns, **table.more)
            if not made.ok:
                raise StackDown(f"the table {table.name} could not be made: {made.code}")

    async def start(self, *, token_secret: str) -> None:
        address = self._stack.address
        config = SoakConfig(
            url=address.url,
            admin_key=address.api_key,
            token_secret=token_secret,
            seed=self._seed,
            seconds=self._seconds,
            record=str(self._folder / "soak.jsonl"),
            feed=str(self._folder / "feed.json"),
            # Some more than wanted: faults make recording slower.
            pairs=round(self._pairs * 1.15) + 1,
        )
        path = self._stack.folder / "soak.json"
        config.write(path)
        self._child = await Child.start(
            "tests.chaos.soak.process", str(path), log=self._folder / "soak.log"
        )
        await self._child.hear(timeout_s=60.0)
        self._sampling = asyncio.create_task(self._sampler.collect(), name="samples")

    def alive(self) -> bool:
        return self._child is None or self._child.mark.alive()

    async def stop(self) -> None:
        """The clients end; what they asked comes to its end."""
        if self._child is not None:
            await self._child.ask({"do": "stop"}, timeout_s=_STOPPED_S)

    # --- after ----------------------------------------------------------------------------------

    async def finish(self, session: Session, *, say: Callable[[str], None]) -> None:
        """On a drained stack: everything is asked once more, and validated in full."""
        told, child = self.told, self._child
        if child is None:
            return
        said = await child.ask({"do": "finish"}, timeout_s=_FINISHED_S)
        told.clients = {k: v for k, v in said.items() if k != "problems"}
        told.problems += said["problems"]
        told.missing_file_reads = said["counts"].get("missing_file_reads", 0)
        await child.end(timeout_s=30.0)
        say(f"everything was asked again: {said['historian']}")
        await self._compacted()
        told.validation = await self._validated(session)
        if told.validation.get("errors") != 0:
            told.problems.append(f"the validation at the end found {dict(told.validation)}")
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        self._sampler.samples.append(await self._sampler.look())
        self._facts = await jobs.jobs_of(self._stack.superuser)
        told.publications = await jobs.outcomes_of(self._stack.superuser)
        told.files, told.jobs = self._sampler.told(), jobs.totals(self._facts)
        (self._folder / "samples.json").write_text(json.dumps(self._sampler.as_json()))

    async def _compacted(self) -> None:
        """Until compaction leaves as many small files as it found, or some time has gone."""
        before, until_s = -1, time.monotonic() + _SETTLED_S
        while time.monotonic() < until_s:
            sample = await self._sampler.look(store=False)
            small = sum(table["small"] for table in sample.tables.values())
            if small == before:
                return
            before = small
            await asyncio.sleep(10.0)

    async def _validated(self, session: Session) -> Mapping[str, Any]:
        """The report of a full validation, without its lists."""
        deadline_s = time.monotonic() + _VALIDATED_S
        said: Any = "nothing"
        while time.monotonic() < deadline_s:
            outcome = await session.post(
                "/v1/admin/maintenance/validate?timeout_ms=100000", {"parameters": {"full": True}}
            )
            said = outcome.code
            if outcome.ok and outcome.answer["state"] == "done":
                report = outcome.answer["report"]
                if report.get("errors"):
                    return dict(report)
                return {k: v for k, v in report.items() if k != "findings"}
            if outcome.ok:
                said = outcome.answer["state"], outcome.answer["error"]
            await asyncio.sleep(0.5)
        return {"errors": None, "said": str(said)}

    async def abandon(self) -> None:
        """Whatever became of the run: nothing of it is left."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        if self._child is not None:
            with contextlib.suppress(OSError):
                await self._child.end(timeout_s=5.0)

    def judge(
        self, history: History, truth: EndState | None, evidence: Mapping[str, int]
    ) -> list[str]:
        told = self.told
        missing = judging.missing_reads(history)
        told.missing_file_reads += len(missing)
        told.rows_acknowledged = judging.acknowledged_rows(history)
        told.load_s = round(judging.load_s(history), 1)
        told.latencies = judging.latencies(
            history,
            jobs.compacting(self._facts),
            wall_less_monotonic_s=time.time() - time.monotonic(),
        )
        problems = [*told.problems, *missing, *judging.write_problems(history)]
        problems += jobs.problems_of(self._facts)
        problems += judging.abort_problems(told.publications.get("commits", {}), evidence)
        if not told.clients:
            return [*problems, "the soak's clients told nothing"]
        problems += judging.file_problems(told.files, minutes=self._seconds / 60)
        problems += judging.pair_problems(told.clients["historian"], wanted=self._pairs)
        problems += judging.stream_problems(told.clients["streams"], minutes=self._seconds / 60)
        if truth is not None:
            feeds = json.loads((self._folder / "feed.json").read_text())
            for table, seen in feeds.items():
                groups = {int(k): (v[0], v[1]) for k, v in seen["groups"].items()}
                gaps = [(first, last) for first, last in seen["gaps"]]
                problems += judging.feed_problems(history, truth, table, groups, gaps=gaps)
        return judging.shown_problems(problems)
