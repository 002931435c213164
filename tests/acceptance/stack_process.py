"""`lakebus up` with the smallest application: `stack_process.py DATA_DIR`."""

from __future__ import annotations

import sys

from cluster.up import foreground
from lakebus.settings import Settings


def main() -> int:
    settings = Settings.load(environ={}, flags={"data_dir": sys.argv[1], "profile": "test"})
    return foreground(settings, wiring="tests.acceptance.minimal_app:deploy")


if __name__ == "__main__":
    sys.exit(main())
