"""Mutants of the in-memory model: it is held to the same suite, so it must be as hard to break."""

from __future__ import annotations

from tests.mutation.mutant import Edit, in_memory, mutant

_RANGES = "storage/bus/memory_ranges.py"
_PUBLISH = "storage/catalog/memory_publish.py"
_BUS = "storage/bus/memory.py"
_DOOR = "storage/bus/memory_door.py"
_LAKE = "storage/memory_lake.py"
_CATALOG = "storage/catalog/memory.py"

MUTANTS = (
    mutant(
        "memory_publish_ignores_epoch",
        "B6 C2",
        "A commit of a reclaimed range is published.",
        Edit(
            _PUBLISH,
            "if held(lake, commit.lease) is None or commit.lease.lease_id in taken:",
            "if commit.lease.lease_id not in lake.state.ranges or commit.lease.lease_id in taken:",
        ),
        killers=in_memory("test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing"),
    ),
    mutant(
        "memory_publish_refuses_expired",
        "B6",
        "A commit whose lease expired is refused although nobody took the range.",
        Edit(
            _PUBLISH,
            "if held(lake, commit.lease) is None or commit.lease.lease_id in taken:",
            "row = held(lake, commit.lease)\n"
            "    if row is None or commit.lease.lease_id in taken or row.expires_at <= lake.now():",
        ),
        killers=in_memory("test_B6_expired_and_not_reclaimed_still_publishes"),
    ),
    mutant(
        "memory_renew_ignores_epoch",
        "B4",
        "A renewal by who lost the range extends the lease of its new owner.",
        Edit(
            _BUS,
            "row = ranges.held(self._lake, lease)\n            if row is not None:",
            "row = self._lake.state.ranges.get(lease.lease_id)\n            if row is not None:",
        ),
        killers=in_memory("test_B4_renewal_after_a_reclaim_changes_nothing"),
    ),
    mutant(
        "memory_release_ignores_epoch",
        "B4 B7",
        "Who lost a range can still give it back.",
        Edit(
            _BUS,
            "ranges.give_back(self._lake, ranges.held_or_lost(self._lake, lease))",
            "ranges.give_back(self._lake, self._lake.state.ranges[lease.lease_id])",
        ),
        killers=in_memory("test_B7_a_released_range_returns_at_once_and_uncounted"),
    ),
    mutant(
        "memory_claim_keeps_epoch",
        "B2 B6",
        "A claim does not issue a new epoch.",
        Edit(_RANGES, "    state.last_epoch += 1\n", "    state.last_epoch += 0\n"),
        killers=in_memory("test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing"),
    ),
    mutant(
        "memory_halving_off",
        "B8",
        "A range that failed is never halved.",
        Edit(_RANGES, "    if _is_lone(row):\n        row.lone", "    if True:\n        row.lone"),
        killers=in_memory("test_B8_an_expired_range_is_halved_and_nothing_of_it_is_lost"),
    ),
    mutant(
        "memory_quarantine_without_canary",
        "B8",
        "Every failure of a lone entry counts towards quarantine.",
        Edit(_RANGES, "row.lone_failures += int(showed_other_work)", "row.lone_failures += 1"),
        killers=in_memory("test_B8_expiry_alone_never_condemns"),
    ),
    mutant(
        "memory_breaker_off",
        "B8",
        "Crashing entries are quarantined however many they are.",
        Edit(_PUBLISH, "    if crashed:\n", "    if False:\n"),
        killers=in_memory("test_B8_a_rising_rate_stops_quarantining"),
    ),
    mutant(
        "memory_watermark_goes_back",
        "C3",
        "The watermark is the end of what was published last.",
        Edit(
            _PUBLISH,
            "    advance_watermark(shard)\n",
            "    advance_watermark(shard)\n    shard.watermark = lease.hi\n",
        ),
        killers=in_memory("test_C3_the_watermark_is_the_longest_terminal_prefix_and_never_falls"),
    ),
    mutant(
        "memory_time_repeats",
        "C4",
        "Two publications may have one time.",
        Edit(_LAKE, "            self.head.published_at + _MICROSECOND,\n", ""),
        killers=in_memory("test_C4_publication_times_strictly_increase"),
    ),
    mutant(
        "memory_closed_until_ignored",
        "C4",
        "A publication gets a time that was answered before.",
        Edit(_LAKE, "            self.state.closed_until + _MICROSECOND,\n", ""),
        killers=in_memory("test_C4_an_answered_time_is_closed"),
    ),
    mutant(
        "memory_forgets_publications",
        "C5",
        "A repeated publication is judged again.",
        Edit(_PUBLISH, "    if earlier is not None:\n", "    if False:\n"),
        killers=in_memory("test_C5_a_repeated_publication_is_answered_and_not_done_again"),
    ),
    mutant(
        "memory_keeps_intents",
        "C6",
        "Write intents are not consumed.",
        Edit(_PUBLISH, "        del state.intents[file.file_id]\n", ""),
        killers=in_memory("test_C6_a_publish_consumes_the_intent"),
    ),
    mutant(
        "memory_window_from_acceptance",
        "A13",
        "The window of a key counts from its acceptance only.",
        Edit(
            _BUS,
            "if entry.terminal_at is None or now <= entry.terminal_at + window:",
            "if now <= entry.accepted_at + window:",
        ),
        killers=in_memory("test_A13_the_window_counts_from_the_terminal_time"),
    ),
    mutant(
        "memory_schema_before_key",
        "A3",
        "The schema is judged before the key: a replay is refused after a schema change.",
        Edit(
            _DOOR,
            "    if scope is not None and (record := find_record(lake, scope)) is not None:\n",
            "    if stale := _stale_tables(lake, entry):\n        return SchemaStale(stale)\n"
            "    if scope is not None and (record := find_record(lake, scope)) is not None:\n",
        ),
        killers=in_memory("test_A3_a_replay_is_answered_after_a_schema_change_and_after_a_drop"),
    ),
    mutant(
        "memory_drop_does_not_wait",
        "A12",
        "A drop is published while entries accepted before it are not terminal.",
        Edit(
            _CATALOG, "if any(reached[shard] < needed for", "if any(reached[shard] < 0 * needed for"
        ),
        killers=in_memory("test_A12_a_drop_closes_the_door_and_waits_for_what_was_accepted"),
    ),
)
