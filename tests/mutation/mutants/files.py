"""Mutants of what lies on disk and of what is known about it (C6, D11, D12)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, mutant, unit

_OBJECTS = "storage/files/objects.py"
_STATISTICS = "storage/files/statistics.py"
_PREDICATES = "storage/files/predicates.py"
_PRUNING = "storage/files/pruning.py"
_OBJECT_TESTS = "test_files_objects.py"

MUTANTS = (
    mutant(
        "object_not_synced",
        "C6 A1",
        "An object gets its name before its bytes are on disk.",
        Edit(
            _OBJECTS,
            '        os.fsync(file)\n        os.link(\n            f"/proc/self/fd/{file}",\n',
            '        os.link(\n            f"/proc/self/fd/{file}",\n',
        ),
        killers=unit(
            _OBJECT_TESTS, "test_C6_file_and_directories_are_synced_before_the_put_returns"
        ),
    ),
    mutant(
        "object_by_temporary_name_not_synced",
        "C6 A1",
        "Where files must have names, an object gets its last one before its bytes are on disk.",
        Edit(
            _OBJECTS,
            "            _write_all(file, data)\n            os.fsync(file)\n",
            "            _write_all(file, data)\n",
        ),
        killers=unit(
            _OBJECT_TESTS, "test_C6_a_temporary_name_is_synced_before_it_becomes_the_object"
        ),
    ),
    mutant(
        "object_folder_not_synced",
        "C6 A1",
        "The name of a new object can be lost in a power cut.",
        Edit(
            _OBJECTS,
            "            self._write_and_link(handle, name, data)\n            os.fsync(handle)\n",
            "            self._write_and_link(handle, name, data)\n",
        ),
        killers=unit(
            _OBJECT_TESTS, "test_C6_file_and_directories_are_synced_before_the_put_returns"
        ),
    ),
    mutant(
        "object_new_folder_not_synced",
        "C6 A1",
        "The name of a new folder, and all in it, can be lost in a power cut.",
        Edit(
            _OBJECTS,
            "            _sync_directory(current)\n            if current == str(self._root):\n",
            "            if current == str(self._root):\n",
        ),
        killers=unit(
            _OBJECT_TESTS, "test_C6_file_and_directories_are_synced_before_the_put_returns"
        ),
    ),
    mutant(
        "object_overwritten",
        "C6",
        "A second put under one name replaces the first object's bytes.",
        Edit(
            _OBJECTS,
            "        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)\n",
            "        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)\n"
            "        os.link(name, temporary, src_dir_fd=directory, dst_dir_fd=directory)\n",
        ),
        killers=unit(
            _OBJECT_TESTS, "test_C6_a_temporary_name_is_synced_before_it_becomes_the_object"
        ),
    ),
    mutant(
        "publish_before_put_ends",
        "C6",
        "A commit is proposed while its files are still being written.",
        Edit(
            "actors/staging.py",
            "        await self._store.put_new(key, file.encoded.data)\n",
            "        self._late = asyncio.ensure_future("
            "self._store.put_new(key, file.encoded.data))\n",
        ),
        killers=unit(
            "test_actors_coordinator.py", "test_C6_nothing_is_proposed_before_its_files_are_stored"
        ),
    ),
    mutant(
        "nan_gets_bounds",
        "D11",
        "A column with a NaN claims bounds.",
        Edit(
            _STATISTICS,
            "    if kind.family is Family.FLOAT and has_nan(column):\n",
            "    if False:\n",
        ),
        killers=unit("test_files_statistics.py", "test_D11_a_nan_leaves_no_bounds"),
    ),
    mutant(
        "minus_zero_is_a_bound",
        "D11",
        "The bound -0.0 is not the bound 0.0.",
        Edit(_STATISTICS, "return repr(scalar.as_py() + 0.0)", "return repr(scalar.as_py())"),
        killers=unit("test_files_statistics.py", "test_D11_bounds_are_canonical_text"),
    ),
    mutant(
        "cut_maximum_not_raised",
        "D11",
        "A long text's upper bound is a mere prefix, below the text itself.",
        Edit(
            _STATISTICS,
            "return text if len(cut) == len(text) else _raise_text(cut)",
            "return cut",
        ),
        killers=unit("test_files_statistics.py", "test_D11_cut_text_encloses_the_value_bytewise"),
    ),
    mutant(
        "pruning_nulls",
        "D11",
        "IS NULL skips files in which only some rows are null.",
        Edit(
            _PREDICATES,
            "return found is None or found.null_count > 0",
            "return found is None or found.null_count >= rows",
        ),
        killers=unit("test_pruning_conditions.py"),
    ),
    mutant(
        "pruning_late_column",
        "D11",
        "A file from before a column was added is skipped by IS NULL on it.",
        Edit(
            _PREDICATES,
            "return found is None or found.null_count > 0",
            "return found is not None and found.null_count > 0",
        ),
        killers=unit(
            "test_pruning_conditions.py",
            "test_D11_a_column_added_later_keeps_the_files_from_before",
        ),
    ),
    mutant(
        "pruning_strict_bound",
        "D11",
        "A bound that equals the constant counts as outside, also for <= and >=.",
        Edit(
            _PREDICATES,
            "strict_least = strict and least is not None and least.exact",
            "strict_least = least is not None and least.exact",
        ),
        killers=unit("test_pruning_conditions.py"),
    ),
    mutant(
        "pruning_or_drops_the_unknown",
        "D11",
        "Of an OR, the side that is not understood is left out.",
        Edit(
            _PREDICATES,
            "    if len(checks) != len(parts) or not checks:\n",
            "    if not checks:\n",
        ),
        killers=unit("test_pruning_conditions.py"),
    ),
    mutant(
        "pruning_outer_join",
        "D11",
        "A condition in the ON of a LEFT JOIN prunes the left table.",
        Edit(
            _PRUNING,
            '        case "LEFT":\n            return [(left, conditions), (right, on)]\n',
            '        case "LEFT":\n            return [(left, conditions + on), (right, on)]\n',
        ),
        killers=unit("test_pruning_conditions.py"),
    ),
    mutant(
        "row_numbers_restart",
        "D12",
        "Rows of an entry's later parts are numbered from 0 again.",
        Edit(
            "actors/range_files.py",
            "steps = np.asarray(found.first_rows, np.int64) - starts",
            "steps = -starts",
        ),
        killers=unit(
            "test_actors_coordinator.py", "test_D12_rows_carry_shard_position_and_row_of_the_entry"
        ),
    ),
)
