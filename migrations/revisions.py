"""Which revisions there are, without Alembic: by the names that each migration gives itself.

Every process of a stack asks this at its start, and each job of maintenance; Alembic and SQLAlchemy
are a second of processor time to import, and only who changes a schema needs them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

_REVISION = re.compile(r'^revision: str = "(\w+)"$', re.MULTILINE)
_BEFORE = re.compile(r'^down_revision: str \| None = (?:None|"(\w+)")$', re.MULTILINE)


@lru_cache(maxsize=1)
def revisions() -> tuple[str, ...]:
    """All of them, oldest first; none where the installation has no migrations. Raises ValueError
    when they are not one line."""

    after: dict[str | None, str] = {}
    for script in files("migrations.versions").iterdir():
        if not script.name.endswith(".py") or script.name == "__init__.py":
            continue
        text = script.read_text(encoding="utf-8")
        revision, before = _REVISION.search(text), _BEFORE.search(text)
        if revision is None or before is None or before[1] in after:
            raise ValueError(f"the migration {script.name} has no place in the line of revisions")
        after[before[1]] = revision[1]
    line: list[str] = []
    while (following := after.pop(line[-1] if line else None, None)) is not None:
        line.append(following)
    if after:
        raise ValueError(f"migrations follow on ones that are not there: {sorted(after.values())}")
    return tuple(line)
