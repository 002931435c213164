"""Mutants of what decides over files, snapshots and pins: the SQL of maintenance (E, C6, D8)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, matrix, mutant, on_postgres

_FOLDER = "storage/sql/functions"
_SWAP = f"{_FOLDER}/swap.sql"
_EXPIRY = f"{_FOLDER}/expiry.sql"
_PINS = f"{_FOLDER}/pins.sql"
_COLLECTION = f"{_FOLDER}/collection.sql"
_JOBS = f"{_FOLDER}/jobs.sql"
_ERASURE = f"{_FOLDER}/erasure.sql"
_RACES = "test_upkeep_faults.py"

_PIN_OR_EXPIRY = "test_E3_a_pin_comes_before_an_expiry_or_is_refused"
_RECHECK = "test_E3_the_recheck_pardons_what_somebody_needs"
_GRANTED = "test_E3_a_pin_is_granted_only_for_what_is_retained"
_EXPIRES = "test_E8_a_snapshot_expires_when_it_is_too_old_and_beyond_the_count"
_CONSUMED = "test_C6_a_swap_consumes_the_write_intents_of_its_files"
_TAGS = "test_E8_tags_are_created_once_listed_and_dropped"
_LOST_LEASE = "test_an_expired_lease_is_claimed_by_the_next_worker"
_OWED = "test_E7_erasure_is_done_again_before_a_restored_lake_is_read"

_SWAPS = (
    mutant(
        "swap_takes_files_that_ended",
        "E2 C7",
        "A swap may replace files that another swap or a delete has replaced already.",
        Edit(
            _SWAP,
            " AND f.table_id = p_table_id AND f.last_snapshot IS NULL;",
            " AND f.table_id = p_table_id;",
        ),
        killers=on_postgres("test_E2_of_two_swaps_with_a_common_input_one_wins"),
    ),
    mutant(
        "swap_takes_files_of_other_tables",
        "E2",
        "A swap of one table may replace files of another.",
        Edit(
            _SWAP,
            " AND f.table_id = p_table_id AND f.last_snapshot IS NULL;",
            " AND f.last_snapshot IS NULL;",
        ),
        killers=on_postgres("test_E2_inputs_must_be_live_files_of_the_table_each_named_once"),
    ),
    mutant(
        "swap_without_head_lock",
        "E2 C4",
        "A swap looks at its inputs before it waits for the publication under way.",
        Edit(_SWAP, "    PERFORM 1 FROM lake FOR UPDATE;\n", ""),
        killers=matrix(_RACES, "test_E2_a_swap_that_waits_for_another_finds_its_inputs_gone"),
    ),
    mutant(
        "swap_rows_unchecked",
        "E1",
        "A swap is published although its files hold fewer or more rows than it says.",
        Edit(_SWAP, "IF v_rows_out <> v_rows_in - p_rows_removed THEN", "IF false THEN"),
        killers=on_postgres("test_E1_a_swap_that_changes_the_number_of_rows_is_refused"),
    ),
    mutant(
        "swap_without_intent",
        "C6",
        "A swap names a file whose write intent was collected.",
        Edit(_SWAP, "IF v_count <> cardinality(v_files) THEN", "IF false THEN"),
        killers=on_postgres(_CONSUMED),
    ),
    mutant(
        "swap_leaves_its_intents",
        "C6 E4",
        "The intents of files that a swap published stay, and expire into orphans.",
        Edit(_SWAP, "    DELETE FROM write_intent w WHERE w.file_id = ANY (v_files);\n", ""),
        killers=on_postgres(_CONSUMED),
    ),
    mutant(
        "swap_locks_no_intents",
        "C6 E4",
        "A collection may take the intents of a swap that is being published.",
        Edit(_SWAP, "ORDER BY w.file_id FOR UPDATE) locked;", "ORDER BY w.file_id) locked;"),
        killers=matrix(_RACES, "test_C6_collection_passes_over_an_intent_that_a_swap_has_locked"),
    ),
    mutant(
        "swap_is_judged_again",
        "C5",
        "A swap whose reply was lost is not answered from its record.",
        Edit(_SWAP, "    IF FOUND THEN\n        RETURN;\n    END IF;\n", ""),
        killers=on_postgres("test_C5_a_swap_whose_reply_was_lost_is_answered_from_its_record"),
    ),
)

_EXPIRIES = (
    mutant(
        "expiry_ignores_the_age",
        "E8",
        "A snapshot beyond the count expires however young it is.",
        Edit(_EXPIRY, "OR w.published_at >= v_before)", "OR w.published_at >= 'infinity')"),
        killers=on_postgres(_EXPIRES),
    ),
    mutant(
        "expiry_ignores_the_count",
        "E8",
        "A snapshot beyond the age expires however few there are.",
        Edit(_EXPIRY, "WHERE w.snapshot_id >= v_counted\n", "WHERE w.snapshot_id IS NULL\n"),
        killers=on_postgres(_EXPIRES),
    ),
    mutant(
        "expiry_takes_the_head",
        "E8 D2",
        "The newest snapshot expires, too.",
        Edit(_EXPIRY, "WHERE w.snapshot_id >= v_counted\n", "WHERE w.snapshot_id > v_counted\n"),
        Edit(
            _EXPIRY,
            "                    max(w.snapshot_id))\n",
            "                    max(w.snapshot_id) + 1)\n",
        ),
        killers=on_postgres("test_E8_the_head_never_expires"),
    ),
    mutant(
        "expiry_takes_tagged_snapshots",
        "E8",
        "A tag does not keep its snapshot.",
        Edit(
            _EXPIRY,
            "\n       AND NOT EXISTS (SELECT 1 FROM tag t WHERE t.snapshot_id = s.snapshot_id);\n"
            "    -- failpoint: expire_snapshots.after_snapshots",
            ";\n    -- failpoint: expire_snapshots.after_snapshots",
        ),
        killers=on_postgres("test_E8_a_tag_keeps_its_snapshot_for_ever"),
    ),
    mutant(
        "expiry_without_lock",
        "E3 E8",
        "Snapshots expire beside a pin that is just being granted for them.",
        Edit(
            _EXPIRY,
            "        PERFORM pg_advisory_xact_lock(7204, 0);\n"
            "        -- failpoint: expire_snapshots.after_lock",
            "        -- failpoint: expire_snapshots.after_lock",
        ),
        killers=matrix(_RACES, _PIN_OR_EXPIRY),
    ),
    mutant(
        "tag_of_an_expired_snapshot",
        "E8 E3",
        "A tag may name a snapshot whose files may be gone.",
        Edit(
            _EXPIRY,
            "     WHERE s.snapshot_id = p_snapshot_id AND s.expired_at IS NULL\n",
            "     WHERE s.snapshot_id = p_snapshot_id\n",
        ),
        killers=on_postgres(_TAGS),
    ),
    mutant(
        "tag_dropped_with_others_left",
        "E8",
        "A snapshot expires with the first of its tags that is dropped.",
        Edit(
            _EXPIRY,
            "\n       AND NOT EXISTS (SELECT 1 FROM tag t WHERE t.snapshot_id = s.snapshot_id);\n"
            "    -- failpoint: drop_tag.after_expiry",
            ";\n    -- failpoint: drop_tag.after_expiry",
        ),
        killers=on_postgres(_TAGS),
    ),
    mutant(
        "tag_takes_a_young_snapshot_along",
        "E8",
        "A snapshot that is not old expires with its last tag.",
        Edit(
            _EXPIRY,
            "       AND s.snapshot_id < (SELECT l.oldest_snapshot_id FROM lake l)\n",
            "",
        ),
        killers=on_postgres("test_E8_a_tag_dropped_before_its_snapshot_is_old_expires_nothing"),
    ),
)

_PINNED = (
    mutant(
        "pin_is_renewed_after_its_end",
        "E3",
        "A pin that has expired is renewed as if its files had never been free.",
        Edit(
            _PINS,
            "     WHERE p.pin_id = p_pin_id"
            " AND (p.expires_at IS NULL OR p.expires_at > clock_timestamp())\n",
            "     WHERE p.pin_id = p_pin_id\n",
        ),
        killers=on_postgres("test_E3_an_expired_pin_keeps_nothing"),
    ),
    mutant(
        "pin_of_an_expired_snapshot",
        "E3",
        "A pin is granted for a snapshot that has expired.",
        Edit(
            _PINS,
            "WHERE s.snapshot_id = w.id AND s.expired_at IS NULL)",
            "WHERE s.snapshot_id = w.id)",
        ),
        killers=on_postgres(_GRANTED),
    ),
    mutant(
        "pin_from_an_expired_floor_on",
        "E3",
        "A pin is granted from a snapshot on that has expired.",
        Edit(_PINS, "WHERE p_floor < l.oldest_snapshot_id AND (", "WHERE false AND ("),
        killers=on_postgres(_GRANTED),
    ),
    mutant(
        "pin_is_widened",
        "E3",
        "Who holds a pin may lower its floor below what is retained.",
        Edit(_PINS, "(v_floor IS NULL OR p_floor < v_floor)", "v_floor IS NULL"),
        killers=on_postgres(
            "test_E3_a_pin_may_be_renewed_below_the_oldest_snapshot_and_never_widened"
        ),
    ),
    mutant(
        "pin_without_lock",
        "E3",
        "A pin is granted beside an expiry or a last look that does not see it.",
        Edit(_PINS, "    PERFORM pg_advisory_xact_lock_shared(7204, 0);\n", ""),
        killers=matrix(_RACES, _PIN_OR_EXPIRY),
    ),
)

_COLLECTED = (
    mutant(
        "collection_of_the_oldest_snapshots_files",
        "E3 D8",
        "A file that the oldest retained snapshot still needs is condemned.",
        Edit(
            _COLLECTION,
            "WHERE f.last_snapshot <= (SELECT least(",
            "WHERE f.last_snapshot <= 1 + (SELECT least(",
        ),
        killers=on_postgres("test_E3_files_of_retained_snapshots_are_never_condemned"),
    ),
    mutant(
        "collection_of_tagged_files",
        "E3 E8",
        "The files of a tagged snapshot are condemned.",
        Edit(
            _COLLECTION,
            "WHERE t.snapshot_id >= f.first_snapshot AND t.snapshot_id < f.last_snapshot)",
            "WHERE false)",
        ),
        killers=on_postgres("test_E3_a_tag_keeps_the_files_of_its_snapshot_until_it_is_dropped"),
    ),
    mutant(
        "collection_of_pinned_files",
        "E3",
        "The files of a pinned snapshot are condemned.",
        Edit(
            _COLLECTION,
            "WHERE n.id >= f.first_snapshot AND n.id < f.last_snapshot)",
            "WHERE false)",
        ),
        killers=on_postgres("test_E3_a_pin_of_snapshots_keeps_their_files_and_no_others"),
    ),
    mutant(
        "collection_below_a_pin",
        "E3",
        "What a pin keeps from its floor on is condemned.",
        Edit(
            _COLLECTION,
            "least(l.oldest_snapshot_id, (SELECT min(floor) FROM live))",
            "l.oldest_snapshot_id",
        ),
        killers=on_postgres("test_E3_a_pin_keeps_what_every_snapshot_from_its_floor_on_needs"),
    ),
    mutant(
        "condemned_since_the_file_ended",
        "E3",
        "The safety window counts from the file's last snapshot and not from its condemnation.",
        Edit(
            _COLLECTION,
            "'condemned', clock_timestamp(), NULL)::condemned_file)\n      INTO v_found FROM (",
            "'condemned', (SELECT s.published_at FROM snapshot s"
            " WHERE s.snapshot_id = u.last_snapshot), NULL)::condemned_file)\n"
            "      INTO v_found FROM (",
        ),
        killers=on_postgres("test_E3_a_file_is_condemned_then_deleting_then_deleted"),
    ),
    mutant(
        "deletes_within_the_safety_window",
        "E3",
        "A file is deleted as soon as it is condemned.",
        Edit(
            _COLLECTION,
            "AND c.condemned_at < clock_timestamp() - p_window\n",
            "AND c.condemned_at < clock_timestamp() + p_window\n",
        ),
        killers=on_postgres("test_E3_a_file_is_condemned_then_deleting_then_deleted"),
    ),
    mutant(
        "deletes_without_a_second_look",
        "E3",
        "A condemned file is deleted although somebody needs it again.",
        Edit(_COLLECTION, "AND f.file_id <> ALL (v_unneeded))", "AND false)"),
        killers=on_postgres(_RECHECK),
    ),
    mutant(
        "deletes_what_is_being_written",
        "E3 C6",
        "A condemned name is deleted although a write intent holds it.",
        Edit(
            _COLLECTION,
            "AND NOT EXISTS (SELECT 1 FROM write_intent w WHERE w.file_id = c.file_id)\n",
            "",
        ),
        killers=on_postgres(_RECHECK),
    ),
    mutant(
        "deletes_payloads_of_waiting_entries",
        "E3 A1",
        "A condemned payload is deleted although the bus still names it.",
        Edit(
            _COLLECTION,
            "\n       AND NOT EXISTS (SELECT 1 FROM bus_log l WHERE l.payload_key = c.object_key);",
            ";",
        ),
        killers=matrix(_RACES, "test_E3_a_payload_that_the_bus_names_is_pardoned"),
    ),
    mutant(
        "deletes_beside_a_pin",
        "E3",
        "The last look excludes nobody who begins to need a file meanwhile.",
        Edit(
            _COLLECTION,
            "        PERFORM pg_advisory_xact_lock(7204, 0);\n"
            "        -- failpoint: begin_deletes.after_lock",
            "        -- failpoint: begin_deletes.after_lock",
        ),
        killers=matrix(_RACES, "test_E3_a_pin_waits_for_the_check_that_gives_files_up"),
    ),
    mutant(
        "deletes_beyond_the_limit",
        "E5",
        "One run gives up more files than it may.",
        Edit(_COLLECTION, "c.file_id LIMIT v_room) d;", "c.file_id) d;"),
        killers=on_postgres("test_E5_every_step_of_collection_has_a_dry_run_and_a_limit"),
    ),
    mutant(
        "orphan_without_window",
        "E4",
        "A file that was not published is an orphan as soon as its intent expires.",
        Edit(
            _COLLECTION,
            "WHERE w.expires_at < clock_timestamp() - p_older\n",
            "WHERE w.expires_at < clock_timestamp() - p_older * 0\n",
        ),
        killers=on_postgres("test_E4_an_intent_is_an_orphan_only_after_its_expiry_and_the_window"),
    ),
    mutant(
        "orphan_keeps_its_intent",
        "E4 C6",
        "A publication may still name a file that was condemned as an orphan.",
        Edit(
            _COLLECTION, "        DELETE FROM write_intent w WHERE w.file_id = ANY (v_old);\n", ""
        ),
        killers=on_postgres("test_C6_no_publish_can_name_a_file_whose_intent_was_collected"),
    ),
)

_JOBBED = (
    mutant(
        "job_ended_by_a_former_worker",
        "E5",
        "A worker that lost its lease ends the job of its successor.",
        Edit(_JOBS, "AND j.epoch = p_epoch FOR UPDATE;", "FOR UPDATE;"),
        killers=on_postgres(_LOST_LEASE),
    ),
    mutant(
        "job_lease_renewed_by_a_former_worker",
        "E5",
        "A worker that lost its lease goes on as if it had it.",
        Edit(
            "storage/postgres/jobs.py",
            "SET expires_at = clock_timestamp() + $3::interval\n WHERE job_id = $1 AND epoch = $2 ",
            "SET expires_at = clock_timestamp() + $3::interval\n"
            " WHERE job_id = $1 AND epoch >= $2 ",
        ),
        killers=on_postgres(_LOST_LEASE),
    ),
    mutant(
        "job_claimed_while_it_runs",
        "E5",
        "A job is given to a second worker before the lease of the first has expired.",
        Edit(
            _JOBS,
            "OR (j.state = 'running' AND j.expires_at <= v_now))",
            "OR j.state = 'running')",
        ),
        killers=on_postgres(_LOST_LEASE),
    ),
    mutant(
        "job_of_another_request",
        "E7 A3",
        "A key that was used for another delete answers with that one.",
        Edit(_JOBS, "AND v_job.fingerprint IS DISTINCT FROM p_fingerprint;", "AND false;"),
        killers=on_postgres("test_A3_a_key_is_one_job_for_ever"),
    ),
    mutant(
        "job_every_tick",
        "E5",
        "A periodic job is submitted whenever somebody asks.",
        Edit(
            _JOBS,
            "IF v_next > v_now AND v_next <= v_now + p_every * 1.1 THEN",
            "IF v_next > v_now + p_every THEN",
        ),
        killers=on_postgres("test_a_periodic_job_is_submitted_once_a_period"),
    ),
)

_ERASED = (
    mutant(
        "erasure_leaves_caches_warm",
        "E7",
        "Replicas do not hear that files of their snapshots were exchanged.",
        Edit(_ERASURE, "UPDATE lake SET erasure_count = lake.erasure_count + 1;", "PERFORM 1;"),
        killers=on_postgres("test_E7_erasure_reaches_a_replica_with_warm_caches"),
    ),
    mutant(
        "erasure_is_not_owed",
        "E7",
        "A restored table is read before its erasures were done again.",
        Edit(
            _ERASURE,
            "erasures_owed = (\n        SELECT coalesce(array_agg(DISTINCT e.table_id), '{}')"
            " FROM erasure e\n         WHERE e.owed AND e.ended_at IS NULL);\n"
            "    -- failpoint: owe_erasures.after_head",
            "erasures_owed = '{}';\n    -- failpoint: owe_erasures.after_head",
        ),
        killers=on_postgres(_OWED),
    ),
    mutant(
        "erasure_is_forgotten_by_a_restore",
        "E7 F3",
        "Erasures of the lost line of history are not done again.",
        Edit(_ERASURE, "CONTINUE WHEN EXISTS (", "CONTINUE WHEN true OR EXISTS ("),
        killers=on_postgres(_OWED),
    ),
    mutant(
        "erasure_without_intent",
        "E7 C6",
        "A file whose intent was collected takes the place of another.",
        Edit(
            _ERASURE,
            "                CONTINUE WHEN NOT FOUND;\n            ELSIF",
            "            ELSIF",
        ),
        killers=on_postgres("test_E7_an_exchange_leaves_as_many_rows_as_it_says"),
    ),
    mutant(
        "erasure_rows_unchecked",
        "E7 E1",
        "A file with other rows than it should have takes the place of another.",
        Edit(
            _ERASURE,
            "IF coalesce((v_file ->> 'rows')::bigint, 0)"
            " <> v_old.rows - (v_one ->> 'rows')::bigint THEN",
            "IF false THEN",
        ),
        killers=on_postgres("test_E7_an_exchange_leaves_as_many_rows_as_it_says"),
    ),
)

MUTANTS = (*_SWAPS, *_EXPIRIES, *_PINNED, *_COLLECTED, *_JOBBED, *_ERASED)
