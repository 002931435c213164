"""D6: tokens merge like a semilattice; D5: what we did not sign is refused."""

from __future__ import annotations

import contextlib
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import MalformedToken
from lakebus.tokens import OWN_ENTRIES_MAX, TokenCodec, VisibilityToken, merge_all

HISTORY = uuid.UUID(int=7, version=4)
CODEC = TokenCodec(bytes(range(32)))

#: A busy machine is no counterexample.
laws = settings(deadline=None)

_shards = st.integers(0, 5)
_positions = st.integers(0, 2**64 - 1)


def tokens(*, own_max: int = 8) -> st.SearchStrategy[VisibilityToken]:
    return st.builds(
        VisibilityToken,
        history=st.just(HISTORY),
        floor=st.integers(0, 2**64 - 1),
        positions=st.dictionaries(_shards, _positions, max_size=6),
        own=st.frozensets(st.tuples(_shards, _positions), max_size=own_max),
    )


@laws
@given(tokens(), tokens(), tokens())
def test_D6_merge_is_associative(
    a: VisibilityToken, b: VisibilityToken, c: VisibilityToken
) -> None:
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@laws
@given(tokens(), tokens())
def test_D6_merge_is_commutative(a: VisibilityToken, b: VisibilityToken) -> None:
    assert a.merge(b) == b.merge(a)


@laws
@given(tokens())
def test_D6_merge_is_idempotent(a: VisibilityToken) -> None:
    assert a.merge(a) == a


@laws
@given(tokens(own_max=60), tokens(own_max=60), tokens(own_max=60))
def test_D6_the_laws_hold_where_own_entries_are_dropped(
    a: VisibilityToken, b: VisibilityToken, c: VisibilityToken
) -> None:
    merged = a.merge(b).merge(c)
    assert len(merged.own) <= OWN_ENTRIES_MAX
    assert merged == a.merge(b.merge(c)) == c.merge(b).merge(a)
    assert merged.merge(a) == merged


@laws
@given(tokens(), tokens(), st.integers(0, 2**64 - 1), st.dictionaries(_shards, _positions))
def test_D6_a_merge_is_covered_exactly_when_both_are(
    a: VisibilityToken, b: VisibilityToken, snapshot_id: int, watermark: dict[int, int]
) -> None:
    both = a.covered_by(snapshot_id, watermark) and b.covered_by(snapshot_id, watermark)
    assert a.merge(b).covered_by(snapshot_id, watermark) == both


@laws
@given(st.lists(tokens(), max_size=5), st.randoms())
def test_D6_many_tokens_merge_in_any_order(many: list[VisibilityToken], random: object) -> None:
    shuffled = list(many)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert merge_all(many) == merge_all(shuffled)
    assert (merge_all(many) is None) == (not many)


def test_D3_a_token_is_covered_from_its_floor_and_all_its_positions_on() -> None:
    token = VisibilityToken(uuid.UUID(int=1), floor=5, positions={0: 3, 1: 2})
    assert token.covered_by(5, {0: 3, 1: 2})
    assert token.covered_by(9, {0: 4, 1: 9, 2: 1})
    assert not token.covered_by(4, {0: 3, 1: 2})
    assert not token.covered_by(9, {0: 2, 1: 9})
    assert not token.covered_by(9, {0: 3})


def test_D6_tokens_of_two_histories_do_not_merge() -> None:
    other = VisibilityToken(uuid.UUID(int=8, version=4))
    with pytest.raises(ValueError, match="histories"):
        VisibilityToken(HISTORY).merge(other)


@laws
@given(tokens(own_max=OWN_ENTRIES_MAX))
def test_D5_a_token_survives_its_text(token: VisibilityToken) -> None:
    assert CODEC.decode(CODEC.encode(token)) == token


@laws
@given(tokens(), st.integers(min_value=0), st.characters(codec="utf-8"))
def test_D5_a_changed_token_is_refused(token: VisibilityToken, at: int, put: str) -> None:
    text = CODEC.encode(token)
    at %= len(text)
    changed = text[:at] + put + text[at + 1 :]
    if changed == text:
        return
    with contextlib.suppress(MalformedToken):
        # base64 has spare bits at its end: another spelling of the same bytes is the same token.
        assert CODEC.decode(changed) == token


@laws
@given(tokens(), st.integers(1, 200))
def test_D5_a_token_that_was_cut_is_refused(token: VisibilityToken, cut: int) -> None:
    text = CODEC.encode(token)
    with pytest.raises(MalformedToken):
        CODEC.decode(text[: max(0, len(text) - cut)])


@laws
@given(tokens())
def test_D5_a_token_of_another_lake_is_refused(token: VisibilityToken) -> None:
    stranger = TokenCodec(bytes(reversed(range(32))))
    with pytest.raises(MalformedToken):
        CODEC.decode(stranger.encode(token))


@pytest.mark.parametrize(
    "text", ["", "lb1.", "lb2.abc", "x" * 9_000, "lb1." + "é" * 10, "lb1.===="]
)
def test_D5_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(MalformedToken):
        CODEC.decode(text)
