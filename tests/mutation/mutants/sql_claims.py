"""Mutants of claims, leases and purging in PostgreSQL (section B, A13)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, integration, mutant, on_postgres

_CLAIM = "storage/sql/functions/claim_range.sql"
_RETURN = "storage/sql/functions/return_range.sql"
_PURGE = "storage/sql/functions/purge.sql"
_BUS = "storage/postgres/bus.py"
_LOCKS = "test_postgres_locks.py"

MUTANTS = (
    mutant(
        "reclaim_keeps_epoch",
        "B2 B6",
        "A reclaim does not issue a new epoch, so the paused owner is still believed.",
        Edit(_CLAIM, "SET hi = v_lease.hi, epoch = nextval('lease_epoch')", "SET hi = v_lease.hi"),
        killers=on_postgres("test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing"),
    ),
    mutant(
        "reclaim_not_counted",
        "B8",
        "An expired lease is not counted as an attempt.",
        Edit(_CLAIM, "            v_lease.attempt := v_lease.attempt + 1;\n", ""),
        killers=on_postgres("test_B8_an_expired_range_is_halved_and_nothing_of_it_is_lost"),
    ),
    mutant(
        "reclaim_not_halved",
        "B8",
        "An expired range is given out whole again, so its poison is never isolated.",
        Edit(_CLAIM, "IF v_lease.hi - v_lease.lo = 1 THEN\n", "IF true THEN\n"),
        killers=on_postgres("test_B8_an_expired_range_is_halved_and_nothing_of_it_is_lost"),
    ),
    mutant(
        "reclaim_condemns_without_canary",
        "B8",
        "The expiry of a lone entry counts although its worker never showed that it works.",
        Edit(
            _CLAIM,
            "IF v_lease.canary_epoch = v_lease.epoch OR EXISTS (",
            "IF true OR EXISTS (",
        ),
        killers=on_postgres("test_B8_expiry_alone_never_condemns"),
    ),
    mutant(
        "reclaim_takes_any_canary",
        "B8",
        "A canary noted under an earlier lease counts against a later worker.",
        Edit(
            _CLAIM,
            "IF v_lease.canary_epoch = v_lease.epoch OR",
            "IF v_lease.canary_epoch IS NOT NULL OR",
        ),
        killers=on_postgres("test_B8_a_canary_counts_for_its_own_epoch_only"),
    ),
    mutant(
        "reclaim_counts_earlier_publications",
        "B8",
        "What the worker published before its claim counts as proof that it works.",
        Edit(
            _CLAIM,
            "WHERE p.owner = v_lease.owner AND p.published_at > v_lease.claimed_at)",
            "WHERE p.owner = v_lease.owner)",
        ),
        killers=on_postgres("test_B8_what_was_published_before_the_claim_shows_nothing"),
    ),
    mutant(
        "isolation_lease_is_long",
        "B8",
        "A range that failed before gets a lease of full length: isolation takes ten ttl and more.",
        Edit(
            _CLAIM,
            "CASE WHEN v_lease.attempt > 0 THEN p_isolation_ttl ELSE p_ttl END",
            "p_ttl",
        ),
        killers=on_postgres(
            "test_B8_a_range_that_failed_gets_a_short_lease",
            "test_B8_one_poison_entry_delays_its_shard_by_at_most_ten_ttl",
        ),
    ),
    mutant(
        "reclaim_before_expiry",
        "B5",
        "A lease can be taken away shortly before its time.",
        Edit(_CLAIM, "b.expires_at <= v_now)", "b.expires_at <= v_now + interval '150 ms')"),
        killers=on_postgres("test_B5_a_lease_is_claimable_after_its_ttl_and_not_before"),
    ),
    mutant(
        "renew_by_client_clock",
        "B5",
        "A renewal counts from the client's clock.",
        Edit(_BUS, "SET expires_at = clock_timestamp()\n", "SET expires_at = $5::timestamptz\n"),
        Edit(
            _BUS,
            "                    self._isolation_ttl,\n"
            "                    self._ttl,\n                )\n"
            "        kept =",
            "                    self._isolation_ttl,\n                    self._ttl,\n"
            "                    SystemClock().utc_now(),\n                )\n        kept =",
        ),
        Edit(
            _BUS,
            "from lakebus.errors import Corrupt",
            "from lakebus.clock import SystemClock\nfrom lakebus.errors import Corrupt",
        ),
        killers=on_postgres("test_B5_the_clocks_of_clients_decide_nothing"),
    ),
    mutant(
        "claim_without_lock",
        "B2",
        "Two claimers read the same place to go on from, and both get the range.",
        Edit(
            _CLAIM,
            "s.next_append > c.next_claim FOR UPDATE OF c SKIP LOCKED;",
            "s.next_append > c.next_claim;",
        ),
        killers=integration(_LOCKS, "test_B2_two_claimers_at_one_place_get_two_ranges"),
    ),
    mutant(
        "claim_waits_for_foreign_transactions",
        "B3",
        "Entries are claimed only when no older transaction is open in the whole database.",
        Edit(
            _CLAIM,
            "WHERE l.shard = v_shard AND l.hi > v_next AND",
            "WHERE l.xmin::text::bigint < pg_snapshot_xmin(pg_current_snapshot())::text::bigint\n"
            "                            AND l.shard = v_shard AND l.hi > v_next AND",
        ),
        killers=on_postgres("test_B3_an_entry_is_claimable_whatever_transactions_are_open"),
    ),
    mutant(
        "claim_ignores_bytes",
        "B1",
        "A range may be larger than its budget of bytes.",
        Edit(_CLAIM, "OR v_bytes + v_log.entry_bytes[v_place] > p_bytes_max", "OR false"),
        killers=on_postgres("test_B1_a_claim_stays_within_its_bytes_and_takes_at_least_one"),
    ),
    mutant(
        "return_ignores_epoch",
        "B4 B7",
        "Who lost a range can still give it back, and takes it from its new owner.",
        Edit(_RETURN, "AND b.epoch = p_epoch AND b.state", "AND b.state"),
        killers=on_postgres("test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing"),
    ),
    mutant(
        "release_is_counted",
        "B7",
        "Giving a range back counts as a failed attempt.",
        Edit(
            _RETURN,
            "attempt = b.attempt + CASE WHEN p_failed THEN 1 ELSE 0 END",
            "attempt = b.attempt + 1",
        ),
        killers=on_postgres("test_B7_a_released_range_returns_at_once_and_uncounted"),
    ),
    mutant(
        "failure_not_halved",
        "B8",
        "A range that failed comes back whole.",
        Edit(
            _RETURN,
            "IF p_failed AND v_lease.hi - v_lease.lo > 1 THEN",
            "IF p_failed AND v_lease.hi - v_lease.lo > 1000000 THEN",
        ),
        killers=on_postgres("test_B8_a_failed_range_is_halved_too_and_both_halves_wait"),
    ),
    mutant(
        "failure_not_delayed",
        "B7",
        "A range that failed is claimable again at once.",
        Edit(_RETURN, "not_before = v_ready", "not_before = clock_timestamp()"),
        killers=on_postgres("test_B7_a_failure_counts_and_delays"),
    ),
    mutant(
        "renew_ignores_epoch",
        "B4",
        "A renewal by who lost the range extends the lease of its new owner.",
        Edit(_BUS, "AND b.epoch = r.epoch AND b.state", "AND b.state"),
        killers=on_postgres("test_B4_renewal_after_a_reclaim_changes_nothing"),
    ),
    mutant(
        "renew_in_any_order",
        "B4 C7",
        "A renewal locks its leases in the order in which they lie, and deadlocks with a publish.",
        Edit(_BUS, "     ORDER BY b.lease_id FOR UPDATE OF b)\n", "     FOR UPDATE OF b)\n"),
        killers=integration(
            _LOCKS, "test_B4_a_renewal_and_a_publication_of_the_same_leases_never_deadlock"
        ),
    ),
    mutant(
        "renew_refuses_expired",
        "B4",
        "A lease that expired and that nobody took cannot be renewed.",
        Edit(
            _BUS,
            "AND b.epoch = r.epoch AND b.state = 'leased'\n",
            "AND b.epoch = r.epoch AND b.state = 'leased' AND b.expires_at > clock_timestamp()\n",
        ),
        killers=on_postgres("test_B4_an_expired_lease_that_nobody_took_can_be_renewed"),
    ),
    mutant(
        "read_ignores_lease",
        "B6",
        "Who lost a range can still read it.",
        Edit(
            _BUS,
            "WHERE b.lease_id = $4 AND b.epoch = $5 AND b.state = 'leased')",
            "WHERE b.lease_id = $4 AND $5 > 0)",
        ),
        killers=on_postgres("test_B6_a_range_that_was_reclaimed_cannot_be_read"),
    ),
    mutant(
        "canary_ignores_epoch",
        "B8",
        "A canary of who lost the range counts against its new owner.",
        Edit(
            _BUS,
            'SET canary_epoch = epoch WHERE lease_id = $1 AND epoch = $2"',
            'SET canary_epoch = epoch WHERE lease_id = $1 AND epoch >= $2"',
        ),
        killers=on_postgres("test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing"),
    ),
    mutant(
        "purge_segments_not_terminal",
        "B10 A1",
        "A ring of segments is emptied although entries in it are not terminal.",
        Edit(
            _PURGE,
            "        AND r.left_at IS NOT NULL\n"
            "        AND NOT EXISTS (SELECT 1 FROM unnest(r.left_positions, h.watermark)\n",
            "        AND r.left_at IS NOT NULL\n"
            "        AND NOT EXISTS (SELECT 1"
            " FROM unnest(r.left_positions[1:0], h.watermark[1:0])\n",
        ),
        killers=on_postgres("test_B10_purge_keeps_whatever_is_not_terminal"),
    ),
    mutant(
        "purge_keys_not_terminal",
        "A13",
        "The window of a key counts from its acceptance only.",
        Edit(
            _PURGE,
            "r.terminal_at IS NULL\n       AND NOT EXISTS (SELECT 1 FROM"
            " unnest(r.left_positions, h.watermark)\n",
            "r.terminal_at IS NULL\n       AND NOT EXISTS (SELECT 1 FROM"
            " unnest(r.left_positions[1:0], h.watermark[1:0])\n",
        ),
        killers=on_postgres("test_A13_the_window_counts_from_the_terminal_time"),
    ),
    mutant(
        "purge_keys_within_window",
        "A13",
        "Keys go as soon as their entries are terminal.",
        Edit(
            _PURGE,
            "greatest(r.left_at, r.terminal_at) + p_window;",
            "greatest(r.left_at, r.terminal_at);",
        ),
        killers=on_postgres("test_A13_the_window_counts_from_the_terminal_time"),
    ),
    mutant(
        "purge_keys_window_from_rotation",
        "A13",
        "The window of keys counts from when their generation was left.",
        Edit(_PURGE, "greatest(r.left_at, r.terminal_at) + p_window;", "r.left_at + p_window;"),
        killers=on_postgres("test_A13_the_window_counts_from_the_terminal_time"),
    ),
    mutant(
        "purge_log_not_terminal",
        "B10",
        "Log rows go although their entries are not terminal.",
        Edit(_PURGE, "WHERE l.hi <= h.watermark[l.shard + 1]\n", "WHERE l.hi > 0\n"),
        killers=on_postgres("test_B10_purge_keeps_whatever_is_not_terminal"),
    ),
    mutant(
        "purge_log_before_keys",
        "A13 A3",
        "Log rows go although keys still point at them, so a replay finds no receipt.",
        Edit(
            _PURGE,
            "           AND l.accepted_at < (SELECT min(r.began_at) FROM bus_ring r"
            " WHERE r.kind = 'key')\n",
            "",
        ),
        killers=on_postgres("test_A13_the_window_counts_from_the_terminal_time"),
    ),
    mutant(
        "purge_waits_for_locks",
        "B10",
        "Emptying a ring waits for seconds for its lock, and every append queues up behind it.",
        Edit(
            _PURGE,
            "truncate_segments(p_ring integer) RETURNS boolean LANGUAGE plpgsql\n"
            "SET lock_timeout = '50ms' AS",
            "truncate_segments(p_ring integer) RETURNS boolean LANGUAGE plpgsql\n"
            "SET lock_timeout = '5s' AS",
        ),
        killers=on_postgres("test_B10_purge_never_holds_up_ingest"),
    ),
    mutant(
        "rotate_keys_without_fence",
        "A5 A3",
        "Key generations change while an append is writing to the old one.",
        Edit(
            _PURGE,
            "    PERFORM pg_advisory_xact_lock(7201, 0);\n"
            "    -- failpoint: rotate_keys.after_fence\n",
            "    -- failpoint: rotate_keys.after_fence\n",
        ),
        killers=integration(_LOCKS, "test_A5_a_rotation_of_keys_does_not_overtake_an_append"),
    ),
    mutant(
        "rotate_segments_without_fence",
        "A1 B10",
        "Segment rings change while an append writes to the old one, which is then emptied.",
        Edit(
            _PURGE,
            "    PERFORM pg_advisory_xact_lock(7201, 0);\n"
            "    -- failpoint: switch_segments.after_fence\n",
            "    -- failpoint: switch_segments.after_fence\n",
        ),
        killers=integration(_LOCKS, "test_B10_a_rotation_of_segments_does_not_overtake_an_append"),
    ),
)
