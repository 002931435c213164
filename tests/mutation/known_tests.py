"""Which tests a file offers, told from its text: a mutant must not name one that is not there."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

_DEFINED = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)
_STARRED = re.compile(r"^from (tests\.[\w.]+) import \*", re.MULTILINE)


def is_known(tree: Path, test: str) -> bool:
    """True when the file of a pytest id is there, and offers the test that the id names, if any."""

    file, _, name = test.partition("::")
    path = tree / file
    return path.is_file() and (not name or name.partition("[")[0] in _offered(path, tree))


@lru_cache(maxsize=256)
def _offered(path: Path, tree: Path) -> frozenset[str]:
    """The tests that the file defines, and those of the modules that it imports with a star."""

    text = path.read_text(encoding="utf-8")
    names = set(_DEFINED.findall(text))
    for module in _STARRED.findall(text):
        starred = tree / f"{module.replace('.', '/')}.py"
        if starred.is_file():
            names |= _offered(starred, tree)
    return frozenset(names)
