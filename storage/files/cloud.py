"""Object stores by URL: S3-compatible servers, Google Cloud Storage, Azure Blob Storage.

One client library (obstore) speaks to all three; what differs between them is how the client is
made (`storage.files.cloud_settings`). Names are kept unique by the store itself: every put is one
request that carries the condition "only if there is no such object" (`If-None-Match: *`, on Google
`x-goog-if-generation-match: 0`), so nothing can be overwritten, by whomever. A store that ignores
the condition is refused at the start (`check_conditions`): nothing would be true on it.

One request, however large the file is: multi-part uploads are conditional on few stores, and only
at their last step. The services take 5 GB so, and data files end far below (64 MiB by default).

Retries are made here and not in the library, because only here it is known what a second answer
means. A put that failed may have happened, or may still happen: so when its repetition is told that
the name is taken, the object is read, and it was ours if it has our bytes. An outcome that stays
open is Unavailable, as the interface says. Reads and deletes may simply be repeated.
"""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from lakebus.clock import SYSTEM_CHANCE, Chance, Clock, SystemClock
from lakebus.errors import ConfigurationError, Corrupt, Unavailable
from storage.files.cloud_settings import CloudSettings, Place, open_client
from storage.files.objects import ObjectExists, ObjectStore, check_key, check_prefix

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: Pauses between attempts double, up to the longest; each is shortened by up to a half at random.
_PAUSE_S: Final = 0.1
_PAUSE_S_MAX: Final = 3.0
#: A store that asks for less is left alone for longer, and so are those who come next.
_THROTTLED_PAUSE_S: Final = 0.5
_THROTTLED_RETRY_AFTER_S: Final = 2.0
_TEXT_MAX: Final = 500
#: What the library says of an answer; the text behind it repeats it for programmers.
_STATUS = re.compile(r"status code: (\d{3})")
_PROGRAMMERS_PART = "Debug source:"
#: The body of an answer, in XML, of which two elements say something.
_ANSWER = re.compile(
    r"(status code: [^:]*):.*?<Code>(.*?)</Code>\s*(?:<Message>(.*?)</Message>)?.*", re.DOTALL
)
_THROTTLED = re.compile(r"<Code>(SlowDown|ServerBusy|TooManyRequests)|rateLimitExceeded")
_NO_PLACE = re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
#: The library's own words, where it looks at an answer's range before anybody else can.
_BEYOND_END = "Wanted range starting at"
#: Two puts of one name at the same moment: S3 asks to send it again (409).
_CONFLICT = "ConditionalRequestConflict"
_SECRETS = re.compile(r"(?i)(signature|credential|token|secret|sig)=[^&\s\"']+")


class StoreRefuses(Unavailable):
    """The store answered that we may not, or that the bucket is not there: somebody has to act."""


class _Trouble(enum.Enum):
    EXISTS = enum.auto()
    MISSING = enum.auto()
    REFUSED = enum.auto()
    BEYOND_END = enum.auto()
    THROTTLED = enum.auto()
    FAILED = enum.auto()


