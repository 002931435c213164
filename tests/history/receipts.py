"""Checks of receipts, keys and conflicts (contract A2 to A6)."""

from __future__ import annotations

from tests.history.anomalies import Kind
from tests.history.record import Fail, Ingest, Ok, Operated, Receipted
from tests.history.stories import Knowledge, Story, may_be_stored, parse_batch_id

#: Refusals that judge the request itself. The key is looked up before any of them, so none may
#: meet an attempt that began after the request had its receipt (A3). `backpressure` is not here:
#: a process that is out of memory for bodies refuses by the same code before it knows the key.
JUDGED_AFTER_THE_KEY = frozenset(
    {
        "rows_invalid",
        "schema_version_mismatch",
        "table_not_found",
    }
)


def check_receipts(known: Knowledge) -> None:
    for story in known.stories.values():
        if story.receipt is not None and story.accepted is not None:
            _check_words(known, story)
        if len(story.attempts) > 1:
            _check_attempts(known, story)
        elif isinstance(story.attempts[0].end, Fail):
            _check_conflict(known, story, story.attempts[0], story.attempts[0].end)


def _check_words(known: Knowledge, story: Story) -> None:
    """The receipt describes the request and its own entry."""

    receipt, asked = story.receipt, story.accepted
    assert receipt is not None
    assert asked is not None
    wrong: list[str] = []
    if receipt.target != asked.target:
        wrong.append(f"target {receipt.target}, asked for {asked.target}")
    rows = sum(asked.tables.values())
    if (receipt.rows, receipt.rows_rejected) != (rows, asked.bad_rows):
        wrong.append(
            f"{receipt.rows} rows and {receipt.rows_rejected} rejected, sent were {rows} and "
            f"{asked.bad_rows}"
        )
    parsed = parse_batch_id(receipt.batch_id)
    if parsed is None:
        wrong.append(f"{receipt.batch_id!r} is no batch id")
    else:
        shard, position = parsed[1]
        token = receipt.token
        if token.positions != {shard: position + 1} or token.own != ((shard, position),):
            wrong.append(f"the token does not own batch {receipt.batch_id}: {token}")
    if wrong:
        known.findings.add(
            Kind.WRONG_RECEIPT, f"request {story.request}: {'; '.join(wrong)}", story.attempts[:1]
        )


def _check_attempts(known: Knowledge, story: Story) -> None:
    accepted = [a for a in story.attempts if isinstance(a.end, Ok)]
    for operated in accepted:
        _check_same(known, story, operated)
    for operated in story.attempts:
        if isinstance(operated.end, Fail):
            _check_refusal(known, story, operated, operated.end)


def _check_same(known: Knowledge, story: Story, operated: Operated) -> None:
    assert isinstance(operated.end, Ok)
    assert isinstance(operated.end.result, Receipted)
    assert isinstance(operated.operation, Ingest)
    receipt, first = operated.end.result.receipt, story.receipt
    assert first is not None
    if receipt.batch_id != first.batch_id:
        other = parse_batch_id(receipt.batch_id)
        if other is None or other[0] == story.serial:  # a lost line takes its keys with it
            known.findings.add(
                Kind.DUPLICATE,
                f"request {story.request} has two entries: {first.batch_id}, {receipt.batch_id}",
                [_first_ok(story), operated],
            )
    elif _variant(story) != operated.operation.variant:
        known.findings.add(
            Kind.MISSED_CONFLICT,
            f"request {story.request} was accepted with two payloads, both as {first.batch_id}",
            [_first_ok(story), operated],
        )
    elif receipt != first:
        known.findings.add(
            Kind.UNSTABLE_RECEIPT,
            f"request {story.request} got two different receipts for batch {first.batch_id}",
            [_first_ok(story), operated],
        )


def _check_refusal(known: Knowledge, story: Story, operated: Operated, end: Fail) -> None:
    if end.code == "idempotency_conflict":
        _check_conflict(known, story, operated, end)
    elif end.code == "quarantined":
        if story.receipt is not None and end.batch_id not in (None, story.receipt.batch_id):
            known.findings.add(
                Kind.DUPLICATE,
                f"request {story.request} has two entries: {story.receipt.batch_id}, and "
                f"{end.batch_id} that was quarantined",
                [_first_ok(story), operated],
            )
    elif (
        end.code in JUDGED_AFTER_THE_KEY
        and story.acknowledged_at is not None
        and story.acknowledged_at < operated.begin
    ):
        known.findings.add(
            Kind.BROKEN_REPLAY,
            f"request {story.request} had its receipt, and was then refused as {end.code}",
            [_first_ok(story), operated],
        )


def _check_conflict(known: Knowledge, story: Story, operated: Operated, end: Fail) -> None:
    """A conflict needs another payload under the key, sent before this attempt ended."""

    if end.code != "idempotency_conflict":
        return
    assert isinstance(operated.operation, Ingest)
    variant = operated.operation.variant
    other = any(
        isinstance(a.operation, Ingest)
        and a.operation.variant != variant
        and a.begin < end.at
        and may_be_stored(a)
        for a in story.attempts
    )
    if not other or _variant(story) == variant:
        known.findings.add(
            Kind.FALSE_CONFLICT,
            f"request {story.request} met a conflict, but its key has only this payload",
            [operated],
        )
    elif (
        end.batch_id is not None
        and story.receipt is not None
        and end.batch_id != story.receipt.batch_id
    ):
        known.findings.add(
            Kind.UNSTABLE_RECEIPT,
            f"the conflict of request {story.request} names batch {end.batch_id}, its receipt "
            f"says {story.receipt.batch_id}",
            [_first_ok(story), operated],
        )


def _variant(story: Story) -> int | None:
    """The variant that a receipt says is stored; None when there is no receipt."""

    return None if story.receipt is None or story.accepted is None else story.accepted.variant


def _first_ok(story: Story) -> Operated:
    return min(
        (a for a in story.attempts if isinstance(a.end, Ok)),
        key=lambda a: a.end.at if a.end is not None else 0,
    )
