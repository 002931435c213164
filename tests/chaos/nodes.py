"""A Ray cluster of several nodes on one machine, as a process: `python -m tests.chaos.nodes TEMP`.

The stack attaches to it (`ray.address`) and its actors are spread over the nodes. Orders:
`{"do": "add"}` answers `{"raylet": pid}`; `{"do": "remove", "raylet": pid}` clears away what is
left of a node whose raylet has died. The head is added first and stays.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.chaos.children import obey, say

#: A node that is silent for about this long is declared dead (period by threshold, and a timeout).
HEALTH: Mapping[str, str] = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}
_OBJECT_STORE_BYTES = 100 * 1024 * 1024


class Nodes:
    """The nodes of one cluster, by the pid of their raylet."""

    def __init__(self, temp_dir: Path) -> None:
        from ray.cluster_utils import Cluster  # here: importing Ray takes a second

        self._cluster = Cluster(shutdown_at_exit=True)
        self._temp_dir = temp_dir
        self._nodes: dict[int, Any] = {}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> int:
        node = self._cluster.add_node(
            num_cpus=4,
            object_store_memory=_OBJECT_STORE_BYTES,
            node_ip_address="127.0.0.1",
            temp_dir=str(self._temp_dir),
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            dashboard_agent_listen_port=0,
        )
        (raylet,) = node.all_processes["raylet"]
        self._nodes[raylet.process.pid] = node
        return int(raylet.process.pid)

    def remove(self, raylet: int) -> None:
        self._cluster.remove_node(self._nodes.pop(raylet), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


async def _serve(temp_dir: Path) -> None:
    # On the main thread, although it blocks: Ray sets signal handlers, and has nothing beside it.
    nodes = Nodes(temp_dir)

    async def do(order: Mapping[str, Any]) -> Mapping[str, Any]:
        if order["do"] == "add":
            return {"raylet": nodes.add()}
        if order["do"] == "remove":
            nodes.remove(order["raylet"])
            return {"removed": order["raylet"]}
        raise ValueError(f"{order['do']!r} is no order: add, remove")

    try:
        head = nodes.add()
        say({"address": nodes.address, "raylet": head, "pid": os.getpid()})
        await obey(do)
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
