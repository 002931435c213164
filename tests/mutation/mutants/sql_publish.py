"""Mutants of publication and schema changes in PostgreSQL (section C, A12, D2)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, integration, mutant, on_postgres

_PUBLISH = "storage/sql/functions/publish.sql"
_TABLES = "storage/sql/functions/tables.sql"
_CATALOG = "storage/postgres/catalog.py"
_LOCKS = "test_postgres_locks.py"

MUTANTS = (
    mutant(
        "publish_ignores_epoch",
        "B6 C2",
        "A commit of a reclaimed range is published.",
        Edit(
            _PUBLISH,
            "AND b.epoch = (v_commit ->> 'epoch')::bigint AND b.state = 'leased'",
            "AND b.state = 'leased'",
        ),
        killers=on_postgres("test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing"),
    ),
    mutant(
        "publish_refuses_expired",
        "B6",
        "A commit whose lease expired is refused although nobody took the range.",
        Edit(
            _PUBLISH,
            "AND b.epoch = (v_commit ->> 'epoch')::bigint AND b.state = 'leased'",
            "AND b.epoch = (v_commit ->> 'epoch')::bigint AND b.state = 'leased'\n"
            "            AND b.expires_at > clock_timestamp()",
        ),
        killers=on_postgres("test_B6_expired_and_not_reclaimed_still_publishes"),
    ),
    mutant(
        "publish_lease_twice",
        "C2",
        "Two commits of one lease in one publication both count.",
        Edit(
            _PUBLISH,
            "IF NOT FOUND OR v_commit ->> 'lease_id' = ANY (v_leases) THEN",
            "IF NOT FOUND THEN",
        ),
        killers=on_postgres("test_C2_two_commits_without_files_of_one_lease_in_one_publication"),
    ),
    mutant(
        "publish_head_after_leases",
        "C1 C5",
        "The head row is locked after the leases: repeats of a publication judge each other.",
        Edit(
            _PUBLISH,
            "    SELECT * INTO v_head FROM lake FOR UPDATE;\n",
            "    SELECT * INTO v_head FROM lake;\n",
        ),
        Edit(
            _PUBLISH,
            "    outcomes := v_outcomes;\n",
            "    SELECT * INTO v_head FROM lake FOR UPDATE;\n    outcomes := v_outcomes;\n",
        ),
        killers=integration(_LOCKS, "test_C5_a_repeat_waits_for_the_publication_under_way"),
    ),
    mutant(
        "publish_without_head_lock",
        "C1 C3",
        "Publications do not wait for each other.",
        Edit(
            _PUBLISH,
            "    SELECT * INTO v_head FROM lake FOR UPDATE;\n",
            "    SELECT * INTO v_head FROM lake;\n",
        ),
        killers=integration(_LOCKS, "test_C5_a_repeat_waits_for_the_publication_under_way"),
    ),
    mutant(
        "publish_forgets_publications",
        "C5",
        "A repeated publication is judged again instead of being answered from its record.",
        Edit(
            _PUBLISH,
            "FROM snapshot s WHERE s.publication_id = p_publication_id;",
            "FROM snapshot s WHERE s.publication_id = p_publication_id AND s.snapshot_id < 0;",
        ),
        killers=on_postgres("test_C5_a_repeated_publication_is_answered_and_not_done_again"),
    ),
    mutant(
        "publish_keeps_intents",
        "C6",
        "Write intents are not consumed, so collection later deletes a published file.",
        Edit(
            _PUBLISH,
            "                    DELETE FROM write_intent w WHERE w.file_id = ANY (v_files);\n",
            "",
        ),
        killers=on_postgres("test_C6_a_publish_consumes_the_intent"),
    ),
    mutant(
        "publish_intents_unchecked",
        "C6",
        "A file is published although its write intent is gone.",
        Edit(_PUBLISH, "IF v_count <> cardinality(v_files) THEN", "IF false THEN"),
        killers=on_postgres("test_C6_collection_that_removed_the_intent_first_wins"),
    ),
    mutant(
        "publish_intents_unlocked",
        "C6",
        "Write intents are counted without a lock, while collection is removing one.",
        Edit(
            _PUBLISH,
            "                 ORDER BY w.file_id FOR UPDATE) locked;",
            "                 ORDER BY w.file_id) locked;",
        ),
        killers=integration(_LOCKS, "test_C6_a_collection_under_way_is_waited_for"),
    ),
    mutant(
        "publish_time_repeats",
        "C4",
        "A publication after the clock stepped back gets an earlier time than the one before.",
        Edit(
            _PUBLISH,
            "    published_at := greatest(clock_timestamp(),"
            " v_head.published_at + interval '1 microsecond',\n",
            "    published_at := greatest(clock_timestamp(),\n",
        ),
        killers=integration(
            _LOCKS, "test_C4_a_clock_that_stepped_back_gives_later_times_all_the_same"
        ),
    ),
    mutant(
        "publish_into_closed_time",
        "C4",
        "A publication gets a time that was answered before.",
        Edit(
            _PUBLISH,
            "interval '1 microsecond',\n"
            "                             v_head.closed_until + interval '1 microsecond');",
            "interval '1 microsecond');",
        ),
        killers=integration(_LOCKS, "test_C4_a_clock_that_stepped_back_does_not_open_closed_times"),
    ),
    mutant(
        "schema_change_into_closed_time",
        "C4",
        "A schema change gets a time that was answered before.",
        Edit(
            _TABLES,
            "interval '1 microsecond',\n"
            "                       v_head.closed_until + interval '1 microsecond');",
            "interval '1 microsecond');",
        ),
        killers=integration(_LOCKS, "test_C4_a_clock_that_stepped_back_does_not_open_closed_times"),
    ),
    mutant(
        "schema_change_time_repeats",
        "C4",
        "A schema change after the clock stepped back gets an earlier time.",
        Edit(
            _TABLES,
            "v_time := greatest(clock_timestamp(),"
            " v_head.published_at + interval '1 microsecond',\n",
            "v_time := greatest(clock_timestamp(),\n",
        ),
        killers=integration(
            _LOCKS, "test_C4_a_clock_that_stepped_back_gives_later_times_all_the_same"
        ),
    ),
    mutant(
        "close_time_not_kept",
        "C4",
        "A time is answered without being closed.",
        Edit(_TABLES, "    UPDATE lake SET closed_until = p_time;\n", ""),
        killers=integration(_LOCKS, "test_C4_a_clock_that_stepped_back_does_not_open_closed_times"),
    ),
    mutant(
        "close_time_in_future",
        "C4 D2",
        "A time that has not come is closed and answered.",
        Edit(_TABLES, "ELSIF p_time > clock_timestamp() THEN", "ELSIF false THEN"),
        killers=on_postgres("test_C4_a_time_that_has_not_come_is_not_closed"),
    ),
    mutant(
        "watermark_covers_unpublished",
        "C3 D3",
        "The watermark is one position too high.",
        Edit(
            _PUBLISH,
            "greatest(watermark[v_shard + 1], v_mark);",
            "greatest(watermark[v_shard + 1], v_mark) + 1;",
        ),
        killers=on_postgres("test_C3_the_watermark_is_the_longest_terminal_prefix_and_never_falls"),
    ),
    mutant(
        "watermark_jumps_over_gaps",
        "C3 D3",
        "The watermark jumps to the end of what was just published.",
        Edit(
            _PUBLISH,
            "        v_mark := watermark[v_shard + 1];\n",
            "        v_mark := (SELECT min((c ->> 'lo')::bigint) FROM unnest(v_accepted) c\n"
            "                    WHERE (c ->> 'shard')::integer = v_shard);\n",
        ),
        killers=on_postgres("test_C3_the_watermark_is_the_longest_terminal_prefix_and_never_falls"),
    ),
    mutant(
        "watermark_goes_back",
        "C3",
        "A publication starts from an older snapshot's watermark, so other shards fall back.",
        Edit(
            _PUBLISH,
            "    watermark := v_head.watermark;\n",
            "    watermark := (SELECT s.watermark FROM snapshot s\n"
            "                   ORDER BY s.snapshot_id DESC OFFSET 1 LIMIT 1);\n",
        ),
        killers=on_postgres("test_C3_publishing_on_one_shard_leaves_the_others_where_they_are"),
    ),
    mutant(
        "publish_breaker_off",
        "B8",
        "Crashing entries are quarantined however many they are.",
        Edit(_PUBLISH, ") > p_quarantine_max THEN", ") > p_quarantine_max + 1000000 THEN"),
        killers=on_postgres(
            "test_B8_one_publication_cannot_outrun_the_breaker",
            "test_B8_a_rising_rate_stops_quarantining",
        ),
    ),
    mutant(
        "publish_keeps_lease",
        "C1 C2",
        "A published range stays leased and is claimed again.",
        Edit(
            _PUBLISH,
            "WHERE b.lease_id = ANY (v_leases::bigint[]);",
            "WHERE -b.lease_id = ANY (v_leases::bigint[]);",
        ),
        killers=on_postgres("test_C1_snapshot_files_ack_and_watermark_become_visible_together"),
    ),
    mutant(
        "publish_frees_no_bytes",
        "A11 C1",
        "Published bytes still count as backlog.",
        Edit(
            _PUBLISH,
            "SET terminal_bytes = d.terminal_bytes + v_count",
            "SET terminal_bytes = d.terminal_bytes + 0 * v_count",
        ),
        killers=on_postgres("test_C1_snapshot_files_ack_and_watermark_become_visible_together"),
    ),
    mutant(
        "read_back_always_absent",
        "C5",
        "What became of a publication is always answered with: nothing.",
        Edit(
            _CATALOG,
            "        return None if row is None else _published(row)\n",
            "        return None\n",
        ),
        killers=on_postgres("test_C5_a_repeated_publication_is_answered_and_not_done_again"),
    ),
    mutant(
        "read_back_does_not_wait",
        "C5",
        "A publication that is still under way is read back as absent.",
        Edit(
            _CATALOG,
            '                await connection.execute("SELECT 1 FROM lake FOR UPDATE")\n',
            "",
        ),
        killers=integration(_LOCKS, "test_C5_reading_back_waits_for_a_publication_under_way"),
    ),
    mutant(
        "drop_does_not_wait",
        "A12",
        "A drop is published while entries accepted before it are not terminal.",
        Edit(
            _TABLES,
            "ELSIF EXISTS (SELECT 1 FROM unnest(v_table.closing_positions, v_head.watermark)",
            "ELSIF EXISTS (SELECT 1"
            " FROM unnest(v_table.closing_positions[1:0], v_head.watermark[1:0])",
        ),
        killers=on_postgres("test_A12_a_drop_closes_the_door_and_waits_for_what_was_accepted"),
    ),
    mutant(
        "drop_overtakes_append",
        "A12",
        "A drop notes the ends of the shards while an append is under way.",
        Edit(_TABLES, "    PERFORM pg_advisory_xact_lock(7202, v_id);\n", ""),
        killers=integration(_LOCKS, "test_A12_a_drop_waits_for_an_append_under_way"),
    ),
    mutant(
        "schema_change_overtakes_append",
        "A12",
        "A schema change does not wait for appends under way.",
        Edit(_TABLES, "    PERFORM pg_advisory_xact_lock(7202, p_table_id);\n", ""),
        killers=integration(_LOCKS, "test_A12_a_schema_change_waits_for_an_append_under_way"),
    ),
    mutant(
        "schema_change_stops_ingest",
        "A12 C7",
        "A schema change holds its table while it waits for the head row, and appends with it.",
        Edit(
            _TABLES,
            "    PERFORM 1 FROM lake FOR UPDATE;\n"
            "    PERFORM pg_advisory_xact_lock(7202, p_table_id);\n",
            "    PERFORM pg_advisory_xact_lock(7202, p_table_id);\n"
            "    PERFORM 1 FROM lake FOR UPDATE;\n",
        ),
        killers=integration(_LOCKS, "test_C7_a_schema_change_that_waits_does_not_stop_appends"),
    ),
    mutant(
        "schema_change_of_any_version",
        "A12",
        "A schema change made for another version is applied.",
        Edit(_TABLES, "ELSIF v_table.version <> p_expected_version THEN", "ELSIF false THEN"),
        killers=on_postgres(
            "test_A12_a_schema_change_meets_the_version_it_expects_or_changes_nothing"
        ),
    ),
    mutant(
        "expired_snapshot_is_answered",
        "D2",
        "An expired snapshot is answered as if it were retained.",
        Edit(_CATALOG, 'if row["expired_at"] is not None:', "if False:"),
        killers=on_postgres("test_D2_expired_snapshots_say_so_and_name_the_oldest"),
    ),
    mutant(
        "quarantine_of_replayed_entries",
        "D4 B9",
        "An entry that was replayed is still told as quarantined.",
        Edit(
            "storage/postgres/bus.py",
            "WHERE q.kind = 'entry' AND q.successor_batch_id IS NULL LIMIT 1",
            "WHERE q.kind = 'entry' LIMIT 1",
        ),
        killers=on_postgres("test_B9_a_replay_is_one_new_entry_and_recorded_once"),
    ),
)
