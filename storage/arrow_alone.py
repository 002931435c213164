"""Arrow without pandas, for processes that are given none of its values.

Before the first list becomes an array, pyarrow imports pandas where that is installed, to tell
whether the list is one of its series: a quarter of a second of processor time and 54 MiB for the
life of the process. It looks once. So a process of ours lets it look while pandas is not to be
found. Whoever asks for pandas by name (`to_pandas`) still gets it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

import pyarrow as pa

_PANDAS = "pandas"


class _NotHere:
    """Finds no pandas, and leaves everything else to others."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == _PANDAS:
            raise ModuleNotFoundError("left out of this process", name=name)
        return None


def leave_pandas_out() -> None:
    """For the start of a process that runs nobody else's code: afterwards pyarrow takes a pandas
    series for any other sequence. Changes nothing where pandas has been imported already."""

    if _PANDAS in sys.modules:
        return
    not_here = _NotHere()
    sys.meta_path.insert(0, not_here)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(not_here)
