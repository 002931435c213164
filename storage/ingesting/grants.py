"""Who may do what: principals, their API keys, the grants of a key, and where keys are kept.

Quotas that are a key's own are in `storage.ingesting.quotas`.

A principal is a named identity that outlives its keys; idempotency keys, batches and ordering
belong to it (contract, *Words*). A key carries grants: a scope, limited to table name patterns.

What a principal may not see is answered exactly like what does not exist (D10): a table is seen
when any grant of the key matches its name. A seen table without the wanted scope is `forbidden`,
an unseen one is `table_not_found`, and a key without the scope at all is `forbidden` before any
name is looked up, so that no answer tells more than the key's own grants do.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from lakebus.errors import Forbidden, MalformedRequest, TableNotFound
from storage.ingesting.quotas import NO_QUOTAS, Quotas

SCOPES = ("ingest", "create", "query", "admin")
_PATTERN = re.compile(r"[a-z0-9_.*]{1,127}")


@dataclass(frozen=True, slots=True)
class Grant:
    """`scope` on the tables whose folded name matches one of `tables` (`*` stands for any text)."""

    scope: str
    tables: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise MalformedRequest(f"{self.scope!r} is not a scope; use one of {', '.join(SCOPES)}")
        if not self.tables:
            raise MalformedRequest(f"the scope {self.scope!r} needs at least one table pattern")
        for pattern in self.tables:
            if not _PATTERN.fullmatch(pattern):
                raise MalformedRequest(
                    f"{pattern[:80]!r} is not a table pattern; use lower-case names with * for "
                    "any text, like sales.*"
                )


def grants_from_json(document: object) -> tuple[Grant, ...]:
    """Reads `["query", {"scope": "ingest", "tables": ["sales.*"]}]`. Raises MalformedRequest."""

    if not isinstance(document, list) or not document:
        raise MalformedRequest(
            'scopes must be a list like ["query", {"scope": "ingest", "tables": ["sales.*"]}]'
        )
    return tuple(_grant_from_json(item) for item in document)


def grants_as_json(grants: Iterable[Grant]) -> list[dict[str, object]]:
    """The form in which grants are stored and shown."""

    return [{"scope": grant.scope, "tables": list(grant.tables)} for grant in grants]


def _grant_from_json(item: object) -> Grant:
    if isinstance(item, str):
        return Grant(item)
    if isinstance(item, dict) and set(item) <= {"scope", "tables"}:
        scope, tables = item.get("scope"), item.get("tables", ["*"])
        if (
            isinstance(scope, str)
            and isinstance(tables, list)
            and all(isinstance(pattern, str) for pattern in tables)
        ):
            return Grant(scope, tuple(pattern.lower() for pattern in tables))
    raise MalformedRequest(
        'each scope is a name or {"scope": name, "tables": [pattern, …]} with nothing else in it'
    )


@lru_cache(maxsize=1024)
def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    parts = (".*".join(re.escape(piece) for piece in pattern.split("*")) for pattern in patterns)
    return re.compile("|".join(f"(?:{part})" for part in parts), re.DOTALL)


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of one request: an identity, what its key grants, and the key's own quotas."""

    principal_id: int
    name: str
    grants: tuple[Grant, ...]
    key_id: str = ""
    quotas: Quotas = NO_QUOTAS

    def has(self, scope: str) -> bool:
        """True when the key has the scope on any table."""

        return any(grant.scope == scope for grant in self.grants)

    def allows(self, scope: str, table: str) -> bool:
        return any(
            grant.scope == scope and _matcher(grant.tables).fullmatch(table) is not None
            for grant in self.grants
        )

    def sees(self, table: str) -> bool:
        """True when any grant matches the table, so that its existence is no secret (D10)."""

        return any(_matcher(grant.tables).fullmatch(table) is not None for grant in self.grants)

    def covers(self, scope: str) -> bool:
        """True when the key has the scope on every table."""

        return any(grant.scope == scope and "*" in grant.tables for grant in self.grants)

    def require(self, scope: str) -> None:
        """Raises Forbidden when the key lacks the scope altogether."""

        if not self.has(scope):
            raise Forbidden(f"this API key lacks the scope {scope!r}", scope=scope)

    def require_everywhere(self, scope: str) -> None:
        """Raises Forbidden unless the scope covers every table: what makes keys or shows the audit
        log must not be reached from a part of the tables."""

        self.require(scope)
        if not self.covers(scope):
            raise Forbidden(f"this needs the scope {scope!r} on all tables", scope=scope)

    def require_table(self, scope: str, table: str, known: Iterable[str] = ()) -> None:
        """Raises Forbidden, or TableNotFound for a table that the caller may not see (D10).

        `known` are the names of live tables, for suggestions among what the caller may see.
        """

        self.require(scope)
        if self.allows(scope, table):
            return
        if self.sees(table):
            raise Forbidden(
                f"this API key lacks the scope {scope!r} on the table {table}", scope=scope
            )
        raise self.table_not_found(table, known)

    def table_not_found(self, table: str, known: Iterable[str] = ()) -> TableNotFound:
        """The one answer for a table that is not there and for one that is not to be seen."""

        seen = sorted(name for name in known if name != table and self.sees(name))
        close = difflib.get_close_matches(table, seen, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return TableNotFound(f"there is no table {table}{hint}", did_you_mean=close)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A stored key: only the sha256 of its secret is kept, and never shown."""

    key_id: str
    principal_id: int
    principal: str
    secret_hash: bytes = field(repr=False)
    grants: tuple[Grant, ...]
    label: str
    created_at: dt.datetime
    expires_at: dt.datetime | None = None
    last_used_at: dt.datetime | None = None
    revoked_at: dt.datetime | None = None
    quotas: Quotas = NO_QUOTAS


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """Who did what, when. `subject` is what it was done to; `detail` never holds a secret."""

    audit_id: int
    at: dt.datetime
    principal: str
    action: str
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)


class KeyStore(Protocol):
    """Keys, principals and the audit log. All calls raise Unavailable when the store is away."""

    async def find(self, key_id: str) -> ApiKey | None:
        """The key with this id, also when it is revoked or expired, or None."""
        ...

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
        """Stores a new key; makes the principal of this name when there is none."""
        ...

    async def list_keys(self) -> Sequence[ApiKey]:
        """Every key, newest first, revoked ones too."""
        ...

    async def revoke(self, key_id: str) -> bool:
        """True when the key exists; revoking again keeps the first time of revocation."""
        ...

    async def touch(self, key_id: str) -> None:
        """Records that the key was used about now; called at most once a minute for a key."""
        ...

    async def audit(
        self,
        *,
        principal: str,
        action: str,
        subject: str,
        detail: Mapping[str, object] | None = None,
    ) -> None: ...

    async def audit_records(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[AuditRecord]:
        """Newest first; `before` is an exclusive audit id."""
        ...