class CloudObjectStore:
    """Objects below one prefix of one bucket. One per process; any number of calls at a time."""

    def __init__(
        self,
        place: Place,
        settings: CloudSettings | None = None,
        *,
        clock: Clock | None = None,
        chance: Chance = SYSTEM_CHANCE,
    ) -> None:
        """Raises ConfigurationError; says nothing to the store yet."""

        self._place = place
        self._settings = settings or CloudSettings()
        self._clock = clock or SystemClock()
        self._chance = chance
        self._client = open_client(place, self._settings)

    async def put_new(self, key: str, data: bytes) -> None:
        check_key(key)

        async def put() -> None:
            await obstore.put_async(self._client, key, data, mode="create", use_multipart=False)

        doubtful = False
        for attempt in range(self._settings.attempts):
            try:
                return await put()
            except (BaseError, OSError) as error:
                trouble = _trouble_of(error)
                if trouble is _Trouble.EXISTS:
                    if doubtful and await self._has(key, data):
                        return None
                    raise ObjectExists(f"an object named {key} exists already") from error
                doubtful = True
                await self._pause_or_raise(error, trouble, attempt)
        raise AssertionError("the last attempt ends the loop")

    async def get(self, key: str) -> bytes:
        check_key(key)

        async def get() -> bytes:
            found = await obstore.get_async(self._client, key)
            return bytes(await found.bytes_async())

        return await self._repeated(get, key)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        check_key(key)
        if start < 0 or length < 0:
            raise ValueError("a range starts at 0 or later and is not negative")
        if length == 0:  # no request can ask for nothing
            await self._require(key, start)
            return b""

        async def get() -> bytes:
            found = await obstore.get_range_async(self._client, key, start=start, length=length)
            return bytes(found)

        try:
            data = await self._repeated(get, key)
        except Unavailable as error:
            if _trouble_of(error.__cause__) is _Trouble.BEYOND_END:
                await self._require(key, start + length)
            raise
        if len(data) != length:
            raise Corrupt(f"the object {key} ends before byte {start + length}")
        return data

    async def size(self, key: str) -> int | None:
        check_key(key)

        async def head() -> int | None:
            try:
                return int((await obstore.head_async(self._client, key))["size"])
            except FileNotFoundError:
                return None

        return await self._repeated(head, key)

    async def delete(self, key: str) -> None:
        check_key(key)

        async def delete() -> None:
            try:
                await obstore.delete_async(self._client, key)
            except FileNotFoundError:
                return

        await self._repeated(delete, key)

    async def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        check_prefix(prefix)
        # Prefixes of the library end at a slash; the rest is compared here. A page that fails is
        # not asked for again: the listing begins anew, and what was told already is left out.
        folder = prefix.rpartition("/")[0] or None
        last = ""
        for attempt in range(self._settings.attempts):
            try:
                pages = obstore.list(self._client, folder, offset=last or None)
                async for page in pages:
                    for one in page:
                        key = one["path"]
                        last = max(last, key)
                        if key.startswith(prefix):
                            yield key, one["size"]
                return
            except (BaseError, OSError) as error:
                await self._pause_or_raise(error, _trouble_of(error), attempt)

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def close(self) -> None:
        """Connections end with the process: the library has no way to close them earlier."""

    # --- attempts -----------------------------------------------------------------------------

    async def _repeated(self, call: Callable[[], Awaitable[_Result]], key: str) -> _Result:
        for attempt in range(self._settings.attempts):
            try:
                return await call()
            except (BaseError, OSError) as error:
                trouble = _trouble_of(error)
                if trouble is _Trouble.MISSING:
                    raise Corrupt(f"the object {key} is not in the store") from error
                await self._pause_or_raise(error, trouble, attempt)
        raise AssertionError("the last attempt ends the loop")

    async def _pause_or_raise(self, error: Exception, trouble: _Trouble, attempt: int) -> None:
        throttled = trouble is _Trouble.THROTTLED
        repeatable = throttled or trouble is _Trouble.FAILED
        if not repeatable or attempt + 1 >= self._settings.attempts:
            # Callers may be strangers, so what the store said goes to the log and not to them.
            _log.warning("the object store failed (%s): %s", trouble.name, words_of(error))
            if throttled:
                raise Unavailable(
                    "the object store asks for less", retry_after_s=_THROTTLED_RETRY_AFTER_S
                ) from error
            if trouble is _Trouble.FAILED or trouble is _Trouble.BEYOND_END:
                raise Unavailable("the object store failed, or did not answer") from error
            raise StoreRefuses("the object store refuses us", retry_after_s=5.0) from error
        pause_s = _THROTTLED_PAUSE_S if throttled else _PAUSE_S
        pause_s = min(_PAUSE_S_MAX, pause_s * 2**attempt)
        await self._clock.sleep_s(pause_s * (1 - self._chance.jitter() / 2))

    async def _has(self, key: str, data: bytes) -> bool:
        """Whether the object is the one that a put in doubt was to make."""

        return await self.size(key) == len(data) and await self.get(key) == data

    async def _require(self, key: str, end: int) -> None:
        size = await self.size(key)
        if size is None:
            raise Corrupt(f"the object {key} is not in the store")
        if size < end:
            raise Corrupt(f"the object {key} ends before byte {end}")


async def check_conditions(store: ObjectStore, *, chance: Chance = SYSTEM_CHANCE) -> None:
    """Puts one small object twice. Raises ConfigurationError for a store that overwrites, or that
    does not let us write, read and delete; Unavailable for one that does not answer."""

    key = f"probe/{chance.new_uuid().hex}"
    try:
        if await store.size(key) is not None:
            raise ConfigurationError("the object store says that an object is there that never was")
        await store.put_new(key, b"the first put of this name")
        try:
            await _require_refusal(store, key)
        finally:
            await store.delete(key)
    except StoreRefuses as error:
        raise ConfigurationError(
            f"{error.detail}: {words_of(error.__cause__)} - look at store.url, store.endpoint and "
            "store.region, and whether the credentials may put, get, list and delete there"
        ) from error
    except Unavailable as error:
        raise Unavailable(
            f"{error.detail}: {words_of(error.__cause__)}", retry_after_s=error.retry_after_s
        ) from error


async def _require_refusal(store: ObjectStore, key: str) -> None:
    try:
        await store.put_new(key, b"the second put of this name")
    except ObjectExists:
        return
    raise ConfigurationError(
        "the object store overwrites objects although it is asked not to (If-None-Match: *), so no "
        "file in it would be safe. Use a store with conditional puts"
    )


def _trouble_of(error: BaseException | None) -> _Trouble:
    text = str(error)
    found = _STATUS.search(text)
    status = 0 if found is None else int(found[1])
    kind = _Trouble.FAILED
    if _NO_PLACE.search(text):
        kind = _Trouble.REFUSED
    elif isinstance(error, AlreadyExistsError | PreconditionError):
        kind = _Trouble.FAILED if _CONFLICT in text else _Trouble.EXISTS
    elif isinstance(error, FileNotFoundError):
        kind = _Trouble.MISSING
    elif status in (429, 503) or _THROTTLED.search(text):
        kind = _Trouble.THROTTLED
    elif status == 416 or _BEYOND_END in text:
        kind = _Trouble.BEYOND_END
    elif isinstance(error, PermissionDeniedError | UnauthenticatedError):
        kind = _Trouble.REFUSED
    elif 400 <= status < 500 and status not in (408, 409):
        kind = _Trouble.REFUSED  # the request itself is wrong: another region, another signature
    return kind


def words_of(error: BaseException | None) -> str:
    """What the library said, on one line, short, and without what signs a request."""

    text = str(error).partition(_PROGRAMMERS_PART)[0]
    text = _ANSWER.sub(r"\1, \2: \3", text)
    text = _SECRETS.sub(r"\1=…", " ".join(text.split()))
    return text if len(text) <= _TEXT_MAX else text[:_TEXT_MAX] + "…"
