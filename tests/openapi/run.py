"""Runs: every boundary of every operation, then random requests, from a seed and within a time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.openapi import cases
from tests.openapi.judge import Judge
from tests.openapi.world import World, world

#: Forms of an answer; the description has no parameter for them.
ACCEPT = (
    None,
    "application/json",
    "application/json; integers=number",
    "application/x-ndjson",
    "text/csv",
    "application/vnd.apache.arrow.stream",
    "application/vnd.apache.parquet",
    "text/html",
    "application/json;q=x",
)


#: So many valid requests to an operation are about things that are there.
_PLAIN = 4


@dataclass(slots=True)
class Findings:
    """`answers` counts what was answered, by operation and status; `faults` are what was wrong."""

    faults: list[str] = field(default_factory=list)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    requests: int = 0

    @property
    def never_well(self) -> list[str]:
        """Operations of which no request was answered with what was asked for."""

        seen = {label for label, _ in self.answers}
        return sorted(seen - {label for label, status in self.answers if status < 400})


class Session:
    """A world on a loop of its own, and the description that it serves."""

    def __init__(self, runner: asyncio.Runner, made: World, document: dict[str, Any]) -> None:
        self._runner = runner
        self._world = made
        self._judge = Judge(made)
        self.findings = Findings(answers=self._judge.answers)
        self.operations: list[cases.AnyOperation] = []
        self.document = document
        self.hold_to(document)

    def hold_to(self, document: dict[str, Any]) -> None:
        """Compares with this description from now on."""

        found = cases.operations(cases.schema_of(document))
        # What takes things away comes last.
        self.operations = sorted(found, key=lambda one: one.method == "delete")

    def boundaries(self, *labels: str) -> None:
        """Every boundary of the description, or of these operations; valid names are those of
        things that are there."""

        for operation in self.operations:
            if labels and operation.label not in labels:
                continue
            valid = 0
            for number, case in enumerate(cases.boundaries(operation)):
                valid += cases.is_valid(case)
                turns = _Turns(valid, plain=valid <= _PLAIN)
                cases.ground(case, self._world.known, turns)
                self.findings.faults += self._ask(case, ACCEPT[number % len(ACCEPT)])

    def random(self, label: str, *, examples: int, seed: int) -> None:
        """Random requests to one operation; the first fault ends it, made as small as it goes."""

        operation = next(one for one in self.operations if one.label == label)
        strategy = st.one_of([operation.as_strategy(generation_mode=mode) for mode in cases.MODES])

        @hypothesis.seed(seed)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(case=strategy, data=st.data())
        def ask(case: cases.AnyCase, data: Any) -> None:
            cases.ground(case, self._world.known, data.draw)
            faults = self._ask(case, data.draw(st.sampled_from(ACCEPT)))
            if faults:
                raise AssertionError("\n".join(faults))

        try:
            ask()
        except AssertionError as error:
            self.findings.faults.append(str(error))
        except BaseExceptionGroup as group:
            self.findings.faults += [str(error) for error in group.exceptions]

    def _ask(self, case: cases.AnyCase, accept: str | None) -> list[str]:
        self.findings.requests += 1
        return self._runner.run(self._judge.faults(case, accept=accept))


class _Turns:
    """Draws for a case that is not random, so that each run is the same one. `plain`: everything
    that can be something of the lake is."""

    def __init__(self, number: int, *, plain: bool) -> None:
        self._number = number
        self._chance = None if plain else random.Random(number)

    def __call__(self, strategy: st.SearchStrategy[Any]) -> Any:
        given = cases.choices(strategy)
        if self._chance is not None:
            return self._chance.choice(given)
        if any(one is True for one in given):
            return True
        return given[self._number % len(given)]


@contextlib.contextmanager
def session(*, folder: Path | None = None) -> Iterator[Session]:
    """`folder`: statements are run by DuckDB, which may use it; else they are played."""

    cases.register_media_types()
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        made = runner.run(stack.enter_async_context(world(folder=folder)))
        try:
            document = runner.run(_description(made))
            yield Session(runner, made, document)
        finally:
            runner.run(stack.aclose())


async def _description(made: World) -> dict[str, Any]:
    return dict((await made.lake.get("/openapi.json")).json())


def long_run(*, seconds: float, seed: int, folder: Path | None, examples: int = 60) -> Findings:
    """Rounds until the time is up, each in a new world and from a seed of its own."""

    ends_s = time.monotonic() + seconds
    total = Findings()
    known: set[str] = set()
    number = 0
    while time.monotonic() < ends_s or number == 0:
        with session(folder=folder) as one:
            if number == 0:
                one.boundaries()
            mixed = sorted(one.operations, key=lambda one: one.label)
            random.Random(seed + number).shuffle(mixed)
            for operation in mixed:
                if time.monotonic() < ends_s:
                    one.random(operation.label, examples=examples, seed=seed + number)
            total.answers += one.findings.answers
            total.requests += one.findings.requests
            for fault in one.findings.faults:
                title = fault.split("\n", 2)[0]
                if title not in known:
                    known.add(title)
                    total.faults.append(f"(seed {seed + number}) {fault}")
        number += 1
    return total
