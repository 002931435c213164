"""An iterator whose next item is made in another thread while this one is used."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

_T = TypeVar("_T")


def ahead(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """The same items in the same order, one ahead. What `items` raises comes out here. One item is
    made at a time, always by the same thread, so `items` need not know of threads; it is closed
    with this one, and none is being made any more then."""

    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
