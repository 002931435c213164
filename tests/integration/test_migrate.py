"""Migrations, table definitions and functions are one database; anything else is refused."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine

from cluster import migrate, schema_state
from lakebus.errors import StartRefused, Unavailable
from storage.names import SCHEMA
from storage.sql import fingerprint
from storage.tables import metadata


async def run(dsn: str, sql: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def test_upgrade_makes_everything_and_repeating_changes_nothing(database_dsn: str) -> None:
    assert (await schema_state.current(database_dsn)).empty
    made = await migrate.upgrade(database_dsn)
    assert made == schema_state.SchemaState(schema_state.newest_revision(), fingerprint())
    assert await migrate.upgrade(database_dsn) == made
    await schema_state.require_known_schema(database_dsn)


async def test_migrations_and_table_definitions_are_the_same_database(database_dsn: str) -> None:
    await migrate.upgrade(database_dsn)

    def differences(connection: sa.Connection) -> list[object]:
        options = {
            "include_schemas": True,
            "compare_server_default": True,
            "version_table": "schema_version",
            "version_table_schema": SCHEMA,
            "include_name": lambda name, kind, _: kind != "schema" or name == SCHEMA,
        }
        return list(
            compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
        )

    # The role's name is the schema's name, which would make the schema the unnamed default one.
    engine = create_async_engine(
        database_dsn.replace("postgresql", "postgresql+asyncpg", 1),
        connect_args={"server_settings": {"search_path": "public"}},
    )
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_P26_analyzing_passes_over_what_no_plan_is_made_by(database_dsn: str) -> None:
    """The arrays of a long log took a third of a second each time, beside the appends."""

    await migrate.upgrade(database_dsn)
    connection = await asyncpg.connect(database_dsn, server_settings={"search_path": SCHEMA})
    try:
        await connection.execute(
            "INSERT INTO bus_log SELECT 0, g, g + 1, g, 0, 0, NULL, 1, now(), now(), '{1}',"
            " ARRAY[sha256(g::text::bytea)], ARRAY[g], '{1}', '{t}', '{100}', '{0}', '{1}'"
            " FROM generate_series(1, 500) g"
        )
        for ring in range(3):
            await connection.execute(
                f"INSERT INTO idem_{ring} SELECT sha256(g::text::bytea), '', g, 1, '1:1'"
                f" FROM generate_series(1, 500) g; ANALYZE idem_{ring}"
            )
        await connection.execute("ANALYZE bus_log")
        rows = await connection.fetch(
            "SELECT tablename, attname FROM pg_stats"
            " WHERE tablename = 'bus_log' OR tablename LIKE 'idem%'"
        )
        known = await connection.fetchval(
            "SELECT sum(reltuples) FROM pg_class WHERE relname = 'bus_log' OR relname ~ '^idem_.$'"
        )
    finally:
        await connection.close()
    assert {tuple(row) for row in rows} == {
        ("bus_log", name)
        for name in (
            "shard", "lo", "hi", "segment_id", "segment_ring", "key_ring", "payload_key",
            "history_serial", "accepted_at", "expires_at",
        )
    }  # fmt: skip
    assert known == 4 * 500


async def test_concurrent_upgrades_do_not_disturb_each_other(database_dsn: str) -> None:
    states = await asyncio.gather(*(migrate.upgrade(database_dsn) for _ in range(4)))
    assert len(set(states)) == 1


async def test_empty_database_is_refused_with_the_command(database_dsn: str) -> None:
    with pytest.raises(StartRefused, match="lakebus migrate"):
        await schema_state.require_known_schema(database_dsn)


async def test_schema_of_a_newer_version_is_refused(database_dsn: str) -> None:
    await migrate.upgrade(database_dsn)
    await run(database_dsn, f"UPDATE {SCHEMA}.schema_version SET version_num = '9999'")
    with pytest.raises(StartRefused, match="a newer version made it"):
        await schema_state.require_known_schema(database_dsn)
    with pytest.raises(StartRefused, match="a newer version made it"):
        await migrate.upgrade(database_dsn)


async def test_other_functions_are_refused_and_installed_by_an_upgrade(database_dsn: str) -> None:
    await migrate.upgrade(database_dsn)
    await run(database_dsn, f"COMMENT ON SCHEMA {SCHEMA} IS 'lakebus functions 0123456789abcdef'")
    with pytest.raises(StartRefused, match="lakebus migrate"):
        await schema_state.require_known_schema(database_dsn)
    await migrate.upgrade(database_dsn)
    await schema_state.require_known_schema(database_dsn)


async def test_failed_upgrade_leaves_the_database_as_it_was(
    database_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "install_statements", lambda: ("SELECT 1 FROM nowhere",))
    with pytest.raises(asyncpg.UndefinedTableError):
        await migrate.upgrade(database_dsn)
    assert (await schema_state.current(database_dsn)).empty
    connection = await asyncpg.connect(database_dsn)
    assert await connection.fetchval("SELECT to_regnamespace($1)", SCHEMA) is None
    await connection.close()


async def test_unreachable_database_says_so() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await schema_state.current("postgresql://lakebus@127.0.0.1:1/lakebus")
