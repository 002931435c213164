"""The copy of the tree that mutants are put into, and the processes that look at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.json_reader.building import INSTALLED_NAME, build, compiler
from tests.mutation.mutant import Mutant

TREE = Path(__file__).resolve().parents[2]
_PARTS = (
    "lakebus", "storage", "actors", "serve_app", "cluster", "migrations", "tests", "pyproject.toml",
)  # fmt: skip
#: What is built is built anew, from the source of the copy.
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
_READER = Path("storage/rows/json_columns.c")
_READER_SOURCES = frozenset({str(_READER), "storage/rows/json_values.h"})


class NotBuilt(Exception):
    """The mutant's C is no program."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended; `exit_code` is None when its time was up."""

    exit_code: int | None
    output: str


class Workspace:
    """A copy of the tree below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        for part in _PARTS:
            source, target = TREE / part, self.root / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=_LEFT_OUT)
            else:
                shutil.copyfile(source, target)
        self._build()

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Holds the mutant in the copy. Raises PatchStale and NotBuilt."""

        texts = mutant.texts(self.root)
        before = {name: (self.root / name).read_text(encoding="utf-8") for name in texts}
        try:
            self._write(texts)
            yield
        finally:
            self._write(before)

    def _write(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            path = self.root / name
            path.write_text(text, encoding="utf-8")
            # Bytecode is known by the second and the size of its source: both may stay the same.
            for kept in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
                kept.unlink()
        if not _READER_SOURCES.isdisjoint(texts):
            self._build()

    def _build(self) -> None:
        """The compiled reader, where an installation has one."""

        if compiler() is None:
            return
        source = self.root / _READER
        try:
            build(source, source.with_name(INSTALLED_NAME))
        except subprocess.CalledProcessError as error:
            raise NotBuilt(error.stderr.decode(errors="replace")[-400:]) from None

    def run(
        self, arguments: Sequence[str], *, environ: Mapping[str, str], within_s: float
    ) -> Ended:
        """Runs Python in the copy, in a process group of its own, which ends when time is up."""

        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env={**_outer(), **environ, "PYTHONPATH": str(self.root)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            output, _ = process.communicate()
            return Ended(None, output)
        return Ended(process.returncode, output)


def _outer() -> dict[str, str]:
    """Our environment, but what an outer pytest says to itself."""

    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
