"""Checks of the bus's order: one shard for an ordering key, order after receipts, no gaps (A7)."""

from __future__ import annotations

from tests.history.anomalies import Kind
from tests.history.stories import Knowledge, Story


def check_positions(known: Knowledge) -> None:
    shards: dict[int, list[Story]] = {}
    for place, story in known.by_place.items():
        shards.setdefault(place[0], []).append(story)
    for stories in shards.values():
        stories.sort(key=_position)
        _check_order(known, stories)
    _check_shard_choice(known)
    if known.history.closed:
        _check_gaps(known, shards)


def _position(story: Story) -> int:
    assert story.place is not None
    return story.place[1]


def _check_order(known: Knowledge, stories: list[Story]) -> None:
    """Going up the shard, the latest begin so far must not be after a receipt still to come."""

    latest: Story | None = None
    for story in stories:
        assert story.acknowledged_at is not None
        if latest is not None and story.acknowledged_at < latest.begin:
            assert story.place is not None
            assert latest.place is not None
            known.findings.add(
                Kind.ORDER_INVERSION,
                f"request {latest.request} was sent after the receipt of {story.request} and has "
                f"the lower position on shard {story.place[0]}: {latest.place[1]} < "
                f"{story.place[1]}",
                [story.attempts[0], latest.attempts[0]],
            )
        if latest is None or story.begin > latest.begin:
            latest = story


def _check_shard_choice(known: Knowledge) -> None:
    chosen: dict[tuple[int, str, str | frozenset[str]], Story] = {}
    for story in known.by_place.values():
        asked = story.first
        if asked.ordering_key is None and asked.bad_rows:
            continue  # the set of tables includes those of rejected rows, which are not recorded
        # Without an ordering key the set of tables orders; a key is never equal to a set.
        what = asked.ordering_key if asked.ordering_key is not None else frozenset(asked.tables)
        first = chosen.setdefault((story.serial, asked.principal, what), story)
        assert first.place is not None
        assert story.place is not None
        if first.place[0] != story.place[0]:
            known.findings.add(
                Kind.SHARD_CHANGE,
                f"requests {first.request} and {story.request} of {asked.principal} have one "
                f"ordering and are on shards {first.place[0]} and {story.place[0]}",
                [first.attempts[0], story.attempts[0]],
            )


def _check_gaps(known: Knowledge, shards: dict[int, list[Story]]) -> None:
    """Positions that no receipt names must be explained by requests of unknown outcome, or by
    entries that the catalog knows (the successors of quarantined ones)."""

    skipped = () if known.end_state is None else known.end_state.skipped
    other = _places_elsewhere(known)
    missing = 0
    where: list[str] = []
    for shard, stories in sorted(shards.items()):
        below = known.history.base.get(shard, 0)
        top = _position(stories[-1]) + 1
        if stories[0].place is not None and _position(stories[0]) < below:
            known.findings.add(
                Kind.POSITION_GAP,
                f"shard {shard} gave position {_position(stories[0])} again, below {below}",
                [stories[0].attempts[0]],
            )
            continue
        lost = sum(
            min(hi, top) - max(lo, below) for s, lo, hi in skipped if s == shard and lo < top
        )
        elsewhere = sum(s == shard and below <= p < top for s, p in other)
        gap = top - below - len(stories) - lost - elsewhere
        if gap > 0:
            missing += gap
            where.append(f"{gap} on shard {shard} below {top}")
    if missing > known.unresolved:
        known.findings.add(
            Kind.POSITION_GAP,
            f"{missing} positions belong to nobody ({', '.join(where)}), and only "
            f"{known.unresolved} requests have an unknown outcome",
        )


def _places_elsewhere(known: Knowledge) -> set[tuple[int, int]]:
    """Entries of nobody's request: the successors of quarantined entries."""

    from_quarantine = {successor for successor in known.quarantined.values() if successor}
    places = set()
    for batch_id in from_quarantine:
        _, shard, position = batch_id[1:].split("-")
        places.add((int(shard), int(position)))
    return places - known.by_place.keys()
