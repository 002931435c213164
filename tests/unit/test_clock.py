"""Times and identities as text."""

from __future__ import annotations

import datetime as dt
import uuid
from zoneinfo import ZoneInfo

from lakebus.clock import format_time, new_id_text


def test_times_are_told_apart_where_clocks_are_turned_back() -> None:
    zone = ZoneInfo("Europe/Berlin")
    once = dt.datetime(2026, 10, 25, 2, 30, tzinfo=zone)
    again = once.replace(fold=1)
    assert once == again
    assert format_time(once) == "2026-10-25T00:30:00.000000Z"
    assert format_time(again) == "2026-10-25T01:30:00.000000Z"
    assert format_time(once.astimezone(dt.UTC)) == format_time(once)


def test_ids_are_uuids_and_differ() -> None:
    texts = {new_id_text() for _ in range(100)}
    assert len(texts) == 100
    for text in texts:
        made = uuid.UUID(text)
        assert (str(made), made.version, made.variant) == (text, 4, uuid.RFC_4122)
