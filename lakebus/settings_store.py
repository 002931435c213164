"""The settings of the object store: where data files are kept, and the copies of them in use."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from lakebus.settings_table import Section, setting

_MIB, _GIB = 1024**2, 1024**3


class StoreSettings(Section):
    """Data files and where they are kept. Credentials that are not given here come from the
    environment of the server, as the provider's own tools take them (`AWS_…`, `GOOGLE_…`,
    `AZURE_…`), or from the machine's identity."""

    url: str | None = setting(
        None,
        "Object store: file:///path, s3://bucket/prefix, gs://bucket/prefix or"
        " az://container/prefix; without one, `objects` in the data folder.",
    )
    endpoint: str | None = setting(
        None, "URL of a server that speaks the provider's protocol; without one, the provider's."
    )
    region: str | None = setting(None, "Region of an S3 bucket.")
    allow_http: bool = setting(
        False, "Let `store.endpoint` be http://, where rows and credentials travel in clear."
    )
    virtual_host_style: bool = setting(
        False, "The bucket is part of the host's name; `store.endpoint` then names it too."
    )
    account: str | None = setting(None, "Storage account of an Azure container.")
    access_key_id: SecretStr | None = setting(None, "Access key of S3.")
    secret_access_key: SecretStr | None = setting(
        None, "The secret of that key; for Azure, the key of the account."
    )
    session_token: SecretStr | None = setting(None, "Session token of a temporary S3 key.")
    credentials_file: Path | None = setting(
        None, "Key file of a Google service account, readable by the server."
    )
    request_timeout_s: float = setting(
        60.0,
        "Time of one request to a store by URL, with its body; some are repeated.",
        gt=0,
        le=600,
    )
    cache_dir: Path | None = setting(
        None, "Folder for copies of the files in use; without one, `cache` in the data folder."
    )
    cache_max_bytes: int = setting(
        8 * _GIB,
        "Disk for these copies in each query replica; also the most that one query may read.",
        ge=1 * _MIB,
        le=1024 * _GIB,
        test=1 * _GIB,
    )
    cache_fetches: int = setting(8, "Files that one replica copies at a time.", ge=1, le=64)
