"""The fuzzer of the compiled JSON reader: a short run of it, that it finds what is wrong, and what
becomes of references and memory. `python -m tests.json_reader` looks for longer."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pytest

from lakebus.schemas import Column, TableSchema
from storage.rows import compiled_json
from storage.rows.compiled_json import CompiledPlan, load, read_bodies
from tests.json_reader.bodies import group
from tests.json_reader.building import SOURCE, build, sanitizer_environment
from tests.json_reader.run import read_groups, run_in_child
from tests.json_reader.tight import tight_buffers
from tests.unit import compiled_rig

SEED = 2026
TABLE = TableSchema(
    1,
    "t",
    1,
    (
        Column(1, "id", "bigint", False),
        Column(2, "ok", "boolean"),
        Column(3, "value", "double"),
        Column(4, "note", "varchar"),
        Column(5, "at", "timestamptz"),
    ),
)
BODY = (
    b'[{"id":1,"ok":true,"value":0.1,"note":"a","at":"2026-01-31T12:00:00Z"},{"id":2},'
    b'{"id":3,"note":"\xc3\xbc and more than eight bytes"}]'
)


@pytest.fixture
def plan() -> CompiledPlan:
    compiled_rig.needs_compiler()
    found = compiled_rig.plan_for(TABLE)
    assert found is not None
    return found


def source_with(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """The C sources in the folder, changed: name of the file, a text in it, what stands instead."""

    for file in (SOURCE, SOURCE.with_name("json_values.h")):
        (folder / file.name).write_text(file.read_text())
    for name, find, put in changes:
        text = (folder / name).read_text()
        assert text.count(find) == 1
        (folder / name).write_text(text.replace(find, put))
    return folder / SOURCE.name


def needs_sanitizers(folder: Path) -> None:
    """CI has them; `.ci/suites_ran.py` takes this for a failure there."""

    compiled_rig.needs_compiler()
    if sanitizer_environment(folder) is None:
        pytest.skip("needs a C compiler with sanitizers")


def test_A10_bodies_of_a_seed_are_read_as_the_exact_pass_reads_them(tmp_path: Path) -> None:
    needs_sanitizers(tmp_path)
    exit_code, said = run_in_child([f"--seed={SEED}", "--groups=250"], tmp_path)
    assert exit_code == 0, said
    for kind in ("decimal", "double", "varchar", "timestamptz", "ubigint", "boolean", "date"):
        assert f"bodies with {kind}\n" in said


def test_A9_A10_readers_with_a_fault_are_found_by_what_they_read(tmp_path: Path) -> None:
    compiled_rig.needs_compiler()
    faults = {
        "zone": ("json_values.h", "*value -= sign *", "*value += sign *"),
        "twice": (SOURCE.name, "number < 0 || stamps[number] == stamp", "number < 0"),
        "end": (SOURCE.name, "blank(reader->at + 1, 0) == end", "blank(reader->at + 1, 0) != 0"),
        "neighbour": (SOURCE.name, "            reader.row = first;\n", ""),
    }
    for name, change in faults.items():
        folder = tmp_path / name
        folder.mkdir()
        reader = load(build(source_with(folder, change), folder / "reader.so"))
        assert reader is not None
        found = read_groups(reader, SEED, iter(range(150)), about=lambda number: None)
        assert found.faults, name


@pytest.mark.parametrize(
    "change",
    [
        (SOURCE.name, "reader->row, 0);", "reader->row + 1, 0);"),
        ("json_values.h", " || whole + column->scale > 18", ""),
    ],
    ids=["written behind the last row", "undefined arithmetic"],
)
def test_what_only_sanitizers_see_is_found(change: tuple[str, str, str], tmp_path: Path) -> None:
    needs_sanitizers(tmp_path)
    source = source_with(tmp_path, change)
    exit_code, said = run_in_child([f"--seed={SEED}", "--groups=120"], tmp_path, source=source)
    assert exit_code not in (0, 1), said
    assert "AddressSanitizer" in said or "runtime error" in said
    assert "FAULT the process ended" in said


def test_groups_are_the_same_for_the_same_numbers() -> None:
    assert [group(SEED, n) for n in range(30)] == [group(SEED, n) for n in range(30)]
    assert group(SEED, 1) != group(SEED + 1, 1)


def test_what_is_read_again_and_again_keeps_nothing(plan: CompiledPlan) -> None:
    bodies = [BODY, b'[{"id":"x"}]', BODY + b" " * 500]
    lines = [False] * 3

    def rounds(count: int) -> None:
        for _ in range(count):
            assert read_bodies(plan, bodies, lines, rows_max=10) is not None
            with tight_buffers():
                assert read_bodies(plan, bodies, lines, rows_max=10) is not None

    rounds(200)
    held = [sys.getrefcount(one) for one in (*bodies, bodies, plan, plan.table, *plan.owned)]
    allocated, blocks = pa.total_allocated_bytes(), sys.getallocatedblocks()
    most_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds(2_000)
    # One body kept a round would be 1.2 MB, and one object a round 2,000 blocks.
    assert held == [
        sys.getrefcount(one) for one in (*bodies, bodies, plan, plan.table, *plan.owned)
    ]
    assert pa.total_allocated_bytes() - allocated < 100_000
    assert sys.getallocatedblocks() - blocks < 1_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_kib < 1_000
    assert len(compiled_json._kept) == 1


class _MemoryEnds:
    """A profiler that raises MemoryError at the call number `at` that compiled_json.py makes."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        caller = frame if event == "c_call" else frame.f_back if event == "call" else None
        if caller is not None and caller.f_code.co_filename == compiled_json.__file__:
            self._left -= 1
            if self._left < 0:
                raise MemoryError


