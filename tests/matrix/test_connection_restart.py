"""M26: every process is killed, and all are started again, in any order.

PostgreSQL, the ingest door, the coordinator and a reader as real processes over the real
composition. Nothing is repaired by hand: what was acknowledged is there once, what nobody knows is
resolved by its key, and tokens of before are honoured. `LAKEBUS_MATRIX_RESTARTS` asks for more
orders than the usual suite takes, `LAKEBUS_MATRIX_SEED` for others.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from cluster import components, processes
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.migrate import upgrade
from cluster.ports import free_port
from lakebus.settings import Settings
from lakebus.settings_table import PostgresSettings
from storage.ingesting.grants import SCOPES, Grant
from storage.ingesting.keyring import KeyRing
from tests.matrix.auditor import check_books, check_drained, read_books
from tests.matrix.connection_rig import own_server
from tests.matrix.worker_audit import read_files
from tests.postgres_server import new_data_dir

_ROOT = Path(__file__).parents[2]
_RESTARTS = int(os.environ.get("LAKEBUS_MATRIX_RESTARTS", "1"))
_SEED = int(os.environ.get("LAKEBUS_MATRIX_SEED", "26"))
_ROLES = ("postgres", "door", "coordinator", "reader")
_HANG_S = 60.0


@dataclass(slots=True)
class Stack:
    """Four processes; `receipts` are by idempotency key."""

    server: EmbeddedPostgres
    settings_path: Path
    ports: dict[str, int]
    key: str = ""
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def start(self, role: str) -> None:
        if role == "postgres":
            await self.server.start()
            return
        self.running[role] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.matrix.connection_process",
            role,
            str(self.settings_path),
            str(self.ports[role]),
            cwd=_ROOT,
        )

    async def kill(self, role: str) -> None:
        if role != "postgres":
            process = self.running.pop(role)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            return
        os.kill(self.server.pid, signal.SIGKILL)
        for mark in processes.working_in(self.server.cluster_dir):
            if mark.alive():
                os.kill(mark.pid, signal.SIGKILL)
        await self.server.stop()

    def client(self, role: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.ports[role]}",
            headers={"authorization": f"Bearer {self.key}"},
            timeout=_HANG_S,
        )


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    folder = new_data_dir()
    server = own_server(folder)
    await server.start()
    await upgrade(server.dsn)
    settings = Settings(
        data_dir=folder / "lake", postgres=PostgresSettings(dsn=SecretStr(server.dsn))
    )
    settings.data_dir.mkdir()
    path = components.keep_settings(settings)
    lake = await components.open_lake(settings, components.object_store(settings))
    issued = await KeyRing(lake.keys).issue(principal="someone", grants=[Grant(s) for s in SCOPES])
    await lake.close()
    made = Stack(server, path, {role: free_port() for role in _ROLES}, issued.text)
    yield made
    for role in tuple(made.running):
        await made.kill(role)
    await server.stop()


async def answers(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
    """The first answer that is not "not now"; a caller that retries as it is told."""

    async with asyncio.timeout(_HANG_S):
        while True:
            try:
                answer = await client.request(method, path, **more)
            except httpx.TransportError:
                await asyncio.sleep(0.05)
                continue
            if answer.status_code not in (429, 503):
                return answer
            await asyncio.sleep(0.05)


async def send(stack: Stack, client: httpx.AsyncClient, key: str) -> httpx.Response:
    row = [{"id": int(key), "note": key}]
    return await answers(
        client, "POST", "/v1/tables/t/rows", json=row, headers={"idempotency-key": key}
    )


async def keep_sending(stack: Stack, first: int) -> None:
    """Each key until it has its receipt, through whatever happens meanwhile."""

    async with stack.client("door") as client:
        for n in itertools.count(first, 3):
            answer = await send(stack, client, str(n))
            assert answer.status_code == 202, answer.text
            stack.receipts[str(n)] = answer.json()["receipt"]


async def acknowledged(stack: Stack, more: int) -> None:
    wanted = len(stack.receipts) + more
    async with asyncio.timeout(_HANG_S):
        while len(stack.receipts) < wanted:
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_M26_killed_and_started_in_any_order_nothing_is_lost_or_doubled(
    stack: Stack,
) -> None:
    dice = random.Random(_SEED)
    orders = list(itertools.permutations(_ROLES))
    for role in _ROLES[1:]:
        await stack.start(role)
    columns = [{"name": "id", "type": "bigint"}, {"name": "note", "type": "varchar"}]
    async with stack.client("door") as client:
        made = await answers(client, "POST", "/v1/tables", json={"name": "t", "columns": columns})
        assert made.status_code == 201, made.text
    sending = [asyncio.create_task(keep_sending(stack, n)) for n in range(3)]
    try:
        for _ in range(_RESTARTS):
            await acknowledged(stack, 20)
            for role in dice.choice(orders):
                await stack.kill(role)
                await asyncio.sleep(dice.random() * 0.05)
            for role in dice.choice(orders):
                await stack.start(role)
                await asyncio.sleep(dice.random() * 0.2)
            assert not any(task.done() for task in sending)
        await acknowledged(stack, 20)
    finally:
        for task in sending:
            task.cancel()
        ended = await asyncio.gather(*sending, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
    await audit_stack(stack)


async def audit_stack(stack: Stack) -> None:
    """Receipts by their keys, tokens at the reader, then the rows out of the files themselves."""

    tokens = [receipt["visibility_token"] for receipt in stack.receipts.values()][:8]
    async with stack.client("door") as client:
        # Every number: a sender whose request hung is far behind the others.
        for key in map(str, range(max(map(int, stack.receipts)) + 4)):
            answer = (await send(stack, client, key)).json()
            receipt = stack.receipts.setdefault(key, answer["receipt"])
            assert answer["receipt"] == receipt, "the key answers another receipt"
        tokens += [receipt["visibility_token"] for receipt in stack.receipts.values()][-8:]
    async with stack.client("reader") as client:
        covered = await answers(client, "POST", "/v1/visibility", json={"token": tokens})
        assert covered.status_code == 200, covered.text
        listed = await answers(client, "GET", "/v1/tables/t/files")
    assert listed.status_code == 200, listed.text
    books = await read_books(stack.server.dsn)
    assert {file["file_id"] for file in listed.json()["files"]} == {
        str(row["file_id"]) for row in books["files"]
    }
    objects = components.objects_dir(components.read_settings(str(stack.settings_path)))
    contents, ids = read_files(objects, books)
    check_books(books, contents)
    check_drained(books)
    rows = Counter(row_id for found in ids.values() for row_id in found)
    assert set(rows.values()) == {1}, "rows were published twice"
    assert set(rows) == set(map(int, stack.receipts))
