"""Every mutant applies to the tree as it is, and names tests that are there."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutation.known_tests import is_known
from tests.mutation.mutant import Edit, PatchStale, mutant
from tests.mutation.mutants import ALL
from tests.mutation.workspace import TREE
from tests.unit.test_contract_index import LAST_OF_SECTION


def test_every_mutant_applies_and_is_a_program() -> None:
    wrong = []
    for one in ALL:
        try:
            texts = one.texts(TREE)
        except PatchStale as error:
            wrong.append(f"{one.name}: {error}")
            continue
        for name, text in texts.items():
            assert text != (TREE / name).read_text(encoding="utf-8")
            if name.endswith(".py"):
                ast.parse(text, filename=f"{one.name}: {name}")
    assert wrong == []


def test_every_mutant_names_tests_that_are_there() -> None:
    missing = [(one.name, test) for one in ALL for test in one.killers if not is_known(TREE, test)]
    assert missing == []


def test_names_are_unique_and_mutants_break_product_code_only() -> None:
    assert [name for name, times in Counter(one.name for one in ALL).items() if times > 1] == []
    packages = {file.partition("/")[0] for one in ALL for file in one.files}
    assert packages == {"lakebus", "storage", "actors", "serve_app"}


def test_the_mutants_are_spread_over_the_contract() -> None:
    numbers = {number for one in ALL for number in one.statements}
    assert [n for n in numbers if not 1 <= int(n[1:]) <= LAST_OF_SECTION[n[0]]] == []
    sections = Counter(number[0] for one in ALL for number in one.statements)
    assert all(sections[letter] >= 20 for letter in "ABCD")


def test_an_edit_applies_exactly_once() -> None:
    edit = Edit("a.py", "one", "two")
    assert edit.applied_to("one and three") == "two and three"
    for text in ("three", "one and one"):
        with pytest.raises(PatchStale, match=r"a\.py"):
            edit.applied_to(text)


def test_a_mutant_without_statement_or_killer_is_refused() -> None:
    edit = Edit("a.py", "one", "two")
    for statements, killers in (("", ("tests/x.py",)), ("A1", ())):
        with pytest.raises(ValueError, match="killers"):
            mutant("x", statements, "breaks", edit, killers=killers)
