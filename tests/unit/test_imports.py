"""What processes import before they work. Modules are counted, not seconds: of these there are as
many on a busy machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

import migrations
from cluster.schema_state import newest_revision
from migrations.revisions import revisions
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings

ROOT = Path(__file__).parents[2]
#: Who changes a schema, who serves, and who decodes or plans for others.
CHANGING = {"alembic", "sqlalchemy", "storage.tables", "cluster.migrate"}
SERVING = {"serve_app", "fastapi", "starlette", "uvicorn", "cluster.assembly", "storage.reading"}
SCHEDULING = {"actors.coordinator", "actors.maintenance", "actors.role_host", "storage.rows.decode"}
OTHERS = {"pandas", "polars", "pyarrow.dataset", "pyarrow.flight", "opentelemetry"}


def loaded(*names: str, before: tuple[str, ...] = ()) -> set[str]:
    """What a fresh process has loaded for these modules, and had not for those `before`."""

    code = (
        "import importlib, json, sys\n"
        f"for name in {before!r}: importlib.import_module(name)\n"
        "known = set(sys.modules)\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(set(sys.modules) - known)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(said.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "body", ["compaction", "retention", "collection", "validation", "deletion", "erasure"]
)
def test_the_process_of_a_job_imports_what_jobs_need(body: str) -> None:
    """Ray comes with the process; the rest is counted: 361 modules for a compaction."""

    ours = ("actors.job_worker", "cluster.backend", f"storage.maintenance.{body}")
    found = loaded(*ours, before=("ray", "ray.util.metrics"))
    assert found & {"pyarrow.lib", "asyncpg", "storage.maintenance.jobs"}
    heavy = CHANGING | SCHEDULING | OTHERS
    if body == "compaction":
        heavy |= SERVING
        assert len(found) < 400
    assert found & heavy == set()


@pytest.mark.parametrize(
    "module", ["cluster.wiring", "cluster.doors", "cluster.backend", "cluster.stack_commands"]
)
def test_only_who_changes_a_schema_imports_what_changes_schemas(module: str) -> None:
    found = loaded(module)
    assert "cluster.schema_state" in found
    assert found & CHANGING == set()


#: Prints whether lists that become arrays have loaded pandas, and whether a table still can be one.
_ARRAYS = (
    "import sys, pyarrow as pa; {before}; pa.array([1]); pa.array(range(3)); "
    "found = 'pandas' in sys.modules; print(found, len(pa.table({{'a': [1, 2]}}).to_pandas()))"
)


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("pass", True),
        ("from storage.arrow_alone import leave_pandas_out; leave_pandas_out()", False),
        ("from actors import job_worker; job_worker._begin()", False),
        (
            "import pandas; from storage.arrow_alone import leave_pandas_out; leave_pandas_out(); "
            "assert pa.array(pandas.Series([1.0, float('nan')])).null_count == 1",
            True,
        ),
    ],
)
def test_pandas_stays_out_of_processes_that_are_given_none_of_it(before: str, found: bool) -> None:
    pytest.importorskip("pandas")
    code = _ARRAYS.format(before=before)
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(found), "2"]


@pytest.mark.skipif(sys.platform != "linux", reason="by what a process has mapped")
async def test_the_process_that_runs_sql_loads_no_pandas(tmp_path: Path) -> None:
    settings = EngineSettings(
        allowed_directory=str(tmp_path), temp_directory=str(tmp_path / "spill"), spare=False
    )
    engine = QueryEngine(settings)
    await engine.start()
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        mapped = [Path(f"/proc/{child}/maps").read_text() for child in children]
        running = [maps for maps in mapped if "_duckdb" in maps]
        assert running
        assert [maps for maps in running if "/pandas/" in maps] == []
    finally:
        await engine.stop()


def test_a_look_at_the_stack_imports_nothing_of_replicas() -> None:
    found = loaded("cluster.status")
    assert found & SERVING == set()
    assert found & {"ray", "duckdb"} == set()


def test_revisions_are_those_that_alembic_finds() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    by_alembic = [one.revision for one in script.walk_revisions()]
    assert list(revisions()) == by_alembic[::-1]
    assert newest_revision() == script.get_current_head()
