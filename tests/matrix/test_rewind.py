"""M27: the database was rolled back, or promoted with a lost tail (contract F3, F4).

Real servers, real copies of their files, a real promotion. In each row: tokens above the fork are
refused with their own error and those below it honoured, no epoch is used twice, nothing accepted
on the kept line is lost, zombies change nothing; doors stop, and serve once the loss is accepted.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.migrate import upgrade
from lakebus.errors import HistoryRewound, TokenHistoryLost
from lakebus.schemas import Column
from storage.bus.interface import Accepted
from storage.catalog.interface import CommitOutcome
from storage.files.objects import LocalObjectStore
from storage.postgres import PostgresLake
from storage.postgres.rewind_acceptance import accept_loss, report
from storage.reading.history import map_token
from tests.conformance.harness import entry_of
from tests.conformance.worker import StagedFiles, Worker
from tests.matrix import rewind_rig as rig
from tests.matrix.rewind_rig import Machine
from tests.postgres_server import new_data_dir, run_elsewhere


@pytest.fixture(scope="module")
def template() -> Iterator[Machine]:
    """A stopped server with the schema and no lake."""

    folder = new_data_dir()
    made = Machine(folder)

    async def make() -> None:
        await made.server.start()
        await upgrade(made.dsn)
        await made.server.stop()

    try:
        run_elsewhere(make)
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    """Where a door's own settings put it, too."""

    (tmp_path / "objects").mkdir()
    return LocalObjectStore(tmp_path / "objects")


async def drain(lake: PostgresLake, files: StagedFiles) -> None:
    worker = Worker(bus=lake.bus, catalog=lake.catalog, files=files)
    while (claim := await lake.bus.claim(worker.owner)) is not None:
        await worker.publish(await worker.stage(claim))


async def test_M27_a_rolled_back_volume_stops_every_door_until_its_loss_is_accepted(
    template: Machine, tmp_path: Path, store: LocalObjectStore
) -> None:
    files = StagedFiles()
    async with rig.machine(template) as server:
        await server.server.start()
        async with rig.process(server.dsn, store) as role:
            key = await rig.new_key(role)
            zombie = Worker(bus=role.bus, catalog=role.catalog, files=files)
            async with rig.door(server.dsn, tmp_path, key) as door:
                columns = [{"name": "id", "type": "varchar"}]
                assert (await door.post("/v1/tables", {"name": "t", "columns": columns})).is_success
                kept = await door.receipt("kept")
                await drain(role, files)
                waiting = await door.receipt("waiting")
                backup = await server.back_up()
                await rig.wait_for(door.ready, "the door finds the server again")

                lost = await door.receipt("lost")
                await drain(role, files)
                lost_head = await role.catalog.head()
                await door.receipt("lost-too")
                claim = await zombie.claim()
                staged = await zombie.stage(claim)
                await role.judge()  # the marker, which comes by itself a second later
                await server.roll_back(backup)

                await rig.wait_for(lambda: rig.refused(role), "the roles refuse")
                await _everything_is_refused(door)
                with pytest.raises(HistoryRewound):
                    await zombie.publish(staged)
                with pytest.raises(HistoryRewound):
                    await role.bus.claim(uuid.uuid4())
                async with rig.process(server.dsn, store) as newcomer:
                    with pytest.raises(HistoryRewound, match="accept-loss"):
                        await newcomer.catalog.head()
                    newest = await _accept(server.dsn, store, lost_head.snapshot_id)
                    await newcomer.judge()
                    assert (await newcomer.catalog.head()).history == newest

                await rig.wait_for(door.ready, "the door opens by itself")
                await role.judge()
                late = await zombie.publish(staged)
                assert late.outcomes == {staged.commit_id: CommitOutcome.LEASE_LOST}
                heir = await Worker(bus=role.bus, catalog=role.catalog, files=files).claim()
                assert heir.lease.epoch > claim.lease.epoch
                await role.bus.release(heir.lease)

                again = await door.receipt("lost")
                assert again["batch_id"] != lost["batch_id"]
                assert await door.receipt("waiting") == waiting
                await drain(role, files)
                for receipt in (kept, waiting, again):
                    token = receipt["visibility_token"]
                    answer = await door.get(f"/v1/visibility?token={token}")
                    assert answer.json()["visible"] is True
                gone = await door.get(f"/v1/visibility?token={lost['visibility_token']}")
                assert (gone.status_code, gone.json()["code"]) == (410, "token_history_lost")
                gone = await door.get(f"/v1/snapshots/{lost_head.snapshot_id}")
                assert (gone.status_code, gone.json()["code"]) == (410, "history_lost")
                assert gone.json()["newest_kept_snapshot_id"] < lost_head.snapshot_id
                head = await role.catalog.head()
                rows = await files.rows_at(role.catalog, head.snapshot_id)
                assert len(rows) == sum(rows.values()) == 3


