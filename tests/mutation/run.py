"""The run: the tests green on the tree as it is, then each mutant against its own tests."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.imported import MODULES_VARIABLE
from tests.mutation.mutant import Mutant, PatchStale
from tests.mutation.verdicts import End, Verdict, run_tests
from tests.mutation.workspace import NotBuilt, Workspace
from tests.postgres_server import EXTERNAL_VARIABLE, running_postgres

MUTANT_S = 180.0
GREEN_S = 1_200.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Judged:
    """One mutant and what became of it."""

    mutant: Mutant
    verdict: Verdict
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """`green` is empty when every test passed on the tree as it is."""

    green: str
    green_seconds: float
    judged: tuple[Judged, ...]
    seconds: float

    @property
    def good(self) -> bool:
        return not self.green and all(j.verdict.end is End.KILLED for j in self.judged)


def run(mutants: Sequence[Mutant], *, say: Say) -> Report:
    """Judges the mutants, one after the other, in a copy that is deleted afterwards."""

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lakebus-mutation-") as folder:
        workspace = Workspace(Path(folder))
        with _environ(mutants) as environ:
            green = _green(workspace, mutants, environ)
            green_s = time.monotonic() - began
            say(f"the tree as it is: {green or 'green'} ({green_s:.0f} s)")
            judged: list[Judged] = []
            for number, mutant in enumerate([] if green else mutants, start=1):
                judged.append(_judge(workspace, mutant, environ))
                say(f"[{number}/{len(mutants)}] {_line(judged[-1])}")
    return Report(green, green_s, tuple(judged), time.monotonic() - began)


@contextmanager
def _environ(mutants: Sequence[Mutant]) -> Iterator[dict[str, str]]:
    """One server for all runs, started only when a test of them wants one."""

    if not any(_wants_server(test) for mutant in mutants for test in mutant.killers):
        yield {}
        return
    with running_postgres() as dsn:
        yield {EXTERNAL_VARIABLE: dsn}


def _wants_server(test: str) -> bool:
    return "postgres" in test or test.startswith(("tests/integration/", "tests/matrix/"))


def _green(workspace: Workspace, mutants: Sequence[Mutant], environ: dict[str, str]) -> str:
    """Why a failure would mean nothing, or nothing: every test that may kill must pass first."""

    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.killers))
    verdict = run_tests(workspace, tests, environ=environ, within_s=GREEN_S, stop_at_first=False)
    if verdict.end is not End.SURVIVED:
        return f"{verdict.end}: {verdict.test} {verdict.detail}"
    idle = [
        test
        for test in tests
        if not any(p == test or p.startswith((f"{test}[", f"{test}::")) for p in verdict.passed)
    ]
    return f"skipped: {', '.join(idle)}" if idle else ""


def _judge(workspace: Workspace, mutant: Mutant, environ: dict[str, str]) -> Judged:
    began = time.monotonic()
    try:
        with workspace.mutated(mutant):
            verdict = run_tests(
                workspace,
                mutant.killers,
                environ={**environ, **_imports(mutant)},
                within_s=MUTANT_S,
            )
    except PatchStale as error:
        verdict = Verdict(End.STALE, detail=str(error))
    except NotBuilt as error:
        verdict = Verdict(End.INVALID, detail=str(error))
    return Judged(mutant, verdict, time.monotonic() - began)


def _imports(mutant: Mutant) -> dict[str, str]:
    """What tells the run to import the mutated modules. SQL is installed by the fixtures, where a
    failure counts as one of set-up."""

    names = [name for name in mutant.files if name.endswith(".py")]
    modules = [name.removesuffix(".py").replace("/", ".") for name in names]
    return {MODULES_VARIABLE: " ".join(modules)}


def _line(judged: Judged) -> str:
    verdict = judged.verdict
    test = verdict.test.rpartition("::")[2]
    words = f"{judged.mutant.name}: {verdict.end} ({judged.seconds:.1f} s)"
    if verdict.end is End.KILLED:
        return f"{words} by {test}: {verdict.detail[:100]}"
    return f"{words} {test} {verdict.detail}".rstrip()


def say_aloud(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
