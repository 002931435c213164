"""Cuts one entry out of its segment, as a child process that is allowed to die of it.

Reads from standard input what `pack_request` made, writes the entry's own segment to standard
output. Run by `actors.staging` for entries that ended every worker that tried them.
"""

from __future__ import annotations

import struct
import sys

from actors.range_files import single_payload

EXTRACT_MODULE = __name__
_HEAD = struct.Struct(">I")


def pack_request(payload: bytes, index: bytes) -> bytes:
    return _HEAD.pack(len(index)) + index + payload


def main() -> None:
    request = sys.stdin.buffer.read()
    (length,) = _HEAD.unpack_from(request)
    start = _HEAD.size + length
    sys.stdout.buffer.write(single_payload(request[start:], request[_HEAD.size : start]))
