"""The commands that start, stop and look after a stack: `lakebus up`, `down`, `status`, `logs`,
`doctor`, `migrate`, `config`, `keys`, `history`, `demo`, `repair`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cluster import doctor as doctor_module
from cluster import history_command
from cluster import logs as logs_module
from cluster import status as status_module
from cluster.client_commands import connected, json_option, say_json
from cluster.down import take_down
from cluster.keys_client import keys_of, keys_revoke, say_keys
from cluster.keys_command import create_key, key_lines, list_keys, quotas_of
from cluster.repair_command import repair
from lakebus.client import TIMEOUT_S
from lakebus.settings import Settings
from lakebus.settings_table import PROFILES
from storage.ingesting.grants import SCOPES, Grant


def stack_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which stack and which settings are meant."""
    for option in (
        click.option("--config", type=click.Path(path_type=Path), help="Settings file (TOML)."),
        click.option("--profile", type=click.Choice(PROFILES), help="Set of defaults."),
        click.option(
            "--data-dir", type=click.Path(path_type=Path), help="Folder of the stack [.lakebus]."
        ),
    ):
        command = option(command)
    return command


def load(data_dir: Path | None, profile: str | None, config: Path | None, **flags: Any) -> Settings:
    return Settings.load(
        environ=os.environ,
        config=config,
        flags={"data_dir": data_dir, "profile": profile, **flags},
    )


@click.command()
@stack_options
@click.option("--port", type=click.IntRange(0, 65535), help="HTTP port; 0 takes a free one.")
@click.option("--detach", is_flag=True, help="Leave it running in the background.")
@click.option("--migrate", is_flag=True, help="Bring an external database to this version first.")
def up(
    data_dir: Path | None,
    profile: str | None,
    config: Path | None,
    port: int | None,
    detach: bool,
    migrate: bool,
) -> int:
    """Start a stack; its data stays when it stops."""
    from cluster import up as up_module  # SQLAlchemy and more: `status` need not wait for it

    settings = load(data_dir, profile, config, **{"http.port": port})
    if not detach:
        return up_module.foreground(settings, migrate_external=migrate)
    given = {"--data-dir": data_dir, "--profile": profile, "--config": config, "--port": port}
    arguments = [
        part for name, value in given.items() if value is not None for part in (name, str(value))
    ]
    return up_module.detached(settings, arguments + (["--migrate"] if migrate else []))


@click.command()
@stack_options
def down(data_dir: Path | None, profile: str | None, config: Path | None) -> int:
    """Stop the stack, and clear away what a killed one left."""
    click.echo(asyncio.run(take_down(load(data_dir, profile, config))))
    return 0


@click.command()
@stack_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(data_dir: Path | None, profile: str | None, config: Path | None, as_json: bool) -> int:
    """Say what runs and what is wrong. Exit code 0: well, 1: badly, 3: not running."""
    found = asyncio.run(status_module.status(load(data_dir, profile, config)))
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.lines()))
    return found.exit_code


@click.command()
@stack_options
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added.")
@click.option("-n", "--lines", type=click.IntRange(0), default=50, show_default=True)
@click.argument("component", required=False, type=click.Choice(logs_module.COMPONENTS))
def logs(
    data_dir: Path | None,
    profile: str | None,
    config: Path | None,
    follow: bool,
    lines: int,
    component: str | None,
) -> int:
    """Show the logs of the stack, or of one component."""
    from cluster.stack_files import StackFiles

    files = StackFiles(load(data_dir, profile, config).data_dir)
    paths = logs_module.log_files(files, component)
    if not paths:
        click.echo(f"No logs in {files.root} yet.", err=True)
        return 1
    offsets = logs_module.show(paths, lines=lines, write=click.echo)
    if follow:
        try:
            logs_module.follow(offsets, write=click.echo, ended=lambda: False)
        except KeyboardInterrupt:
            return 0
    return 0


@click.command()
@stack_options
def doctor(data_dir: Path | None, profile: str | None, config: Path | None) -> int:
    """Look whether this machine is fit, with hints. Exit code 1 if a stack could not start."""
    findings = doctor_module.examine(load(data_dir, profile, config))
    for finding in findings:
        click.echo(finding.line())
    return 1 if any(finding.result == doctor_module.FAILURE for finding in findings) else 0


@click.command()
@stack_options
def migrate(data_dir: Path | None, profile: str | None, config: Path | None) -> int:
    """Bring the database to the schema of this version."""
    from cluster.migrations_command import migrate_now

    click.echo(asyncio.run(migrate_now(load(data_dir, profile, config))))
    return 0