@pytest.mark.parametrize("buffers", [nullcontext, tight_buffers], ids=["kept", "own"])
def test_A9_where_memory_ends_the_next_body_is_read_all_the_same(
    plan: CompiledPlan, buffers: Callable[[], AbstractContextManager[None]]
) -> None:
    def read() -> pa.RecordBatch:
        found = read_bodies(plan, [BODY], [False], rows_max=10)
        assert found is not None
        return found.batch

    wanted = read()
    for at in itertools.count():
        compiled_json._kept.clear()  # made anew, they take the most memory
        got = None
        with buffers(), suppress(MemoryError):
            sys.setprofile(_MemoryEnds(at))
            try:
                got = read()
            finally:
                sys.setprofile(None)
        assert read().equals(wanted)
        if got is not None:
            assert got.equals(wanted)
            break
    assert at > 20


def test_only_bytes_are_read(plan: CompiledPlan) -> None:
    padded = BODY + b" " * (-len(BODY) % 4)
    others = (bytearray(BODY), memoryview(BODY), memoryview(padded)[::2])
    for other in (*others, memoryview(padded).cast("i")):
        group_of_two: list[Any] = [other, BODY]
        assert read_bodies(plan, group_of_two, [False, False], rows_max=10) is None


def test_threads_read_small_bodies_side_by_side(plan: CompiledPlan) -> None:
    """In Python the lock may be handed over between any two steps."""

    def read(first: int) -> None:
        body = json.dumps([{"id": first + n, "note": str(first)} for n in range(first % 5 + 1)])
        found = read_bodies(plan, [body.encode()], [False], rows_max=10)
        assert found is not None
        assert found.batch.column(0).to_pylist() == [*range(first, first + first % 5 + 1)]
        assert set(found.batch.column(3).to_pylist()) == {str(first)}

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert len([*pool.map(read, range(2_000))]) == 2_000
    finally:
        sys.setswitchinterval(interval_s)


def test_plans_stay_in_their_process(plan: CompiledPlan) -> None:
    for leave in (pickle.dumps, copy.deepcopy):
        with pytest.raises((ValueError, TypeError, pickle.PicklingError)):
            leave(plan)
