"""`lakebus logs`: the last lines of a stack's log files, and what is added to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.stack_files import StackFiles
from lakebus.errors import ConfigurationError

_TAIL_BYTES = 64 * 1024
_POLL_S = 0.3

COMPONENTS = ("up", "host", "postgres", "serve", "haproxy", "actors", "ray")


def log_files(files: StackFiles, component: str | None) -> list[Path]:
    """The files of one component, or those that matter most; only what is there."""
    state = files.state()
    run_dir = Path(state.run_dir) if state is not None and state.run_dir else None
    ours = {
        "up": [files.logs / "up.log"],
        "host": [files.logs / "ray_host.log"],
        "postgres": [files.logs / "postgres.log"],
    }
    if component is not None and component not in COMPONENTS:
        raise ConfigurationError(
            f"There is no component {component!r}; choose one of {', '.join(COMPONENTS)}."
        )
    if component in ours:
        found: Iterable[Path] = ours[component]
    elif component is None:
        found = [path for paths in ours.values() for path in paths]
        found = [*found, *_of_ray(run_dir, "serve/*.log")]
    else:
        patterns = {
            "serve": "serve/*.log",
            "haproxy": "serve/*haproxy*.log",
            "actors": "worker-*.[eo]*",
            "ray": "*.log",
        }
        found = _of_ray(run_dir, patterns[component])
    return [path for path in found if path.is_file() and path.stat().st_size]


def _of_ray(run_dir: Path | None, pattern: str) -> list[Path]:
    if run_dir is None:
        return []
    return sorted((run_dir / "ray" / "session_latest" / "logs").glob(pattern))


def show(paths: list[Path], *, lines: int, write: Callable[[str], None]) -> dict[Path, int]:
    """Write the last lines of each file; return how far each was read."""
    offsets = {}
    for path in paths:
        with open(path, "rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
            offsets[path] = size
        write(f"==> {path} <==")
        for line in text.splitlines()[-lines:]:
            write(line)
    return offsets


def follow(
    offsets: dict[Path, int], *, write: Callable[[str], None], ended: Callable[[], bool]
) -> None:
    """Write what is added, until `ended`. Polls: log files live on any file system."""
    while not ended():
        for path, offset in offsets.items():
            size = path.stat().st_size if path.exists() else 0
            if size < offset:  # replaced by a new one
                offsets[path] = 0
            elif size > offset:
                with open(path, "rb") as file:
                    file.seek(offset)
                    added = file.read(size - offset)
                offsets[path] = size
                for line in added.decode(errors="replace").splitlines():
                    write(f"{path.stem}: {line}")
        time.sleep(_POLL_S)
