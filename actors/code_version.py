"""Which code this process runs, as a short text for actor names.

A detached actor keeps the code it was started with, across restarts too, so the version is part of
its name: new code never talks to an old actor by mistake, and old actors can be found and ended.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from lakebus import __version__

_PACKAGES = ("lakebus", "storage", "actors", "cluster")


@functools.cache
def code_version() -> str:
    """The release, and a digest over the sources that an actor may run."""

    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=5)
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".sql"):
                digest.update(str(path.relative_to(root)).encode() + b"\x00")
                digest.update(path.read_bytes())
    return f"{__version__}-{digest.hexdigest()}"
