"""Bus payloads: every entry comes back as it went in, alone or with others, or not at all."""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import Corrupt
from storage.rows.segment import (
    ZSTD_ENTRIES_MIN,
    EntryPart,
    decode_segment,
    decode_single_entry,
    encode_segment,
    single_entry_segment,
)


def part(start: int, rows: int, *, table_id: int = 1, version: int = 1) -> EntryPart:
    numbers = range(start, start + rows)
    batch = pa.record_batch(
        {
            "1": pa.array(list(numbers), pa.int64()),
            "2": pa.array([None if n % 3 == 0 else f"text {n}" for n in numbers], pa.string()),
            "3": pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([n.to_bytes(16, "big") for n in numbers], pa.binary(16))
            ),
        }
    )
    return EntryPart(table_id, version, batch)


def same(got: list[EntryPart], wanted: list[EntryPart]) -> bool:
    return len(got) == len(wanted) and all(
        (a.table_id, a.schema_version) == (b.table_id, b.schema_version) and a.batch.equals(b.batch)
        for a, b in zip(got, wanted, strict=True)
    )


_entry = st.lists(
    st.builds(
        lambda start, rows, table, version: part(start, rows, table_id=table, version=version),
        st.integers(0, 1000),
        st.integers(0, 20),
        st.integers(1, 3),
        st.integers(1, 2),
    ),
    min_size=0,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_entry, min_size=1, max_size=ZSTD_ENTRIES_MIN + 2))
def test_round_trip_of_any_group(entries: list[list[EntryPart]]) -> None:
    encoded = encode_segment(entries)
    assert len(encoded.entry_indexes) == len(encoded.entry_bytes) == len(entries)
    assert all(size >= 1 for size in encoded.entry_bytes)
    segment = decode_segment(encoded.payload)
    for index, wanted in zip(encoded.entry_indexes, entries, strict=True):
        assert same(segment.parts(index), wanted)


def test_A9_an_entry_needs_only_its_own_index() -> None:
    entries = [[part(i * 10, 10), part(i, 1, table_id=2)] for i in range(5)]
    encoded = encode_segment(entries)
    for place in (4, 0, 2):
        assert same(
            decode_segment(encoded.payload).parts(encoded.entry_indexes[place]), entries[place]
        )


def test_A9_a_part_of_another_shape_stays_apart() -> None:
    odd = EntryPart(1, 1, pa.record_batch({"1": pa.array(["not a number"])}))
    entries = [[part(0, 2)], [odd], [part(2, 2)]]
    encoded = encode_segment(entries)
    segment = decode_segment(encoded.payload)
    assert all(
        same(segment.parts(index), wanted)
        for index, wanted in zip(encoded.entry_indexes, entries, strict=True)
    )


@pytest.mark.parametrize("entries", [1, ZSTD_ENTRIES_MIN - 1, ZSTD_ENTRIES_MIN])
def test_slices_are_stored_without_what_lies_around_them(entries: int) -> None:
    whole = part(0, 5000)
    sliced = EntryPart(1, 1, whole.batch.slice(4990, 7))
    encoded = encode_segment([[sliced]] * entries)
    assert same(decode_segment(encoded.payload).parts(encoded.entry_indexes[-1]), [sliced])
    assert len(encoded.payload) < 3000


def test_shares_add_up_to_about_the_payload() -> None:
    encoded = encode_segment([[part(0, 100)], [part(100, 300)]])
    assert 0.8 * len(encoded.payload) < sum(encoded.entry_bytes) <= len(encoded.payload)
    assert encoded.entry_bytes[1] == pytest.approx(3 * encoded.entry_bytes[0], rel=0.01)


def test_large_groups_are_packed_tighter() -> None:
    few = encode_segment([[part(i * 50, 50)] for i in range(ZSTD_ENTRIES_MIN - 1)])
    many = encode_segment([[part(i * 50, 50)] for i in range(ZSTD_ENTRIES_MIN)])
    assert len(many.payload) < len(few.payload)


def test_decoding_is_without_copies() -> None:
    encoded = encode_segment([[part(0, 1000)], [part(1000, 1000)]])
    segment = decode_segment(encoded.payload)
    first, second = (segment.parts(index)[0].batch for index in encoded.entry_indexes)
    assert first.column(0).buffers()[1].address == second.column(0).buffers()[1].address


def test_E6_every_damaged_byte_is_noticed() -> None:
    payload = encode_segment([[part(0, 3)], [part(3, 2, table_id=2)]]).payload
    for at in range(len(payload)):
        damaged = bytearray(payload)
        damaged[at] ^= 0x01
        with pytest.raises(Corrupt):
            decode_segment(bytes(damaged))
    for cut in range(0, len(payload), 7):
        with pytest.raises(Corrupt):
            decode_segment(payload[:cut])
    with pytest.raises(Corrupt):
        decode_segment(payload + b"\0")


@pytest.mark.parametrize(
    "item",
    [
        (0, 0, 99, 1, 1),
        (0, -1, 1, 1, 1),
        (0, 0, -1, 1, 1),
        (1, 0, 1, 1, 1),
        (-1, 0, 1, 1, 1),
        (0, 0, 1, 2, 1),
        (0, 0, 1, 1, 2),
    ],
)
def test_an_index_of_another_segment_is_corrupt(item: tuple[int, ...]) -> None:
    segment = decode_segment(encode_segment([[part(0, 3)]]).payload)
    with pytest.raises(Corrupt):
        segment.parts(msgspec.msgpack.encode([item]))
    with pytest.raises(Corrupt):
        segment.parts(b"\xc1")


def test_B9_a_single_entry_carries_its_own_index() -> None:
    parts = [part(0, 3), part(5, 2, table_id=2), part(9, 4)]
    payload = single_entry_segment(parts)
    assert same(decode_single_entry(payload), parts)
    group = encode_segment([parts]).payload
    with pytest.raises(Corrupt, match="group"):
        decode_single_entry(group)
