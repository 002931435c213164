"""Buffers that are no larger than they must be, so that the sanitizer sees what leaves them.

All columns of a table lie in one block, and each has some slack behind it. To the sanitizer it is
all one; so what a column must not touch is forbidden by hand, where the process has a sanitizer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from storage.rows import compiled_json
from storage.rows.compiled_json import PADDING_BYTES, Buffers, CompiledPlan, own_buffers

#: What the reader writes ahead behind a text.
_AHEAD_BYTES = 8


@contextmanager
def tight_buffers() -> Iterator[None]:
    """Within, whatever is read gets buffers of its own, as large bodies do."""

    forbidden: list[tuple[Buffers, int, int]] = []

    def made(plan: CompiledPlan, data: bytes, bodies: int) -> Buffers | None:
        buffers = own_buffers(plan, data, bodies)
        if buffers is not None:
            forbidden.extend(
                (buffers, *region) for region in _slack(buffers, len(data) - PADDING_BYTES)
            )
            for _, address, size in forbidden:
                _mark("poison", address, size)
        return buffers

    kept_bytes = compiled_json.KEPT_BYTES
    try:
        compiled_json.KEPT_BYTES, compiled_json.own_buffers = 0, made  # type: ignore[misc]
        yield
    finally:
        compiled_json.KEPT_BYTES, compiled_json.own_buffers = kept_bytes, own_buffers  # type: ignore[misc]
        # Whoever gets this memory next may use all of it.
        for _, address, size in forbidden:
            _mark("unpoison", address, size)


def _slack(buffers: Buffers, size: int) -> Iterator[tuple[int, int]]:
    """Address and size of what no column may touch."""

    rows = buffers.space.rows
    for array, used in (
        (buffers.fixed, 16 * rows),
        (buffers.valid, rows),
        (buffers.ends, 4 * (rows + 1)),
        (buffers.texts, size + _AHEAD_BYTES),
    ):
        step = array.shape[1] * array.itemsize
        for column in range(array.shape[0]):
            yield array.ctypes.data + column * step + used, step - used


def _mark(how: str, address: int, size: int) -> None:
    function = getattr(ctypes.CDLL(None), f"__asan_{how}_memory_region", None)
    if function is not None:
        function(ctypes.c_void_p(address), ctypes.c_size_t(size))
