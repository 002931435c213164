"""The command `lakebus`: checks that the installation is one, then hands over to the CLI.

lakebus is several top-level packages. A stray folder of the same name earlier on the path (say, a
directory `storage` where the command is run) would mix two programs, so that is found first and
said plainly.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("lakebus", "storage", "actors", "serve_app", "cluster", "migrations")


def installation_problem() -> str | None:
    """What is wrong with where the packages come from, or None."""
    home = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return f"The package {name!r} of lakebus is missing; install lakebus again."
        found = Path(spec.origin).resolve().parents[1]
        if found != home:
            return (
                f"The package {name!r} comes from {found}, but lakebus is installed in {home}."
                " Another package of this name hides ours: run lakebus from another folder, or"
                " uninstall that package."
            )
    return None


def main() -> int:
    """Entry point of the console script."""
    problem = installation_problem()
    if problem is not None:
        print(problem, file=sys.stderr)  # noqa: T201 - the CLI cannot be imported then
        return 2
    # The one import to the right (house, "Who may import whom"), and only as a program.
    try:
        from cluster.cli import main as run
    except KeyboardInterrupt:  # nothing has been started yet
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
