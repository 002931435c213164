"""What a mutant is, and how its edits are put into a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class PatchStale(Exception):
    """The text that a mutant replaces is not in its file exactly once any more."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One exact text of one file (relative to the tree), and what stands there instead."""

    file: str
    find: str
    put: str

    def applied_to(self, text: str) -> str:
        """The mutated text. Raises PatchStale unless `find` occurs exactly once."""

        found = text.count(self.find)
        if found != 1:
            raise PatchStale(f"{self.file}: {found} places read {self.find[:60]!r}")
        return text.replace(self.find, self.put)


@dataclass(frozen=True, slots=True)
class Mutant:
    """`statements`: what it breaks, by number of the contract. `breaks`: how, in a sentence.
    `killers`: the pytest ids that must notice, fastest first."""

    name: str
    statements: tuple[str, ...]
    breaks: str
    edits: tuple[Edit, ...]
    killers: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(edit.file for edit in self.edits))

    def texts(self, tree: Path) -> dict[str, str]:
        """The mutated files' new texts, by name. Raises PatchStale."""

        texts: dict[str, str] = {}
        for edit in self.edits:
            before = texts.get(edit.file)
            if before is None:
                before = (tree / edit.file).read_text(encoding="utf-8")
            texts[edit.file] = edit.applied_to(before)
        return texts


def mutant(
    name: str, statements: str, breaks: str, *edits: Edit, killers: tuple[str, ...]
) -> Mutant:
    """`statements` as text, like "B4 B6"."""

    numbers = tuple(statements.split())
    if not numbers or not killers or not edits:
        raise ValueError(f"{name}: a mutant needs statements, edits and killers")
    return Mutant(name, numbers, breaks, edits, killers)


def on_postgres(*tests: str) -> tuple[str, ...]:
    """Tests of the conformance suite, on PostgreSQL."""

    return tuple(f"tests/test_conformance_postgres.py::{test}" for test in tests)


def in_memory(*tests: str) -> tuple[str, ...]:
    """Tests of the conformance suite, on the in-memory model."""

    return tuple(f"tests/test_conformance_memory.py::{test}" for test in tests)


def unit(file: str, *tests: str) -> tuple[str, ...]:
    """Unit tests; without names the whole file."""

    path = f"tests/unit/{file}"
    return tuple(f"{path}::{test}" for test in tests) or (path,)


def integration(file: str, *tests: str) -> tuple[str, ...]:
    path = f"tests/integration/{file}"
    return tuple(f"{path}::{test}" for test in tests) or (path,)


def matrix(file: str, *tests: str) -> tuple[str, ...]:
    """Tests of the failure matrix, which stop transactions at their failpoints."""

    path = f"tests/matrix/{file}"
    return tuple(f"{path}::{test}" for test in tests) or (path,)
