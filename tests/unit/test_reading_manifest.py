"""The manifest against a model: the files and tables of any snapshot, however it was brought up."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import uuid
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import SnapshotExpired, Unavailable
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import Head, ManifestDelta, SchemaLife
from storage.reading.kept import Kept
from storage.reading.manifest import Manifest, SnapshotView
from storage.reading.table_files import LIVE, FileRow, FileViews, TableFiles
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.conformance.memory import MemoryHarness
from tests.conformance.worker import fake_file
from tests.unit.reading_rig import head_of

_TABLES = 3


class ModelCatalog:
    """Files and schema versions with their snapshots, and nothing else."""

    def __init__(self) -> None:
        self.files: list[DataFile] = []
        self.lives: list[SchemaLife] = []
        self.until = 0
        self.oldest = 1
        self.tagged: set[int] = set()
        self.deltas: list[tuple[int, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail = False

    def head(self) -> Head:
        return head_of(self.until, oldest=self.oldest)

    def expected(self, snapshot_id: int, table_id: int) -> set[uuid.UUID]:
        return {
            f.file_id
            for f in self.files
            if f.table_id == table_id
            and f.first_snapshot <= snapshot_id
            and (f.last_snapshot is None or snapshot_id < f.last_snapshot)
        }

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        self.deltas.append((after, until))
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fail:
            raise Unavailable("gone")
        if 0 < after < self.oldest:
            raise SnapshotExpired("ends were forgotten")

        def end(last: int | None) -> int | None:
            return last if last is not None and last <= until else None

        needed = [self.oldest, *self.tagged]
        files = [
            dataclasses.replace(f, last_snapshot=end(f.last_snapshot))
            for f in self.files
            if after < f.first_snapshot <= until
            and not (
                after == 0
                and f.last_snapshot is not None
                and f.last_snapshot <= self.oldest
                and not any(f.first_snapshot <= s < f.last_snapshot for s in needed)
            )
        ]
        ended = {
            f.file_id: f.last_snapshot
            for f in self.files
            if f.first_snapshot <= after
            and f.last_snapshot is not None
            and after < f.last_snapshot <= until
        }
        lives = [
            dataclasses.replace(
                life,
                last_snapshot=end(life.last_snapshot),
                table_last_snapshot=end(life.table_last_snapshot),
            )
            for life in self.lives
            if after < life.first_snapshot <= until
            or (life.last_snapshot is not None and after < life.last_snapshot <= until)
        ]
        return ManifestDelta(after, until, tuple(files), ended, tuple(lives))

    async def snapshot(self, snapshot_id: int) -> None:
        if snapshot_id < self.oldest and snapshot_id not in self.tagged:
            raise SnapshotExpired("gone")


class CatalogOf:
    """The model with the asynchronous face of a catalog."""

    def __init__(self, model: ModelCatalog) -> None:
        self._model = model
        self.manifest_delta = model.manifest_delta
        self.snapshot = model.snapshot

    async def head(self) -> Head:
        return self._model.head()


def manifest_of(model: ModelCatalog, *, dead_rows_min: int = 10_000) -> Manifest:
    return Manifest(CatalogOf(model), dead_rows_min=dead_rows_min)  # type: ignore[arg-type]


def add(model: ModelCatalog, table_id: int, at: int) -> None:
    file = fake_file(uuid.uuid4(), table_id, 1, 10)
    model.files.append(dataclasses.replace(file, first_snapshot=at))


def end_some(model: ModelCatalog, table_id: int, at: int, share: int) -> None:
    for n, file in enumerate(model.files):
        live = file.last_snapshot is None and file.first_snapshot < at
        if live and file.table_id == table_id and n % 3 >= share:
            model.files[n] = dataclasses.replace(file, last_snapshot=at)


def ids(view: SnapshotView, table_id: int) -> list[uuid.UUID]:
    return [file.file_id for file in view.files(table_id).files]


_publication = st.tuples(
    st.lists(st.integers(0, _TABLES - 1), max_size=4),  # files added
    st.one_of(st.none(), st.tuples(st.integers(0, _TABLES - 1), st.integers(0, 2))),  # ended
)
_history = st.lists(
    st.tuples(st.lists(_publication, max_size=4), st.lists(st.integers(0, 100), max_size=4)),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(_history, st.booleans())
def test_D8_every_snapshot_has_its_files_whenever_it_is_asked(
    history: list[tuple[list[tuple[list[int], tuple[int, int] | None]], list[int]]], reload: bool
) -> None:
    asyncio.run(_compare(history, reload))


async def _compare(
    history: list[tuple[list[tuple[list[int], tuple[int, int] | None]], list[int]]], reload: bool
) -> None:
    model = ModelCatalog()
    model.until = 1
    manifest = manifest_of(model, dead_rows_min=1 if reload else 10_000)
    for publications, questions in history:
        for added, ended in publications:
            model.until += 1
            for table_id in added:
                add(model, table_id, model.until)
            if ended is not None:
                end_some(model, ended[0], model.until, ended[1])
        for question in questions:
            snapshot_id = 1 + question % model.until
            view = await manifest.at(snapshot_id, model.head())
            for table_id in range(_TABLES):
                found = ids(view, table_id)
                assert len(found) == len(set(found))
                assert set(found) == model.expected(snapshot_id, table_id)


async def test_a_view_stays_right_while_the_manifest_moves_on() -> None:
    model = ModelCatalog()
    model.until = 1
    add(model, 0, 1)
    manifest = manifest_of(model)
    view = await manifest.at(1, model.head())
    model.until = 3
    add(model, 0, 2)
    end_some(model, 0, 3, 0)
    newer = await manifest.at(3, model.head())
    assert set(ids(view, 0)) == model.expected(1, 0)
    assert set(ids(newer, 0)) == model.expected(3, 0)


async def test_a_snapshot_published_after_the_head_was_read_is_reached() -> None:
    model = ModelCatalog()
    model.until = 1
    manifest, head = manifest_of(model), model.head()
    model.until = 2
    add(model, 0, 2)
    view = await asyncio.wait_for(manifest.at(2, head), 5)
    assert set(ids(view, 0)) == model.expected(2, 0) != set()


async def test_callers_share_one_advance() -> None:
    model = ModelCatalog()
    model.until = 1
    manifest = manifest_of(model)
    await manifest.at(1, model.head())
    model.deltas.clear()
    model.gate.clear()
    model.until = 2
    first = [asyncio.create_task(manifest.at(2, model.head())) for _ in range(50)]
    while not model.deltas:
        await asyncio.sleep(0)
    model.until = 4
    second = [asyncio.create_task(manifest.at(n, model.head())) for n in (3, 4) for _ in range(50)]
    await asyncio.sleep(0)
    model.gate.set()
    await asyncio.gather(*first, *second)
    assert model.deltas == [(1, 2), (2, 4)]


async def test_prefetching_a_head_leaves_nothing_to_do_for_its_readers() -> None:
    model = ModelCatalog()
    model.until = 1
    manifest = manifest_of(model)
    await manifest.at(1, model.head())
    model.until = 2
    manifest.prefetch(model.head())
    while manifest.until < 2:
        await asyncio.sleep(0)
    model.fail = True
    await manifest.at(2, model.head())


async def test_a_failed_advance_is_reported_and_tried_again_by_the_next_reader() -> None:
    model = ModelCatalog()
    model.until, model.fail = 1, True
    manifest = manifest_of(model)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await manifest.at(1, model.head())
    model.fail = False
    assert (await manifest.at(1, model.head())).snapshot_id == 1


async def test_E3_useless_files_leave_by_a_new_load_that_keeps_what_tags_need() -> None:
    model = ModelCatalog()
    manifest = manifest_of(model, dead_rows_min=20)
    for snapshot_id in range(1, 41):
        model.until = snapshot_id
        end_some(model, 0, snapshot_id, 0)
        add(model, 0, snapshot_id)
    await manifest.at(40, model.head())
    assert manifest.file_count == 40
    model.tagged, model.oldest, model.until = {7}, 39, 41
    add(model, 0, 41)
    await manifest.at(41, model.head())
    assert manifest.file_count == 4  # 39, 40 and 41, and the tagged one
    view = await manifest.at(7, model.head())
    assert set(ids(view, 0)) == model.expected(7, 0) != set()
    with pytest.raises(SnapshotExpired):  # never an empty answer for what was left out
        await manifest.at(8, model.head())


async def test_E8_files_that_only_tags_need_do_not_bring_a_new_load_with_every_advance() -> None:
    model = ModelCatalog()
    for n in range(1, 7):
        add(model, 0, n)
    end_some(model, 0, 7, share=0)
    model.until, model.oldest, model.tagged = 7, 7, {6}
    manifest = manifest_of(model, dead_rows_min=3)
    for _ in range(4):
        view = await manifest.at(model.until, model.head())
        assert ids(view, 0) == []
        assert len(ids(await manifest.at(6, model.head()), 0)) == 6
        model.until += 1
    assert [after for after, _ in model.deltas] == [0, 7, 8, 9]


async def test_D8_a_copy_that_slept_through_an_expiry_is_loaded_anew() -> None:
    model = ModelCatalog()
    for n in range(1, 4):
        add(model, 0, n)
    model.until = 3
    manifest = manifest_of(model)
    assert len(ids(await manifest.at(3, model.head()), 0)) == 3
    end_some(model, 0, 4, share=0)
    model.files = model.files[:1]  # the others were deleted, and the catalog forgot them
    model.files[0] = dataclasses.replace(model.files[0], last_snapshot=None)
    model.until = model.oldest = 6
    assert ids(await manifest.at(6, model.head()), 0) == [model.files[0].file_id]
    assert model.deltas[-2:] == [(3, 6), (0, 6)]


async def test_a_head_of_a_line_that_was_left_is_refused_and_not_waited_for() -> None:
    model = ModelCatalog()
    model.until = 1
    manifest = manifest_of(model)
    newer = dataclasses.replace(head_of(1_000), history=uuid.UUID(int=5))
    model.until = 1_000
    await manifest.at(1_000, newer)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(manifest.at(1, head_of(1)), 5)


# --- names ----------------------------------------------------------------------------------------


def _life(
    table_id: int,
    name: str,
    version: int,
    first: int,
    last: int | None,
    born: int,
    gone: int | None,
) -> SchemaLife:
    schema = TableSchema(table_id, name, version, (Column(1, "id", "bigint"),))
    return SchemaLife(schema, first, last, born, gone)


async def test_D1_a_name_means_the_table_that_bore_it_at_the_snapshot() -> None:
    model = ModelCatalog()
    model.lives = [
        _life(1, "a", 1, 2, 4, 2, 8),
        _life(1, "b", 2, 4, 8, 2, 8),  # renamed in 4, dropped in 8
        _life(2, "a", 1, 5, 6, 5, None),
        _life(2, "a", 2, 6, None, 5, None),
        _life(3, "b", 1, 9, None, 9, None),
    ]
    expected: Mapping[int, Mapping[str, tuple[int, int]]] = {
        1: {},
        2: {"a": (1, 1)},
        3: {"a": (1, 1)},
        4: {"b": (1, 2)},
        5: {"a": (2, 1), "b": (1, 2)},
        6: {"a": (2, 2), "b": (1, 2)},
        8: {"a": (2, 2)},
        9: {"a": (2, 2), "b": (3, 1)},
    }
    all_at_once = manifest_of(model)
    step_by_step = manifest_of(model)
    model.until = 1
    for model.until in range(1, 10):
        await step_by_step.at(model.until, model.head())
    for manifest in (all_at_once, step_by_step):
        for snapshot_id, names in expected.items():
            view = await manifest.at(snapshot_id, model.head())
            found = {n: (s.table_id, s.version) for n, s in view.schemas().items()}
            assert found == names
            for name in ("a", "b", "c"):
                schema = view.schema(name)
                assert (schema is None) is (name not in names)
                if schema is not None:
                    assert (schema.table_id, schema.version) == names[name]


# --- bounds ---------------------------------------------------------------------------------------


def test_kept_views_are_bounded_by_their_references() -> None:
    model, table = ModelCatalog(), TableFiles(0)
    from_model = FileViews(references_max=1_000)
    for snapshot_id in range(1, 101):
        add(model, 0, snapshot_id)
        table.add(FileRow(model.files[-1], LIVE))
    sizes = [len(from_model.view(table, s).files) for s in range(1, 101)]
    assert sizes == list(range(1, 101))
    assert from_model.references <= 1_000
    assert len(from_model.view(table, 100).files) == 100


def test_kept_values_are_bounded_by_their_cost() -> None:
    kept: Kept[str] = Kept(10_000)
    for n in range(100):
        kept.put(n, "x", 1_000)
    assert 1 < len(kept) <= 10
    assert kept.get(99) == "x"
    assert kept.get(0) is None
    kept.put("big", "x", 5_000)
    assert kept.get("big") is None
    kept.put(99, "y", 1_000)
    assert kept.get(99) == "y"
    kept.clear()
    assert len(kept) == 0


async def test_the_manifest_of_a_real_catalog_agrees_with_a_fresh_load() -> None:
    lake = MemoryHarness(dataclasses.replace(SUITE_SETTINGS, claim_entries_max=1), live=True)
    tables = [await lake.create(name) for name in ("a", "b")]
    moving = Manifest(lake.catalog)
    for n in range(20):
        await lake.accept(entry_of(tables[n % 2], [n]))
        await lake.worker().publish_one()
        head = await lake.catalog.head()
        await moving.at(head.snapshot_id, head)
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="a"))
    head = await lake.catalog.head()
    fresh = Manifest(lake.catalog)
    for snapshot_id in range(1, head.snapshot_id + 1):
        one, two = await moving.at(snapshot_id, head), await fresh.at(snapshot_id, head)
        assert one.schemas() == two.schemas()
        for table in tables:
            assert sorted(ids(one, table.table_id)) == sorted(ids(two, table.table_id))


async def test_D4_a_reader_never_spins_on_an_advance_that_has_just_ended() -> None:
    """Between the end of an advance and its callback, waiting for it gives the loop no turn."""

    model = ModelCatalog()
    add(model, 1, 1)
    model.until = 1
    manifest = Manifest(CatalogOf(model))  # type: ignore[arg-type]
    await manifest.at(1, model.head())
    ended = asyncio.ensure_future(asyncio.sleep(0))
    await ended
    manifest._advance = ended  # as it stands before the callback has run
    add(model, 1, 2)
    model.until = 2
    reader = manifest.at(2, model.head())
    signal.signal(signal.SIGALRM, _fail_for_standing_still)
    signal.alarm(5)
    try:
        reader.send(None)  # the first step: it must come back to the loop
    finally:
        signal.alarm(0)
    reader.close()
    view = await asyncio.wait_for(manifest.at(2, model.head()), 5)
    assert view.snapshot_id == 2


def _fail_for_standing_still(*_: object) -> None:
    raise TimeoutError("the reader did not give the loop a turn")
