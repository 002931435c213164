"""Settings under which every job of maintenance works without rest, and meets every other."""

from __future__ import annotations

from collections.abc import Mapping

_KIB = 1024
_MIB = 1024 * _KIB

SMALL_FILE_BYTES = 128 * _KIB
SMALL_FILES_MAX = 24
#: As long as a query may take: less is refused.
SNAPSHOT_KEEP_S = 100.0
#: Longer than the outages that faults make, so that no publication is late by its own fault: an
#: intent that expires belongs to somebody who died.
INTENT_TTL_S = 120.0
PIN_TTL_S = 20.0
JOB_LEASE_S = 5.0

SETTINGS: Mapping[str, str] = {
    "LAKEBUS_MAINTENANCE_COMPACT_EVERY_S": "4",
    "LAKEBUS_MAINTENANCE_RETAIN_EVERY_S": "8",
    "LAKEBUS_MAINTENANCE_COLLECT_EVERY_S": "8",
    "LAKEBUS_MAINTENANCE_VALIDATE_EVERY_S": "75",
    # Small, so that a few minutes of rows fill several tiers.
    "LAKEBUS_MAINTENANCE_TARGET_FILE_BYTES": str(_MIB),
    "LAKEBUS_MAINTENANCE_SMALL_FILE_BYTES": str(SMALL_FILE_BYTES),
    "LAKEBUS_MAINTENANCE_SMALL_FILES_MAX": str(SMALL_FILES_MAX),
    "LAKEBUS_MAINTENANCE_COMPACT_INPUTS_MIN": "4",
    "LAKEBUS_MAINTENANCE_COMPACT_INPUT_BYTES_MAX": str(16 * _MIB),
    "LAKEBUS_MAINTENANCE_REWRITE_MEMORY_BYTES": str(192 * _MIB),
    "LAKEBUS_MAINTENANCE_SNAPSHOT_KEEP_HOURS": str(SNAPSHOT_KEEP_S / 3600),
    "LAKEBUS_MAINTENANCE_SNAPSHOT_KEEP_COUNT": "60",
    # Pins and the re-check protect readers, not the window: it may be as short as a pin.
    "LAKEBUS_MAINTENANCE_SAFETY_WINDOW_S": str(PIN_TTL_S),
    "LAKEBUS_MAINTENANCE_ORPHAN_WINDOW_HOURS": str(45 / 3600),
    "LAKEBUS_BUS_INTENT_TTL_S": str(INTENT_TTL_S),
    "LAKEBUS_MAINTENANCE_JOBS_AT_ONCE": "2",
    "LAKEBUS_MAINTENANCE_JOB_LEASE_S": str(JOB_LEASE_S),
    "LAKEBUS_MAINTENANCE_JOB_ATTEMPTS_MAX": "50",
    "LAKEBUS_QUERY_PIN_TTL_S": str(PIN_TTL_S),
}
