"""Runs HAProxy for Ray Serve: `haproxy_launcher.py HOST HAPROXY [arguments …]`.

Ray writes HAProxy's configuration; three things in it are not fit for a machine that others can
reach, and Ray has no setting for them: the pages for metrics and statistics listen on all
interfaces, the admin socket is open to everybody, and each request is logged to a syslog that is
not there. Two more would break promises of ours (see `corrected`). This program corrects them in
the file and becomes HAProxy. It also ties HAProxy's life to the Ray actor that started it: without
that, an HAProxy whose actor was killed keeps its port and goes on sending requests to replicas that
are gone.

It is run by path with `python -I -S`, so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def corrected(configuration: str, host: str) -> str:
    """The configuration with its own pages on `host` only. Repeating it changes nothing."""
    text = re.sub(r"(?m)^(\s*bind )(?:\*)?:(\d+)", rf"\g<1>{host}:\g<2>", configuration)
    text = re.sub(r"(?m)^(\s*stats socket .*?)mode 666", r"\g<1>mode 600", text)
    # With splicing of requests HAProxy misses a client that leaves after a body that came in a
    # later packet than its headers, and the query would go on (contract D9).
    text = re.sub(r"(?m)^\s*option splice-request\s*\n", "", text)
    # An HAProxy that starts anew knows no routes yet, and the one that takes over from it does not
    # take over its connections: one kept open would be told of no routes after all is well.
    text = re.sub(
        r"(?m)^(\s*http-request return status 404 )(?!hdr connection close )",
        r"\g<1>hdr connection close ",
        text,
    )
    return re.sub(r"(?m)^\s*log 127\.0\.0\.1:514 .*\n", "", text)


def main(arguments: list[str]) -> None:
    host, program, *rest = arguments
    path = Path(rest[rest.index("-f") + 1])
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(corrected(path.read_text(), host))
    os.replace(draft, path)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        sys.exit(1)
    os.execv(program, [program, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
