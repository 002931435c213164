"""A stack of its own for a run: started by the command line, stopped at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.show.processes import supervisor_of


def end_as_interrupted() -> None:
    """SIGTERM ends a program as Ctrl-C does from here on: its stack is taken down."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)


@dataclass(frozen=True, slots=True)
class RunningStack:
    """`ingest_url`, `query_url`: the direct doors for rows and queries, where there are any."""

    url: str
    api_key: str
    supervisor: int
    data_dir: Path
    start_s: float
    ingest_url: str | None = None
    query_url: str | None = None

    @property
    def asked(self) -> str:
        """Where queries go: as a client of ours goes by itself."""

        return self.query_url or self.url


@contextmanager
def running_stack(**settings: str) -> Iterator[RunningStack]:
    """`settings` are environment settings by their variable without the prefix."""

    folder = Path(tempfile.mkdtemp(prefix="lakebus-bench-"))
    if os.geteuid() == 0:
        folder.chmod(0o711)
    environment = os.environ | {f"LAKEBUS_{name.upper()}": text for name, text in settings.items()}
    command = [sys.executable, "-m", "lakebus"]
    place = ["--data-dir", str(folder / "stack")]
    began = time.monotonic()
    try:
        subprocess.run(
            [*command, "up", *place, "--port", "0", "--detach"],
            env=environment, check=True, stdout=sys.stderr, timeout=240,
        )  # fmt: skip
        seconds = time.monotonic() - began
        root = folder / "stack"
        connection = json.loads((root / "connection.json").read_text(encoding="utf-8"))
        yield RunningStack(
            connection["url"],
            connection["api_key"],
            supervisor_of(root),
            root,
            round(seconds, 2),
            connection.get("ingest_url"),
            connection.get("query_url"),
        )
    finally:
        subprocess.run([*command, "down", *place], check=False, stdout=sys.stderr, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)
