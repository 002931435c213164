"""The in-memory KeyStore: the meaning of the protocol, for tests and tools."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lakebus.clock import Clock, SystemClock
from storage.ingesting.grants import ApiKey, AuditRecord, Grant
from storage.ingesting.quotas import NO_QUOTAS, Quotas


class MemoryKeyStore:
    """Keeps keys, principals and the audit log in dictionaries of one event loop."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._keys: dict[str, ApiKey] = {}
        self._principals: dict[str, int] = {}
        self._audit: list[AuditRecord] = []

    async def find(self, key_id: str) -> ApiKey | None:
        return self._keys.get(key_id)

    async def create(
        self,
        *,
        key_id: str,
        principal: str,
        secret_hash: bytes,
        grants: Sequence[Grant],
        label: str = "",
        expires_at: dt.datetime | None = None,
        quotas: Quotas = NO_QUOTAS,
    ) -> ApiKey:
        principal_id = self._principals.setdefault(principal, len(self._principals) + 1)
        key = ApiKey(
            key_id=key_id,
            principal_id=principal_id,
            principal=principal,
            secret_hash=secret_hash,
            grants=tuple(grants),
            label=label,
            created_at=self._clock.utc_now(),
            expires_at=expires_at,
            quotas=quotas,
        )
        self._keys[key_id] = key
        return key

    async def list_keys(self) -> Sequence[ApiKey]:
        return list(reversed(self._keys.values()))

    async def revoke(self, key_id: str) -> bool:
        key = self._keys.get(key_id)
        if key is None:
            return False
        if key.revoked_at is None:
            self._keys[key_id] = replace(key, revoked_at=self._clock.utc_now())
        return True

    async def touch(self, key_id: str) -> None:
        key = self._keys.get(key_id)
        if key is not None:
            self._keys[key_id] = replace(key, last_used_at=self._clock.utc_now())

    async def audit(
        self,
        *,
        principal: str,
        action: str,
        subject: str,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        self._audit.append(
            AuditRecord(
                audit_id=len(self._audit) + 1,
                at=self._clock.utc_now(),
                principal=principal,
                action=action,
                subject=subject,
                detail=dict(detail or {}),
            )
        )

    async def audit_records(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[AuditRecord]:
        chosen = [r for r in reversed(self._audit) if before is None or r.audit_id < before]
        return chosen[:limit]
