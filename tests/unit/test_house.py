"""The house rules that a machine can hold: who imports whom, what may appear where, what ships."""

from __future__ import annotations

import ast
import gc
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ("lakebus", "storage", "actors", "serve_app", "cluster")
SHIPPED = {*ORDER, "migrations"}
LINES_MAX = 500

MAY_IMPORT = {name: set(ORDER[: place + 1]) for place, name in enumerate(ORDER)} | {
    "migrations": {"lakebus", "storage", "migrations"}
}
MAY_IMPORT["cluster"].add("migrations")
# The console script hands over to the CLI; everything else of `lakebus` stays to the left.
EXCEPTIONS = {("lakebus/__main__.py", "cluster")}

RAY_ALLOWED = {
    "actors/handles.py",
    "actors/job_runner.py",
    "actors/job_worker.py",
    "actors/ray_metrics.py",
    "actors/runtime.py",
    "lakebus/client_ray.py",
    "serve_app/deployments.py",
    "serve_app/replica_ports.py",
    "serve_app/replica_stops.py",
}
DRIVERS = {"asyncpg", "sqlalchemy", "alembic"}
DRIVERS_ALLOWED = {"storage", "cluster", "migrations"}
SQL = re.compile(
    r"\s*(SELECT\s.+\sFROM\s|INSERT INTO\s|UPDATE\s\S+\sSET\s|DELETE FROM\s|CREATE TABLE\s"
    r"|ALTER TABLE\s|TRUNCATE\s)",
    re.DOTALL,
)
SQL_FORBIDDEN = {"lakebus", "actors", "serve_app"}


def repository_files() -> list[Path]:
    """All files that are, or are about to be, under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    found = (ROOT / name for name in listed.split("\0") if name)
    return sorted(path for path in found if path.is_file())


FILES = repository_files()
MODULES = [
    path for path in FILES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in SHIPPED
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def syntax_tree(path: Path) -> ast.Module:
    """The module's syntax tree.

    Without garbage collection meanwhile: CPython 3.11 keeps the depth of the tree that it builds
    in one place, and a finalizer that builds another tree breaks the count (python/cpython#106905).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        if collecting:
            gc.enable()


def imported(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, wherever in it."""
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            assert node.module is not None
            yield node.module


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 20
    assert {name_of(path).split("/")[0] for path in MODULES} == SHIPPED


def test_packages_import_only_what_is_left_of_them() -> None:
    wrong = [
        f"{name_of(path)} imports {other}"
        for path in MODULES
        for other in roots(path) & SHIPPED
        if other not in MAY_IMPORT[name_of(path).split("/")[0]]
        and (name_of(path), other) not in EXCEPTIONS
    ]
    assert wrong == []


def test_migration_versions_import_only_alembic_and_sqlalchemy() -> None:
    allowed = {"__future__", "alembic", "sqlalchemy"}
    versions = [path for path in MODULES if path.parent == ROOT / "migrations" / "versions"]
    assert len(versions) > 1
    assert [name_of(path) for path in versions if roots(path) - allowed] == []


def test_ray_appears_only_at_the_edges() -> None:
    wrong = [
        name_of(path)
        for path in MODULES
        if "ray" in roots(path)
        and name_of(path) not in RAY_ALLOWED
        and not name_of(path).startswith("cluster/")
    ]
    assert wrong == []


def test_database_drivers_appear_only_in_storage_and_cluster() -> None:
    wrong = [
        name_of(path)
        for path in MODULES
        if roots(path) & DRIVERS and name_of(path).split("/")[0] not in DRIVERS_ALLOWED
    ]
    assert wrong == []


def test_sql_is_written_only_in_storage_migrations_and_cluster() -> None:
    wrong = []
    for path in MODULES:
        if name_of(path).split("/")[0] not in SQL_FORBIDDEN:
            continue
        for node in ast.walk(syntax_tree(path)):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            if SQL.match(node.value):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert wrong == []


def test_storage_and_actors_know_no_http() -> None:
    servers = {"starlette", "fastapi", "uvicorn", "httpx"}
    wrong = [
        name_of(path)
        for path in MODULES
        if name_of(path).split("/")[0] in {"storage", "actors"} and roots(path) & servers
    ]
    assert wrong == []


def test_importing_lakebus_is_light() -> None:
    heavy = "{'ray', 'duckdb', 'pyarrow', 'sqlalchemy', 'asyncpg', 'numpy', 'pandas'}"
    code = f"import sys, lakebus; print(sorted({heavy} & set(sys.modules)))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"


def test_no_file_is_longer_than_one_sitting() -> None:
    counted = {
        name_of(path): len(path.read_text().splitlines())
        for path in FILES
        if path.suffix in {".py", ".sql", ".mako"}
    }
    assert {name: lines for name, lines in counted.items() if lines > LINES_MAX} == {}


def test_no_file_names_a_machine_or_a_registry() -> None:
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("crates", "io"), ("npmjs", "org")]
    words = [re.escape(".".join(host)) for host in hosts]
    words += [rf"(?<![\w.])/{place}/" for place in ("root", "work", "home", "opt")]
    pattern = re.compile("|".join(words))
    wrong = []
    for path in FILES:
        if path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:  # a picture, or data
            continue
        wrong += [
            f"{name_of(path)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert wrong == []


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files in the wheel, built from a copy so that the tree stays clean."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in FILES:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_has_exactly_our_top_level_names(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == SHIPPED


def test_wheel_holds_every_module_and_data_file(wheel_names: set[str]) -> None:
    suffixes = {".py", ".sql", ".mako", ".typed"}
    ours = {
        name_of(path)
        for path in FILES
        if path.suffix in suffixes and name_of(path).split("/")[0] in SHIPPED
    }
    assert ours - wheel_names == set()


def test_locks_name_the_versions_that_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = (ROOT / "requirements" / "runtime.in").read_text().splitlines()
    asked = {line for line in written if line and not line.startswith("#")}
    assert set(project["dependencies"]) == asked
    development = (ROOT / "requirements" / "dev.in").read_text().splitlines()
    wanted = {line for line in development if line and line[0] not in "#-"}
    assert set(project["optional-dependencies"]["dev"]) == wanted


@pytest.mark.parametrize("name", ["build.txt", "runtime.txt", "dev.txt", "demo.txt"])
def test_every_locked_package_has_hashes(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    pinned = re.findall(r"(?m)^[A-Za-z0-9][\w.-]*==", text)
    blocks = re.findall(
        r"(?m)^[A-Za-z0-9][\w.-]*==.*(?:\\\n\s+--hash=sha256:[0-9a-f]{64}.*)+", text
    )
    assert pinned
    assert len(blocks) == len(pinned)