@click.group()
def config() -> None:
    """Settings."""


@config.command("show")
@stack_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def config_show(
    data_dir: Path | None, profile: str | None, config: Path | None, as_json: bool
) -> int:
    """List every setting, its value, and where the value came from."""
    values = load(data_dir, profile, config).describe()
    if as_json:
        rows = [{"name": one.name, "value": one.value, "source": one.source} for one in values]
        click.echo(json.dumps(rows, indent=1))
        return 0
    width = max(len(one.name) for one in values)
    for one in values:
        click.echo(f"{one.name:{width}}  {one.value:28}  {one.source}")
    return 0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of the demo [.lakebus-demo]."
)
@click.option("--keep", is_flag=True, help="Leave the folder, with the data, when it ends.")
@click.option(
    "--flights", type=click.IntRange(1000), help="Send only so many of the 336,776 flights."
)
def demo(as_json: bool, data_dir: Path | None, keep: bool, flights: int | None) -> int:
    """Start everything, stream real flights in, ask questions, break something, stop."""
    # By name, because it brings DuckDB and Arrow, which no other command waits for.
    module = importlib.import_module("cluster.demo")
    code: int = module.main(as_json=as_json, data_dir=data_dir, keep=keep, flights=flights)
    return code


@click.group()
def keys() -> None:
    """API keys, made where the database is."""


@keys.command("create")
@stack_options
@click.option("--principal", required=True, help="Whose key it is; made when new.")
@click.option(
    "--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="Repeat it."
)
@click.option("--tables", multiple=True, help="Table patterns, like sales.*; all by default.")
@click.option("--requests-per-s", type=float, help="Quota of its own; 0: none.")
@click.option("--ingest-bytes-per-s", type=int, help="Quota of its own; 0: none.")
@click.option("--queries-at-once", type=int, help="In one replica; 0: no bound of its own.")
def keys_create(
    data_dir: Path | None,
    profile: str | None,
    config: Path | None,
    principal: str,
    scopes: tuple[str, ...],
    tables: tuple[str, ...],
    **quotas: float | None,
) -> int:
    """Make an API key and print it, once."""
    settings = load(data_dir, profile, config)
    grants = [Grant(scope, tables or ("*",)) for scope in scopes]
    made = create_key(settings, principal=principal, grants=grants, quotas=quotas_of(**quotas))
    click.echo(asyncio.run(made))
    return 0


@keys.command("list")
@stack_options
@json_option
def keys_list(
    data_dir: Path | None, profile: str | None, config: Path | None, as_json: bool
) -> int:
    """Show every key, without its secret: from the database that postgres.dsn names, else over
    HTTP (LAKEBUS_URL and LAKEBUS_API_KEY, or the stack of --data-dir)."""
    settings = load(data_dir, profile, config)
    if settings.postgres.dsn is not None and not as_json:
        click.echo("\n".join(key_lines(asyncio.run(list_keys(settings)))))
        return 0
    url, api_key = os.environ.get("LAKEBUS_URL"), os.environ.get("LAKEBUS_API_KEY")
    with connected(url, api_key, Path(settings.data_dir), TIMEOUT_S) as api:
        found = keys_of(api)
    if as_json:
        say_json({"keys": found})
    else:
        say_keys(found)
    return 0


@click.group()
def history() -> None:
    """Whether the database went back in time, and accepting what was lost."""


@history.command("show")
@stack_options
def history_show(data_dir: Path | None, profile: str | None, config: Path | None) -> int:
    """Compare the database with what the object store remembers. Exit code 1: it is older."""
    found = asyncio.run(history_command.show(load(data_dir, profile, config)))
    click.echo("\n".join(history_command.lines(found)))
    return 1 if found.verdict == "behind" else 0


@history.command("accept-loss")
@stack_options
@click.option("--yes", is_flag=True, help="Do not ask.")
def history_accept_loss(
    data_dir: Path | None, profile: str | None, config: Path | None, yes: bool
) -> int:
    """Show what a rewound database has lost, ask, and go on without it.

    There is no way back: what was lost stays lost, even if its database is found later.
    """

    def agreed(_: object) -> bool:
        return yes or click.confirm("Go on without it, for ever?", default=False)

    settings = load(data_dir, profile, config)
    asyncio.run(history_command.accept(settings, agreed=agreed, say=click.echo))
    return 0


keys.add_command(keys_revoke)
stack_options(repair)
