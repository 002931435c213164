"""The supervisor of one stack: what `lakebus up` runs.

It starts PostgreSQL and, beside it, the process that holds Ray; hands the database over when both
are there; and then only watches. A dead PostgreSQL is started again on its port, a dead Ray host is
started again with everything below it. Nothing that matters lives in this process: killing it loses
nothing, and the next `lakebus up` clears away what it left (`cluster/leftovers.py`).

Start-up is a race of two lines on purpose (importing and starting Ray takes most of the time):

::

    Ray host   import ─ ray.init ─ serve.start ──┐
    database   start ─ migrate ──────────────────┴─ deploy ─ /readyz ─ ready
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster import leftovers, processes, ray_environment, schema_state
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.host_link import HostFailed, HostLink
from cluster.ports import PortClaims
from cluster.processes import ProcessMark
from cluster.ray_environment import NAMESPACE, RayPlace
from cluster.stack_files import StackFiles, StackState
from lakebus.errors import LakebusError, StartRefused
from lakebus.settings import Settings

WIRING = "cluster.wiring:deploy"
_log = logging.getLogger("lakebus.stack")
_RESTART_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_CALM_S = 60.0
_DATABASE_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A stack that answers."""

    url: str
    api_key: str
    seconds: float
    ingest_url: str | None = None
    query_url: str | None = None


