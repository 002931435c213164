"""A stack on this machine: private, restarted, cleaned up after, and beside others.

The application is the smallest there is (`minimal_app.py`): these tests are about the ground.
"""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator

import pytest

from cluster.stack_files import StackFiles
from tests.acceptance.stacks import RunningStack, lakebus, listeners, wait_until
from tests.postgres_server import new_data_dir

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LOOPBACK = {"127.0.0.1", "::1"}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[RunningStack, RunningStack]]:
    """Two stacks, started at the same moment with the same settings."""
    stacks = (RunningStack(new_data_dir()), RunningStack(new_data_dir()))
    for stack in stacks:
        stack.start()
    try:
        for stack in stacks:
            stack.ready()
        yield stacks
    finally:
        for stack in stacks:
            stack.stop()
            stack.remove()


@pytest.fixture(scope="module")
def stack(pair: tuple[RunningStack, RunningStack]) -> RunningStack:
    return pair[0]


def test_two_stacks_side_by_side_do_not_meet(pair: tuple[RunningStack, RunningStack]) -> None:
    first, second = pair
    assert first.ask()["stack"] == first.files.stack_id()
    assert second.ask()["stack"] == second.files.stack_id()
    pids = [{mark.pid for mark in one.living()} for one in pair]
    assert not pids[0] & pids[1]
    ports = [{port for _, port in listeners(one)} for one in pids]
    assert not ports[0] & ports[1]


def test_nothing_listens_beyond_loopback(stack: RunningStack) -> None:
    postgres = stack.postgres()
    assert postgres is not None
    state = stack.ready()
    pids = {mark.pid for mark in stack.living()} | {postgres.pid, state.supervisor.pid}
    found = listeners(pids)
    assert {port for _, port in found} >= {state.http_port}
    assert len(found) > 10
    assert {address for address, _ in found} <= LOOPBACK, found


def test_files_with_secrets_are_private(stack: RunningStack) -> None:
    files = stack.files
    for path in (files.connection_path, files.state_path, *files.secrets.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(files.secrets.stat().st_mode) == 0o700
    assert {path.name for path in files.secrets.iterdir()} >= {
        "api_key",
        "postgres.json",
        "ray_token",
    }
    connection = files.connection()
    assert connection is not None
    assert set(connection) == {"url", "api_key"}


def test_secrets_are_in_no_command_line_and_no_environment(stack: RunningStack) -> None:
    folder = stack.files.secrets
    passwords = json.loads((folder / "postgres.json").read_text())
    hidden = [(folder / "ray_token").read_bytes(), (folder / "api_key").read_bytes()]
    hidden += [text.encode() for text in passwords.values()]
    assert all(len(secret) > 8 for secret in hidden)
    for mark in stack.living():
        for name in ("cmdline", "environ"):
            shown = _read(f"/proc/{mark.pid}/{name}")
            assert not any(secret in shown for secret in hidden)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it ended meanwhile
        return b""


def test_status_is_well_and_its_json_names_the_parts(stack: RunningStack) -> None:
    code, output, _ = lakebus("status", "--json", "--data-dir", str(stack.data_dir))
    found = json.loads(output)
    assert (code, found["state"], found["problems"]) == (0, "running", [])
    assert found["http"] == "ready"
    assert found["memory_bytes"] > 100 * 2**20


def test_second_start_in_the_same_folder_is_refused(stack: RunningStack) -> None:
    code, _, error = lakebus("up", "--data-dir", str(stack.data_dir))
    assert code == 1
    assert "runs already" in error
    assert "lakebus down" in error


def test_F1_killed_postgresql_is_started_again_on_its_port(stack: RunningStack) -> None:
    before = stack.postgres()
    assert before is not None
    port = json.loads((stack.data_dir / "postgres" / "state.json").read_text())["port"]
    os.kill(before.pid, signal.SIGKILL)

    def back() -> bool:
        now = stack.postgres()
        return now is not None and now != before

    wait_until(back, within_s=20, why="PostgreSQL is started again")
    again = json.loads((stack.data_dir / "postgres" / "state.json").read_text())["port"]
    assert again == port


def test_F1_killed_ray_host_is_started_again(stack: RunningStack) -> None:
    before = stack.ready()
    assert before.host is not None
    replica = stack.ask()["pid"]
    os.kill(before.host.pid, signal.SIGKILL)

    def back() -> bool:
        answer = stack.answers()
        return answer is not None and answer["pid"] != replica

    wait_until(back, within_s=90, why="the application answers from a new process")
    assert stack.ready().restarts == 1
    assert stack.process is not None
    assert stack.process.poll() is None


def test_F1_killed_supervisor_leaves_nothing_that_serves_and_up_works_again(
    pair: tuple[RunningStack, RunningStack],
) -> None:
    stack = pair[1]
    stack.ready()
    port = stack.ready().http_port
    assert stack.process is not None
    stack.stop(signal.SIGKILL)
    code, output, _ = lakebus("status", "--json", "--data-dir", str(stack.data_dir))
    assert (code, json.loads(output)["state"]) == (1, "killed")
    assert "lakebus down" in json.loads(output)["problems"][0]
    wait_until(lambda: stack.answers() is None, within_s=10, why="nobody answers any more")
    stack.start()
    assert stack.ready().http_port == port
    assert stack.ask()["stack"] == stack.files.stack_id()


def test_down_clears_away_what_a_killed_supervisor_left(
    pair: tuple[RunningStack, RunningStack],
) -> None:
    stack = pair[1]
    stack.ready()
    stack.stop(signal.SIGKILL)
    code, output, _ = lakebus("down", "--data-dir", str(stack.data_dir))
    assert code == 0
    assert "Cleared away" in output
    assert stack.living() == []
    assert stack.postgres() is None
    assert lakebus("status", "--data-dir", str(stack.data_dir))[0] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_leaves_no_process(stack: RunningStack, number: signal.Signals) -> None:
    if stack.process is None or stack.process.poll() is not None:
        stack.start()
    if number == signal.SIGINT:
        stack.ready()
    else:  # in the middle of the start
        wait_until(stack.postgres, within_s=60, why="PostgreSQL runs")
    assert stack.stop(number) == 0, stack.output.read_text()
    assert stack.living() == []
    assert stack.postgres() is None
    state = StackFiles(stack.data_dir).state()
    assert state is not None
    assert state.phase == "stopped"
