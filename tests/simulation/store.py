"""The object store over the network, and the encoder that stands in for Parquet.

A put whose answer is lost is Unavailable, and the object may be there or not; a put may also land
long after its writer has died. An object holds its rows as JSON lines with the hidden columns, so
that whoever reads a file sees every row with its origin; the rows themselves have gone through
`actors.range_files.encode_range`, as in the product.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pyarrow as pa

from lakebus.errors import Unavailable
from lakebus.schemas import TableSchema
from storage.files.objects import MemoryObjectStore
from storage.files.parquet import EncodedFile
from tests.simulation.network import Endpoint, Network

_PUT_S = 5.0


class Objects(MemoryObjectStore):
    """What is on the store's disks."""

    def has(self, key: str) -> bool:
        return key in self._objects


class RemoteStore:
    """One process's `ObjectStore`."""

    def __init__(self, network: Network, endpoint: Endpoint, objects: MemoryObjectStore) -> None:
        self._network = network
        self._endpoint = endpoint
        self._objects = objects

    async def put_new(self, key: str, data: bytes) -> None:
        await self._network.call(
            self._endpoint,
            lambda: self._objects.put_new(key, data),
            lost=_lost,
            refused=_lost,
            timeout_s=_PUT_S,
        )

    async def get(self, key: str) -> bytes:
        return await self._network.call(
            self._endpoint,
            lambda: self._objects.get(key),
            lost=_lost,
            refused=_lost,
            timeout_s=_PUT_S,
            repeatable=True,
        )

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        return (await self.get(key))[start : start + length]

    async def size(self, key: str) -> int | None:
        return await self._objects.size(key)

    async def delete(self, key: str) -> None:
        await self._network.call(
            self._endpoint,
            lambda: self._objects.delete(key),
            lost=_lost,
            refused=_lost,
            timeout_s=_PUT_S,
        )

    async def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        async for found in self._objects.list(prefix):
            yield found

    def local_path(self, key: str) -> Path | None:
        return None


def _lost() -> Exception:
    return Unavailable("the object store did not answer")


def encode_rows(schema: TableSchema, rows: pa.Table) -> EncodedFile:
    """Satisfies `actors.range_files.EncodeFile`."""

    data = msgspec.json.encode(rows.to_pydict())
    return EncodedFile(
        data=data,
        rows=rows.num_rows,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        statistics={},
    )


def decode_rows(data: bytes) -> dict[str, list[object]]:
    """Values by column id and hidden column, in file order."""

    return msgspec.json.decode(data, type=dict[str, list[object]])
