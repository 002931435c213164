"""`python -m benchmarks.balancer [--quick]`: rows by the direct door with a balancer before it, and
without.

The balancer is the HAProxy that Ray's package brings, on loopback, with one thread: as a balancer
of HTTP, which shares requests over kept connections, and of TCP, which shares connections. It
stands before one ingest replica and before two, which share a port: the kernel deals their
connections out. Closed loops of JSON requests of 100 rows take turns in windows, all ways in each
round, on the cores of the stack; who begins changes with the round. A stack of its own for each
number of replicas, with maintenance off, which would meet one way more than another.

Printed as JSON, and as a table on stderr: published rows a second, the time to an acknowledgement,
and the µs of CPU that a request took of the balancer, of all of ours and of PostgreSQL.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import machine, measures
from benchmarks.goals import processes
from benchmarks.goals.context import wait_quiet, windowed
from benchmarks.goals.programs import Program, program
from benchmarks.stacks import RunningStack, end_as_interrupted, running_stack
from cluster.ray_environment import haproxy_program

ROWS = 100
WITHOUT, HTTP, TCP = "no balancer", "HTTP balancer", "TCP balancer"
WAYS = (WITHOUT, HTTP, TCP)
_READY_S, _MORE_S, _UP_S = 60.0, 100.0, 10.0

_CONFIGURATION = """\
global
    nbthread 1
    maxconn 4096
defaults
    timeout connect 1s
    timeout client 130s
    timeout server 130s
    timeout check 2s
    retries 1
    option redispatch
listen http
    bind 127.0.0.1:{http}
    mode http
    retry-on conn-failure
    http-reuse safe
    option httpchk GET /readyz
    server door {door} check inter 500ms
listen tcp
    bind 127.0.0.1:{tcp}
    mode tcp
    server door {door}
"""
_MEASURED = (
    "rows_per_s", "ack_ms_p50", "ack_ms_p99", "balancer_us", "ours_us", "postgres_us",
    "load_cpu_us_per_request", "cores_of_others",
)  # fmt: skip


@contextmanager
def balancer(door: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Its pid, and its addresses by way; `door` is host and port of what stands behind it."""

    ports = {HTTP: _free_port(), TCP: _free_port()}
    with tempfile.TemporaryDirectory(prefix="lakebus-balancer-") as folder:
        path = Path(folder) / "haproxy.cfg"
        path.write_text(_CONFIGURATION.format(door=door, http=ports[HTTP], tcp=ports[TCP]))
        process = subprocess.Popen(
            [str(haproxy_program()), "-db", "-f", str(path)], stdout=sys.stderr, stderr=sys.stderr
        )
        try:
            for port in ports.values():
                _listening(port)
            yield process.pid, {way: f"http://127.0.0.1:{port}" for way, port in ports.items()}
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _listening(port: int) -> None:
    until = time.monotonic() + _UP_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.02)
    raise RuntimeError("the balancer does not listen")


def measure(stack: RunningStack, options: argparse.Namespace) -> dict[str, Any]:
    """The windows of each way."""

    assert stack.ingest_url is not None, "the direct door is open by default"
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with ExitStack() as opened:
        pid, urls = opened.enter_context(balancer(urlsplit(stack.ingest_url).netloc))
        urls[WITHOUT] = stack.ingest_url
        loads = {
            way: opened.enter_context(_load(stack, urls[way], number, options.clients))
            for number, way in enumerate(WAYS)
        }
        for load in loads.values():
            load.ready(_READY_S)
        for turn in range(options.rounds):
            for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
                wait_quiet(stack.supervisor, within_s=5.0)
                found[way].append(_window(loads[way], stack, pid, options.seconds))
    return {way: summary(found[way]) for way in WAYS}


@contextmanager
def _load(stack: RunningStack, url: str, number: int, clients: int) -> Iterator[Program]:
    table = f"balanced_{number}"
    asyncio.run(measures.make_table(stack.url, stack.api_key, table))
    order = {
        "url": url, "read_url": stack.url, "api_key": stack.api_key, "table": table,
        "clients": clients, "rows": ROWS, "seed": number + 1, "warm_s": 1.0,
    }  # fmt: skip
    log = Path(tempfile.gettempdir()) / "lakebus-balancer.log"
    with program("benchmarks.closed_load", order, log=log) as load:
        yield load


def _window(load: Program, stack: RunningStack, pid: int, seconds: float) -> dict[str, Any]:
    before = processes.cpu_of(pid)
    found = windowed(load, stack.supervisor, seconds=seconds, limit_s=seconds + _MORE_S)
    if not found["visible"] or found["failures"]:
        raise RuntimeError(f"not every request was acknowledged and visible: {found}")
    taken_s = processes.cpu_of(pid) - before
    groups = dict(found["server_cpu_us_per_request"])
    return found | {
        "balancer_us": taken_s * 1e6 / max(found["requests"], 1),
        "postgres_us": groups.pop("PostgreSQL", 0.0),
        "ours_us": sum(groups.values()),
        "cores_of_others": found["cores_of_others"] - taken_s / found["published_s"],
    }


def summary(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; of the rate the extremes, too."""

    rates = [window["rows_per_s"] for window in windows]
    return {
        "windows": len(windows),
        "rows_per_s_min": min(rates),
        "rows_per_s_max": max(rates),
        **{name: round(statistics.median(w[name] for w in windows), 2) for name in _MEASURED},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The table for people."""

    told = [
        "| replicas | way | rows/s | ack p50 / p99 ms | CPU µs a request: balancer | ours | PG |"
    ]
    told.append("|---|---|---|---|---|---|---|")
    for replicas, ways in found["replicas"].items():
        told += [
            f"| {replicas} | {way} | {one['rows_per_s']:,.0f} | {one['ack_ms_p50']:.1f} /"
            f" {one['ack_ms_p99']:.1f} | {one['balancer_us']:.0f} | {one['ours_us']:.0f} |"
            f" {one['postgres_us']:.0f} |"
            for way, one in ways.items()
        ]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balancer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short window of each way")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 3.0
    end_as_interrupted()
    found: dict[str, Any] = {"machine": machine.describe(), "clients": options.clients}
    found["replicas"] = {}
    for replicas in options.replicas:
        given = {"maintenance_enabled": "false", "http_ingest_replicas": str(replicas)}
        with running_stack(**given) as stack:
            found["replicas"][str(replicas)] = measure(stack, options)
    print("\n".join(lines(found)), file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