async def _everything_is_refused(door: rig.Door) -> None:
    answers = [
        await door.send("refused"),
        await door.send("kept"),
        await door.get("/readyz"),
        await door.get("/v1/tables"),
        await door.get("/v1/tables/t"),
        await door.get("/v1/snapshots/latest"),
        await door.get("/v1/snapshots"),
        await door.get("/v1/admin/status"),
        await door.post("/v1/tables", {"name": "u", "columns": [{"name": "a", "type": "date"}]}),
    ]
    for answer in answers:
        document = answer.json()
        assert (answer.status_code, document["code"]) == (503, "history_rewound"), answer.text
        assert document["retryable"] is False
        assert "lakebus history accept-loss" in document["detail"]
    assert (await door.get("/healthz")).status_code == 200


async def _accept(dsn: str, store: LocalObjectStore, lost_snapshot: int) -> uuid.UUID:
    """What the command does: look, print, accept. Two operators at once begin one line."""

    found = await report(dsn, store=store)
    assert found.verdict == "behind"
    assert str(lost_snapshot) in found.losses[0]
    assert len(found.losses) > 1, "accepted requests were lost too"
    assert found.history_id is not None
    done = await asyncio.gather(
        *(
            accept_loss(dsn, store=store, bus_settings=rig.BUS, history_id=found.history_id)
            for _ in range(3)
        ),
        return_exceptions=True,
    )
    (began,) = [one for one in done if not isinstance(one, BaseException)]
    assert [type(one).__name__ for one in done if one is not began] == ["StartRefused"] * 2
    after = await report(dsn, store=store)
    assert (after.verdict, list(after.losses)) == ("same", [])
    assert after.history_id == began.history_id != found.history_id
    assert after.history_id is not None
    return after.history_id


