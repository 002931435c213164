"""Mutants of what came for speed: short ways that must give what the long ones give, and waits
that must end."""

from __future__ import annotations

from tests.mutation.mutant import Edit, integration, mutant, unit

_LOAD = "actors/processor_load.py"
_DUE = "actors/compaction_due.py"
_WATCHER = "storage/reading/watcher.py"
_CLAIMS = "storage/postgres/claims.py"
_LEADING = "storage/reading/leading.py"
_LARGE = "storage/ingesting/large.py"
_SMALL = "storage/engine/child_small.py"
_READER = "storage/rows/json_columns.c"
_VALUES = "storage/rows/json_values.h"
_COMPILED = "storage/rows/compiled_json.py"
_SCHEDULE_TESTS = "test_actors_schedule.py"
_LOAD_TESTS = "test_actors_processor_load.py"
_WATCHER_TESTS = "test_reading_watcher.py"
_CLAIM_TESTS = "test_postgres_claims.py"
_LARGE_TESTS = "test_ingesting_large.py"
_SMALL_TESTS = "test_engine_small_answers.py"
_FUZZ = unit(
    "test_json_reader.py", "test_A10_bodies_of_a_seed_are_read_as_the_exact_pass_reads_them"
)

_MAINTENANCE = (
    mutant(
        "busy_machine_waits_for_ever",
        "E5",
        "On a machine that stays busy small files are never merged.",
        Edit(
            _DUE,
            "return now_s - self._waiting_since_s < PATIENCE * self._settings.compact_every_s",
            "return True",
        ),
        killers=unit(_SCHEDULE_TESTS, "test_a_compaction_waits_three_periods_at_most"),
    ),
    mutant(
        "busy_machine_forgets_since_when_it_waits",
        "E5",
        "Each look begins the wait for a calm machine anew.",
        Edit(_DUE, "        if self._waiting_since_s is None:\n", "        if True:\n"),
        killers=unit(_SCHEDULE_TESTS, "test_a_compaction_waits_three_periods_at_most"),
    ),
    mutant(
        "busy_machine_lets_files_pile_up",
        "E5",
        "A table with many small files waits for a calm machine like any other.",
        Edit(
            _DUE,
            "        if most > BUSY_FACTOR * self._maintenance.small_files_max:\n",
            "        if most > 1_000 * self._maintenance.small_files_max:\n",
        ),
        killers=unit(_SCHEDULE_TESTS, "test_a_table_with_twice_its_small_files_waits_for_nobody"),
    ),
    mutant(
        "busy_machine_merges_all_the_same",
        "E5",
        "Compactions do not wait while the machine is busy.",
        Edit(_DUE, "        if busy and self._may_wait(most, now_s):\n", "        if False:\n"),
        killers=unit(
            _SCHEDULE_TESTS, "test_a_compaction_waits_while_the_machine_is_busy_and_no_longer"
        ),
    ),
    mutant(
        "larger_files_are_forgotten",
        "E5",
        "What a busy machine left unmerged is not remembered.",
        Edit(_DUE, "            self._owed = True\n", "            self._owed = False\n"),
        killers=unit(_SCHEDULE_TESTS, "test_larger_files_wait_until_it_is_calm_again"),
    ),
    mutant(
        "larger_files_wait_for_ever",
        "E5",
        "On a machine that stays busy larger files are never merged.",
        Edit(
            _DUE,
            "        due = Due.SMALL if busy and not late else Due.ALL\n",
            "        due = Due.SMALL if busy else Due.ALL\n",
        ),
        killers=unit(_SCHEDULE_TESTS, "test_larger_files_wait_ten_minutes_at_most"),
    ),
    mutant(
        "pause_between_bursts_is_calm",
        "E5",
        "A machine is calm as soon as one look finds it so.",
        Edit(
            _LOAD,
            "return self._calm_since_s is None or now_s - self._calm_since_s < CALM_S",
            "return self._calm_since_s is None",
        ),
        killers=unit(_LOAD_TESTS, "test_a_pause_between_two_bursts_is_no_calm"),
    ),
    mutant(
        "machine_that_nobody_counts_is_busy",
        "E5",
        "Where the kernel counts no times, the machine is always busy.",
        Edit(
            _LOAD,
            "        if self._times is None and not ours:\n            return False\n",
            "",
        ),
        killers=unit(_LOAD_TESTS, "test_where_nobody_counts_nobody_waits"),
    ),
    mutant(
        "own_jobs_keep_the_machine_busy",
        "E5",
        "What jobs take themselves counts as others' work when they have ended.",
        Edit(
            _LOAD,
            "        if ours or now_s - self._looked_s >= _LOOK_EVERY_S:\n",
            "        if ours:\n            return True\n"
            "        if now_s - self._looked_s >= _LOOK_EVERY_S:\n",
        ),
        killers=unit(_LOAD_TESTS, "test_what_jobs_take_themselves_makes_nothing_busy_afterwards"),
    ),
    mutant(
        "waiting_for_disks_is_use",
        "E5",
        "A processor that waits for a disk counts as busy.",
        Edit(
            _LOAD,
            "    return total - counted[_IDLE] - counted[_IOWAIT], total\n",
            "    return total - counted[_IDLE], total\n",
        ),
        killers=unit(_LOAD_TESTS, "test_times_are_read_as_linux_writes_them"),
    ),
)

