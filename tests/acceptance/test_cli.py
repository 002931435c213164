"""The command line: what it prints, how it ends, and that mistakes are one clear line."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import doctor, haproxy_launcher, migrate
from cluster.ports import BLOCK_SIZE, PortClaims
from lakebus import __version__
from lakebus.__main__ import PACKAGES, installation_problem
from lakebus.settings import Settings
from storage.rows import compiled_json
from tests.acceptance.stacks import ROOT, lakebus
from tests.postgres_server import new_data_dir


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = new_data_dir()
    yield folder
    shutil.rmtree(folder)


def test_version_and_help() -> None:
    code, output, _ = lakebus("version")
    assert code == 0
    assert __version__ in output
    code, output, _ = lakebus("--help")
    assert code == 0
    for command in ("up", "down", "status", "logs", "doctor", "migrate", "config", "demo"):
        assert command in output
    for command in ("ingest", "query", "tables", "snapshots", "trace", "quarantine", "completion"):
        assert command in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("upp",), "No such command"),
        (("up", "--port", "70000"), "not in the range"),
        (("up", "--profile", "prod"), "'local', 'test', 'production'"),
        (("logs", "kafka"), "'postgres'"),
        (("snapshots", "show", "3", "--data-dir", "nowhere"), "lakebus up"),
        (("ingest", "no-such-file.csv", "--table", "t"), "does not exist"),
    ],
)
def test_wrong_commands_are_explained(arguments: tuple[str, ...], said: str) -> None:
    code, _, error = lakebus(*arguments)
    assert code == 2
    assert said in error
    assert "Traceback" not in error


def test_wrong_settings_are_one_line(data_dir: Path) -> None:
    for environ, said in (
        ({"LAKEBUS_BUS_SHARD": "4"}, "Did you mean LAKEBUS_BUS_SHARDS?"),
        ({"LAKEBUS_PROFILE": "production"}, "postgres.dsn must be given"),
    ):
        code, _, error = lakebus("up", "--data-dir", str(data_dir), environ=environ)
        assert code == 1
        assert said in error
        assert len(error.strip().splitlines()) == 1


def test_config_show_names_sources_and_hides_secrets(data_dir: Path) -> None:
    environ = {"LAKEBUS_POSTGRES_DSN": "postgresql://lakebus:hunter2@db/lakebus"}
    (data_dir / "lakebus.toml").write_text("[bus]\nshards = 2")
    code, output, error = lakebus(
        "config", "show", "--json", "--data-dir", str(data_dir), environ=environ
    )
    assert code == 0, error
    found = {row["name"]: row for row in json.loads(output)}
    assert found["postgres.dsn"] == {
        "name": "postgres.dsn",
        "value": "<secret>",
        "source": "environment",
    }
    assert found["bus.shards"]["source"].startswith("file ")
    assert found["data_dir"]["source"] == "flag"
    assert "hunter2" not in output
    code, output, _ = lakebus("config", "show", "--data-dir", str(data_dir), environ=environ)
    assert code == 0
    assert "hunter2" not in output


def test_nothing_runs_where_nothing_was_started(data_dir: Path) -> None:
    where = ("--data-dir", str(data_dir))
    assert lakebus("status", *where)[0] == 3
    code, output, _ = lakebus("down", *where)
    assert code == 0
    assert "Nothing runs" in output
    code, _, error = lakebus("logs", *where)
    assert code == 1
    assert "No logs" in error


def test_damaged_state_file_does_not_stop_status_and_down(data_dir: Path) -> None:
    (data_dir / "state.json").write_text('{"supervisor": 7')
    assert lakebus("status", "--data-dir", str(data_dir))[0] == 3
    (data_dir / "state.json").write_text("[]")
    assert lakebus("down", "--data-dir", str(data_dir))[0] == 0


def test_migrate_makes_the_embedded_database_and_repeats(data_dir: Path) -> None:
    for _ in range(2):
        code, output, error = lakebus("migrate", "--data-dir", str(data_dir))
        assert code == 0, error
        assert "The database has schema" in output


def test_unreachable_external_database_is_one_line(data_dir: Path) -> None:
    environ = {"LAKEBUS_POSTGRES_DSN": "postgresql://lakebus@127.0.0.1:1/lakebus"}
    code, _, error = lakebus("migrate", "--data-dir", str(data_dir), environ=environ)
    assert code == 1
    assert "cannot be reached" in error
    assert "Traceback" not in error


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    code, _, error = lakebus("up", "--data-dir", str(tmp_path / "taken"))
    assert code == 1
    assert "cannot be used" in error


def test_doctor_finds_this_machine_fit(data_dir: Path) -> None:
    code, output, _ = lakebus("doctor", "--data-dir", str(data_dir))
    assert code == 0, output
    for name in ("python", "packages", "postgres", "haproxy", "disk", "port"):
        assert name in output


def test_doctor_gives_hints_where_something_is_missing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"data_dir": data_dir, "postgres.bin_dir": data_dir}
    settings = Settings.load(environ={}, flags=flags)
    monkeypatch.setattr(doctor, "_NEEDED", ("ray", "surely-not-there"))
    monkeypatch.setattr(compiled_json, "READER", None)
    findings = {finding.name: finding for finding in doctor.examine(settings)}
    assert findings["postgres"].result == doctor.FAILURE
    assert "holds no working PostgreSQL" in findings["postgres"].hint
    assert "pip install surely-not-there" in findings["packages"].hint
    assert (findings["json"].result, "C compiler" in findings["json"].hint) == (
        doctor.WARNING,
        True,
    )


def test_packages_are_one_installation() -> None:
    assert installation_problem() is None


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "lakebus"])
def test_package_that_hides_ours_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "from lakebus.__main__ import main; raise SystemExit(main())"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"The package '{name}' comes from {tmp_path}" in done.stderr


def test_ports_are_claimed_once() -> None:
    first, second = PortClaims(), PortClaims()
    try:
        block = first.take_block()
        assert block is not None
        assert not second.take(block)
        other = second.take_block(block)
        assert other is not None
        assert abs(other - block) >= BLOCK_SIZE
        first.release()
        assert second.take(block)
    finally:
        first.release()
        second.release()


def test_haproxy_pages_are_moved_to_loopback() -> None:
    written = """\