class Stack:
    """One stack in one data folder.

    :param wiring: `module:function` of what is deployed; tests deploy something small.
    :param migrate_external: whether an external database may be migrated without being asked.
    :param say: where progress goes, one line at a time.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        wiring: str = WIRING,
        migrate_external: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._wiring = wiring
        self._migrate_external = migrate_external
        self._say = say
        self.files = StackFiles(settings.data_dir)
        self._claims = PortClaims()
        self._postgres: EmbeddedPostgres | None = None
        self._host: HostLink | None = None
        self._place: RayPlace | None = None
        self._state: StackState | None = None
        self._http_port = self._direct_port = self._query_port = 0
        self._stopping = asyncio.Event()

    # --- life ------------------------------------------------------------------------------

    async def run(self, *, on_ready: Callable[[Ready], None] = lambda _: None) -> None:
        """Start, tell when the stack answers, and keep it running until `stop` is called."""
        self.files.make()
        with self.files.locked():
            try:
                on_ready(await self._until_stopped(self._started()))
                await self._watch()
            except _Stopped:
                pass
            finally:
                await self._stop()

    def stop(self) -> None:
        """Ask `run` to end; safe from a signal handler of the loop."""
        self._stopping.set()

    async def _until_stopped(self, work: Any) -> Any:
        """Do the work, or give up on it when asked to stop."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Stopped
            return await task
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    # --- starting --------------------------------------------------------------------------

    async def _started(self) -> Ready:
        try:
            return await self._start()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = f" Free space for {self.files.root} and start again." if full else ""
            raise StartRefused(f"The stack does not start: {error}.{advice}") from error

    async def _start(self) -> Ready:
        began = time.monotonic()
        earlier = self.files.state()
        stack_id = self.files.stack_id()
        cleared = await leftovers.clear(earlier, stack_id)
        if cleared:
            self._say(f"cleared away {cleared} processes of a start that was killed")
        self._take_ports(earlier)
        self._place = self._prepare_place(stack_id, earlier)
        own = ProcessMark.of(os.getpid())
        assert own is not None, "this process lives"
        self._state = StackState(
            supervisor=own,
            stack_id=stack_id,
            http_port=self._http_port,
            direct_port=self._direct_port,
            query_port=self._query_port,
            first_port=self._place.first_port,
            run_dir=str(self._place.run_dir),
        )
        self._host = self._spawn_host()
        # Both are always waited for, so that the failure of one does not leave the other half done.
        database, host = await asyncio.gather(
            self._start_database(), self._said("serve_started"), return_exceptions=True
        )
        for outcome in (database, host):
            if isinstance(outcome, BaseException):
                raise outcome
        self._say(f"Ray runs ({time.monotonic() - began:.1f} s)")
        return await self._deploy(str(database), began)

    def _take_ports(self, earlier: StackState | None) -> None:
        settings = self._settings
        last = last_direct = last_query = 0
        if earlier is not None:
            last, last_direct = earlier.http_port, earlier.direct_port
            last_query = earlier.query_port
        self._http_port = self._take_port(
            "http.port", settings.http.host, settings.http.port, last, flag="--port"
        )
        if settings.direct.enabled:
            self._direct_port = self._take_port(
                "direct.port", settings.direct.host, settings.direct.port, last_direct
            )
            self._query_port = self._take_port(
                "direct.query_port", settings.direct.host, settings.direct.query_port, last_query
            )

    def _take_port(
        self, name: str, host: str, wanted: int, last: int, *, flag: str | None = None
    ) -> int:
        explicit = self._settings.source_of(name) != "default"
        candidates = [wanted] if explicit and wanted else [last, wanted]
        for port in candidates:
            if port and self._claims.take(port, host):
                return port
        if explicit and wanted:
            raise StartRefused(
                f"Port {wanted} is taken. Stop what listens there, or choose another with"
                f" {flag or name} (0 takes a free one)."
            )
        block = self._claims.take_block()
        if block is None:
            raise StartRefused("No free ports were found on this machine.")
        return block

    def _prepare_place(self, stack_id: str, earlier: StackState | None) -> RayPlace:
        wanted = self._settings.ray.port_base or (0 if earlier is None else earlier.first_port)
        first_port = self._claims.take_block(wanted)
        if first_port is None:
            raise StartRefused(
                f"The ports from {wanted} on (ray.port_base) are not free. Choose others, or 0."
            )
        place = RayPlace(
            stack_id=stack_id,
            run_dir=ray_environment.run_dir_of(self._settings, stack_id),
            token_file=self.files.ray_token(),
            first_port=first_port,
        )
        ray_environment.prepare(place)
        return place

    async def _start_database(self) -> str:
        """The DSN of a database with a schema that we know."""
        dsn = self._settings.postgres.dsn
        if dsn is not None:
            text = dsn.get_secret_value()
            if self._migrate_external or (await schema_state.current(text)).empty:
                await _upgrade(text)
            await schema_state.require_known_schema(text)
            return text
        self._postgres = EmbeddedPostgres.from_settings(self.files.root, self._settings.postgres)
        began = time.monotonic()
        text = await self._postgres.start()
        if not (await schema_state.current(text)).up_to_date:
            await _upgrade(text)
        self._say(f"PostgreSQL runs ({time.monotonic() - began:.1f} s)")
        return text

    def _spawn_host(self) -> HostLink:
        assert self._place is not None, "the place is made before the host"
        settings = self._settings
        environment = ray_environment.environment(settings, self._place, os.environ)
        host = HostLink(self.files.logs, wiring=self._wiring, environment=environment)
        self._write_state(phase="starting", host=host.mark, processes=())
        host.send(
            "start",
            ray={
                "address": settings.ray.address,
                "namespace": NAMESPACE,
                "cpus": settings.ray.cpus,
                "object_store_bytes": settings.ray.object_store_bytes,
                "temp_dir": str(self._place.ray_dir),
            },
            http={
                "host": settings.http.host,
                "port": self._http_port,
                "request_timeout_s": self._settings.request_timeout_s,
            },
        )
        return host

    async def _said(self, kind: str) -> dict[str, Any]:
        assert self._host is not None, "the host was started"
        return await self._host.wait_for(kind, timeout_s=self._settings.ray.start_timeout_s)

    async def _deploy(self, dsn: str, began: float) -> Ready:
        assert self._host is not None, "the host is started before the application"
        values = self._settings.private_json()
        values |= {"postgres.dsn": dsn, "http.port": self._http_port}
        values |= {"direct.port": self._direct_port, "direct.query_port": self._query_port}
        values["data_dir"] = str(self.files.root)
        self._host.send("deploy", settings=values, api_key=self.files.api_key())
        deployed = await self._said("deployed")
        url, api_key = deployed["url"], deployed["api_key"] or ""
        await self._wait_ready(url, began)
        if api_key:
            self.files.keep_api_key(api_key)
        direct = self._settings.direct
        ingest_url = await self._door(deployed.get("ingest_url"), direct.url, "rows")
        query_url = await self._door(deployed.get("query_url"), direct.query_url, "queries")
        self.files.write_connection(
            url=url, api_key=api_key, ingest_url=ingest_url, query_url=query_url
        )
        marks = (self._host.mark, *processes.descendants(self._host.mark.pid))
        self._write_state(
            phase="ready", url=url, ingest_url=ingest_url, query_url=query_url, processes=marks
        )
        seconds = time.monotonic() - began
        return Ready(
            url=url, api_key=api_key, seconds=seconds, ingest_url=ingest_url, query_url=query_url
        )

    async def _door(self, url: str | None, given: str | None, what: str) -> str | None:
        """Its address, if it answers or is `given` (a balancer's, which may come later)."""
        if url is None or url == given:
            return url
        opened, said = await asyncio.to_thread(answers, f"{url}/healthz")
        if not opened:
            self._say(
                f"the direct door at {url} does not answer ({said}); {what} go through the url"
            )
        return url if opened else None

    async def _wait_ready(self, url: str, began: float) -> None:
        deadline = began + self._settings.ray.start_timeout_s
        said = ""
        while time.monotonic() < deadline:
            ready, said = await asyncio.to_thread(answers, f"{url}/readyz")
            if ready:
                return
            await asyncio.sleep(0.05)
        raise HostFailed(
            f"The application does not get ready within {self._settings.ray.start_timeout_s:.0f} s"
            f" ({said}). `lakebus logs` tells more."
        )

    # --- watching --------------------------------------------------------------------------

    async def _watch(self) -> None:
        lines = [self._watch_host()]
        if self._postgres is not None:
            lines.append(self._watch_postgres(self._postgres))
        tasks = [asyncio.ensure_future(line) for line in lines]
        try:
            await self._until_stopped(asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_postgres(self, postgres: EmbeddedPostgres) -> None:
        pauses = _Pauses()
        while True:
            code = await postgres.wait_exit()
            self._say(f"PostgreSQL ended ({code}); starting it again")
            pauses.begin()
            while True:
                await pauses.wait()
                try:
                    await postgres.start()
                    break
                except (LakebusError, OSError) as error:  # a full disk passes, too
                    _log.error("PostgreSQL does not start: %s", error)
            self._say("PostgreSQL runs again")

    async def _watch_host(self) -> None:
        pauses = _Pauses()
        while True:
            assert self._host is not None, "the host was started"
            await processes.wait_gone(self._host.mark)
            self._say("Ray ended; starting it again")
            pauses.begin()
            while True:
                await pauses.wait()
                try:
                    await self._restart_host()
                    break
                except (LakebusError, OSError) as error:  # a full disk passes, too
                    _log.error("Ray does not start: %s", error)
            self._say("Ray runs again")

    async def _restart_host(self) -> None:
        assert self._host is not None, "there was a host"
        assert self._state is not None, "there was a state"
        assert self._place is not None, "there was a place"
        began = time.monotonic()
        await self._host.stop()
        await leftovers.clear(self._state, self._state.stack_id)
        ray_environment.prepare(self._place)
        self._state = replace(self._state, restarts=self._state.restarts + 1)
        self._host = self._spawn_host()
        await self._said("serve_started")
        dsn = self._settings.postgres.dsn
        text = self._postgres.dsn if self._postgres is not None else ""
        await self._deploy(dsn.get_secret_value() if dsn is not None else text, began)

    # --- stopping --------------------------------------------------------------------------

    async def _stop(self) -> None:
        self._write_last_state(phase="stopping")
        if self._host is not None:
            await self._host.stop()
        if self._state is not None:
            await leftovers.clear(self._state, self._state.stack_id)
        if self._postgres is not None:
            await self._postgres.stop()
        self._claims.release()
        self._write_last_state(phase="stopped", host=None, processes=())

    def _write_last_state(self, **changes: Any) -> None:
        """Where the disk is full the processes end all the same; the next start finds none of what
        the file still names, and goes by process marks, not by the phase."""
        try:
            self._write_state(**changes)
        except OSError as error:
            _log.error("The state of the stack cannot be written down: %s", error)

    def _write_state(self, **changes: Any) -> None:
        if self._state is not None:
            self._state = replace(self._state, **changes)
            self.files.write_state(self._state)


class _Stopped(Exception):
    """Somebody asked to stop."""


class _Pauses:
    """How long to wait before a restart: longer each time, short again after a calm minute."""

    def __init__(self) -> None:
        self._count = 0
        self._last = 0.0

    def begin(self) -> None:
        if time.monotonic() - self._last > _CALM_S:
            self._count = 0

    async def wait(self) -> None:
        await asyncio.sleep(_RESTART_PAUSES_S[min(self._count, len(_RESTART_PAUSES_S) - 1)])
        self._count += 1
        self._last = time.monotonic()


async def _upgrade(dsn: str) -> None:
    # Mostly there is nothing to do, and a second of processor time is what Alembic takes to import.
    from cluster import migrate

    await migrate.upgrade(dsn)


def answers(url: str) -> tuple[bool, str]:
    """Whether a GET of the URL is answered with 200, and what was said if not."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200, f"status {response.status}"
    except urllib.error.HTTPError as error:
        with error:
            return False, f"status {error.code}: {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return False, str(error)