_READING = (
    mutant(
        "who_waits_lets_wake_ups_gather",
        "D4",
        "A process rests though somebody in it waits for a snapshot.",
        Edit(
            _WATCHER,
            "        if len(self._room) or now_s - self._asked_s < _ACTIVE_S:\n",
            "        if now_s - self._asked_s < -1:\n",
        ),
        killers=unit(
            _WATCHER_TESTS,
            "test_wake_ups_gather_while_nobody_asks_and_are_followed_at_once_by_who_waits",
        ),
    ),
    mutant(
        "who_comes_does_not_end_the_rest",
        "D4",
        "Somebody who begins to wait while a process rests waits for the end of the rest.",
        Edit(
            _WATCHER,
            "        self._asked_s = self._clock.monotonic_s()\n        self._asked.set()\n",
            "        self._asked_s = self._clock.monotonic_s()\n",
        ),
        killers=unit(
            _WATCHER_TESTS,
            "test_wake_ups_gather_while_nobody_asks_and_are_followed_at_once_by_who_waits",
        ),
    ),
    mutant(
        "nobody_follows_lazily",
        "D4",
        "A process that nobody asks reads every publication.",
        Edit(_WATCHER, "        if rest_s > 0:\n", "        if rest_s > 1e9:\n"),
        killers=unit(
            _WATCHER_TESTS,
            "test_wake_ups_gather_while_nobody_asks_and_are_followed_at_once_by_who_waits",
        ),
    ),
    mutant(
        "wait_trusts_wake_ups_alone",
        "D4",
        "With a listener, a wait does not poll, so a lost wake-up is waited for.",
        Edit(
            _WATCHER,
            "async with asyncio.timeout(self._poll_s if len(self._room) else None):",
            "async with asyncio.timeout(None if self._listen else self._poll_s):",
        ),
        Edit(
            _WATCHER,
            "        return asyncio.get_running_loop().call_later(self._poll_s, self._look.set)\n",
            "        return None\n",
        ),
        killers=unit(_WATCHER_TESTS, "test_D4_a_wait_polls_though_no_wake_up_comes"),
    ),
    mutant(
        "first_rows_are_nulls",
        "D11",
        "Rows that are null count as rows that certainly come first.",
        Edit(_LEADING, "file.rows - found.null_count, file)", "file.rows, file)"),
        killers=unit("test_reading_leading.py", "test_D11_no_row_among_the_first_is_left_out"),
    ),
    mutant(
        "last_rows_by_the_wrong_bound",
        "D11",
        "With a descending order bounds are taken as they are.",
        Edit(
            _LEADING,
            "        least, greatest = -greatest, -least\n",
            "        least, greatest = -least, -greatest\n",
        ),
        killers=unit("test_reading_leading.py", "test_D11_no_row_among_the_first_is_left_out"),
    ),
    mutant(
        "files_without_bounds_hold_nothing",
        "D11",
        "A file that makes no claim is not read for the first rows.",
        Edit(
            _LEADING,
            "    return [*others, *(one.file for one in bounded)]\n",
            "    return [one.file for one in bounded]\n",
        ),
        killers=unit("test_reading_leading.py", "test_D11_no_row_among_the_first_is_left_out"),
    ),
    mutant(
        "first_rows_without_the_offset",
        "D11",
        "Rows that an OFFSET passes over are not counted among the wanted ones.",
        Edit(
            _LEADING,
            '    for part in (limit.get("limit"), limit.get("offset")):\n',
            '    for part in (limit.get("limit"),):\n',
        ),
        killers=unit("test_reading_leading.py", "test_D11_orders_that_are_understood"),
    ),
    mutant(
        "first_rows_of_a_condition",
        "D11",
        "Files are left out though a condition decides which rows count.",
        Edit(
            _LEADING,
            "all(node.get(name) == value for name, value in _PLAIN.items())\n",
            "True\n",
        ),
        killers=unit("test_reading_leading.py", "test_D11_orders_that_are_understood"),
    ),
    mutant(
        "small_answer_is_cut",
        "D8",
        "An answer that is no longer small is cut where small ones end.",
        Edit(
            "storage/engine/child_query.py",
            "        if len(rows) <= SMALL_ROWS and are_whole(rows, types):\n",
            "        if are_whole(rows, types):\n",
        ),
        killers=unit(_SMALL_TESTS, "test_an_answer_that_is_not_small_goes_the_long_way"),
    ),
    mutant(
        "small_answer_of_infinite_times",
        "D8",
        "An infinite time is told as the last one that Python has.",
        Edit(
            _SMALL,
            "if value is not None and (type(value) is not wanted or value in _AMBIGUOUS):",
            "if value is not None and type(value) is not wanted:",
        ),
        killers=unit(_SMALL_TESTS, "test_values_are_written_as_the_long_way_writes_them"),
    ),
    mutant(
        "small_answer_of_any_type",
        "D8",
        "Types whose values Python does not tell whole take the short way.",
        Edit(_SMALL, "    return type_id(kind) in _PLAIN\n", "    return True\n"),
        killers=unit(_SMALL_TESTS, "test_values_are_written_as_the_long_way_writes_them"),
    ),
    mutant(
        "small_answer_of_floats_by_python",
        "D8",
        "Small answers write every double as Python does.",
        Edit(_SMALL, '    if name == "double" and all(', '    if name == "double" or all('),
        killers=unit(_SMALL_TESTS, "test_floating_point_numbers_have_the_digits_of_the_long_way"),
    ),
    mutant(
        "small_answer_unescaped",
        "D8",
        "Small answers write texts without escapes.",
        Edit(_SMALL, "    if _HARMFUL.search(value) is not None:\n", "    if False:\n"),
        killers=unit(_SMALL_TESTS, "test_values_are_written_as_the_long_way_writes_them"),
    ),
    mutant(
        "small_answers_forget_who_disappointed",
        "D8",
        "A statement that was executed twice once is executed twice again and again.",
        Edit(
            _SMALL,
            "        if shape is None or self._known.get(shape) is False:\n",
            "        if shape is None:\n",
        ),
        killers=unit(_SMALL_TESTS, "test_who_has_disappointed_is_not_tried_again"),
    ),
)

