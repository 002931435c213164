"""Keeps the port that Serve opens in every replica away from the network.

Each replica serves calls of other deployments over gRPC, with pickled payloads and without asking
who is calling, on all interfaces of the machine, and Serve has no setting for it. On one machine
only this machine's processes have business there. Call `keep_replica_ports_on_loopback` in the
constructor of every deployment: the port is opened after it.
"""

from __future__ import annotations

import os
from typing import Any

from ray.serve._private import replica as _replica

replica: Any = _replica

_ANYWHERE = "[::]:"
_HERE = "127.0.0.1:"


def keep_replica_ports_on_loopback() -> None:
    """Do it in this replica, if its Ray is confined to this machine. Repeating it is harmless."""
    if os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0":
        return  # a real cluster: replicas of other machines call this one
    usual = replica.add_port_to_grpc_server

    def add_port(server: Any, address: str) -> Any:
        here = address.replace(_ANYWHERE, _HERE) if address.startswith(_ANYWHERE) else address
        return usual(server, here)

    replica.add_port_to_grpc_server = add_port
