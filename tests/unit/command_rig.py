"""A server in this process behind a real socket, and commands that are sent to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner, Result

from cluster.cli import cli
from lakebus.client import connect
from tests.unit.http_rig import Server, server


@dataclass(frozen=True, slots=True)
class Lake:
    """A server in this process, and commands that are sent to it."""

    server: Server
    url: str
    folder: Path

    @property
    def environ(self) -> Mapping[str, str]:
        return {"LAKEBUS_URL": self.url, "LAKEBUS_API_KEY": self.server.key}

    async def run(self, *arguments: str, given: str | bytes | None = None) -> Result:
        return await asyncio.to_thread(
            CliRunner().invoke,
            cli,
            arguments,
            input=given,
            env=self.environ,
            standalone_mode=False,
            catch_exceptions=False,
        )

    def file(self, name: str, content: bytes | str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)


@pytest.fixture
async def lake(tmp_path: Path) -> AsyncIterator[Lake]:
    """With one table, `events`."""

    async with server() as made:
        config = uvicorn.Config(
            made.app, port=0, host="127.0.0.1", lifespan="off", log_config=None, access_log=False
        )
        listening = uvicorn.Server(config)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(listening.serve(sockets=[sock]))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with connect(url, made.key) as client:
            await asyncio.to_thread(client.create_table, "events", {"id": "bigint"})
        try:
            yield Lake(made, url, tmp_path)
        finally:
            listening.should_exit = True
            await serving
            sock.close()
