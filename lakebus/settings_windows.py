"""Times of which one must be longer than another: checked together, at every start.

Nothing that is asked here is needed to keep a promise: pins, intents and the last look before a
delete do that, whatever the times. But a lake whose times are the wrong way round loses work, or
refuses what was promised a moment ago, and says so only then.
"""

from __future__ import annotations

from lakebus.settings_table import BusSettings, MaintenanceSettings, QuerySettings

#: A write intent outlives the lease under which its file is written so many times.
_LEASES_OF_AN_INTENT = 2


def window_problems(
    *, bus: BusSettings, query: QuerySettings, maintenance: MaintenanceSettings
) -> list[str]:
    """What to change, in a sentence each."""

    problems = []
    if maintenance.safety_window_s < query.pin_ttl_s:
        problems.append(
            f"maintenance.safety_window_s ({maintenance.safety_window_s:g}) must be at least "
            f"query.pin_ttl_s ({query.pin_ttl_s:g}): a file stays for as long as a replica that "
            "cannot reach the catalog may believe in its pin; raise the first or lower the second"
        )
    deadline_s, kept_s = query.timeout_ms_max / 1_000, maintenance.snapshot_keep_hours * 3_600
    if kept_s < deadline_s:
        problems.append(
            f"maintenance.snapshot_keep_hours ({maintenance.snapshot_keep_hours:g}, which is "
            f"{kept_s:g} s) must be at least query.timeout_ms_max ({query.timeout_ms_max}): a "
            "snapshot that a query was answered from would expire before another query has read "
            "it; raise the first or lower the second"
        )
    least_s = _LEASES_OF_AN_INTENT * bus.lease_ttl_ms / 1_000
    if bus.intent_ttl_s < least_s:
        problems.append(
            f"bus.intent_ttl_s ({bus.intent_ttl_s:g}) must be at least {least_s:g}, "
            f"{_LEASES_OF_AN_INTENT} times bus.lease_ttl_ms: a range may be written for as long as "
            "its lease is renewed; raise the first or lower the second"
        )
    return problems
