"""Mutants of tokens and of the read path (section D)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, in_memory, integration, mutant, unit

_TOKENS = "lakebus/tokens.py"
_BARRIER = "storage/reading/barrier.py"
_WATCHER = "storage/reading/watcher.py"
_SHARED = "storage/reading/shared_read.py"
_HISTORY = "storage/reading/history.py"
_RESOLVE = "storage/reading/resolve.py"
_MANIFEST = "storage/reading/manifest.py"
_FILES = "storage/reading/table_files.py"
_PLANNING = "storage/reading/planning.py"

MUTANTS = (
    mutant(
        "token_signature_unchecked",
        "D5",
        "A forged token is read.",
        Edit(_TOKENS, " or not hmac.compare_digest(mac, self._mac(body)):", ":"),
        killers=unit("test_token_laws.py", "test_D5_a_changed_token_is_refused"),
    ),
    mutant(
        "token_floor_ignored",
        "D3 D6",
        "A snapshot older than the token's floor covers it.",
        Edit(_TOKENS, "return snapshot_id >= self.floor and all(", "return all("),
        killers=unit(
            "test_token_laws.py",
            "test_D3_a_token_is_covered_from_its_floor_and_all_its_positions_on",
        ),
    ),
    mutant(
        "token_merge_takes_the_last",
        "D6",
        "Merging takes the other token's position instead of the maximum.",
        Edit(_TOKENS, "max(position, positions.get(shard, 0))", "position"),
        killers=unit("test_token_laws.py", "test_D6_merge_is_commutative"),
    ),
    mutant(
        "token_history_unchecked",
        "D5",
        "A token of any line of history is taken for one of the present line.",
        Edit(
            _HISTORY,
            "    if token.history == current:\n        return token\n",
            "    return VisibilityToken(current, token.floor, token.positions, token.own)\n",
        ),
        killers=unit(
            "test_reading_tokens.py",
            "test_D5_a_token_above_a_fork_or_of_a_lost_line_is_lost",
        ),
    ),
    mutant(
        "token_floor_above_fork",
        "D5",
        "A token that asks for a lost snapshot is honoured.",
        Edit(_HISTORY, "if token.floor > fork.snapshot_id or any(", "if any("),
        killers=unit(
            "test_reading_tokens.py",
            "test_D5_a_token_above_a_fork_or_of_a_lost_line_is_lost",
        ),
    ),
    mutant(
        "own_entries_ignored",
        "D4",
        "A caller never hears that its own entry was quarantined.",
        Edit(
            "storage/reading/own_entries.py",
            "        if not unknown:\n            return\n",
            "        if unknown or not unknown:\n            return\n",
        ),
        killers=in_memory("test_D4_the_wait_ends_in_quarantined_exactly_for_ones_own_entry"),
    ),
    mutant(
        "quarantine_asked_before_coverage",
        "D4",
        "The verdict about own entries is asked before the wait, so a later one is missed.",
        Edit(
            _BARRIER,
            "        token = await self._merge(tokens, head)\n"
            "        if not token.covered_by(head.snapshot_id, head.watermark):\n"
            "            head = await self._wait(token, head, deadline_s)\n"
            "        await self.refuse_quarantined(token)\n",
            "        token = await self._merge(tokens, head)\n"
            "        await self.refuse_quarantined(token)\n"
            "        if not token.covered_by(head.snapshot_id, head.watermark):\n"
            "            head = await self._wait(token, head, deadline_s)\n",
        ),
        killers=unit(
            "test_reading_tokens.py", "test_D4_the_verdict_is_asked_after_the_coverage_was_seen"
        ),
    ),
    mutant(
        "unknown_token_waits",
        "D5",
        "A token ahead of everything is waited for instead of being refused.",
        Edit(
            _BARRIER,
            "        if token.floor > head.snapshot_id:\n            raise _unknown()\n",
            "        return\n",
        ),
        killers=in_memory("test_D5_a_token_ahead_of_its_shard_is_refused_by_the_authoritative_end"),
    ),
    mutant(
        "ends_from_memory",
        "D5",
        "A token is refused by ends that were read before the request.",
        Edit(
            _BARRIER,
            "        ends = await self._ends.fresh()\n",
            "        ends = dict(self._known_ends) or await self._ends.fresh()\n",
        ),
        killers=in_memory("test_D5_a_token_ahead_of_its_shard_is_refused_by_the_authoritative_end"),
    ),
    mutant(
        "timeout_reads_stale",
        "D4",
        "A wait that runs out answers from whatever head is known.",
        Edit(
            _WATCHER,
            "waiter.future.set_exception(visibility_timeout(waited_ms))",
            "waiter.future.set_result(self._head)",
        ),
        killers=unit(
            "test_reading_watcher.py",
            "test_D4_the_deadline_needs_no_catalog_and_no_background_task",
        ),
    ),
    mutant(
        "latest_from_cache",
        "D2",
        "The newest snapshot is answered from memory.",
        Edit(
            _WATCHER,
            "        return await self._reads.fresh()\n",
            "        return self._head or await self._reads.fresh()\n",
        ),
        killers=in_memory("test_D2_latest_is_at_least_the_newest_published_before_the_request"),
    ),
    mutant(
        "read_shared_too_late",
        "D2",
        "A caller gets the answer of a read that started before it asked.",
        Edit(
            _SHARED,
            "        callers, self._boarding = self._boarding, []\n"
            "        self._departing = False\n",
            "        callers = self._boarding\n        self._departing = False\n",
        ),
        Edit(
            _SHARED,
            "                value = await self._read()\n",
            "                value = await self._read()\n                self._boarding = []\n",
        ),
        killers=unit(
            "test_reading_watcher.py",
            "test_D2_a_caller_never_gets_a_read_that_started_before_it_asked",
        ),
    ),
    mutant(
        "rewound_catalog_is_believed",
        "F4",
        "A catalog that went back in time is read as if nothing had happened.",
        Edit(
            _WATCHER,
            "if before is not None and head.snapshot_id < before.snapshot_id:",
            "if False:",
        ),
        killers=unit(
            "test_reading_watcher.py", "test_F4_a_catalog_that_went_back_in_time_is_refused"
        ),
    ),
    mutant(
        "waiter_woken_by_one_part",
        "D4 D3",
        "Who waits for several shards is woken by the first of them.",
        Edit(
            "storage/reading/waiters.py",
            "                if waiter.missing(head) is None:\n",
            "                if True:\n",
        ),
        killers=unit(
            "test_reading_watcher.py", "test_D4_a_waiter_is_woken_exactly_when_a_head_covers_it"
        ),
    ),
    mutant(
        "fixed_snapshot_ignores_token",
        "D7",
        "A fixed snapshot is read although it does not cover the token.",
        Edit(
            _RESOLVE,
            "            if demand is not None:\n",
            "            if demand is None:\n",
        ),
        killers=in_memory("test_D7_a_fixed_snapshot_that_does_not_cover_is_a_conflict_at_once"),
    ),
    mutant(
        "remembered_snapshot_outlives_expiry",
        "D2",
        "A snapshot that this replica remembers is answered after it expired.",
        Edit(
            _RESOLVE,
            "if snapshot_id is not None and snapshot_id >= head.oldest_snapshot_id:",
            "if snapshot_id is not None:",
        ),
        killers=in_memory("test_D2_an_expired_snapshot_is_never_answered_by_a_neighbour"),
    ),
    mutant(
        "answer_without_floor",
        "D6",
        "The token of an answer does not hold the snapshot it was read at.",
        Edit(
            _RESOLVE,
            "                VisibilityToken(head.history, head.snapshot_id),\n",
            "                VisibilityToken(head.history, 0),\n",
        ),
        killers=in_memory("test_D6_reads_chain_monotonically_across_replicas"),
    ),
    mutant(
        "manifest_ignores_ended_files",
        "D1 D8",
        "A file that ended stays in every later snapshot.",
        Edit(
            _MANIFEST, "in delta.ended.items():", "in dict(list(delta.ended.items())[:0]).items():"
        ),
        killers=unit("test_reading_manifest.py"),
    ),
    mutant(
        "manifest_of_a_lost_line",
        "D5 F3",
        "A replica that lived through a restore answers from the lost line's files.",
        Edit(
            _MANIFEST,
            "            and copy.history == head.history\n",
            "",
        ),
        killers=unit("test_reading_manifest.py")
        + unit(
            "test_reading_tokens.py",
            "test_F3_a_replica_that_lives_through_a_restore_sees_the_new_line_only",
        ),
    ),
    mutant(
        "file_seen_one_snapshot_longer",
        "D1 D8",
        "A file is still read at the snapshot that removed it.",
        Edit(_FILES, "if row.last > epoch])", "if row.last >= epoch])"),
        killers=unit("test_reading_manifest.py"),
    ),
    mutant(
        "view_grown_over_an_end",
        "D1 D8",
        "A view is grown from an older one although files ended in between.",
        Edit(
            _FILES,
            "            if bisect.bisect_right(self._ends, near.epoch) == ended:\n",
            "            if ended >= 0:\n",
        ),
        killers=unit("test_reading_manifest.py"),
    ),
    mutant(
        "plan_kept_for_other_parameters",
        "D1",
        "A plan made for other parameters is used again, with the wrong files pruned.",
        Edit(_PLANNING, "        given = repr(parameters)\n", '        given = "some"\n'),
        killers=in_memory("test_a_kept_plan_is_not_taken_for_other_parameters"),
    ),
    mutant(
        "suggestions_name_hidden_tables",
        "D10",
        "A misspelt name is answered with a suggestion that the caller may not see.",
        Edit(
            _PLANNING,
            "known = [other for other in view.schemas() if visible(other)]",
            "known = list(view.schemas())",
        ),
        killers=unit("test_reading_query.py"),
    ),
    mutant(
        "hidden_table_is_read",
        "D10",
        "A query reads a table that its caller may not see.",
        Edit(
            _PLANNING,
            "schema = view.schema(name) if visible(name) else None",
            "schema = view.schema(name)",
        ),
        killers=unit("test_http_query.py", "test_D10_tables_without_a_grant_do_not_exist_in_sql"),
    ),
    mutant(
        "limit_of_rows_truncates",
        "D9",
        "An answer with more rows than allowed is cut without a word.",
        Edit(
            "storage/engine/child_query.py",
            "        reader = binding.relation.to_arrow_reader(min(size, request.rows_max + 1))\n",
            "        binding.relation = binding.relation.limit(request.rows_max)\n"
            "        reader = binding.relation.to_arrow_reader(min(size, request.rows_max + 1))\n",
        ),
        killers=integration(
            "test_engine_queries.py", "test_D9_limit_of_rows_is_not_a_limit_clause"
        ),
    ),
    mutant(
        "guard_allows_a_function",
        "D10",
        "SQL may read the engine's settings, and with them its folders.",
        Edit(
            "storage/engine/child_guard.py",
            "        if name in self._rules.allowed:\n",
            '        if name in self._rules.allowed or name == "current_setting":\n',
        ),
        killers=unit("test_engine_guard.py", "test_D10_escape_is_refused"),
    ),
    mutant(
        "guard_allows_a_table_function",
        "D10",
        "SQL may read any file of the server.",
        Edit(
            "storage/engine/child_guard.py",
            "        if name not in TABLE_FUNCTIONS:\n",
            '        if name not in TABLE_FUNCTIONS and name != "read_text":\n',
        ),
        killers=unit("test_engine_guard.py", "test_D10_escape_is_refused"),
    ),
    mutant(
        "first_rows_without_ties",
        "D11",
        "Of rows that are equal to the last one wanted some are left out before the rest of the"
        " order was asked.",
        Edit(
            "storage/reading/leading.py",
            "if each.first <= one.last]",
            "if each.first < one.last]",
        ),
        killers=unit("test_reading_leading.py", "test_D11_no_row_among_the_first_is_left_out"),
    ),
    mutant(
        "names_without_ids",
        "D1",
        "Files are read by name if their version has columns of these names, whichever they are.",
        Edit(
            "storage/reading/shapes.py",
            "_columns(written) == columns",
            "{c.name for c in written.columns} == {c.name for c in schema.columns}",
        ),
        killers=unit(
            "test_reading_shapes.py",
            "test_D1_files_of_another_version_are_read_by_name_only_if_it_has_the_same_columns",
        ),
    ),
    mutant(
        "names_of_missing_columns",
        "D1",
        "Files are read by name although they lack a column of their own version.",
        Edit(
            "storage/reading/shapes.py",
            "if not (same and file.statistics.keys() >= ids):",
            "if not same:",
        ),
        killers=unit("test_reading_shapes.py", "test_D1_a_file_that_lacks_a_column_is_read_by_ids"),
    ),
    mutant(
        "timeout_asked_twice",
        "D9",
        "A query that had no time left at the direct door is run once more by the other way.",
        Edit(
            "lakebus/client_query_door.py",
            'return not isinstance(code, str) or code == "unavailable"',
            "return not isinstance(code, str) or status >= 500",
        ),
        killers=unit("test_query_door.py", "test_what_the_door_says_of_the_query_is_the_answer"),
    ),
)
