"""The process that holds a stack's Ray: it starts Ray and Serve, deploys, waits, and ends them.

`lakebus up` does not embed Ray itself: when Ray's control service dies, Ray ends the process it is
embedded in without a word, and the one that must notice and start anew has to survive that.

Every process below this one is told by the kernel to die with it (Ray does that for its own, we for
HAProxy), and this one is told to die with `lakebus up`. So killing any of them leaves nothing that
serves, and the next start finds little to clear away.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from cluster.channel import Channel, ChannelClosed
from cluster.deployed import Deployed
from lakebus.errors import LakebusError
from lakebus.settings import Settings

_PR_SET_PDEATHSIG = 1
_LOOK_S = 1.0


def main(arguments: list[str]) -> int:
    """`python -m cluster.ray_host FD PARENT WIRING`: socket, parent's pid, what to deploy."""
    descriptor, parent, wiring = int(arguments[0]), int(arguments[1]), arguments[2]
    _die_with(parent)
    # Stopping is the supervisor's word alone; Ctrl-C in its terminal must not race with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        _serve(channel, wiring)
    except ChannelClosed:
        return 1
    except Exception as error:  # noqa: BLE001 - whatever it was, the supervisor must hear of it
        traceback.print_exc()
        with contextlib.suppress(ChannelClosed):
            channel.send("failed", error=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        sys.exit(1)


def _serve(channel: Channel, wiring: str) -> None:
    start = channel.receive()
    _start_ray(start["ray"])
    channel.send("ray_started")
    with _ended_without_ray():
        _start_serve(start["http"])
    channel.send("serve_started")
    order = channel.receive()
    if order["kind"] == "stop":
        _stop()
        return
    module, _, function = wiring.partition(":")
    deploy = getattr(importlib.import_module(module), function)
    settings = Settings.from_private_json(order["settings"])
    with asyncio.Runner() as runner:
        with _ended_without_ray():
            deployed: Deployed = runner.run(deploy(settings, api_key=order["api_key"]))
        channel.send(
            "deployed",
            url=deployed.url,
            api_key=deployed.api_key,
            ingest_url=deployed.ingest_url,
            query_url=deployed.query_url,
        )
        while not channel.waiting(deployed.tend_s) or channel.receive()["kind"] != "stop":
            _require_ray()
            _tend(runner, deployed)
    _stop()


def _tend(runner: asyncio.Runner, deployed: Deployed) -> None:
    try:
        done = runner.run(deployed.tend())
    except LakebusError as error:
        done = f"could not look after the actors: {error}"
    if done:
        print(f"lakebus: {done}", flush=True)  # noqa: T201 - into the host's log


def _require_ray() -> None:
    """Raises when the Ray that this process has started is not whole any more.

    Without its raylet or its control service nothing is started again, while what runs goes on for
    long as if all were well: to it, a raylet that we have not reaped is alive. Looking reaps it.
    """
    import ray  # long imported by now; here, as everywhere in this file

    node = ray._private.worker._global_node
    dead: set[str] = set() if node is None else {kind for kind, _ in node.dead_processes()}
    gone = dead & {"raylet", "gcs_server"}
    if gone:
        raise RuntimeError(f"Ray has lost its {' and its '.join(sorted(gone))}")


@contextlib.contextmanager
def _ended_without_ray() -> Iterator[None]:
    """Ends this process when its Ray is not whole any more while the block runs: what waits for an
    actor on a node that is gone waits for ever. The supervisor sees the end and starts anew."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_S):
            try:
                _require_ray()
            except RuntimeError as error:
                print(f"lakebus: {error}", flush=True)  # noqa: T201 - into the host's log
                # Nothing to tidy up: the kernel ends what Ray has started (see above).
                os._exit(1)

    watch = threading.Thread(target=look, name="ray-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _start_ray(options: dict[str, Any]) -> None:
    import ray  # here, so that a wrong argument or a gone parent is found before seconds of import

    if options["address"] is not None:
        ray.init(address=options["address"], namespace=options["namespace"], log_to_driver=False)
        return
    with _slim_head():
        ray.init(
            address="local",
            namespace=options["namespace"],
            num_cpus=options["cpus"],
            object_store_memory=options["object_store_bytes"],
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=options["temp_dir"],
        )


@contextlib.contextmanager
def _slim_head() -> Iterator[None]:
    """Let `ray.init` start a head without what one machine does not need.

    `ray start` has options for this and `ray.init` has none: no autoscaler monitor, no log monitor
    (about 100 MB together), and the agent's HTTP port chosen freely instead of the fixed 52365, for
    which a second stack would wait in vain.
    """
    from ray._private import parameter

    class SlimParams(parameter.RayParams):
        def __init__(self, **given: Any) -> None:
            slim = {
                "no_monitor": True,
                "include_log_monitor": False,
                "dashboard_agent_listen_port": 0,
            }
            super().__init__(**(given | slim))

    usual = parameter.RayParams
    parameter.RayParams = SlimParams  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        parameter.RayParams = usual  # type: ignore[misc]


def _start_serve(options: dict[str, Any]) -> None:
    from ray import serve

    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": options["host"],
            "port": options["port"],
            "request_timeout_s": options["request_timeout_s"],
        },
    )


def _stop() -> None:
    import ray
    from ray import serve

    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
