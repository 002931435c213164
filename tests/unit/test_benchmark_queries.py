"""The client that P12 is measured with: whole answers, and nothing else taken for one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from benchmarks.goals.programs import Failed
from benchmarks.goals.queries import Asker


@contextmanager
def answering(parts: Sequence[bytes], seen: list[bytes]) -> Iterator[Asker]:
    """One exchange: the parts are sent when the request has come, each by itself."""

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                seen.append(connection.recv(1 << 16))
                for part in parts:
                    connection.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        asker = Asker(f"http://127.0.0.1:{listener.getsockname()[1]}", "a-key")
        try:
            yield asker
        finally:
            asker.close()
            thread.join(20)


def test_an_answer_in_parts_is_read_whole() -> None:
    seen: list[bytes] = []
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nContent-Len"
    parts = [head, b"gth: 8\r\n", b"\r\n[", b"[1,", b"22]]"]
    with answering(parts, seen) as asker:
        assert asker.ask(asker.request("SELECT 1")) == b"[[1,22]]"
    assert seen[0].startswith(b"POST /v1/query HTTP/1.1\r\n")
    assert b"Authorization: Bearer a-key\r\n" in seen[0]
    assert seen[0].endswith(b'Content-Length: 19\r\n\r\n{"sql": "SELECT 1"}')


@pytest.mark.parametrize(
    "parts",
    [
        [b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n[[1"],
        [b"HTTP/1.1 200"],
    ],
)
def test_anything_else_is_no_figure(parts: list[bytes]) -> None:
    with answering(parts, []) as asker, pytest.raises(Failed):
        asker.ask(asker.request("SELECT 1"))
