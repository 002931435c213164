"""The compiled JSON reader, built for tests from the source as it is: what an installation built
may be older, and some have none."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from lakebus.schemas import TableSchema
from storage.rows import compiled_json
from storage.rows.compiled_json import CompiledPlan, CompiledReader, compiled_plan
from storage.rows.decode_json import DecodePlan, make_plan
from storage.rows.shapes import shape_of
from tests.json_reader import building
from tests.json_reader.building import SOURCE


def build(source: Path, target: Path) -> Path:
    """Skips the test where there is no compiler."""

    needs_compiler()
    return building.build(source, target)


def needs_compiler() -> None:
    if building.compiler() is None:
        pytest.skip("needs a C compiler")


@functools.cache
def reader() -> CompiledReader:
    with tempfile.TemporaryDirectory() as folder:
        loaded = compiled_json.load(build(SOURCE, Path(folder) / "json_columns.so"))
    assert loaded is not None
    return loaded


def plan_for(schema: TableSchema) -> CompiledPlan | None:
    return compiled_plan(schema.columns, shape_of(schema), reader())


def plan_with(schema: TableSchema) -> DecodePlan:
    """What `plan_of` gives where the reader is built."""

    return replace(make_plan(schema), compiled=plan_for(schema))


def plan_without(schema: TableSchema) -> DecodePlan:
    """What `plan_of` gives where it is not."""

    return replace(make_plan(schema), compiled=None)
