"""What processes import before they work. Modules are counted, not seconds: of these there are as
many on a busy machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

import migrations
from cluster.schema_state import newest_revision
from migrations.revisions import revisions

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


def test_a_look_at_the_stack_imports_nothing_of_replicas() -> None:
    found = loaded("cluster.status")
    assert found & SERVING == set()
    assert "ray" not in found
    assert "duckdb" not in found


def test_revisions_are_those_that_alembic_finds() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    by_alembic = [one.revision for one in script.walk_revisions()]
    assert list(revisions()) == by_alembic[::-1]
    assert newest_revision() == script.get_current_head()
