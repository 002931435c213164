"""Mutants of the append transaction in PostgreSQL (sections A and E)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, integration, mutant, on_postgres

_APPEND = "storage/sql/functions/append_group.sql"
_LOCKS = "test_postgres_locks.py"

MUTANTS = (
    mutant(
        "append_keys_unsorted",
        "A5",
        "Keys are inserted in the order in which requests came, so groups can deadlock.",
        Edit(
            _APPEND,
            """\
            INSERT INTO idem_0 SELECT k.key_hash, k.fingerprint, v_segment, k.n, k.versions
              FROM unnest(p_keys, p_fingerprints, p_schema_versions, statuses) WITH ORDINALITY
                   AS k (key_hash, fingerprint, versions, status, n)
             WHERE k.status = 0 AND k.key_hash IS NOT NULL ORDER BY k.key_hash
""",
            """\
            INSERT INTO idem_0 SELECT k.key_hash, k.fingerprint, v_segment, k.n, k.versions
              FROM unnest(p_keys, p_fingerprints, p_schema_versions, statuses) WITH ORDINALITY
                   AS k (key_hash, fingerprint, versions, status, n)
             WHERE k.status = 0 AND k.key_hash IS NOT NULL
""",
        ),
        killers=integration(_LOCKS, "test_A5_groups_that_wait_for_each_others_keys_never_deadlock"),
    ),
    mutant(
        "append_counter_before_keys",
        "A7 B11",
        "The shard's counter is locked before the keys, so one slow key stops the whole shard.",
        Edit(
            _APPEND,
            "    v_segment := nextval('segment_number');\n",
            "    PERFORM 1 FROM bus_shard b WHERE b.shard = p_shard FOR UPDATE;\n"
            "    v_segment := nextval('segment_number');\n",
        ),
        killers=integration(
            _LOCKS, "test_B11_a_group_that_waits_for_a_key_does_not_stop_its_shard"
        ),
    ),
    mutant(
        "append_positions_before_keys",
        "A7 A9",
        "Positions are given to entries whose key somebody else has: the shard gets holes.",
        Edit(
            _APPEND,
            "    v_count := cardinality(v_ordinals);\n",
            "    v_count := (SELECT count(*) FROM unnest(statuses) AS s (n) WHERE s.n < 2);\n",
        ),
        killers=on_postgres("test_A9_a_refused_neighbour_changes_nothing_for_a_group"),
    ),
    mutant(
        "append_schema_unchecked",
        "A12",
        "The append transaction does not compare table and schema version with the catalog.",
        Edit(_APPEND, "IF stale_tables IS NOT NULL THEN", "IF false THEN"),
        killers=on_postgres("test_A12_a_stale_schema_version_is_told_and_nothing_is_appended"),
    ),
    mutant(
        "append_without_table_lock",
        "A12",
        "An append does not hold its tables, so a schema change overtakes it.",
        Edit(
            _APPEND,
            "        v_lock := pg_advisory_xact_lock_shared(7202, v_table);\n",
            "        v_lock := '';\n",
        ),
        killers=integration(_LOCKS, "test_A12_a_schema_change_waits_for_an_append_under_way"),
    ),
    mutant(
        "append_without_ring_fence",
        "A5 A3",
        "An append does not hold the ring fence, so keys go into a generation that was left.",
        Edit(_APPEND, "    v_lock := pg_advisory_xact_lock_shared(7201, 0);\n", ""),
        killers=integration(_LOCKS, "test_A5_a_rotation_of_keys_does_not_overtake_an_append"),
    ),
    mutant(
        "append_key_won_twice",
        "A5 A3",
        "Who loses a key to another transaction is taken for its winner.",
        Edit(
            _APPEND,
            "        IF v_won < v_key_count THEN\n",
            "        IF false THEN\n",
        ),
        killers=integration(_LOCKS, "test_A5_groups_that_wait_for_each_others_keys_never_deadlock"),
    ),
    mutant(
        "append_rejects_of_refused",
        "A10",
        "Rejected rows are stored although their entry was refused.",
        Edit(
            _APPEND, "         WHERE statuses[r.entry] = 0;\n    END IF;", "         ;\n    END IF;"
        ),
        killers=on_postgres("test_A10_a_refused_entry_leaves_no_rejected_rows"),
    ),
    mutant(
        "append_rejects_in_another_transaction",
        "A10",
        "Rejected rows are stored after the commit of their entry, by a second statement.",
        Edit(
            "storage/postgres/group_commit.py",
            "        rejects = [(n, r) for n, e in enumerate(entries, start=1)"
            " for r in e.rejects]\n",
            "        rejects: list[tuple[int, object]] = []\n",
        ),
        Edit(
            "storage/postgres/group_commit.py",
            "        taken = [\n            waiting.key\n",
            """\
            position = row["lo"] or 0
            for waiting, status in zip(group, row["statuses"], strict=True):
                for reject in waiting.entry.rejects if status == _ACCEPTED else ():
                    await connection.execute(
                        "INSERT INTO bus_quarantine (kind, history_serial, shard, position,"
                        " principal_id, target, table_ids, rows, reason, attempts, by_crash,"
                        " created_at, payload) VALUES ('rejects', $1, $2, $3, $4, $5, $6, $7,"
                        " 'rows did not fit the table', 0, false, $8, $9)",
                        row["history_serial"], self._shard, position, waiting.entry.principal_id,
                        waiting.entry.target, [reject.table_id], reject.rows, row["accepted_at"],
                        reject.document,
                    )
                position += status == _ACCEPTED
        taken = [
            waiting.key
""",
        ),
        killers=on_postgres("test_A10_rejected_rows_are_there_though_the_reply_was_lost"),
    ),
    mutant(
        "append_first_attempt_ignored",
        "A13",
        "A first attempt older than the window is appended once more.",
        Edit(
            _APPEND,
            "p_first_attempts[s.n] < clock_timestamp() - p_window",
            "p_first_attempts[s.n] < clock_timestamp() - p_window * 100",
        ),
        killers=on_postgres("test_A13_an_old_first_attempt_with_an_unknown_key_is_refused"),
    ),
    mutant(
        "append_backpressure_off",
        "A11",
        "The bus takes bytes beyond its limit.",
        Edit(_APPEND, ">= p_backlog_bytes_hard", ">= p_backlog_bytes_hard + 1000000000"),
        killers=on_postgres("test_A11_beyond_its_bytes_the_bus_refuses_and_leaves_nothing"),
    ),
    mutant(
        "append_backpressure_before_key",
        "A3",
        "Backpressure is judged before the key: a replay is refused.",
        Edit(
            _APPEND,
            "statuses := array_replace(statuses, 0::smallint, 3::smallint);",
            "statuses := array_fill(3::smallint, ARRAY[cardinality(p_targets)]);",
        ),
        killers=on_postgres("test_A3_a_replay_is_answered_under_backpressure"),
    ),
    mutant(
        "append_payload_intent_unchecked",
        "A1 C6",
        "An entry is appended although collection took its payload's write intent before.",
        Edit(_APPEND, "IF v_intents = 0 THEN", "IF false THEN"),
        killers=integration(_LOCKS, "test_C6_a_payload_that_was_collected_is_not_appended"),
    ),
    mutant(
        "append_same_key_in_one_group",
        "A5 A9",
        "Two requests with one key are put into one statement, and both are accepted.",
        Edit(
            "storage/postgres/group_commit.py",
            "            if waiting.key is not None and waiting.key in keys:",
            "            if False:",
        ),
        killers=on_postgres("test_A9_a_refused_neighbour_changes_nothing_for_a_group"),
    ),
    mutant(
        "append_lost_reply_is_failure",
        "A6 C5",
        'A connection that broke while a commit was under way is told as "nothing happened".',
        Edit(
            "storage/postgres/failures.py",
            "            raise\n        raise OutcomeUnknown(\n",
            "            raise\n        raise Unavailable(\n",
        ),
        killers=on_postgres("test_A6_an_unknown_outcome_is_resolved_by_the_key"),
    ),
    mutant(
        "append_refused_behind_its_commit",
        "A6 A9",
        "A group that has committed is refused as a whole when its neighbours' keys are not read.",
        Edit(
            "storage/postgres/group_commit.py",
            "            return {}\n        return {row",
            "            raise\n        return {row",
        ),
        killers=(
            "tests/matrix/test_connection_append.py"
            "::test_M04_what_cannot_be_read_after_the_commit_refuses_no_neighbour",
        ),
    ),
    mutant(
        "key_scope_without_target",
        "A3",
        "A key means the same for every table.",
        Edit(
            "storage/postgres/group_commit.py",
            '    text = f"{principal_id}\\x00{target}\\x00{key}".encode()',
            '    text = f"{principal_id}\\x00{key}".encode()',
        ),
        killers=on_postgres("test_A3_the_key_belongs_to_principal_and_target_and_to_no_shard"),
    ),
    mutant(
        "sessions_commit_asynchronously",
        "A1",
        "Sessions leave it to the server whether a commit is on disk when it is answered.",
        Edit(
            "storage/postgres/pool.py",
            '    "synchronous_commit": "on",\n',
            '    "synchronous_commit": "off",\n',
        ),
        killers=integration(
            "test_A1_durability.py",
            "test_A1_every_session_commits_synchronously_whatever_the_server_says",
        ),
    ),
)
