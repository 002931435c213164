"""`lakebus ray-env`: what a Ray driver needs in its environment to join the stack's cluster."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from cluster.stack_commands import load, stack_options
from cluster.stack_files import StackFiles
from lakebus.errors import Unavailable
from lakebus.settings import Settings


@click.command()
@stack_options
def ray_env(data_dir: Path | None, profile: str | None, config: Path | None) -> int:
    """Print what lets a Ray driver on this machine join the stack's cluster.

    \b
    eval "$(lakebus ray-env)"; python job.py     with ray.init() and lakebus.connect("ray", key)

    The token itself is not printed, but the path of its file.
    """
    for name, value in driver_environment(load(data_dir, profile, config)).items():
        click.echo(f"export {name}={shlex.quote(value)}")
    return 0


def driver_environment(settings: Settings) -> dict[str, str]:
    """Raises Unavailable when no stack runs there."""
    files = StackFiles(settings.data_dir)
    address = settings.ray.address or _address(files)
    found = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": settings.ray.auth_mode}
    if settings.ray.auth_mode == "token":
        found["RAY_AUTH_TOKEN_PATH"] = str(files.ray_token())
    if settings.ray.address is None:
        # As in the stack itself: the driver's own ports on loopback, too.
        found["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return found


def _address(files: StackFiles) -> str:
    """Where the control service of the stack's own Ray listens: Ray writes the port down there."""
    state = files.state()
    if state is not None and state.supervisor.alive() and state.run_dir:
        session = Path(state.run_dir) / "ray" / "session_latest"
        for path in session.glob("gcs_server_port_*"):
            return f"127.0.0.1:{int(path.read_text())}"
    raise Unavailable(f"no stack runs in {files.root}; start one with `lakebus up`")
