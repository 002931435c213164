"""M04: an append has committed, and nobody hears of it."""

from __future__ import annotations

import asyncio
import time

import pytest

from lakebus.errors import OutcomeUnknown, Unavailable
from storage.bus.interface import Accepted
from storage.postgres.pool import LOCKING_TRANSACTION_MS, RELEASE_S, PoolSettings
from tests.conformance.harness import entry_of, total
from tests.faults.proxy import Act, Rule, Way
from tests.matrix.connection_rig import FaultyLake, lake, template  # noqa: F401 (fixtures)

_APPEND = "append_group("


async def test_M04_a_lost_reply_is_unknown_and_the_key_finds_the_receipt(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    wired = await lake.wired()
    lost = wired.proxy.arm(Rule(act=Act.CUT, sql=_APPEND))
    entry = entry_of(table, [1, 2], key="k")
    with pytest.raises(OutcomeUnknown):
        await wired.lake.bus.append(entry)
    assert (await lost.struck()).committed
    assert total(dict(await lake.bus.ends())) == 1
    # The same process, another one, and one after a restart: the same receipt.
    receipts = [await lake.replay(entry, wired.view), await lake.replay(entry)]
    await lake.restart()
    receipts.append(await lake.replay(entry))
    assert receipts[0].rows == 2
    assert receipts.count(receipts[0]) == 3
    assert total(dict(await lake.bus.ends())) == 1
    lake.keep(entry, receipts[0])
    await lake.audited()
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_M04_the_retrys_reply_may_be_lost_as_well(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    wired = await lake.wired()
    lost = wired.proxy.arm(Rule(act=Act.CUT, sql=_APPEND, times=3))
    entry = entry_of(table, [1], key="k")
    for _ in range(3):
        with pytest.raises(OutcomeUnknown):
            await wired.lake.bus.append(entry)
    assert all(fired.committed for fired in lost.fired)
    lake.keep(entry, await lake.replay(entry, wired.view))
    assert total(dict(await lake.bus.ends())) == 1
    await lake.audited()


@pytest.mark.parametrize("committed", [True, False])
async def test_M04_without_a_key_there_is_at_most_one_entry(
    lake: FaultyLake,  # noqa: F811
    committed: bool,
) -> None:
    table = await lake.create()
    wired = await lake.wired()
    act = Act.CUT if committed else Act.RESET
    broken = wired.proxy.arm(Rule(act=act, sql=_APPEND))
    with pytest.raises(OutcomeUnknown):
        await wired.lake.bus.append(entry_of(table, [1]))
    assert (await broken.struck()).committed == committed
    assert total(dict(await lake.bus.ends())) == int(committed)
    await lake.accept(entry_of(table, [2]))
    await lake.audited()
    assert len(await lake.rows_by_entry()) == 1 + int(committed)


async def test_M04_a_group_of_fifty_whose_reply_is_lost_is_fifty_unknown_outcomes(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    wired = await lake.wired()
    held = wired.proxy.arm(Rule(act=Act.HOLD, sql=_APPEND, way=Way.TO_CLIENT))
    first = entry_of(table, [0], key="first", ordering_key="one")
    leading = asyncio.create_task(wired.lake.bus.append(first))
    await held.struck()
    # While the first group waits for its reply, the second one gathers.
    entries = [entry_of(table, [n], key=f"k{n}", ordering_key="one") for n in range(1, 51)]
    following = [asyncio.create_task(wired.lake.bus.append(entry)) for entry in entries]
    await asyncio.sleep(0)
    lost = wired.proxy.arm(Rule(act=Act.CUT, sql=_APPEND))
    held.lift()
    outcomes = await asyncio.gather(*following, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown] * 50
    assert (await lost.struck()).committed
    await leading
    lake.keep(first, await lake.replay(first))
    for entry in entries:
        lake.keep(entry, await lake.replay(entry, wired.view))
    assert total(dict(await lake.bus.ends())) == 51
    await lake.audited()
    assert len(await lake.rows_by_entry()) == 51


async def test_M04_a_silent_wire_is_no_answer_and_no_second_entry(
    lake: FaultyLake,  # noqa: F811
) -> None:
    # No reset: the reply just never comes, and the caller gives up by its own clock.
    table = await lake.create()
    wired = await lake.wired()
    gone = wired.proxy.arm(Rule(act=Act.DROP, sql=_APPEND, way=Way.TO_CLIENT))
    entry = entry_of(table, [1], key="k")
    waiting = asyncio.create_task(wired.lake.bus.append(entry))
    assert (await gone.struck()).committed
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    lake.keep(entry, await lake.replay(entry))
    assert total(dict(await lake.bus.ends())) == 1
    wired.proxy.reset()
    await lake.audited()


async def test_M04_a_silent_connection_is_unknown_and_the_next_one_works(
    lake: FaultyLake,  # noqa: F811
) -> None:
    # The wire goes dead for this connection; the server's own bound has long ended the statement
    # when ours comes, and not even the cancellation is answered.
    table = await lake.create()
    wired = await lake.wired()
    wired.proxy.arm(Rule(act=Act.DROP, sql=_APPEND, way=Way.TO_CLIENT))
    entry = entry_of(table, [1], key="k")
    began_s = time.monotonic()
    with pytest.raises(OutcomeUnknown):
        await wired.lake.bus.append(entry)
    # Not the half minute that a statement may take elsewhere: a shard's group waits for this.
    bound_s = PoolSettings(transaction_ms=LOCKING_TRANSACTION_MS).command_s
    assert bound_s < 5
    assert time.monotonic() - began_s < bound_s + RELEASE_S + 3
    lake.keep(entry, await lake.replay(entry, wired.view))
    await lake.audited()


async def test_M04_what_cannot_be_read_after_the_commit_refuses_no_neighbour(
    lake: FaultyLake,  # noqa: F811
) -> None:
    """The record of a key that was taken is read behind the append: if that fails, the others of
    the group are accepted all the same, and must not be told that nothing was stored (A6, A9)."""

    table = await lake.create()
    wired = await lake.wired()
    known = entry_of(table, [1], key="k", ordering_key="one")
    accepted = await wired.lake.bus.append(known)
    assert isinstance(accepted, Accepted)
    lake.keep(known, accepted.receipt)
    broken = wired.proxy.arm(Rule(act=Act.RESET, sql="find_keys("))
    first, fresh = (entry_of(table, [n], ordering_key="one") for n in (2, 3))
    # The first goes at once and alone; the other two gather behind it and are one group.
    outcomes = await asyncio.gather(
        *(wired.lake.bus.append(entry) for entry in (first, known, fresh)), return_exceptions=True
    )
    assert len(broken.fired) == 1
    assert isinstance(outcomes[0], Accepted)
    assert isinstance(outcomes[1], Unavailable)
    assert isinstance(outcomes[2], Accepted)
    assert total(dict(await lake.bus.ends())) == 3
    await lake.replay(known, wired.view)
    await lake.audited()
