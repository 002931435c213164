"""`lakebus ray-env`: what a driver is told, and where nothing runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.processes import ProcessMark
from cluster.ray_env_command import driver_environment
from cluster.stack_files import StackFiles, StackState
from lakebus.errors import Unavailable
from lakebus.settings import Settings


def settings(data_dir: Path, **environ: str) -> Settings:
    return Settings.load(environ=environ, flags={"data_dir": data_dir, "profile": "test"})


def test_a_driver_is_told_the_address_and_the_tokens_file_but_not_the_token(
    tmp_path: Path,
) -> None:
    files = StackFiles(tmp_path / "stack")
    files.make()
    session = tmp_path / "run" / "ray" / "session_latest"
    session.mkdir(parents=True)
    (session / "gcs_server_port_abc").write_text("4711")
    mark = ProcessMark.of(os.getpid())
    assert mark is not None
    state = StackState(mark, "id", run_dir=str(tmp_path / "run"))
    files.state_path.write_text(json.dumps(state.to_json()))
    told = driver_environment(settings(files.root))
    assert told["RAY_ADDRESS"] == "127.0.0.1:4711"
    assert told["RAY_AUTH_MODE"] == "token"
    assert Path(told["RAY_AUTH_TOKEN_PATH"]) == files.ray_token()
    assert files.ray_token().read_text() not in told.values()


def test_a_cluster_of_ones_own_keeps_its_address(tmp_path: Path) -> None:
    own = {"LAKEBUS_RAY_ADDRESS": "10.0.0.1:6379", "LAKEBUS_RAY_AUTH_MODE": "disabled"}
    told = driver_environment(settings(tmp_path, **own))
    assert told == {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "disabled"}


def test_where_no_stack_runs_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="lakebus up"):
        driver_environment(settings(tmp_path))
