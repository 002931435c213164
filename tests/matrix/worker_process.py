"""A commit worker in a child process, which may be killed or stopped at any step.

Children are forked by a server that has everything imported, so that a new one is there within some
hundredths of a second. A child says what it is about to do to itself before it does it, so nobody
has to guess where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

import tests.failpoints.installed  # noqa: F401 - first: the product is imported with failpoints
from actors.range_files import EncodeFile
from actors.staging import Staged
from lakebus.schemas import TableSchema
from storage.bus.interface import Claim, NewEntry
from storage.files.parquet import EncodedFile, encode_data_file
from tests.failpoints.actions import Run
from tests.failpoints.points import Failpoints
from tests.faults.disks import DiskPoint, watched_disk
from tests.matrix.worker_roles import (
    Fate,
    Poison,
    Worker,
    WorkerSettings,
    busy_encoder,
    open_worker,
)

_STATE_POLL_S = 0.002
#: What a child is told or does takes less, or never happens.
_WITHIN_S = 30.0
#: What takes long to import: what the parent's main module imports, which each child does again,
#: and what pyarrow imports at first use where it is installed.
_PRELOADED = ["pytest", "pandas", __name__]
_SIGNALS: dict[Fate, signal.Signals] = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


# --- in the child -------------------------------------------------------------------------------


class _Child:
    """Answers commands; says before it dies or stops."""

    def __init__(self, settings: WorkerSettings, pipe: Connection) -> None:
        self._settings = settings
        self._pipe = pipe
        self._lock = threading.Lock()
        self._disk = settings.disk
        self._worker: Worker | None = None
        self._by_hand: tuple[Claim, Staged] | None = None
        if settings.failpoint is not None:
            fate, name = settings.failpoint.fate, settings.failpoint.name
            Failpoints().arm(name, Run(lambda: self._meet(fate, name)))

    async def serve(self) -> None:
        encode: EncodeFile = encode_data_file
        if self._settings.busy is not None:
            encode = busy_encoder(self._settings.busy)
        if self._settings.poison is not None:
            encode = self._poisoned(self._settings.poison)
        self._worker = await open_worker(self._settings, encode=encode)
        self._send("ready", os.getpid())
        loop = asyncio.get_running_loop()
        while True:
            try:
                command, arguments = await loop.run_in_executor(None, self._pipe.recv)
            except (EOFError, OSError):
                return
            try:
                answer = await getattr(self, f"do_{command}")(self._worker, *arguments)
            except Exception as error:  # noqa: BLE001 - raised again by whoever asked
                self._send("failed", error)
            else:
                self._send("answer", answer)

    async def do_start(self, worker: Worker) -> None:
        await worker.start()

    async def do_stage(self, worker: Worker) -> tuple[Claim, Staged]:
        self._by_hand = await worker.stage_one()
        return self._by_hand

    async def do_renew(self, worker: Worker) -> int:
        return len(await worker.leases.renew([self._held.lease]))

    async def do_submit(self, worker: Worker) -> str:
        assert self._by_hand is not None
        worker.publisher.start()
        submitted = await worker.publisher.submit(worker.commit_of(*self._by_hand))
        return submitted.outcome.value

    async def do_release(self, worker: Worker) -> None:
        await worker.leases.release(self._held.lease)

    async def do_nack(self, worker: Worker) -> None:
        await worker.leases.nack(self._held.lease, error="late", delay_s=0.0)

    async def do_note_canary(self, worker: Worker) -> None:
        await worker.leases.note_canary(self._held.lease)

    async def do_ended(self, worker: Worker, outcome: str) -> float:
        return worker.ended(outcome)

    async def do_until_ended(self, worker: Worker, outcome: str) -> None:
        await worker.until_ended(outcome)

    async def do_append(self, worker: Worker, entry: NewEntry) -> object:
        return await worker.lake.bus.append(entry)

    @property
    def _held(self) -> Claim:
        assert self._by_hand is not None
        return self._by_hand[0]

    def on_disk(self, point: DiskPoint, path: Path) -> None:
        disk = self._disk
        if disk is not None and point is disk.point and disk.part in path.parts:
            fate, self._disk = disk.fate, None
            self._meet(fate, point.value)

    def _poisoned(self, poison: Poison) -> EncodeFile:
        def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
            if schema.name != "canary" and poison.row_id in rows.column(0).to_pylist():
                time.sleep(poison.after_s)
                self._meet("kill", f"poison among {rows.num_rows}")
            return encode_data_file(schema, rows)

        return encode

    def _meet(self, fate: Fate, where: str) -> None:
        self._send(fate, where)
        os.kill(os.getpid(), _SIGNALS[fate])

    def _send(self, kind: str, value: object) -> None:
        with self._lock:
            self._pipe.send((kind, value))


def child_main(settings: WorkerSettings, pipe: Connection) -> None:
    child = _Child(settings, pipe)
    disk = contextlib.nullcontext()
    if settings.disk is not None or not settings.unnamed_files:
        disk = watched_disk(child.on_disk, unnamed_files=settings.unnamed_files)  # type: ignore[assignment]
    with disk:
        asyncio.run(child.serve())


# --- in the parent ------------------------------------------------------------------------------


class WorkerProcess:
    """A worker in a child process. Make it with `spawn`."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        self._answers: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._fates: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._reader = threading.Thread(target=self._read, name="worker pipe", daemon=True)
        self._reader.start()

    @classmethod
    async def spawn(cls, settings: WorkerSettings) -> WorkerProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        ours, theirs = context.Pipe()
        process = context.Process(target=child_main, args=(settings, theirs), daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        worker = cls(process, ours)
        await worker._next(worker._answers, "ready")
        return worker

    async def ask(self, command: str, *arguments: object) -> Any:
        """What the child answers. Raises what the child raised."""

        self.tell(command, *arguments)
        async with asyncio.timeout(_WITHIN_S):
            kind, value = await self._answers.get()
        if kind == "failed":
            raise value
        assert kind == "answer", (kind, value)
        return value

    def tell(self, command: str, *arguments: object) -> None:
        """The same for a child that will not live to answer."""

        self._pipe.send((command, arguments))

    async def until_ended(self, outcome: str) -> None:
        """Waits until a range of the child has ended so."""

        await self.ask("until_ended", str(outcome))

    async def dies(self) -> str:
        """Waits until the child has killed itself, and says where it did."""

        where: str = await self._next(self._fates, "kill")
        await self._gone()
        return where

    async def stops(self) -> str:
        """Waits until the child has stopped itself, and says where it did."""

        where: str = await self._next(self._fates, "stop")
        await self._until_state("T")
        return where

    async def pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        await self._until_state("T")

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    async def kill(self) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
        await self._gone()

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive())

    async def _gone(self) -> None:
        await asyncio.to_thread(self._process.join)
        await asyncio.to_thread(self._reader.join)
        self._pipe.close()

    async def _next(self, queue: asyncio.Queue[tuple[str, Any]], wanted: str) -> Any:
        async with asyncio.timeout(_WITHIN_S):
            kind, value = await queue.get()
        assert kind == wanted, f"the worker was to {wanted}, and said {kind}: {value}"
        return value

    async def _until_state(self, wanted: str) -> None:
        """The kernel tells nobody but the parent that a process has stopped; the parent of this one
        is the fork server."""

        stat = Path(f"/proc/{self._process.pid}/stat")
        async with asyncio.timeout(_WITHIN_S):
            while stat.read_text().rpartition(") ")[2][0] != wanted:
                await asyncio.sleep(_STATE_POLL_S)

    def _read(self) -> None:
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._fates.put_nowait, ("gone", None))
                self._loop.call_soon_threadsafe(self._answers.put_nowait, ("gone", None))
                return
            queue = self._fates if kind in _SIGNALS else self._answers
            self._loop.call_soon_threadsafe(queue.put_nowait, (kind, value))
