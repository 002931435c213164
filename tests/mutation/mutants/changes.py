"""Mutants of the change feed (D12)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, in_memory, mutant, on_postgres

_CHANGES = "storage/reading/changes.py"
_WINDOWS = "test_D12_windows_hold_each_row_once_in_order_of_its_place"
_DELETED = "test_D12_a_window_keeps_the_rows_that_were_deleted_in_it"

MUTANTS = (
    mutant(
        "changes_begin_too_early",
        "D12",
        "A window holds what was published in the snapshot it begins after.",
        Edit(
            "storage/postgres/catalog.py",
            "WHERE snapshot_id > $1 AND snapshot_id <= $2 AND (shard",
            "WHERE snapshot_id >= $1 AND snapshot_id <= $2 AND (shard",
        ),
        killers=on_postgres("test_D12_ranges_are_told_by_the_snapshots_that_published_them"),
    ),
    mutant(
        "changes_lose_the_rest_of_an_entry",
        "D12",
        "A page that ends within an entry loses the entry's other rows.",
        Edit(
            _CHANGES,
            "            if page.row_count == request.limit:\n"
            "                place = _last_place(page, request.result_format)\n",
            "            if page.row_count == request.limit:\n"
            "                last = _last_place(page, request.result_format)\n"
            "                place = Place(last.shard, last.position, _ROW_MAX)\n",
        ),
        killers=in_memory(_WINDOWS),
    ),
    mutant(
        "changes_of_other_windows",
        "D12",
        "Rows that lie behind a range of the window are taken for its rows.",
        Edit(
            _CHANGES,
            """ WHERE f."{POSITION_COLUMN}" < r.hi AND (f.""",
            """ WHERE (f.""",
        ),
        killers=in_memory(_WINDOWS),
    ),
    mutant(
        "changes_skip_an_entry",
        "D12",
        "A step over many ranges goes on one entry too far.",
        Edit(
            _CHANGES,
            "Place(ranges[-1].shard, ranges[-1].hi - 1, _ROW_MAX)",
            "Place(ranges[-1].shard, ranges[-1].hi, _ROW_MAX)",
        ),
        killers=in_memory(_WINDOWS),
    ),
    mutant(
        "changes_forget_what_was_deleted",
        "D12",
        "Rows that were deleted within the window are missing from it.",
        Edit(_CHANGES, "self._planner.locate([*files, *removed])", "self._planner.locate(files)"),
        killers=in_memory(_DELETED),
    ),
    mutant(
        "changes_repeat_what_a_delete_kept",
        "D12",
        "A row that a delete copied is answered from both files.",
        Edit(_CHANGES, "several=bool(removed))", "several=False)"),
        killers=in_memory(_DELETED),
    ),
    mutant(
        "changes_are_silently_shorter",
        "D12",
        "A window whose deleted rows have expired is answered without them.",
        Edit(_CHANGES, "        if after < oldest:\n", "        if after < 0:\n"),
        killers=in_memory("test_D12_a_feed_that_would_be_shorter_is_refused"),
    ),
)