_ROWS = (
    mutant(
        "claim_brings_its_neighbours",
        "B8 B3",
        "A part of a group comes with the entries of the whole group.",
        Edit(
            _CLAIMS,
            '        entry_indexes=tuple(row["entry_indexes"][first:last]),\n',
            '        entry_indexes=tuple(row["entry_indexes"][: last - first]),\n',
        ),
        killers=integration(_CLAIM_TESTS, "test_B8_what_a_claim_brings_is_what_it_would_read"),
    ),
    mutant(
        "claim_brings_a_part",
        "B8 B3",
        "Of a range of two groups only the first one comes along.",
        Edit(_CLAIMS, "        WHERE l.hi >= c.hi) g ON true", "        ) g ON true"),
        killers=integration(_CLAIM_TESTS, "test_B3_a_range_of_two_groups_is_read"),
    ),
    mutant(
        "claim_brings_any_size",
        "B11",
        "A claim brings its bytes along however many they are.",
        Edit(
            _CLAIMS,
            "              ON octet_length(s.payload) <= {_BROUGHT_BYTES_MAX}\n",
            "              ON true\n",
        ),
        killers=integration(_CLAIM_TESTS, "test_B11_a_large_range_is_not_brought"),
    ),
    mutant(
        "claim_hears_of_nothing_more",
        "B2",
        "A claim says that nothing else waits, whatever does.",
        Edit(_CLAIMS, '        more=row["more"],\n', "        more=False,\n"),
        killers=integration(_CLAIM_TESTS, "test_B2_a_claim_says_whether_there_is_more"),
    ),
    mutant(
        "claim_overlooks_returned_ranges",
        "B2",
        "A range that was given back is not among what a claim says there is more of.",
        Edit(
            _CLAIMS,
            "       OR EXISTS (SELECT FROM bus_lease b WHERE b.state = 'ready') AS more\n",
            "       AS more\n",
        ),
        killers=integration(_CLAIM_TESTS, "test_B2_a_claim_says_what_other_shards_have"),
    ),
    mutant(
        "large_body_on_the_loop",
        "A11",
        "Large bodies are decoded on the event loop.",
        Edit(
            _LARGE,
            "        return await loop.run_in_executor("
            "self._threads, _identified, schema.table_id, decode)\n",
            "        return _identified(schema.table_id, decode) if loop else None\n",
        ),
        killers=unit(_LARGE_TESTS, "test_A4_a_body_from_a_thread_is_the_body_it_would_be"),
    ),
    mutant(
        "large_body_of_another_table",
        "A4",
        "The identity of a large body does not know its table.",
        Edit(
            _LARGE,
            "fingerprint([EntryPart(table_id, 0, batch)])",
            "fingerprint([EntryPart(0, 0, batch)])",
        ),
        killers=unit(_LARGE_TESTS, "test_A4_a_body_from_a_thread_is_the_body_it_would_be"),
    ),
    mutant(
        "large_body_is_refused_in_its_thread",
        "A10",
        "What does not fit in a large body is told by the way that only accepts.",
        Edit(
            _LARGE,
            "    except LakebusError:\n        return None\n",
            "    except OSError:\n        return None\n",
        ),
        killers=unit(_LARGE_TESTS, "test_A10_what_does_not_fit_is_left_to_the_ordinary_way"),
    ),
    mutant(
        "large_body_without_bound",
        "A11",
        "A large body may have more rows than a request.",
        Edit(
            _LARGE,
            "return compiled_batch(plan, body, lines=lines, rows_max=rows_max)",
            "return compiled_batch(plan, body, lines=lines, rows_max=10**9)",
        ),
        killers=unit(_LARGE_TESTS, "test_A10_what_does_not_fit_is_left_to_the_ordinary_way"),
    ),
)

