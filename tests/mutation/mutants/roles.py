"""Mutants of the roles: coordinator, keeper, publisher, lease manager (sections B and C)."""

from __future__ import annotations

from tests.mutation.mutant import Edit, mutant, unit

_COORDINATOR = "actors/coordinator.py"
_PUBLISHER = "actors/publisher.py"
_KEEPER = "actors/lease_keeper.py"
_STAGING = "actors/staging.py"
_RANGE_FILES = "actors/range_files.py"

MUTANTS = (
    mutant(
        "publisher_lost_reply_is_failure",
        "C5",
        "A lost reply is taken for a failure: nobody reads back what happened.",
        Edit(
            _PUBLISHER,
            "                found = await self._read_back(publication_id, backoff)\n",
            "                found = None\n",
        ),
        killers=unit(
            "test_actors_publisher.py", "test_C5_a_lost_reply_is_read_back_and_not_sent_again"
        ),
    ),
    mutant(
        "publisher_new_id_for_each_try",
        "C5",
        "Each try of a publication has an id of its own, so none can be read back.",
        Edit(
            _PUBLISHER,
            "await self._catalog.publish(publication_id, commits)",
            "await self._catalog.publish(uuid.uuid4(), commits)",
        ),
        killers=unit(
            "test_actors_publisher.py",
            "test_C5_what_did_not_happen_is_sent_again_under_the_same_id",
        ),
    ),
    mutant(
        "publisher_unknown_is_refused",
        "C5",
        'An outcome that stays unknown is told as "nothing happened".',
        Edit(
            _PUBLISHER,
            'raise OutcomeUnknown("the catalog does not tell what became of the publish")',
            'raise Unavailable("the catalog does not tell what became of the publish")',
        ),
        killers=unit(
            "test_actors_publisher.py", "test_C5_an_outcome_that_stays_unknown_is_told_as_unknown"
        ),
    ),
    mutant(
        "coordinator_publishes_in_doubt",
        "B4",
        "A commit is proposed under a lease that was not renewed in time.",
        Edit(
            _COORDINATOR,
            "        if not self._keeper.trusted(claim.lease) and",
            "        if False and",
        ),
        killers=unit(
            "test_actors_coordinator.py", "test_B4_a_lease_in_doubt_is_confirmed_before_publishing"
        ),
    ),
    mutant(
        "coordinator_counts_absence_of_the_store",
        "B7",
        "A store that is away counts as a failure of the entries.",
        Edit(
            _COORDINATOR,
            "report = await self._give_back(claim, RangeEnd.RELEASED, str(error))\n"
            "        except EncoderUnsound",
            "report = await self._give_back(claim, RangeEnd.FAILED, str(error))\n"
            "        except EncoderUnsound",
        ),
        killers=unit(
            "test_actors_coordinator.py",
            "test_B7_a_store_that_is_away_releases_the_range_uncounted",
        ),
    ),
    mutant(
        "canary_without_proof",
        "B8",
        "A worker claims to work without having shown it.",
        Edit(_COORDINATOR, "                await self._stager.prove()\n", ""),
        killers=unit(
            "test_actors_poison.py", "test_B8_a_worker_that_cannot_pass_its_canary_counts_nothing"
        ),
    ),
    mutant(
        "keeper_trusts_from_the_reply",
        "B5",
        "Trust in a lease counts from when its claim was answered, not from when it was asked.",
        Edit(
            _KEEPER,
            "            trusted_until_s=asked_at_s + claim.ttl_s * _TRUST,\n",
            "            trusted_until_s=self._clock.monotonic_s() + claim.ttl_s * _TRUST,\n",
        ),
        killers=unit("test_actors_leases.py"),
    ),
    mutant(
        "keeper_trusts_from_the_renewals_reply",
        "B5",
        "Trust after a renewal counts from its reply, not from when it was asked for.",
        Edit(
            _KEEPER,
            "                held.trusted_until_s = now + held.ttl_s * _TRUST\n",
            "                held.trusted_until_s = ("
            "self._clock.monotonic_s() + held.ttl_s * _TRUST)\n",
        ),
        killers=unit(
            "test_actors_leases.py", "test_B5_a_slow_renewal_is_believed_in_from_when_it_was_asked"
        ),
    ),
    mutant(
        "keeper_holds_for_ever",
        "B8",
        "A stuck worker's lease is renewed for ever.",
        Edit(
            _KEEPER,
            "if h.renew_at_s <= now and h.hold_until_s <= now]",
            "if h.renew_at_s <= now and h.hold_until_s <= -1]",
        ),
        killers=unit("test_actors_leases.py", "test_B8_a_lease_held_too_long_is_left_to_expire"),
    ),
    mutant(
        "verdict_without_repeating",
        "B8",
        "An entry is set aside although it failed only once.",
        Edit(
            _RANGE_FILES,
            "        elif reason == _failure(group, trial, verdicts):\n",
            "        else:\n",
        ),
        killers=unit(
            "test_actors_poison.py", "test_B8_a_failure_that_does_not_repeat_is_no_verdict"
        ),
    ),
    mutant(
        "verdict_without_canary",
        "B8",
        "Entries are set aside without asking whether good rows can be encoded.",
        Edit(
            _STAGING,
            "        await self._run(self._canary_bytes)\n        shard = claim.lease.shard\n",
            "        shard = claim.lease.shard\n",
        ),
        killers=unit(
            "test_actors_poison.py",
            "test_B8_an_unsound_encoder_condemns_nothing_and_ends_the_process",
        ),
    ),
    mutant(
        "verdicts_without_limit",
        "B8",
        "Any number of entries of a range is set aside at once.",
        Edit(_RANGE_FILES, "            if len(found) > limit:\n", "            if False:\n"),
        killers=unit(
            "test_actors_poison.py",
            "test_B8_when_too_many_fail_the_fault_is_ours_and_nothing_is_set_aside",
        ),
    ),
    mutant(
        "stop_keeps_leases",
        "B7",
        "A manager that stops does not give its leases back.",
        Edit(
            "actors/lease_manager.py",
            "        for lease in self.held:\n",
            "        for lease in self.held[:0]:\n",
        ),
        killers=unit("test_actors_leases.py", "test_B7_stop_gives_everything_back_at_once"),
    ),
)
