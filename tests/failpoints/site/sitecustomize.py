"""Python runs this at its start when this folder is on PYTHONPATH: failpoints are on from then on.

A sitecustomize that this one hides is run afterwards, as if this one were not there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_TESTS = _HERE.parents[1]

if "tests" not in sys.modules:
    # By place, not by search: other folders called `tests` may be on the path, ours need not be.
    package = types.ModuleType("tests")
    package.__path__ = [str(_TESTS)]
    sys.modules["tests"] = package

from tests.failpoints import hook  # noqa: E402 - must come after the package was placed

hook.install()

_others = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _hidden is not None and _hidden.loader is not None:
    _module = importlib.util.module_from_spec(_hidden)
    sys.modules["sitecustomize"] = _module
    _hidden.loader.exec_module(_module)
