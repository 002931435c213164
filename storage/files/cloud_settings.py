"""Where objects lie in the cloud, and how a client for that place is made.

Secrets are handed to the client and to nothing else: they are in no repr and no environment of a
process that we start. What is not given here the client takes from the environment, as the
provider's own tools do (`AWS_…`, `GOOGLE_…`, `AZURE_…`, or the identity of the machine).
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from lakebus.errors import ConfigurationError

Provider = Literal["s3", "gs", "az"]
Client = S3Store | GCSStore | AzureStore
PROVIDERS: Final[dict[str, Provider]] = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az"}
#: A key of ours has 900 bytes at most, and all three services take 1024.
_PREFIX_BYTES_MAX: Final = 120
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PREFIX_SEGMENT = re.compile(r"[A-Za-z0-9_=+,@$-][A-Za-z0-9._=+,@$-]*")


@dataclass(frozen=True, slots=True)
class Place:
    """A prefix of a bucket (on Azure: of a container)."""

    provider: Provider
    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Place:
        """Of `s3://bucket/prefix`, `gs://…` or `az://…`. Raises ConfigurationError."""

        parts = urlsplit(url)
        provider = PROVIDERS.get(parts.scheme)
        if provider is None:
            raise ConfigurationError(
                f"store.url begins with {parts.scheme or url[:20]!r}; it is file:///path,"
                " s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigurationError(
                "store.url names a bucket and a prefix and nothing else; credentials and options "
                "have settings of their own"
            )
        prefix = parts.path.strip("/")
        segments = prefix.split("/") if prefix else []
        if not _BUCKET.fullmatch(parts.netloc) or not all(map(_PREFIX_SEGMENT.fullmatch, segments)):
            raise ConfigurationError(
                f"store.url {url[:80]!r} has no usable bucket or prefix: letters, digits and -._, "
                "with single slashes between"
            )
        if len(prefix) > _PREFIX_BYTES_MAX:
            raise ConfigurationError(f"the prefix in store.url is over {_PREFIX_BYTES_MAX} bytes")
        return cls(provider, parts.netloc, prefix)

    def __str__(self) -> str:
        return f"{self.provider}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


@dataclass(frozen=True, slots=True)
class CloudSettings:
    """`attempts`: of one call, the first included. `request_timeout_s`: of one attempt, the whole
    body included. `account`: of Azure, whose key is `secret_access_key`. `credentials_file`: the
    key file of a Google service account."""

    endpoint: str | None = None
    region: str | None = None
    allow_http: bool = False
    virtual_host_style: bool = False
    account: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    credentials_file: Path | None = None
    request_timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    attempts: int = 4

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.request_timeout_s <= 0 or self.connect_timeout_s <= 0:
            raise ConfigurationError("attempts and timeouts of the object store are above 0")
        if self.endpoint is not None:
            scheme = urlsplit(self.endpoint).scheme
            if scheme not in ("http", "https"):
                raise ConfigurationError("store.endpoint is a URL: https://host or http://host")
            if scheme == "http" and not self.allow_http:
                raise ConfigurationError(
                    "store.endpoint begins with http://, so credentials and rows would cross the "
                    "network in clear; set store.allow_http if that network is yours alone"
                )
        if self.session_token is not None and self.access_key_id is None:
            raise ConfigurationError("store.session_token belongs to store.access_key_id")


def open_client(place: Place, settings: CloudSettings) -> Client:
    """Raises ConfigurationError."""

    options: Any = {
        "prefix": place.prefix or None,
        "client_options": {
            "allow_http": settings.allow_http,
            "connect_timeout": dt.timedelta(seconds=settings.connect_timeout_s),
            "timeout": dt.timedelta(seconds=settings.request_timeout_s),
        },
        # `storage.files.cloud` repeats what may be repeated.
        "retry_config": {"max_retries": 0},
    }
    makers = {"s3": _s3, "gs": _google, "az": _azure}
    try:
        return makers[place.provider](place, settings, options)
    except (BaseError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(f"no client for {place} can be made: {first[:300]}") from error


def _s3(place: Place, settings: CloudSettings, options: Any) -> Client:
    if (settings.access_key_id is None) != (settings.secret_access_key is None):
        raise ConfigurationError(
            "store.access_key_id and store.secret_access_key are given together, or neither"
        )
    given = {
        "endpoint": settings.endpoint,
        "region": settings.region,
        "access_key_id": settings.access_key_id,
        "secret_access_key": settings.secret_access_key,
        "session_token": settings.session_token,
    }
    config: Any = {name: value for name, value in given.items() if value is not None}
    config |= {
        "virtual_hosted_style_request": settings.virtual_host_style,
        "conditional_put": "etag",
        # One object a call: not every server that speaks S3 deletes in bulk.
        "disable_bulk_delete": True,
    }
    return S3Store(place.bucket, config=config, **options)


def _google(place: Place, settings: CloudSettings, options: Any) -> Client:
    _refuse_foreign(settings, "gs", ("access_key_id", "secret_access_key", "account"))
    config: Any = {}
    if settings.endpoint is not None:
        config["base_url"] = settings.endpoint
    if settings.credentials_file is not None:
        config["service_account"] = str(settings.credentials_file)
    return GCSStore(place.bucket, config=config, **options)


def _azure(place: Place, settings: CloudSettings, options: Any) -> Client:
    _refuse_foreign(settings, "az", ("access_key_id", "session_token", "credentials_file"))
    given = {
        "account_name": settings.account,
        "account_key": settings.secret_access_key,
        "endpoint": settings.endpoint,
    }
    config: Any = {name: value for name, value in given.items() if value is not None}
    return AzureStore(place.bucket, config=config, **options)


def _refuse_foreign(settings: CloudSettings, scheme: str, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(settings, name) is not None:
            raise ConfigurationError(f"store.{name} has no meaning for {scheme}:// stores")
