"""Python's cyclic garbage collector in a process that answers requests.

Everything a replica needs lives until its end, and what a request makes is freed by counting
references, so the collector finds next to nothing; but looking costs. With its defaults it looked
at the youngest objects after every sixteenth small request, and now and then at all of them, which
stops the process for a tenth of a second: both together were a fifth of what a small request cost,
and a wait for whoever came just then. So what is there after the start is never looked at again,
and the rest more rarely. It stays on, because faults do leave cycles behind.
"""

from __future__ import annotations

import gc

#: Objects made and not freed between two looks at the youngest; Python's own number is 700.
_YOUNGEST = 10_000
_OLDER = 10


def calm_collector() -> None:
    """To be called once, when a process has all that it keeps."""

    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNGEST, _OLDER, _OLDER)
