"""Mutants of the claim check: objects that carry large payloads of the bus."""

from __future__ import annotations

from tests.mutation.mutant import Edit, matrix, mutant

_CLAIM_CHECK = "storage/postgres/claim_check.py"
_TESTS = "test_large_payloads.py"

MUTANTS = (
    mutant(
        "payload_damage_is_not_noticed",
        "B8",
        "Damaged bytes of an object reach the decoder, which takes them for the entry's fault.",
        Edit(
            _CLAIM_CHECK,
            "    await asyncio.to_thread(decode_segment, payload)\n    return payload\n",
            "    return payload\n",
        ),
        killers=matrix(_TESTS, "test_B7_bytes_damaged_on_their_way_are_asked_for_again"),
    ),
    mutant(
        "payload_read_after_the_canary",
        "B8",
        "A store that does not give an object counts against the entry.",
        Edit(
            "actors/coordinator.py",
            "            segments = await self._segments(claim)\n",
            "            if lease.hi - lease.lo == 1 and claim.attempt > 0 and not claim.doomed:\n"
            "                await self._leases.note_canary(lease)\n"
            "            segments = await self._segments(claim)\n",
        ),
        killers=matrix(_TESTS, "test_B8_an_object_that_cannot_be_read_condemns_nobody"),
    ),
    mutant(
        "payload_discarded_in_doubt",
        "A6 C6",
        "An object is deleted although its append may have named it.",
        Edit(
            "storage/postgres/group_commit.py",
            "        except (Backpressure, IdempotencyExpired, Unavailable):\n",
            "        except LakebusError:\n",
        ),
        Edit(
            _CLAIM_CHECK,
            "            if not unused:\n                return\n",
            "            del unused\n",
        ),
        killers=matrix(_TESTS, "test_M04_the_object_of_an_append_that_was_not_heard_of_stays"),
    ),
    mutant(
        "payload_released_while_waiting",
        "E3 B10",
        "Objects of entries that are not terminal are condemned.",
        Edit(
            _CLAIM_CHECK,
            "AND l.lo < h.watermark[$1 + 1]\n     WHERE l.hi <= h.watermark[$1 + 1] ORDER",
            "\n     WHERE true ORDER",
        ),
        killers=matrix(_TESTS, "test_B10_a_range_that_was_read_and_not_published_keeps_its_object"),
    ),
    mutant(
        "payload_deleted_without_window",
        "E3",
        "Objects of terminal entries are deleted without the safety window.",
        Edit(_CLAIM_CHECK, "'payload', 'condemned', clock", "'payload', 'deleting', clock"),
        killers=matrix(_TESTS, "test_E3_an_object_is_condemned_when_its_entry_is_terminal"),
    ),
)