async def test_M27_a_promoted_standby_that_lost_nothing_begins_one_line_by_itself(
    template: Machine, store: LocalObjectStore
) -> None:
    files = StagedFiles()
    async with rig.machine(template) as primary, rig.machine(template) as standby:
        await primary.server.start()
        await standby.follow(primary)
        dsn = rig.both(primary, standby)
        async with (
            rig.process(dsn, store) as one,
            rig.process(dsn, store) as two,
            rig.process(dsn, store) as three,
        ):
            table = (await one.catalog.create_table(name="t", columns=_COLUMNS)).schema
            accepted = [await one.bus.append(entry_of(table, [n], key=f"k{n}")) for n in range(4)]
            zombie = Worker(bus=two.bus, catalog=two.catalog, files=files)
            claim = await zombie.claim()
            staged = await zombie.stage(claim)
            later = await one.bus.append(entry_of(table, [9], key="k9"))
            before = await one.catalog.identity()
            tokens = [one.codec.decode(_receipt(each)) for each in (*accepted, later)]
            await one.judge()
            await standby.catch_up(primary)
            await primary.server.stop()
            await standby.promote()

            # Everybody notices at once, and a newcomer with them.
            async def found() -> None:
                async with rig.process(dsn, store) as four:
                    await four.catalog.head()

            await asyncio.gather(
                found(),
                *(
                    rig.wait_for(lambda lake=lake: _serves(lake), "it serves again")  # type: ignore[misc]
                    for lake in (one, two, three)
                ),
            )
            identity = await one.catalog.identity()
            assert len(identity.histories) == len(before.histories) + 1
            assert identity.histories[-1].parent == before.history
            facts = await standby.ask(
                "SELECT string_agg(reason || timeline::text, ',') FROM lakebus.history"
                " WHERE parent_serial IS NOT NULL"
            )
            assert facts == "timeline2"

            late = await zombie.publish(staged)
            assert late.outcomes == {staged.commit_id: CommitOutcome.LEASE_LOST}
            heir = await Worker(bus=two.bus, catalog=two.catalog, files=files).claim()
            assert heir.lease.epoch > claim.lease.epoch
            await two.bus.release(heir.lease)
            await drain(three, files)
            head = await one.catalog.head()
            rows = await files.rows_at(one.catalog, head.snapshot_id)
            assert len(rows) == sum(rows.values()) == 5
            path = identity.histories
            for token in tokens:
                mapped = map_token(token, path=path, shards=head.watermark)
                assert mapped.covered_by(head.snapshot_id, head.watermark)

            # The same server again is no news.
            await standby.server.stop()
            await standby.server.start()
            await rig.wait_for(lambda: _serves(one), "it serves after a restart")
            assert (await one.catalog.identity()).history == identity.history


async def test_M27_a_promoted_standby_that_lagged_stops_until_its_loss_is_accepted(
    template: Machine, store: LocalObjectStore
) -> None:
    files = StagedFiles()
    async with rig.machine(template) as primary, rig.machine(template) as standby:
        await primary.server.start()
        await standby.follow(primary)
        dsn = rig.both(primary, standby)
        async with rig.process(dsn, store) as alive:
            table = (await alive.catalog.create_table(name="t", columns=_COLUMNS)).schema
            kept = await alive.bus.append(entry_of(table, [1], key="kept"))
            await standby.catch_up(primary)
            await standby.lag()
            lost = await alive.bus.append(entry_of(table, [2], key="lost"))
            await drain(alive, files)
            lost_head = await alive.catalog.head()
            await alive.judge()
            await primary.server.stop()
            await standby.promote()

            await rig.wait_for(lambda: rig.refused(alive), "the lag is noticed")
            async with rig.process(standby.dsn, store) as newcomer:
                with pytest.raises(HistoryRewound):
                    await newcomer.catalog.head()
            line = "SELECT count(*) FROM lakebus.history"
            assert await standby.ask(line) == 1, "a line began although something was lost"
            newest = await _accept(standby.dsn, store, lost_head.snapshot_id)
            await alive.judge()
            await drain(alive, files)
            head = await alive.catalog.head()
            assert head.history == newest
            path = (await alive.catalog.identity()).histories
            token = alive.codec.decode(_receipt(kept))
            mapped = map_token(token, path=path, shards=head.watermark)
            assert mapped.covered_by(head.snapshot_id, head.watermark)
            with pytest.raises(TokenHistoryLost):
                map_token(alive.codec.decode(_receipt(lost)), path=path, shards=head.watermark)

            # The old primary comes back: it does not know the line that is served now.
            await primary.server.start()
            async with rig.process(primary.dsn, store) as yesterday:
                with pytest.raises(HistoryRewound):
                    await yesterday.catalog.head()
                with pytest.raises(HistoryRewound):
                    await yesterday.bus.append(entry_of(table, [3], key="split"))


_COLUMNS = (Column(0, "id", "bigint"), Column(0, "note", "varchar"))


def _receipt(outcome: object) -> str:
    assert isinstance(outcome, Accepted)
    return outcome.receipt.visibility_token


async def _serves(lake: PostgresLake) -> bool:
    try:
        await lake.judge()
        await lake.catalog.head()
    except HistoryRewound:
        raise
    except Exception:  # noqa: BLE001 - not found yet; what else it may be, the deadline shows
        return False
    return True
