"""PostgreSQL v3 messages cut out of a stream of bytes: as much of the protocol as a proxy needs.

Nothing here decides anything. A message is handed on as the bytes that came; only what names a
statement is looked into.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_LENGTH_BYTES = 4
_PROTOCOL_V3 = 3 << 16
SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST = 80_877_103, 80_877_104, 80_877_102


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: its type byte (empty for a startup message) and all its bytes."""

    kind: bytes
    data: bytes

    @property
    def body(self) -> bytes:
        return self.data[len(self.kind) + _LENGTH_BYTES :]


@dataclass(slots=True)
class FrameReader:
    """Bytes in, whole messages out. `starting`: the next message is a startup message, which has no
    type byte; the owner clears it after the real one."""

    starting: bool = False
    _rest: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        self._rest += data

    def next(self) -> Frame | None:
        """The next whole message, or None until more bytes come."""

        kind_bytes = 0 if self.starting else 1
        if len(self._rest) < kind_bytes + _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._rest[kind_bytes : kind_bytes + _LENGTH_BYTES], "big")
        size = kind_bytes + length
        if length < _LENGTH_BYTES:
            raise ConnectionError(f"not a PostgreSQL message: its length is {length}")
        if len(self._rest) < size:
            return None
        frame = Frame(bytes(self._rest[:kind_bytes]), bytes(self._rest[:size]))
        del self._rest[:size]
        return frame

    def take_rest(self) -> bytes:
        """What has arrived of a message that is not whole."""

        rest = bytes(self._rest)
        self._rest.clear()
        return rest


def startup_code(frame: Frame) -> int:
    return int.from_bytes(frame.body[:4], "big")


def application_of(frame: Frame) -> str:
    """The application_name of a startup message; empty when it names none."""

    if startup_code(frame) & ~0xFFFF != _PROTOCOL_V3:
        return ""
    words = frame.body[4:].split(b"\0")
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    return pairs.get(b"application_name", b"").decode(errors="replace")


def parsed_statement(frame: Frame) -> tuple[bytes, str]:
    """(name, SQL) of a Parse message."""

    name, _, rest = frame.body.partition(b"\0")
    return name, rest.partition(b"\0")[0].decode(errors="replace")


def bound_statement(frame: Frame) -> bytes:
    """The statement's name in a Bind message."""

    _, _, rest = frame.body.partition(b"\0")
    return rest.partition(b"\0")[0]


def text_of(frame: Frame) -> str:
    """The text of a Query or of a CommandComplete message."""

    return frame.body.partition(b"\0")[0].decode(errors="replace")
