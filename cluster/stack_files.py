"""The files of a stack's data folder, and what each is for.

::

    DIR/lock             held by the `lakebus up` that runs the stack
    DIR/stack_id         who this stack is, for ever
    DIR/state.json       what runs now: processes, ports, address (0600)
    DIR/connection.json  {"url", "api_key", "ingest_url", "query_url"} for clients (0600)
    DIR/lakebus.toml     settings, if the operator wrote any
    DIR/secrets/         passwords, Ray's token, the local API key (0700)
    DIR/logs/            up.log, ray_host.log, postgres.log
    DIR/postgres/        the database
    DIR/objects/         data files

Everything but the database belongs to the user who runs lakebus.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.private_files import write_private
from cluster.processes import ProcessMark
from lakebus.errors import StartRefused


@dataclass(frozen=True, slots=True)
class StackState:
    """What `state.json` says: true while the supervisor lives, a trail to clean up afterwards."""

    supervisor: ProcessMark
    stack_id: str
    phase: str = "starting"
    url: str | None = None
    ingest_url: str | None = None
    query_url: str | None = None
    http_port: int = 0
    direct_port: int = 0
    query_port: int = 0
    first_port: int = 0
    run_dir: str = ""
    host: ProcessMark | None = None
    processes: tuple[ProcessMark, ...] = field(default=())
    restarts: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "supervisor": self.supervisor.to_json(),
            "stack_id": self.stack_id,
            "phase": self.phase,
            "url": self.url,
            "ingest_url": self.ingest_url,
            "query_url": self.query_url,
            "http_port": self.http_port,
            "direct_port": self.direct_port,
            "query_port": self.query_port,
            "first_port": self.first_port,
            "run_dir": self.run_dir,
            "host": None if self.host is None else self.host.to_json(),
            "processes": [mark.to_json() for mark in self.processes],
            "restarts": self.restarts,
        }

    @classmethod
    def from_json(cls, value: Any) -> StackState | None:
        """Read a state; None for anything that is not one (an older version, a torn file)."""
        supervisor = ProcessMark.from_json(value.get("supervisor"))
        if supervisor is None or not isinstance(value.get("stack_id"), str):
            return None
        marks = [ProcessMark.from_json(one) for one in value.get("processes") or []]
        return cls(
            supervisor=supervisor,
            stack_id=value["stack_id"],
            phase=str(value.get("phase")),
            url=value.get("url"),
            ingest_url=value.get("ingest_url"),
            query_url=value.get("query_url"),
            http_port=int(value.get("http_port") or 0),
            direct_port=int(value.get("direct_port") or 0),
            query_port=int(value.get("query_port") or 0),
            first_port=int(value.get("first_port") or 0),
            run_dir=str(value.get("run_dir") or ""),
            host=ProcessMark.from_json(value.get("host")),
            processes=tuple(mark for mark in marks if mark is not None),
            restarts=int(value.get("restarts") or 0),
        )


class StackFiles:
    """The data folder of one stack."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir.resolve()
        self.logs = self.root / "logs"
        self.secrets = self.root / "secrets"
        self.state_path = self.root / "state.json"
        self.connection_path = self.root / "connection.json"

    def make(self) -> None:
        """Make the folders; raises StartRefused if this user cannot."""
        # Root's folder can be passed through, not listed: PostgreSQL's user must reach its own.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            self.root.mkdir(mode=mode, parents=True, exist_ok=True)
            for folder in (self.logs, self.secrets):
                folder.mkdir(mode=0o700, exist_ok=True)
                os.listdir(folder)
        except OSError as error:
            raise StartRefused(
                f"The data folder {self.root} cannot be used by this user: {error.strerror}."
                " Choose another with --data-dir, or start lakebus as the user who owns it."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one supervisor; the kernel lets go when the process ends."""
        with open(self.root / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                state = self.state()
                who = "" if state is None else f" (process {state.supervisor.pid})"
                raise StartRefused(
                    f"The stack in {self.root} runs already{who}. `lakebus status` shows it,"
                    " `lakebus down` stops it, and --data-dir names another."
                ) from None
            yield

    def stack_id(self) -> str:
        path = self.root / "stack_id"
        if not path.exists():
            write_private(path, secrets.token_hex(8))
        return path.read_text().strip()

    def ray_token(self) -> Path:
        """The file with the token that Ray's own ports ask for."""
        return self._secret("ray_token", lambda: secrets.token_hex(32))

    def api_key(self) -> str | None:
        """The local API key of an earlier start."""
        path = self.secrets / "api_key"
        return path.read_text().strip() if path.exists() else None

    def keep_api_key(self, text: str) -> None:
        if text != self.api_key():
            write_private(self.secrets / "api_key", text)

    def _secret(self, name: str, make: Any) -> Path:
        path = self.secrets / name
        if not path.exists():
            write_private(path, make())
        return path

    def state(self) -> StackState | None:
        """What the last start wrote, if it can be read."""
        try:
            return StackState.from_json(json.loads(self.state_path.read_text()))
        except (OSError, ValueError, AttributeError):
            return None

    def write_state(self, state: StackState) -> None:
        write_private(self.state_path, json.dumps(state.to_json(), indent=1))

    def write_connection(
        self,
        *,
        url: str,
        api_key: str,
        ingest_url: str | None = None,
        query_url: str | None = None,
    ) -> None:
        """`ingest_url` and `query_url` stand in it where there are direct doors."""
        document = {"url": url, "api_key": api_key}
        if ingest_url is not None:
            document["ingest_url"] = ingest_url
        if query_url is not None:
            document["query_url"] = query_url
        write_private(self.connection_path, json.dumps(document, indent=1) + "\n")

    def connection(self) -> dict[str, str] | None:
        try:
            found: dict[str, str] = json.loads(self.connection_path.read_text())
        except (OSError, ValueError):
            return None
        return found
