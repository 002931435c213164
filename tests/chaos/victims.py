"""Who can be struck: the processes of one stack, by kind.

Only descendants of roots that this run started are ever returned (`lakebus up`, our PostgreSQL, our
Ray nodes), and each as a mark (pid and start time), so a signal cannot reach a stranger.

An actor's role is not in its command line: every actor is `ray::RoleActor`. The log that its
standard error goes to names it in each line, and says so also when the process is stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster import processes
from cluster.processes import ProcessMark

_ROLE = re.compile(rb'"service": "actor\.([a-z_]+)(?:-\d+)?"')
_LOG_HEAD_BYTES = 4096
#: Our backends, told from the server's own: "postgres: role database address(port) state".
_BACKEND = re.compile(r"^postgres: lakebus \S+ [\d.]+\(\d+\)")


@dataclass(frozen=True, slots=True)
class Process:
    mark: ProcessMark
    title: str

    @property
    def pid(self) -> int:
        return self.mark.pid


def _titled(*words: str) -> Callable[[Process], bool]:
    return lambda process: all(word in process.title for word in words)


def _role(name: str) -> Callable[[Process], bool]:
    return lambda process: process.title == "ray::RoleActor" and role_of(process.pid) == name


_TESTS: dict[str, Callable[[Process], bool]] = {
    "core": _role("core"),
    "coordinator": _role("coordinator"),
    "publisher": _role("publisher"),
    "lease_manager": _role("lease_manager"),
    "role_supervisor": _role("supervisor"),
    "maintainer": _role("maintenance"),
    "job": _titled("ray::lakebus:job:"),
    "ingest_replica": _titled("ray::ServeReplica:api"),
    "query_replica": _titled("ray::ServeReplica:query"),
    "query_child": _titled("storage.engine.child_main"),
    "serve_controller": _titled("ray::ServeController"),
    "proxy_actor": _titled("ray::ProxyActor"),
    "haproxy_manager": _titled("ray::HAProxyManager"),
    "haproxy": _titled("haproxy", " -f "),
    "ray_agent": _titled("ray::DashboardAgent"),
    "raylet": _titled("/raylet/raylet "),
    "gcs": _titled("/gcs/gcs_server "),
    "ray_host": _titled("cluster.ray_host"),
    "postmaster": _titled("postgres -D"),
    "backend": lambda process: _BACKEND.match(process.title) is not None,
}
KNOWN = frozenset(_TESTS)


def role_of(pid: int) -> str | None:
    """The role that an actor's process has, by the log that it writes; None while it has said
    nothing."""
    try:
        with open(f"/proc/{pid}/fd/2", "rb") as log:
            found = _ROLE.search(log.read(_LOG_HEAD_BYTES))
    except OSError:  # gone, or it has no such file
        return None
    return None if found is None else found.group(1).decode()


def processes_below(roots: Iterable[ProcessMark]) -> list[Process]:
    """Every living process at or below the roots, oldest first."""
    marks: dict[int, ProcessMark] = {}
    for root in roots:
        if root.alive():
            marks[root.pid] = root
            marks |= {mark.pid: mark for mark in processes.descendants(root.pid)}
    found = [Process(mark, _title(mark.pid)) for mark in marks.values()]
    return sorted(found, key=lambda process: (process.mark.started_ticks, process.pid))


def of_kind(roots: Iterable[ProcessMark], kind: str) -> list[Process]:
    """The living processes of a kind, oldest first, so that an ordinal means something."""
    return [process for process in processes_below(roots) if _TESTS[kind](process)]


def _title(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()