global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/admin.sock mode 666 level admin expose-fd listeners
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8350
listen stats
  bind *:8404
"""
    corrected = haproxy_launcher.corrected(written, "127.0.0.1")
    binds = [line.split()[1] for line in corrected.splitlines() if line.split()[0] == "bind"]
    assert binds == ["127.0.0.1:9101", "127.0.0.1:8350", "127.0.0.1:8404"]
    assert "mode 600 level admin" in corrected
    assert "514" not in corrected
    assert haproxy_launcher.corrected(corrected, "127.0.0.1") == corrected


def test_keys_create_makes_a_key_on_an_external_database(database_dsn: str) -> None:
    environ = {"LAKEBUS_POSTGRES_DSN": database_dsn}
    asyncio.run(migrate.upgrade(database_dsn))
    quotas = ["--requests-per-s", "2.5", "--ingest-bytes-per-s", "0"]
    asked = ["keys", "create", "--principal", "ops", "--scope", "admin", *quotas]
    code, output, error = lakebus(*asked, environ=environ)
    assert code == 0, error
    assert output.startswith("lbk_")
    code, listed, error = lakebus("keys", "list", environ=environ)
    assert code == 0, error
    assert "requests_per_s 2.5, ingest_bytes_per_s 0" in listed
    assert output.split("_")[1] in listed
    assert output.split("_")[2].strip() not in listed
    code, _, error = lakebus(*asked, "--queries-at-once", "-1", environ=environ)
    assert code == 1
    assert "queries_at_once" in error
    code, _, error = lakebus("keys", "create", "--principal", "ops", "--scope", "admin")
    assert code == 1
    assert "LAKEBUS_POSTGRES_DSN" in error
