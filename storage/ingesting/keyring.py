"""API keys as text: making them, and finding out whose request this is.

A key reads `lbk_<key id>_<secret>`. The store keeps the sha256 of the secret only: the secret has
256 random bits, so a plain hash is enough (there is nothing to guess, unlike a password), and it is
compared in constant time. What the store answered is trusted for at most `cache_s`, so a revoked
key dies everywhere within that time.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from lakebus.clock import Clock, SystemClock
from lakebus.errors import LakebusError, MalformedRequest, Unauthenticated, Unavailable
from storage.ingesting.grants import ApiKey, Grant, KeyStore, Principal
from storage.ingesting.quotas import NO_QUOTAS, Quotas

_log = logging.getLogger(__name__)

_KEY = re.compile(r"lbk_([a-z2-7]{16})_([A-Za-z0-9-]{43})")
_PRINCIPAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_LABEL_CHARACTERS_MAX = 200
#: Unknown ids are remembered shorter: the key may be made a moment later on another replica.
_UNKNOWN_CACHE_S = 1.0
_CACHE_ENTRIES_MAX = 4096
_TOUCH_S = 60.0
#: Until the key is known nobody's time limit holds, so this one does.
_LOOK_UP_S = 2.0


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key and its text, which exists only in this answer."""

    key: ApiKey
    text: str = field(repr=False)


def new_key_text() -> tuple[str, str, bytes]:
    """(key id, key text, sha256 of the secret)."""

    key_id = base64.b32encode(secrets.token_bytes(10)).decode("ascii").lower()
    # `-` only, because `_` separates the parts.
    secret = secrets.token_urlsafe(32).replace("_", "-")
    return key_id, f"lbk_{key_id}_{secret}", hash_secret(secret)


def hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


@dataclass(frozen=True, slots=True)
class _Remembered:
    key: ApiKey | None
    principal: Principal | None
    until_s: float


class KeyRing:
    """Issues keys and authenticates requests, over any KeyStore."""

    def __init__(
        self, store: KeyStore, *, clock: Clock | None = None, cache_s: float = 5.0
    ) -> None:
        self.store = store
        self._clock = clock or SystemClock()
        self._cache_s = cache_s
        self._remembered: dict[str, _Remembered] = {}
        self._looking: dict[str, asyncio.Task[_Remembered]] = {}
        self._touched_s: dict[str, float] = {}

    async def issue(
        self,
        *,
        principal: str,
        grants: Sequence[Grant],
        label: str = "",
        expires_at: dt.datetime | None = None,
        quotas: Quotas = NO_QUOTAS,
    ) -> IssuedKey:
        """Makes a key of a principal (which is made when it is new). Raises MalformedRequest."""

        if not _PRINCIPAL_NAME.fullmatch(principal):
            raise MalformedRequest(
                "the name of a principal has 1 to 63 letters, digits and . _ @ - and begins with "
                "a letter or digit"
            )
        if len(label) > _LABEL_CHARACTERS_MAX:
            raise MalformedRequest(f"a label has at most {_LABEL_CHARACTERS_MAX} characters")
        if expires_at is not None and expires_at <= self._clock.utc_now():
            raise MalformedRequest("expires_at is already past")
        key_id, text, secret_hash = new_key_text()
        key = await self.store.create(
            key_id=key_id,
            principal=principal,
            secret_hash=secret_hash,
            grants=grants,
            label=label,
            expires_at=expires_at,
            quotas=quotas,
        )
        return IssuedKey(key, text)

    async def revoke(self, key_id: str) -> bool:
        """Ends a key: here at once, on other replicas within the cache time."""

        existed = await self.store.revoke(key_id)
        self._remembered.pop(key_id, None)
        return existed

    async def authenticate(self, text: str) -> Principal:
        """The principal of a key's text. Raises Unauthenticated, Unavailable.

        One refusal for every reason, so that nobody learns which ids exist.
        """

        match = _KEY.fullmatch(text)
        if match is None:
            raise _refusal()
        key_id, secret = match[1], match[2]
        found = self._remembered.get(key_id)
        if found is None or found.until_s <= self._clock.monotonic_s():
            found = await self._look_up(key_id)
        if found.key is None or found.principal is None:
            raise _refusal()
        if not hmac.compare_digest(hash_secret(secret), found.key.secret_hash):
            raise _refusal()
        expires_at = found.key.expires_at
        if expires_at is not None and expires_at <= self._clock.utc_now():
            raise _refusal()
        return found.principal

    async def _look_up(self, key_id: str) -> _Remembered:
        """One question to the store however many requests wait for the answer."""

        task = self._looking.get(key_id)
        if task is None:
            task = asyncio.create_task(self._load(key_id))
            self._looking[key_id] = task
            task.add_done_callback(lambda done: self._looked(key_id, done))
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                return await asyncio.shield(task)
        except TimeoutError:
            raise Unavailable(
                "the API key cannot be looked up now; send the request again", retry_after_s=1.0
            ) from None

    def _looked(self, key_id: str, task: asyncio.Task[_Remembered]) -> None:
        self._looking.pop(key_id, None)
        if not task.cancelled():
            # Retrieved here too, in case every request that waited for it has gone.
            task.exception()

    async def _load(self, key_id: str) -> _Remembered:
        asked_s = self._clock.monotonic_s()
        key = await self.store.find(key_id)
        if key is None or key.revoked_at is not None:
            known = _Remembered(None, None, asked_s + min(_UNKNOWN_CACHE_S, self._cache_s))
        else:
            principal = Principal(
                key.principal_id, key.principal, key.grants, key_id, quotas=key.quotas
            )
            known = _Remembered(key, principal, asked_s + self._cache_s)
            await self._touch(key_id, asked_s)
        if len(self._remembered) >= _CACHE_ENTRIES_MAX:
            self._remembered.clear()
            self._touched_s.clear()
        self._remembered[key_id] = known
        return known

    async def _touch(self, key_id: str, now_s: float) -> None:
        if now_s - self._touched_s.get(key_id, -_TOUCH_S) < _TOUCH_S:
            return
        self._touched_s[key_id] = now_s
        try:
            await self.store.touch(key_id)
        except LakebusError:
            # "Last used" is a help for people; a request must not fail for it.
            _log.warning("the last use of a key was not recorded", extra={"key_id": key_id})


def _refusal() -> Unauthenticated:
    return Unauthenticated(
        "the API key is not known, expired or revoked; send Authorization: Bearer <key>"
    )
