"""When small requests for one table wait for each other before they are decoded, and when not.

What is gathered is decoded, encoded and appended together, which costs a good deal less than one by
one. Requests of clients that wait for each answer come back together by themselves, because a group
is answered at once. Requests that come often but each by itself (many clients, each of which has
something to send now and then) never meet: they are what this is for.

A request waits when all of this holds:

* requests for its table come often;
* lately more of them were under way at a time than are gathered now. A client that is alone sees
  none but its own, so it never waits; and once all are here that ever were, nobody waits for more,
  as clients that wait for their answers can send no more;
* waiting has brought company lately. After a wait in vain the next one is spared it, after the
  second the next two, and so on.

It ends when enough are here, or after `WAIT_S_MAX` from when the first of them came, whatever
comes meanwhile. Nothing that a request is promised depends on any of this: it only says when the
event loop turns to it.
"""

from __future__ import annotations

import asyncio
from typing import Final

#: About what an append takes on a busy machine, and little beside a pause between publications.
WAIT_S_MAX: Final = 0.005
#: So many at a time get most of what a group gains.
ENOUGH: Final = 16
#: What counts as lately: the span that is not over, and the one before it.
_SPAN_S: Final = 0.025
#: Fewer requests lately than this are not often: a wait would mostly be in vain.
_OFTEN: Final = 6
_SPARED_MAX: Final = 64


class Crowd:
    """The requests for one table that are under way in this process, now and lately.

    `with crowd:` is one of them, from before it is decoded until the bus has answered. Times are
    the event loop's.
    """

    __slots__ = ("_came", "_came_before", "_most", "_most_before", "_since_s", "_spared", "_vain",
                 "under_way")  # fmt: skip

    def __init__(self) -> None:
        self.under_way = 0
        self._since_s = float("-inf")
        self._came = self._came_before = 0
        self._most = self._most_before = 0
        self._spared = self._vain = 0

    def __enter__(self) -> None:
        now_s = asyncio.get_running_loop().time()
        age_s = now_s - self._since_s
        if age_s >= _SPAN_S:
            recent = age_s < 2 * _SPAN_S
            self._came_before = self._came if recent else 0
            self._most_before = self._most if recent else 0
            self._since_s, self._came, self._most = now_s, 0, self.under_way
        self._came += 1
        self.under_way += 1
        self._most = max(self._most, self.under_way)

    def __exit__(self, *_: object) -> None:
        self.under_way -= 1

    def complete(self, gathered: int) -> bool:
        """Whether no more are waited for when so many are here."""

        return gathered >= min(ENOUGH, max(self._most, self._most_before))

    def should_gather(self) -> bool:
        """Of a request that finds nobody who waits: whether it should."""

        if self.complete(1) or self._came + self._came_before < _OFTEN:
            return False
        if self._spared:
            self._spared -= 1
            return False
        return True

    def waited(self, company: int) -> None:
        """What a wait has brought."""

        self._vain = 0 if company else min(_SPARED_MAX, 2 * self._vain or 1)
        self._spared = self._vain
