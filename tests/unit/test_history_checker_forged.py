"""The checker rejects what breaks the contract: one small change to a valid history each time."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.anomalies import Kind
from tests.history.checker import check
from tests.history.end_state import EndState
from tests.history.forging import OPERATORS, Forged, valid_history
from tests.history.forging.forged import Operator
from tests.history.record import Line, assemble

_SEEDS = range(60)


@cache
def _valid(seed: int) -> tuple[list[Line], EndState]:
    lines, end_state = valid_history(seed)
    assert check(assemble([lines]), end_state).ok
    return lines, end_state


def _operators_of(kind: Kind) -> list[Operator]:
    return [operator for operator, kinds in OPERATORS if kinds[0] is kind]


def _forge(operator: Operator, seed: int) -> Forged | None:
    forged = Forged(*_valid(seed), random.Random(seed))
    return forged if operator(forged) else None


#: The contract numbers that each kind breaks are in `tests.history.anomalies.CONTRACT`.
@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value.replace(" ", "_"))
def test_a_forged_history_shows_exactly_its_anomaly(kind: Kind) -> None:
    """For each kind there is a forgery that shows it and nothing else; the history that it was
    made from is accepted."""
    for seed in _SEEDS:
        for operator in _operators_of(kind):
            forged = _forge(operator, seed)
            if forged is None:
                continue
            history = assemble([forged.lines])
            verdicts = [check(history, forged.end_state), check(history)]
            if any(verdict.kinds == {kind} for verdict in verdicts):
                return
    raise AssertionError(f"no forgery shows {kind.value} alone")


@pytest.mark.parametrize(
    ("operator", "kinds"), OPERATORS, ids=[operator.__name__ for operator, _ in OPERATORS]
)
def test_every_mutation_is_caught(operator: Operator, kinds: tuple[Kind, ...]) -> None:
    applied = 0
    for seed in _SEEDS:
        forged = _forge(operator, seed)
        if forged is None:
            continue
        applied += 1
        verdict = check(assemble([forged.lines]), forged.end_state)
        assert verdict.kinds & set(kinds), f"seed {seed}: {verdict}"
        if applied == 12:
            break
    assert applied >= 5, f"{operator.__name__} found a place in {applied} histories only"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), chance=st.integers(0, 2**32), data=st.data())
def test_random_mutations_of_random_histories_are_caught(
    seed: int, chance: int, data: st.DataObject
) -> None:
    operator, kinds = data.draw(st.sampled_from(OPERATORS))
    lines, end_state = valid_history(seed, steps=200)
    forged = Forged(lines, end_state, random.Random(chance))
    if operator(forged):
        verdict = check(assemble([forged.lines]), forged.end_state)
        assert verdict.kinds & set(kinds), str(verdict)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutations_leave_the_valid_history_as_it_was(seed: int) -> None:
    lines, end_state = _valid(seed)
    before = list(lines)
    for operator, _ in OPERATORS:
        _forge(operator, seed)
    assert lines == before
    assert check(assemble([lines]), end_state).ok
