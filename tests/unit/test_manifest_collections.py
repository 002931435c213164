"""While a manifest is loaded the cyclic collector rests, and a large one is passed over later."""

from __future__ import annotations

import gc

import pytest

from benchmarks.manifest import MadeUpCatalog
from lakebus.errors import Unavailable
from storage.catalog.interface import ManifestDelta
from storage.reading import manifest as product


class Watching(MadeUpCatalog):
    """Notes whether the collector works while it is asked."""

    def __init__(self, *, files: int, fails: bool = False) -> None:
        super().__init__(files=files, tables=2, snapshots=9, seed=1)
        self.collecting: list[bool] = []
        self._fails = fails

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        self.collecting.append(gc.isenabled())
        if self._fails:
            raise Unavailable("the catalog cannot be reached")
        return await super().manifest_delta(after=after, until=until)


@pytest.mark.parametrize(("files", "frozen"), [(19, 0), (20, 1)])
async def test_collector_rests_during_a_load_and_passes_over_a_large_copy(
    monkeypatch: pytest.MonkeyPatch, files: int, frozen: int
) -> None:
    froze: list[bool] = []
    monkeypatch.setattr(product, "_FROZEN_MIN", 20)
    monkeypatch.setattr(gc, "freeze", lambda: froze.append(gc.isenabled()))
    catalog = Watching(files=files)
    manifest = product.Manifest(catalog)  # type: ignore[arg-type]
    await manifest.at(9, await catalog.head())
    assert catalog.collecting == [False]
    assert froze == [False] * frozen, "frozen before it works again, or it looks once more"
    assert gc.isenabled()


async def test_collector_works_again_after_a_load_that_failed() -> None:
    catalog = Watching(files=1, fails=True)
    manifest = product.Manifest(catalog)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        await manifest.at(9, await catalog.head())
    assert catalog.collecting == [False]
    assert gc.isenabled()


async def test_collector_that_was_off_stays_off() -> None:
    catalog = Watching(files=1)
    gc.disable()
    try:
        await product.Manifest(catalog).at(9, await catalog.head())  # type: ignore[arg-type]
        assert not gc.isenabled()
    finally:
        gc.enable()
