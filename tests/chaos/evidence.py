"""What the stack's own metrics tell of a run: how often a lease was found lost, a publication's
reply was lost and resolved, a role was started again.

Ray's agents export them; a process that is killed takes what it had not handed on with it, so the
sums are lower bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import urllib.request
from collections import Counter

from tests.acceptance.stacks import listeners
from tests.chaos import victims
from tests.chaos.stack import ChaosStack

_WANTED = re.compile(
    r"ray_lakebus_(leases_lost|ranges_ended|publish_unknown|role_replaced|quarantined_entries"
    r"|purged_segments|role_failures|jobs_ended)(?:_total)?\{(.*)\} (\S+)$"
)
_TOLD = re.compile(r'(kind|outcome|resolved|reason|cause|role)="([^"]*)"')


class Evidence:
    """Collects the counters of all processes, also of those that end meanwhile."""

    def __init__(self, stack: ChaosStack) -> None:
        self._stack = stack
        self._series: dict[tuple[str, str], float] = {}

    async def collect(self, *, every_s: float = 3.0) -> None:
        """Looks again and again until cancelled."""
        while True:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.look)
            await asyncio.sleep(every_s)

    def look(self) -> None:
        agents = {p.pid for p in victims.of_kind(self._stack.roots(), "ray_agent")}
        for _, port in listeners(agents):
            text = _page(port)
            for line in text.splitlines():
                found = _WANTED.match(line)
                if found is not None:
                    name, labels, value = found.groups()
                    key = (name, labels)
                    self._series[key] = max(self._series.get(key, 0.0), float(value))

    def sums(self) -> dict[str, int]:
        """By name and what its labels tell, over all processes."""
        total: Counter[str] = Counter()
        for (name, labels), value in self._series.items():
            told = ",".join(text for _, text in sorted(_TOLD.findall(labels)))
            total[f"{name}{{{told}}}" if told else name] += round(value)
        return dict(sorted(total.items()))


def _page(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            return str(answer.read().decode(errors="replace"))
    except (http.client.HTTPException, OSError, ValueError):  # a port that speaks something else
        return ""
