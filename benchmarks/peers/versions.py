"""Prints the versions of what is compared with, as JSON."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "duckdb",
    "duckdb-extension-ducklake",
    "duckdb-extension-postgres-scanner",
    "deltalake",
    "pyiceberg",
    "asyncpg",
    "pyarrow",
    "chdb",
)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    found = {name: _version(name) for name in PACKAGES}
    print(json.dumps({"python": platform.python_version(), **found}))
