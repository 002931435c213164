"""API keys over HTTP, for stacks whose database is not at hand (see `cluster.keys_command`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import click

from cluster.api_calls import Api
from cluster.client_commands import api_options, json_option, say_json, say_table

_PATH = "/v1/admin/keys"


def keys_of(api: Api) -> list[dict[str, Any]]:
    return list(api.get(_PATH)["keys"])


def say_keys(keys: Sequence[Mapping[str, Any]]) -> None:
    names = ("key_id", "principal", "created_at", "last_used_at", "expires_at", "revoked_at")
    titles = ("key", "principal", "created", "last used", "expires", "revoked")
    say_table(
        (*titles, "scopes", "quotas", "label"),
        [
            [*(key[name] for name in names), _scopes(key["scopes"]), _quotas(key), key["label"]]
            for key in keys
        ],
    )


def _quotas(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.12g}" for name, value in key["quotas"].items())


def _scopes(scopes: Sequence[Mapping[str, Any]]) -> str:
    def words(scope: Mapping[str, Any]) -> str:
        tables = list(scope["tables"])
        return str(scope["scope"]) + ("" if tables == ["*"] else f"({', '.join(tables)})")

    return ", ".join(words(scope) for scope in scopes)


@click.command("revoke")
@api_options()
@click.argument("key_id")
@json_option
def keys_revoke(api: Api, key_id: str, as_json: bool) -> int:
    """Revoke the key KEY_ID, now and for ever. Exit code 4: there is none."""
    found = api.send("DELETE", f"{_PATH}/{quote(key_id, safe='')}")
    if as_json:
        say_json(found)
    else:
        click.echo(f"the key {found['key_id']} is revoked")
    return 0
