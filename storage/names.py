"""Names in the database, for whoever writes SQL: without the tables, and what describes them."""

from __future__ import annotations

from typing import Final

SCHEMA: Final = "lakebus"
#: Rings of insert-only tables: `bus_segment_0..3` and `idem_0..2`.
SEGMENT_RING: Final = 4
KEY_RING: Final = 3
