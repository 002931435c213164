"""P20 within the goals' harness, and the connections of the loads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.goals import inside
from benchmarks.goals.context import Context, Options
from benchmarks.goals.report import Report
from benchmarks.http1 import Connection, Dropped

ABOUT: dict[str, Any] = {
    "cores": 2, "cpu": "a cpu", "memory_gib": 8.0, "kernel": "6", "python": "3.11",
    "packages": {"ray": "2"}, "commit": "abc", "load_average_at_start": 0.1,
}  # fmt: skip


class Measured(Context):
    """As if the load beside compactions had run, with these ratios."""

    low, high = 1.3, 2.6

    def runs(self, module: str, *arguments: str, timeout_s: float) -> None:
        assert module == "compaction_load"
        found = {"ratio": 1.9, "interval_95": [self.low, self.high]}
        names = ("ack_ms_p50", "ack_ms_p99", "visible_ms_p50", "visible_ms_p99")
        document = {
            "windows": [{}] * 12,
            "ratios": dict.fromkeys(names, found),
            "failures": {"dropped": 2},
        }
        (self.options.out / "compaction_load.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.3, 2.6, "short"), (1.0, 1.2, "pass"), (1.1, 1.3, "undecided")],
)
def test_load_beside_compactions_is_reported(
    tmp_path: Path, low: float, high: float, verdict: str
) -> None:
    context = Measured(Options(tmp_path, None, True, 1, 1.0, 0, frozenset({"P20"})))
    context.low, context.high = low, high
    report = Report(tmp_path, ABOUT, command="bench", quick=True, goals=frozenset({"P20"}))
    turns = report.begin(inside.BENCHMARK, context)
    inside.run(context, turns)
    report.done()
    lines = (tmp_path / "report.md").read_text().splitlines()
    found = [line for line in lines if line.startswith("| P20 ")]
    assert len(found) == 2
    for line in found:
        assert f"**{verdict}**" in line
        assert f"1.9 x (95 %: {low:.3g} to {high:.3g})" in line


async def test_connection_that_ended_while_idle_is_opened_again() -> None:
    served: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        served.append(1)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = Connection(f"http://127.0.0.1:{port}", "key", timeout_s=10)
        for _ in range(3):
            assert (await connection.request("GET", "/")).status == 200
            streams = connection._streams
            assert streams is not None
            await streams[0].read()  # until the server's end has come
        connection.close()
    assert served == [1, 1, 1]


async def test_connection_that_ends_within_an_answer_is_a_drop() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = Connection(f"http://127.0.0.1:{port}", "key", timeout_s=10)
        with pytest.raises(Dropped):
            await connection.request("GET", "/")
