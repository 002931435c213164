"""Under which address clients reach the direct door, and who is told of it.

An address that leads elsewhere costs a client time, and could send its key to a stranger. So
without a setting that names one, only the name by which the client itself came is used, and only
when it came straight to Serve's own port; a door on loopback is told to those on loopback alone.
The id lets a client make sure, before it sends its key, that what answers there is this lake.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid
from dataclasses import dataclass

#: What is said back to the client in a header of ours must be no more than a host and a port: an
#: address in brackets, or labels with dots between them, the last of which may have one behind it.
_HOST = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]{2,45})\]"
    r"|(?P<name>(?=.{1,253}:)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?))"
    r":(?P<port>[0-9]{1,5})"
)
_ANY = frozenset({"", "0.0.0.0", "::"})


@dataclass(frozen=True, slots=True)
class IngestUrl:
    """`host` is where the door listens, `http_port` Serve's; `url` the setting `direct.url`."""

    host: str
    http_port: int
    url: str | None = None
    door_id: str = ""

    def for_client(self, host_header: str | None, port: int) -> str | None:
        """The door's address for a client that came by `host_header`, or None."""

        if self.url is not None:
            return self.url.rstrip("/")
        name, came_to = _parts(host_header)
        if name is None or came_to != self.http_port:
            return None
        if self.host not in _ANY and name != _plain(self.host):
            if not (_is_loopback(name) and _is_loopback(self.host)):
                return None
            name = self.host
        named = f"[{name}]" if ":" in name else name
        return f"http://{named}:{port}"


@dataclass(frozen=True, slots=True)
class DoorPlace:
    """The door of other replicas than the one that tells of it."""

    url: IngestUrl
    port: int

    def for_client(self, host_header: str | None) -> str | None:
        return self.url.for_client(host_header, self.port)


def door_id(history: uuid.UUID) -> str:
    """What the doors of one lake have in common and no other has; tells nothing about it."""

    return hashlib.blake2s(history.bytes, digest_size=8, person=b"door").hexdigest()


def _parts(host_header: str | None) -> tuple[str | None, int | None]:
    """Name and port; None for what is not both. Without a port nobody knows whether the client
    came straight, or through a proxy that speaks TLS."""

    found = None if host_header is None else _HOST.fullmatch(host_header)
    if found is None:
        return None, None
    if found["address"] is None:
        name = _plain(found["name"])
    else:
        try:
            name = str(ipaddress.IPv6Address(found["address"]))
        except ValueError:
            return None, None
    # Whoever came by "any address" knows no name of this machine.
    return (None if name in _ANY else name), int(found["port"])


def _plain(host: str) -> str:
    """One spelling of each: names do not know upper case, and an address has many spellings."""

    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"
