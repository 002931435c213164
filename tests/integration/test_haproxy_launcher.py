"""What the launcher makes of Ray's configuration of HAProxy, asked of HAProxy itself."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import haproxy_launcher
from cluster.ray_environment import haproxy_program

_NO_ROUTES = """\
global
    maxconn 100
defaults
    mode http
    timeout client 30s
    timeout server 30s
    timeout connect 5s
frontend all
    bind unix@{socket}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
"""


@pytest.fixture
def listener() -> Iterator[Path]:
    """A socket on which the launched HAProxy answers by a configuration without a route."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front.sock"
        configuration = Path(folder) / "haproxy.cfg"
        configuration.write_text(_NO_ROUTES.format(socket=path))
        launcher = [sys.executable, "-I", "-S", haproxy_launcher.__file__, "127.0.0.1"]
        process = subprocess.Popen([*launcher, str(haproxy_program()), "-f", str(configuration)])
        try:
            began_s = time.monotonic()
            while not path.exists():
                assert process.poll() is None, "HAProxy did not take the corrected file"
                assert time.monotonic() - began_s < 20.0
                time.sleep(0.01)
            yield path
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_no_route_ends_the_connection(listener: Path) -> None:
    """The HAProxy that knows the routes takes over the listener but no connection: one that is
    kept open would go on being told of none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10.0)
        connection.connect(str(listener))
        connection.sendall(b"GET /v1/query HTTP/1.1\r\nhost: lake\r\n\r\n")
        answer = b""
        while received := connection.recv(65_536):
            answer += received
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"Path '/v1/query' not found.")


def test_what_ray_writes_for_no_route_is_what_is_corrected() -> None:
    """Ray's own words for it change with Ray; a correction that meets nothing corrects nothing."""
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    # Read, not imported: Ray reads its environment at its first import.
    template = (Path(ray.origin).parent / "serve/_private/haproxy_templates.py").read_text()
    corrected = haproxy_launcher.corrected(template, "127.0.0.1")
    assert template.count("return status 404") == 1
    assert corrected.count("return status 404 hdr connection close ") == 1
    assert haproxy_launcher.corrected(corrected, "127.0.0.1") == corrected