_JSON = (
    mutant(
        "compiled_reader_reads_on_behind_a_body",
        "A9 A10",
        "The compiled reader takes a body that ends before its bytes do.",
        Edit(
            _READER,
            "            return *reader->at == ']' && blank(reader->at + 1, 0) == end;",
            "            return *reader->at == ']';",
        ),
        killers=unit("test_rows_compiled.py", "test_A9_A10_what_is_refused_leaves_nothing_behind"),
    ),
    mutant(
        "compiled_reader_keeps_refused_rows",
        "A9",
        "Rows of a body that was refused in its middle go to its neighbour.",
        Edit(_READER, "            reader.row = first;\n", ""),
        killers=_FUZZ,
    ),
    mutant(
        "compiled_reader_writes_behind_the_last_row",
        "A9",
        "The compiled reader writes one row behind the room that there is.",
        Edit(
            _READER,
            "store(space->fixed + number * space->fixed_step, column->width, reader->row, 0);",
            "store(space->fixed + number * space->fixed_step, column->width, reader->row + 1, 0);",
        ),
        killers=_FUZZ,
    ),
    mutant(
        "compiled_reader_takes_half_a_pair",
        "A10",
        "The compiled reader makes a character of two second halves of pairs.",
        Edit(_VALUES, "            if (code >= 0xDC00 || at[1]", "            if (at[1]"),
        killers=unit("test_rows_compiled.py", "test_A9_A10_what_is_refused_leaves_nothing_behind"),
    ),
    mutant(
        "compiled_reader_wraps_decimals",
        "A10",
        "Digits beyond 64 bits are lost where the compiled reader scales a decimal up.",
        Edit(_VALUES, " || whole + column->scale > 18", ""),
        killers=_FUZZ,
    ),
    mutant(
        "compiled_reader_cuts_fractions",
        "A10",
        "The compiled reader takes more digits of a second than a time has.",
        Edit(
            _VALUES,
            "if (count == 0 || count > 6) return NULL;",
            "if (count == 0) return NULL;\n        if (count > 6) count = 6;",
        ),
        killers=unit("test_rows_compiled.py", "test_A9_A10_what_is_refused_leaves_nothing_behind"),
    ),
    mutant(
        "compiled_reader_takes_views",
        "A9",
        "Views, whose length may be another than that of their bytes, are read as bytes.",
        Edit(
            _COMPILED,
            " or not all(type(body) is bytes for body in bodies)",
            "",
        ),
        killers=unit("test_json_reader.py", "test_only_bytes_are_read"),
    ),
    mutant(
        "compiled_buffers_are_shared",
        "A9",
        "Two threads read small bodies in the same buffers.",
        Edit(_COMPILED, "        return _kept.pop()\n", "        return _kept[-1]\n"),
        killers=unit("test_json_reader.py", "test_threads_read_small_bodies_side_by_side"),
    ),
)

MUTANTS = (*_MAINTENANCE, *_READING, *_ROWS, *_JSON)
