"""B8 and B9: when an entry is set aside, when it is not, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from actors.coordinator import RangeEnd, RangeReport
from actors.range_files import EncodeFile
from actors.staging import EncoderUnsound
from lakebus.errors import Unavailable
from lakebus.schemas import TableSchema
from storage.bus.interface import BatchState
from storage.files.parquet import EncodedFile, encode_data_file
from storage.memory_clock import ManualClock
from storage.rows.segment import decode_single_entry
from tests.unit.actors_rig import Overlay, Rig, failing_encoder, with_settings

POISON = 666


def poisoned(*bad: int) -> EncodeFile:
    """An encoder that refuses, as a codec would, the ids `bad`."""
    return failing_encoder(
        lambda ids: pa.ArrowInvalid("bad value") if set(ids) & set(bad) else None
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def rig(clock: ManualClock) -> Rig:
    return Rig(shards=1, clock=clock, quarantine_attempts=3)


async def turns(
    rig: Rig, *, encode: EncodeFile, count: int = 1, store: Any = None, step_s: float = 10
) -> list[RangeReport]:
    """Ranges one after the other by one worker, time passing in between."""
    publisher = rig.publisher()
    publisher.start()
    coordinator = rig.coordinator(publisher=publisher, encode=encode, store=store)
    reports = []
    for _ in range(count):
        report = await coordinator.run_once()
        if report is not None:
            reports.append(report)
        rig.clock.advance_s(step_s)  # type: ignore[attr-defined]
    await coordinator.stop()
    await publisher.stop()
    return reports


async def test_B8_a_verdict_sets_one_entry_aside_and_its_neighbours_are_published(
    rig: Rig,
) -> None:
    events = await rig.create()
    good = [await rig.append((events, [i, i + 100]), ordering="a") for i in range(5)]
    bad = await rig.append((events, [POISON, 5]), ordering="a")
    good += [await rig.append((events, [i, i + 100]), ordering="a") for i in range(6, 9)]

    (report,) = await turns(rig, encode=poisoned(POISON))

    assert report.end is RangeEnd.PUBLISHED
    assert (report.entries, report.quarantined, report.rows) == (9, 1, 16)
    assert await rig.drained()
    assert POISON not in await rig.ids()
    status = await rig.bus.batch(bad.receipt.batch_id)
    assert status is not None
    assert status.state is BatchState.QUARANTINED
    assert status.reason == "ArrowInvalid: bad value"
    for accepted in good:
        neighbour = await rig.bus.batch(accepted.receipt.batch_id)
        assert neighbour is not None
        assert neighbour.state is BatchState.PUBLISHED
    assert rig.metrics.value("lakebus_quarantined_entries_total", cause="verdict") == 1


async def test_B9_a_quarantined_entry_keeps_its_own_bytes_and_nobody_elses(rig: Rig) -> None:
    events, notes = await rig.create("events"), await rig.create("notes")
    await rig.append((events, [1]), ordering="a")
    await rig.append((events, [POISON, 7]), (notes, [8]), ordering="a")
    await turns(rig, encode=poisoned(POISON))
    (item,) = await rig.bus.quarantine_items()
    parts = decode_single_entry(item.payload)
    assert [(p.table_id, p.batch.column(0).to_pylist()) for p in parts] == [
        (events.table_id, [POISON, 7]),
        (notes.table_id, [8]),
    ]
    assert item.attempts == 1


async def test_B8_several_bad_entries_are_found_at_once(rig: Rig) -> None:
    events = await rig.create()
    for i in range(32):
        await rig.append((events, [i]), ordering="a")
    bad = {3, 4, 17, 31}
    (report,) = await turns(rig, encode=poisoned(*bad))
    assert (report.entries, report.quarantined) == (32, 4)
    assert set(await rig.ids()) == set(range(32)) - bad


async def test_A8_a_bad_part_takes_the_whole_entry_along(rig: Rig) -> None:
    events, notes = await rig.create("events"), await rig.create("notes")
    await rig.append((events, [1]), (notes, [POISON]), ordering="a")
    await rig.append((events, [2]), (notes, [3]), ordering="a")
    (report,) = await turns(rig, encode=poisoned(POISON))
    assert report.quarantined == 1
    assert set(await rig.ids()) == {2, 3}


async def test_B8_when_too_many_fail_the_fault_is_ours_and_nothing_is_set_aside(
    rig: Rig,
) -> None:
    rig.settings = with_settings(rig.settings, verdicts_max=3)
    events = await rig.create()
    for i in range(8):
        await rig.append((events, [i]), ordering="a")
    (report,) = await turns(rig, encode=poisoned(*range(8)))
    assert report.end is RangeEnd.FAILED
    assert await rig.bus.quarantine_items() == []


async def test_B8_an_unsound_encoder_condemns_nothing_and_ends_the_process(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
        raise pa.ArrowInvalid("a broken library")

    reports = await turns(rig, encode=encode, count=rig.settings.failures_max)
    assert [r.end for r in reports] == [RangeEnd.RELEASED] * rig.settings.failures_max
    assert [role for role, _ in rig.deaths.seen] == ["coordinator"]
    assert await rig.bus.quarantine_items() == []
    (healthy,) = await turns(rig, encode=encode_data_file)
    assert healthy.end is RangeEnd.PUBLISHED


async def test_B8_an_unsound_encoder_does_not_even_begin_to_claim(rig: Rig) -> None:
    def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
        raise pa.ArrowInvalid("a broken library")

    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    coordinator = rig.coordinator(publisher=rig.publisher(), encode=encode)
    with pytest.raises(EncoderUnsound):
        await coordinator.start()
    await coordinator.stop()
    assert rig.lake.state.ranges == {}


async def test_B8_a_range_that_fails_only_as_a_whole_is_halved(rig: Rig) -> None:
    events = await rig.create()
    for i in range(4):
        await rig.append((events, [i]), ordering="a")
    encode = failing_encoder(
        lambda ids: pa.ArrowInvalid("too many at once") if len(ids) > 2 else None
    )
    reports = await turns(rig, encode=encode, count=3)
    assert [r.end for r in reports] == [
        RangeEnd.FAILED,
        RangeEnd.PUBLISHED,
        RangeEnd.PUBLISHED,
    ]
    assert set(await rig.ids()) == {0, 1, 2, 3}


async def test_B8_a_failure_that_does_not_repeat_is_no_verdict(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    failures = iter([True, True])
    encode = failing_encoder(
        lambda ids: pa.ArrowInvalid("a bit flipped") if next(failures, False) else None
    )
    reports = await turns(rig, encode=encode, count=2)
    assert [r.end for r in reports] == [RangeEnd.FAILED, RangeEnd.PUBLISHED]
    assert await rig.bus.quarantine_items() == []


async def test_B8_an_entry_that_fails_oddly_is_set_aside_after_n_times_alone(rig: Rig) -> None:
    events = await rig.create()
    bad = await rig.append((events, [POISON]), ordering="a")
    for i in range(3):
        await rig.append((events, [i]), ordering="a")
    encode = failing_encoder(lambda ids: KeyError("odd") if POISON in ids else None)

    reports = await turns(rig, encode=encode, count=12)

    assert await rig.drained()
    assert set(await rig.ids()) == {0, 1, 2}
    (item,) = await rig.bus.quarantine_items()
    assert item.batch_id == bad.receipt.batch_id
    assert item.reason == "KeyError: 'odd'"
    lone = [r for r in reports if r.end is RangeEnd.FAILED and r.lease.hi - r.lease.lo == 1]
    assert len(lone) == 3
    assert [p.batch.column(0).to_pylist() for p in decode_single_entry(item.payload)] == [[POISON]]
    assert rig.metrics.value("lakebus_quarantined_entries_total", cause="crash") == 1


async def test_B8_a_worker_that_cannot_pass_its_canary_counts_nothing(rig: Rig) -> None:
    """Two odd failures alone, then the store goes away: no third failure, however often."""
    events = await rig.create()
    await rig.append((events, [POISON]), ordering="a")
    odd: Callable[[list[int]], Exception] = lambda ids: KeyError("odd")  # noqa: E731
    await turns(rig, encode=failing_encoder(odd), count=2)

    async def put_new(key: str, data: bytes) -> None:
        raise Unavailable("away")

    away = Overlay(rig.store, put_new=put_new)
    reports = await turns(rig, encode=failing_encoder(odd), count=20, store=away)
    assert {r.end for r in reports} == {RangeEnd.RELEASED}
    assert await rig.bus.quarantine_items() == []


async def test_B8_the_canary_leaves_no_object_behind(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [POISON]), ordering="a")
    encode = failing_encoder(lambda ids: KeyError("odd"))
    await turns(rig, encode=encode, count=3)
    assert [key async for key, _ in rig.store.list()] == []
    assert {intent.kind for intent in await rig.upkeep.intents()} == {"data"}


async def test_E4_a_canary_that_may_be_there_has_a_write_intent(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [POISON]), ordering="a")
    encode = failing_encoder(lambda ids: KeyError("odd"))

    async def delete(key: str) -> None:
        raise Unavailable("away")

    await turns(rig, encode=encode, count=4, store=Overlay(rig.store, delete=delete))
    left = {key async for key, _ in rig.store.list("canary/")}
    assert left
    canaries = [intent for intent in await rig.upkeep.intents() if intent.kind == "canary"]
    assert {f"canary/{intent.file_id}.parquet" for intent in canaries} == left


async def test_B8_a_rising_rate_stops_quarantining_and_the_rest_goes_on() -> None:
    rig = Rig(
        shards=1,
        clock=ManualClock(),
        quarantine_attempts=1,
        quarantine_rate_max=1,
        retry_backoff_ms=1_500,
    )
    events = await rig.create()
    for i in (POISON, 1, POISON + 1, 2):
        await rig.append((events, [i]), ordering="a")
    encode = failing_encoder(lambda ids: KeyError("odd") if any(i >= POISON for i in ids) else None)
    await turns(rig, encode=encode, count=16, step_s=1)
    assert set(await rig.ids()) == {1, 2}
    assert len(await rig.bus.quarantine_items()) == 1
    assert rig.metrics.value("lakebus_quarantine_stopped_total") >= 1
    assert not await rig.drained()


async def test_B9_damage_keeps_the_bytes_as_they_are(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    (segment,) = rig.lake.state.segments.values()
    damaged = bytearray(segment.payload)
    damaged[-1] ^= 0xFF
    segment.payload = bytes(damaged)
    (report,) = await turns(rig, encode=encode_data_file)
    assert report.quarantined == 1
    (item,) = await rig.bus.quarantine_items()
    assert item.payload == bytes(damaged)
    assert item.reason.startswith("Corrupt: ")
