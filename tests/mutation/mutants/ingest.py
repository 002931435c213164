"""Mutants of the door: payload identity, decoding, replays, limits, what nobody may see."""

from __future__ import annotations

from tests.mutation.mutant import Edit, mutant, unit

_FINGERPRINT = "storage/rows/fingerprint.py"
_SERVICE = "storage/ingesting/service.py"
_FINGERPRINT_TESTS = "test_rows_fingerprint.py"
_INGEST_TESTS = "test_http_ingest.py"

MUTANTS = (
    mutant(
        "fingerprint_absent_is_not_null",
        "A4",
        "A column that is absent and one that is null in all rows are told apart.",
        Edit(
            _FINGERPRINT,
            "        if array.null_count != rows or _nulls_are_hidden(array.type):\n",
            "        if True:\n",
        ),
        Edit(_FINGERPRINT, "    if nulls == rows:\n        return\n", ""),
        killers=unit(_FINGERPRINT_TESTS, "test_A4_absent_equals_null"),
    ),
    mutant(
        "fingerprint_null_is_zero",
        "A4",
        "Which rows are null does not enter the identity of a payload.",
        Edit(
            _FINGERPRINT,
            '        update(b"\\x01")\n        update(valid)\n',
            '        update(b"\\x00")\n',
        ),
        killers=unit(_FINGERPRINT_TESTS, "test_A4_null_differs_from_empty_and_from_zero"),
    ),
    mutant(
        "fingerprint_minus_zero",
        "A4",
        "-0.0 and 0.0 are different payloads.",
        Edit(_FINGERPRINT, '.astype("<f8") + 0.0\n', '.astype("<f8")\n'),
        killers=unit(_FINGERPRINT_TESTS, "test_A4_one_zero_and_one_nan"),
    ),
    mutant(
        "fingerprint_many_nans",
        "A4",
        "NaNs of different bits are different payloads.",
        Edit(_FINGERPRINT, "        if not_numbers.any():\n", "        if False:\n"),
        killers=unit(_FINGERPRINT_TESTS, "test_A4_one_zero_and_one_nan"),
    ),
    mutant(
        "fingerprint_bytes_behind_nulls",
        "A4",
        "Bytes that lie behind a null enter the identity of a payload.",
        Edit(
            _FINGERPRINT,
            "    if valid is not None and lengths[valid == 0].any():\n",
            "    if False:\n",
        ),
        killers=unit(_FINGERPRINT_TESTS, "test_A4_bytes_behind_a_null_do_not_enter"),
    ),
    mutant(
        "fingerprint_ignores_row_count",
        "A4",
        "Tables and their row counts do not enter the identity of a payload.",
        Edit(
            _FINGERPRINT,
            '    update(_TABLE.pack(b"T", table_id, rows))\n',
            '    update(_TABLE.pack(b"T", 0, 0))\n',
        ),
        killers=unit(_FINGERPRINT_TESTS, "test_A4_row_order_and_count_enter")
        + unit(_FINGERPRINT_TESTS, "test_A4_published_vectors"),
    ),
    mutant(
        "fraction_is_cut",
        "A10",
        "Digits beyond the column's scale are cut instead of refused.",
        Edit("storage/rows/cells.py", "    if lowest < 0:\n", "    if lowest < -1000:\n"),
        killers=unit("test_rows_values.py", "test_A10_values_refused"),
    ),
    mutant(
        "finer_than_a_microsecond_is_cut",
        "A10",
        "Parts of a microsecond are cut instead of refused.",
        Edit("storage/rows/cells.py", 'if fraction[6:].strip("0"):', "if False:"),
        killers=unit("test_rows_values.py", "test_A10_values_refused"),
    ),
    mutant(
        "digits_of_a_wide_decimal_wrap",
        "A10",
        "Digits beyond 128 bits are lost where a decimal is scaled up.",
        Edit(
            "storage/rows/columns.py",
            "    if longest + kind.scale > _DECIMAL_TEXT_MAX:\n",
            "    if False:\n",
        ),
        killers=unit(
            "test_nested_rows.py",
            "test_A10_digits_beyond_a_wide_decimal_are_refused_and_never_wrapped",
        ),
    ),
    mutant(
        "fingerprint_of_a_map_as_it_lies",
        "A4",
        "The order in which a map's keys were sent enters the payload's identity.",
        Edit(
            "storage/rows/fingerprint_nested.py",
            'sort_keys=[("row", "ascending"), ("key", "ascending")],',
            'sort_keys=[("row", "ascending")],',
        ),
        killers=unit("test_nested_fingerprint.py", "test_A4_published_vectors_of_nested_values"),
    ),
    mutant(
        "keys_of_a_map_come_twice",
        "A10",
        "The fast way takes a map in which two texts spell one key.",
        Edit(
            "storage/rows/nested_columns.py",
            "        if not told_apart and len(arrays.repeated_keys(key_type, offsets, keys)):\n",
            "        if False:\n",
        ),
        killers=unit(
            "test_nested_rows.py", "test_A10_nested_json_that_does_not_fit_is_named_by_its_path"
        ),
    ),
    mutant(
        "keys_counted_for_the_group",
        "A10",
        "Keys that one body leaves out make up for those that its neighbour has twice.",
        Edit(
            "storage/rows/decode_json.py",
            "        missing[number] += absent\n",
            "        missing[0] += absent\n",
        ),
        killers=unit("test_rows_together.py", "test_A10_keys_are_counted_body_by_body"),
    ),
    mutant(
        "compiled_reader_takes_a_key_twice",
        "A10",
        "The compiled reader takes the last of two values for one column.",
        Edit(
            "storage/rows/json_columns.c",
            "            if (number < 0 || stamps[number] == stamp) return 0;",
            "            if (number < 0) return 0;",
        ),
        killers=unit("test_rows_compiled.py", "test_A9_A10_what_is_refused_leaves_nothing_behind"),
    ),
    mutant(
        "compiled_reader_adds_the_zone",
        "A10",
        "The compiled reader adds a zone's offset to a time instead of taking it away.",
        Edit(
            "storage/rows/json_values.h",
            "            *value -= sign *",
            "            *value += sign *",
        ),
        killers=unit("test_rows_compiled.py", "test_A10_all_types_and_spellings_that_are_usual"),
    ),
    mutant(
        "rows_of_a_neighbour",
        "A9",
        "A request that was decoded with others gets the rows of the first of them.",
        Edit(
            "storage/rows/decode_together.py",
            "rows = batch.slice(start, end - start)",
            "rows = batch.slice(0, end - start)",
        ),
        killers=unit("test_rows_together.py", "test_A10_bodies_together_get_what_they_get_alone"),
    ),
    mutant(
        "identity_of_a_run_knows_its_neighbours",
        "A4",
        "Nulls of a neighbour enter the identity of a payload that was decoded with it.",
        Edit(
            _FINGERPRINT,
            "            if count < end - start:\n                validity",
            "            if True:\n                validity",
        ),
        killers=unit("test_rows_together.py", "test_A4_identities_of_runs_are_those_of_their_rows"),
    ),
    mutant(
        "refusal_before_the_key",
        "A3",
        "A refusal is uttered without looking the key up.",
        Edit(
            _SERVICE,
            "        if request.idempotency_key is None:\n            return None\n        try:\n",
            "        if request.idempotency_key != 0:\n            return None\n        try:\n",
        ),
        killers=unit(_INGEST_TESTS, "test_A3_a_replay_survives_a_drop"),
    ),
    mutant(
        "replay_not_compared",
        "A4",
        "Another payload under a used key gets the first receipt.",
        Edit(
            _SERVICE,
            "        if prepared is None or prepared.fingerprint != record.fingerprint:\n",
            "        if prepared is None:\n",
        ),
        killers=unit(_INGEST_TESTS, "test_A4_another_payload_is_a_conflict"),
    ),
    mutant(
        "replay_decoded_under_todays_schema",
        "A3",
        "A replay is compared under the schema of today, not of its first acceptance.",
        Edit(
            _SERVICE,
            "if prepared is None or prepared.schema_versions != record.schema_versions:",
            "if prepared is None:",
        ),
        killers=unit(
            _INGEST_TESTS, "test_A3_a_replay_is_compared_under_the_schema_of_its_first_acceptance"
        ),
    ),
    mutant(
        "silence_of_the_bus_is_a_refusal",
        "A6",
        'A bus that did not answer in time is told as "nothing was stored".',
        Edit(
            _SERVICE,
            '            raise OutcomeUnknown(\n                "the bus did not answer',
            '            raise Unavailable(\n                "the bus did not answer',
        ),
        killers=unit(
            "test_ingesting_service.py",
            "test_A6_a_bus_that_does_not_answer_in_time_is_an_unknown_outcome",
        ),
    ),
    mutant(
        "quarantine_replayed_twice",
        "B9",
        "Each replay of a quarantined entry is a new entry.",
        Edit(
            "storage/ingesting/quarantine.py",
            '        key = f"quarantine {quarantine_id}"\n',
            '        key = f"quarantine {quarantine_id} {id(fixed) if fixed else id(object())}"\n',
        ),
        killers=unit(
            "test_http_application.py",
            "test_B9_a_replay_is_one_entry_however_often_it_is_asked_for",
            "test_B9_fixed_rows_are_sent_instead",
        ),
    ),
    mutant(
        "batches_of_others_are_shown",
        "D10",
        "Whoever knows a batch's id sees its state.",
        Edit(
            "storage/ingesting/batches.py",
            "if status is None or status.principal_id != principal.principal_id:",
            "if status is None:",
        ),
        killers=unit(_INGEST_TESTS, "test_D10_batches_of_others_are_not_there"),
    ),
    mutant(
        "hidden_table_is_forbidden",
        "D10",
        "A table that the caller may not see is answered otherwise than one that is not there.",
        Edit(
            "storage/ingesting/grants.py",
            "        if self.sees(table):\n            raise Forbidden(\n",
            "        if table:\n            raise Forbidden(\n",
        ),
        killers=unit(
            "test_http_tables.py",
            "test_D10_tables_that_one_may_not_see_do_not_exist",
        ),
    ),
    mutant(
        "tokens_of_changes_without_floor",
        "D6",
        "The token of a schema change does not hold the snapshot that it made.",
        Edit(
            "serve_app/tables.py",
            "return app.codec.encode(VisibilityToken(identity.history, snapshot_id))",
            "return app.codec.encode(VisibilityToken(identity.history, 0))",
        ),
        killers=unit("test_http_tables.py", "test_a_table_is_made_with_ids_version_and_token"),
    ),
    mutant(
        "bomb_is_inflated",
        "A11",
        "A small body may become as large as it likes when it is decompressed.",
        Edit(
            "serve_app/bodies.py",
            "        if size > limit_bytes:\n            raise _too_large(limit_bytes)\n"
            "        await reservation.grow_to(len(body) + size)\n",
            "        await reservation.grow_to(len(body) + size)\n",
        ),
        killers=unit(
            "test_http_bytes.py", "test_A11_decompressed_bytes_count_and_those_at_the_limit_fit"
        ),
    ),
    mutant(
        "share_of_bytes_off",
        "A11",
        "One principal's bodies may take all the bytes that a replica has for everybody.",
        Edit(
            "serve_app/limits_bytes.py",
            "        if ours > mine and after > self._share_bytes:\n",
            "        if after < 0:\n",
        ),
        killers=unit(
            "test_http_limits.py",
            "test_A11_one_principal_takes_no_more_than_its_share_of_the_bytes",
        ),
    ),
    mutant(
        "bytes_refuse_a_replay",
        "A3",
        "A full replica refuses a request that was accepted before, without asking for its key.",
        Edit(
            "serve_app/limits_bytes.py",
            "                if self._known is None or not await "
            "self._budget.accepted_before(self._known):\n",
            "                if True:\n",
        ),
        killers=unit(
            "test_http_limits.py", "test_A3_a_replay_is_answered_while_the_bytes_are_all_taken"
        ),
    ),
    mutant(
        "running_queries_of_others",
        "D10",
        "Whoever knows a query's id can stop it.",
        Edit(
            "serve_app/running.py",
            "        if query is None or query.principal_id != principal_id:\n",
            "        if query is None:\n",
        ),
        killers=unit(
            "test_http_query.py", "test_running_queries_are_ones_own_and_can_be_cancelled"
        ),
    ),
)
