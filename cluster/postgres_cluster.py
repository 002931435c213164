"""The data folder of an embedded PostgreSQL: how it is made, whose it is, how it is run."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from cluster import postgres_binaries
from cluster.postgres_binaries import Binaries, Identity, clean_environment
from cluster.private_files import write_private
from lakebus.errors import StartRefused

SETTINGS: dict[str, str] = {
    # Durability: contract A1.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "wal_level": "replica",
    # A small machine, many short transactions.
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_wal_size": "4GB",
    "min_wal_size": "256MB",
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    "wal_compression": "off",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    "autovacuum_naptime": "15s",
    # Nobody who fell asleep holds anything for long (B3, B11); the roles that lock set less.
    "idle_in_transaction_session_timeout": "60s",
    "client_connection_check_interval": "2s",
    "tcp_keepalives_idle": "30",
    # One face to the world.
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "TimeZone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%a ",
    "log_checkpoints": "off",
    "log_lock_waits": "on",
    "lc_messages": "C",
}
"""What the server is started with, over `postgresql.conf`."""


def make_cluster(
    cluster_dir: Path, binaries: Binaries, identity: Identity, *, password: str, sync: bool
) -> None:
    """Run initdb into a draft folder beside `cluster_dir` and rename it into place."""
    home = cluster_dir.parent
    for draft in home.glob("making-*"):
        shutil.rmtree(draft)
    draft = home / f"making-{secrets.token_hex(4)}"
    draft.mkdir(mode=0o700)
    password_file = draft / "password"
    write_private(password_file, password)
    give(draft, identity)
    command = [str(binaries.tool("initdb")), "-D", str(draft / "data"), "-U", "postgres"]
    command += ["-E", "UTF8", "--no-locale", "--auth=scram-sha-256", "--data-checksums"]
    command += [f"--pwfile={password_file}"]
    if not sync:
        command.append("--no-sync")
    made = subprocess.run(
        identity.command(command),
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env=clean_environment(),
        **identity.popen_arguments(),
    )
    if made.returncode != 0:
        said = (made.stderr or made.stdout).strip()
        shutil.rmtree(draft)
        raise StartRefused(f"PostgreSQL could not make its data folder in {home}: {said}")
    os.rename(draft / "data", cluster_dir)
    shutil.rmtree(draft)


def require_major(cluster_dir: Path, binaries: Binaries) -> None:
    """Raise StartRefused, with the way out, if other programs made the cluster."""
    try:
        found = int((cluster_dir / "PG_VERSION").read_text())
    except (OSError, ValueError) as error:
        raise StartRefused(
            f"{cluster_dir} is not a PostgreSQL data folder ({error}). Move it away, or"
            " choose another --data-dir."
        ) from error
    if found != binaries.major:
        raise StartRefused(
            f"The data in {cluster_dir} was made by PostgreSQL {found}, and the programs"
            f" found ({binaries.source}) are PostgreSQL {binaries.version}; one cannot open the"
            f" other's files. Set {postgres_binaries.BIN_DIR_VARIABLE} to programs of version"
            f" {found}; to change the version, dump there with pg_dump and restore into an"
            " empty --data-dir."
        )


def give(folder: Path, identity: Identity) -> None:
    """Let the identity own the folder and all in it; touches nothing above it."""
    if os.geteuid() != 0 or (folder.stat().st_uid, folder.stat().st_gid) == identity.owner:
        return
    uid, gid = identity.owner
    # Deepest first: were we killed half way, the top would still say that work is left.
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.lchown(os.path.join(parent, name), uid, gid)
        os.lchown(parent, uid, gid)
