"""API keys, principals and the audit log in PostgreSQL. See `storage.ingesting.grants.KeyStore`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence

import asyncpg

from storage.ingesting.grants import ApiKey, AuditRecord, Grant, grants_as_json, grants_from_json
from storage.ingesting.quotas import NO_QUOTAS, Quotas, quotas_as_json, quotas_from_json
from storage.postgres.failures import reading, writing
from storage.postgres.pool import Pool

_KEYS = """
SELECT k.*, p.name AS principal FROM api_key k JOIN principal p USING (principal_id)"""
_CREATE = """
WITH existing AS (SELECT principal_id FROM principal WHERE name = $2),
made AS (
    INSERT INTO principal (name, created_at) SELECT $2, clock_timestamp()
     WHERE NOT EXISTS (SELECT 1 FROM existing)
    ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING principal_id)
INSERT INTO api_key
       (key_id, principal_id, secret_hash, scopes, label, created_at, expires_at, quotas)
SELECT $1, principal_id, $3, $4, $5, clock_timestamp(), $6, $7
  FROM (SELECT principal_id FROM existing UNION ALL SELECT principal_id FROM made) one
RETURNING *, $2 AS principal"""

#: A bound that is always there, because one plan serves all pages: with "or $2 is null" it could
#: not be looked up, and each page would read all that is newer. So it is in every listing.
_AUDIT = """
SELECT * FROM audit WHERE audit_id < coalesce($2, 9223372036854775807)
 ORDER BY audit_id DESC LIMIT $1"""


class PostgresKeys:
    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def find(self, key_id: str) -> ApiKey | None:
        async with self._pool.connection() as connection:
            with reading():
                row = await connection.fetchrow(f"{_KEYS} WHERE k.key_id = $1", key_id)
        return None if row is None else _api_key(row)

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
        async with self._pool.connection() as connection:
            with writing():
                row = await connection.fetchrow(
                    _CREATE,
                    key_id,
                    principal,
                    secret_hash,
                    grants_as_json(grants),
                    label,
                    expires_at,
                    quotas_as_json(quotas),
                )
        assert row is not None
        return _api_key(row)

    async def list_keys(self) -> Sequence[ApiKey]:
        async with self._pool.connection() as connection:
            with reading():
                rows = await connection.fetch(f"{_KEYS} ORDER BY k.created_at DESC, k.key_id")
        return [_api_key(row) for row in rows]

    async def revoke(self, key_id: str) -> bool:
        async with self._pool.connection() as connection:
            with writing():
                found = await connection.fetchval(
                    "UPDATE api_key SET revoked_at = coalesce(revoked_at, clock_timestamp())"
                    " WHERE key_id = $1 RETURNING key_id",
                    key_id,
                )
        return found is not None

    async def touch(self, key_id: str) -> None:
        async with self._pool.connection() as connection:
            with reading():
                await connection.execute(
                    "UPDATE api_key SET last_used_at = clock_timestamp() WHERE key_id = $1",
                    key_id,
                )

    async def audit(
        self,
        *,
        principal: str,
        action: str,
        subject: str,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        async with self._pool.connection() as connection:
            with writing():
                await connection.execute(
                    "INSERT INTO audit (at, principal, action, subject, detail)"
                    " VALUES (clock_timestamp(), $1, $2, $3, $4)",
                    principal,
                    action,
                    subject,
                    dict(detail or {}),
                )

    async def audit_records(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[AuditRecord]:
        async with self._pool.connection() as connection:
            with reading():
                rows = await connection.fetch(
                    _AUDIT,
                    limit,
                    before,
                )
        return [
            AuditRecord(
                audit_id=row["audit_id"],
                at=row["at"],
                principal=row["principal"],
                action=row["action"],
                subject=row["subject"],
                detail=row["detail"],
            )
            for row in rows
        ]


def _api_key(row: asyncpg.Record) -> ApiKey:
    return ApiKey(
        key_id=row["key_id"],
        principal_id=row["principal_id"],
        principal=row["principal"],
        secret_hash=row["secret_hash"],
        grants=grants_from_json(row["scopes"]),
        label=row["label"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        last_used_at=row["last_used_at"],
        revoked_at=row["revoked_at"],
        quotas=quotas_from_json(row["quotas"]),
    )
