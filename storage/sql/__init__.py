"""The SQL of lakebus: functions and views in `.sql` files, each with its reason at the head.

`install_statements()` gives what a migration run executes after the tables are there. Installing is
repeatable: every object is `CREATE OR REPLACE` or `IF NOT EXISTS`. `fingerprint()` names this set
of functions; a server compares it with what the database says was installed.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def install_statements() -> tuple[str, ...]:
    """The scripts in the order in which they must run; each is one multi-statement text."""

    root = files(__name__)
    functions = sorted(
        (f for f in root.joinpath("functions").iterdir() if f.name.endswith(".sql")),
        key=lambda f: f.name,
    )
    scripts = [root.joinpath("objects.sql"), *functions]
    return tuple(script.read_text(encoding="utf-8") for script in scripts)


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """sha256 (hex, 16 characters) over all scripts."""

    digest = hashlib.sha256()
    for script in install_statements():
        digest.update(script.encode("utf-8"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]
