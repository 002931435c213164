"""Mutants of deletes (E7)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, in_memory, mutant

_DELETION = "storage/maintenance/deletion.py"
_JOBS = "storage/maintenance/jobs.py"
_ONCE = "test_E7_a_delete_that_dies_is_done_once"

MUTANTS = (
    mutant(
        "delete_is_published_twice",
        "E7",
        "A second try of a delete that was published publishes another one.",
        Edit(_JOBS, "return uuid.uuid5(_PUBLICATION, job_id.hex)", "return uuid.uuid4()"),
        killers=in_memory(_ONCE),
    ),
    mutant(
        "delete_forgets_files_published_beside_the_list",
        "E7",
        "The files are those of no snapshot: what was published beside the list is left out.",
        Edit(
            _DELETION,
            "if head.snapshot_id > before.snapshot_id:",
            "if head.snapshot_id > before.snapshot_id + 1_000_000:",
        ),
        killers=in_memory(
            "test_E7_a_publication_beside_the_list_of_files_is_in_the_snapshot_or_not"
        ),
    ),
    mutant(
        "delete_takes_a_name_for_another_column",
        "E7",
        "A column that took a name since the delete was accepted is read for it.",
        Edit(
            _DELETION,
            "if accepted.get(name) != newest.get(name):",
            "if accepted.get(name) is None and newest.get(name) is None and False:",
        ),
        killers=in_memory("test_E7_names_are_those_of_the_table_when_it_was_accepted"),
    ),
)
