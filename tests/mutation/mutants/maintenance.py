"""Mutants of the jobs of maintenance: what they prove, wait for and hold (E, D8)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, in_memory, integration, mutant, unit

_COLLECTION = "storage/maintenance/collection.py"
_DELETION = "storage/maintenance/deletion.py"
_ERASURE = "storage/maintenance/erasure.py"
_SWAPPING = "storage/maintenance/swapping.py"
_UPKEEP = "storage/postgres/upkeep.py"
_MAINTAINER = "actors/maintenance.py"
_STARTS_AGAIN = "test_E2_a_delete_that_loses_to_compaction_starts_again"
_STRANGERS = "test_E4_orphans_go_after_their_window_and_strangers_never"

_PROOFS = (
    mutant(
        "rewrite_sums_uncompared",
        "E1 D8",
        "A rewrite does not compare what it wrote with what it read.",
        Edit(
            "storage/maintenance/rewrite.py",
            "if after.rows == expected and after.places == places:",
            "if after.rows.rows == expected.rows or places:",
        ),
        killers=unit("test_maintenance_rewrite.py", "test_E1_a_rewrite_that_changes_a_row_fails"),
    ),
    mutant(
        "rewrite_sums_of_equal_floats",
        "E1 D8",
        "Sums do not tell -0.0 from 0.0, nor one NaN from another.",
        Edit(
            "storage/maintenance/row_sums.py",
            'return f"{name}::BIT" if kind.family is Family.FLOAT else name',
            "return name",
        ),
        killers=unit(
            "test_maintenance_rewrite.py", "test_E1_sums_tell_rows_apart_and_not_their_order"
        ),
    ),
    mutant(
        "rewrite_sums_of_equal_floats_inside",
        "E1 D8",
        "Sums do not tell one NaN from another inside of lists and maps.",
        Edit(
            "storage/maintenance/row_sums.py",
            'lambda leaf: "BIT" if leaf.family is Family.FLOAT else leaf.sql',
            "lambda leaf: leaf.sql",
        ),
        killers=unit("test_nested_files.py", "test_E1_row_sums_tell_every_two_nested_values_apart"),
    ),
    mutant(
        "swap_of_files_that_do_not_add_up",
        "E1",
        "What a rewrite says of its files is not compared with what it read.",
        Edit(
            _SWAPPING,
            "if made.before - made.removed != made.after or made.after.rows != written:",
            "if made.before.rows < 0:",
        ),
        killers=unit(
            "test_maintenance_swapping.py",
            "test_E1_a_rewrite_that_loses_a_row_is_never_published",
        ),
    ),
    mutant(
        "retention_takes_what_it_likes",
        "E1 E8",
        "Retention does not count anew how many rows were old.",
        Edit(
            "storage/maintenance/retention.py",
            "if old != made.removed.rows or left:",
            "if left:",
        ),
        killers=unit(
            "test_maintenance_retention.py",
            "test_E1_a_rewrite_that_takes_too_much_is_never_published",
        ),
    ),
    mutant(
        "delete_takes_other_rows",
        "E7 E1",
        "A delete does not compare how many rows went with how many matched.",
        Edit(_DELETION, "if made.removed.rows != expected:", "if expected < 0:"),
        killers=in_memory("test_E7_a_rewrite_that_takes_other_rows_is_never_published"),
    ),
)

_RACES = (
    mutant(
        "delete_keeps_its_first_snapshot",
        "E7 E2",
        "A delete that lost its files to compaction goes on with the list that it has.",
        Edit(
            _DELETION,
            "            state = await self._state()\n",
            '            state = self.__dict__.get("first") or await self._state()\n'
            '            self.__dict__["first"] = state\n',
        ),
        killers=in_memory(_STARTS_AGAIN),
    ),
    mutant(
        "compaction_takes_no_turns",
        "E2 E7",
        "Compaction goes on in a table in which a delete lost to it again and again.",
        Edit(
            "storage/maintenance/compaction.py",
            "if table.table_id in await patiently(self._context, self._tables_taken):",
            "if not await patiently(self._context, self._tables_taken) and False:",
        ),
        killers=in_memory(_STARTS_AGAIN),
    ),
    mutant(
        "rewrite_without_pin",
        "E3",
        "A rewrite reads files that a collection may delete.",
        Edit(
            _SWAPPING,
            "            await pin.hold()\n            # failpoint: swapping.after_pin",
            "            # failpoint: swapping.after_pin",
        ),
        Edit(
            _SWAPPING,
            "                await pin.hold()\n                place = folder",
            "                place = folder",
        ),
        killers=unit(
            "test_maintenance_swapping.py",
            "test_E3_a_rewrite_holds_a_pin_while_it_reads_and_none_after",
        ),
    ),
    mutant(
        "erasure_looks_once",
        "E7",
        "What a compaction made of the rows while they were erased is not looked at.",
        Edit(
            _ERASURE,
            "            # failpoint: erasure.after_exchange\n",
            "            # failpoint: erasure.after_exchange\n            return []\n",
        ),
        killers=in_memory("test_E7_erasure_and_a_compaction_in_between"),
    ),
    mutant(
        "erasure_leaves_no_record",
        "E7 F3",
        "The object store does not hold what a restored lake has to erase again.",
        Edit(
            _ERASURE,
            "self._context, lambda: write_record(self._context.store, self._erasure_id, record)\n",
            "self._context, lambda: asyncio.sleep(0, (write_record, record))\n",
        ),
        killers=in_memory(
            "test_E7_erasure_is_done_again_before_a_restored_lake_is_read",
            "test_E7_erasure_leaves_no_object_and_no_segment",
        ),
    ),
)

_COLLECTED = (
    mutant(
        "collection_without_safety_window",
        "E3",
        "The job does not hand the safety window on.",
        Edit(
            _COLLECTION,
            "        window_s=settings.safety_window_s, limit=settings.deletes_max\n    )\n"
            "    # failpoint: collection.after_begin",
            "        window_s=0.0, limit=settings.deletes_max\n    )\n"
            "    # failpoint: collection.after_begin",
        ),
        killers=unit(
            "test_collection.py", "test_E3_only_what_was_condemned_for_the_window_is_deleted"
        ),
    ),
    mutant(
        "collection_without_orphan_window",
        "E4",
        "The job does not hand the orphan window on.",
        Edit(
            _COLLECTION,
            "        older_than_s=settings.orphan_window_s, limit=settings.deletes_max\n    )\n"
            "    # failpoint: collection.after_orphans",
            "        older_than_s=0.0, limit=settings.deletes_max\n    )\n"
            "    # failpoint: collection.after_orphans",
        ),
        killers=unit("test_collection.py", _STRANGERS),
    ),
    mutant(
        "sweep_deletes_strangers",
        "E4",
        "An object that the catalog does not know is deleted.",
        Edit(
            _COLLECTION,
            "state = known.get(name) if name is not None else None",
            'state = known.get(name, "deleted") if name is not None else None',
        ),
        killers=unit("test_collection.py", _STRANGERS),
    ),
    mutant(
        "collection_notes_what_failed",
        "E3 E5",
        "Objects that the store did not delete are recorded as deleted.",
        Edit(
            _COLLECTION,
            "return [one for one, is_gone in zip(files, gone, strict=True) if is_gone]",
            "return [one for one, _ in zip(files, gone, strict=True)]",
        ),
        killers=unit(
            "test_collection.py", "test_E3_what_the_store_cannot_delete_is_deleted_by_the_next_run"
        ),
    ),
    mutant(
        "deletes_of_a_restored_catalog",
        "E3 F4",
        "A catalog that went back in time deletes files that the lost line needs.",
        Edit(
            _UPKEEP,
            "        if error is not None:\n            raise error\n        if settled",
            "        if settled",
        ),
        killers=integration(
            "test_upkeep_guard.py",
            "test_E3_nothing_is_deleted_from_the_store_of_another_lake",
            "test_E3_every_call_of_upkeep_is_refused_on_a_catalog_that_went_back",
        ),
    ),
    mutant(
        "deletes_in_a_store_without_marker",
        "E3 F4",
        "Objects are deleted from a store that is not this lake's.",
        Edit(_UPKEEP, "        if settled.marker is None:\n", "        if error is not None:\n"),
        killers=integration(
            "test_upkeep_guard.py",
            "test_E3_nothing_is_deleted_from_a_store_that_lacks_the_marker",
        ),
    ),
)

_MAINTAINED = (
    mutant(
        "maintainer_runs_all_at_once",
        "E5",
        "More jobs run at a time than there may.",
        Edit(
            _MAINTAINER,
            "while len(running) < self._settings.jobs_at_once:",
            "while len(running) <= self._settings.jobs_at_once:",
        ),
        killers=unit(
            "test_actors_maintenance.py",
            "test_one_job_at_a_time_and_a_validation_keeps_no_compaction_waiting",
        ),
    ),
    mutant(
        "maintainer_calls_a_published_delete_failed",
        "E7 C5",
        "A delete whose rows are gone is recorded as failed.",
        Edit(
            _MAINTAINER,
            "return await self._upkeep.swap_outcome(publication_of(job.job_id)) is not None",
            "return False",
        ),
        killers=unit(
            "test_actors_maintenance.py",
            "test_E7_a_delete_that_published_is_never_recorded_as_failed",
        ),
    ),
    mutant(
        "maintainer_gives_an_erasure_up",
        "E7",
        "An erasure that failed some times is tried no more.",
        Edit(
            _MAINTAINER,
            "if job.fruitless_attempts >= settings.attempts_max and job.kind is not JobKind.ERASE:",
            "if job.fruitless_attempts >= settings.attempts_max:",
        ),
        killers=unit("test_actors_maintenance.py", "test_E7_an_erasure_is_tried_until_it_is_done"),
    ),
)

_FLOODED = (
    mutant(
        "brake_is_never_put_on",
        "B3",
        "However many small files there are, coordinators publish as often as before.",
        Edit("actors/brake.py", "linger.slow_down(pause_s)", "linger.slow_down(0.0)"),
        killers=unit(
            "test_actors_brake.py",
            "test_a_coordinator_publishes_less_often_under_a_flood_of_files",
        ),
    ),
    mutant(
        "brake_stays_on",
        "B3",
        "A lake that was flooded once publishes slowly for ever.",
        Edit("actors/brake.py", "min(max(share, 0.0), 1.0)", "min(max(share, 0.5), 1.0)"),
        killers=unit(
            "test_actors_brake.py",
            "test_a_lone_writer_is_slowed_down_too_and_nobody_once_files_are_merged",
        ),
    ),
    mutant(
        "compaction_chases_what_comes_in",
        "C7",
        "A table that is written to all the time keeps the job from all others.",
        Edit(
            "storage/maintenance/compaction.py",
            "if self._known is None:",
            "if True:",
        ),
        killers=unit(
            "test_maintenance_rounds.py",
            "test_files_that_come_in_meanwhile_are_left_to_the_next_job",
        ),
    ),
    mutant(
        "job_forgets_its_earlier_attempts",
        "E5",
        "The record of a job that was begun again tells of its last attempt only.",
        Edit(
            "storage/maintenance/totals.py",
            "whole = self._with(job.report)",
            "whole = self",
        ),
        killers=unit(
            "test_maintenance_rounds.py",
            "test_an_attempt_that_died_is_counted_in_the_report_of_the_next",
        ),
    ),
)

MUTANTS = (*_PROOFS, *_RACES, *_COLLECTED, *_MAINTAINED, *_FLOODED)
