"""The table of settings: sources, bounds, secrets, and that the documentation is the table."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from lakebus.errors import ConfigurationError
from lakebus.settings import Settings, rows, settings_table_markdown
from lakebus.settings_table import PROFILES

DSN = "postgresql://lakebus:hunter2@db.example/lakebus"
DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def load(
    environ: dict[str, str] | None = None, *, config: Path | None = None, **flags: object
) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return Settings.load(environ=environ or {}, flags=named, config=config)


def source_of(settings: Settings, name: str) -> str:
    return next(one.source for one in settings.describe() if one.name == name)


def test_defaults_hold_without_any_source() -> None:
    settings = load()
    assert settings.profile == "local"
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8350)
    assert settings.bus.shards == 4
    assert {one.source for one in settings.describe()} == {"default"}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_by_itself(profile: str) -> None:
    settings = load({"LAKEBUS_POSTGRES_DSN": DSN}, profile=profile)
    assert settings.profile == profile


def test_profile_replaces_defaults_and_is_named_as_source() -> None:
    settings = load(profile="test")
    assert settings.bus.lease_ttl_ms == 1000
    assert source_of(settings, "bus.lease_ttl_ms") == "profile test"
    assert source_of(settings, "profile") == "flag"


def test_flag_beats_environment_beats_file_beats_profile(tmp_path: Path) -> None:
    file = tmp_path / "lakebus.toml"
    file.write_text(
        'profile = "test"\n[bus]\nlease_ttl_ms = 2000\nshards = 2\nretry_backoff_ms = 7'
    )
    environ = {"LAKEBUS_BUS_LEASE_TTL_MS": "3000", "LAKEBUS_BUS_SHARDS": "3"}
    settings = load(environ, config=file, bus__lease_ttl_ms=4000)
    assert settings.bus.lease_ttl_ms == 4000
    assert settings.bus.shards == 3
    assert settings.bus.retry_backoff_ms == 7
    assert settings.bus.claim_poll_ms == 50
    found = {one.name: one.source for one in settings.describe()}
    assert found["bus.lease_ttl_ms"] == "flag"
    assert found["bus.shards"] == "environment"
    assert found["bus.retry_backoff_ms"] == f"file {file}"
    assert found["bus.claim_poll_ms"] == "profile test"
    assert found["bus.claim_bytes_max"] == "default"


def test_flags_that_were_not_given_count_as_absent() -> None:
    assert load({"LAKEBUS_HTTP_PORT": "9000"}, http__port=None).http.port == 9000


def test_file_in_the_data_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "lakebus.toml").write_text("[http]\nport = 9001")
    assert load(data_dir=str(tmp_path)).http.port == 9001
    assert load({"LAKEBUS_DATA_DIR": str(tmp_path)}).http.port == 9001


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"LAKEBUS_BUS_SHARD": "4"}, "Did you mean LAKEBUS_BUS_SHARDS?"),
        ({"LAKEBUS_XYZZY": "4"}, "no setting of lakebus"),
        ({"LAKEBUS_BUS_SHARDS": "0"}, "bus.shards (environment): Input should be greater"),
        ({"LAKEBUS_BUS_SHARDS": "many"}, "bus.shards (environment): Input should be a valid int"),
        ({"LAKEBUS_PROFILE": "prod"}, "choose one of local, test, production"),
        ({"LAKEBUS_CONFIG": "/nowhere/lakebus.toml"}, "no settings file /nowhere/lakebus.toml"),
        ({"LAKEBUS_PROFILE": "production"}, "postgres.dsn must be given"),
        ({"LAKEBUS_QUERY_TIMEOUT_MS_MAX": "10"}, "query.timeout_ms_default must not exceed"),
        ({"LAKEBUS_MAINTENANCE_SAFETY_WINDOW_S": "119"}, "must be at least query.pin_ttl_s (120)"),
        ({"LAKEBUS_MAINTENANCE_SNAPSHOT_KEEP_HOURS": "0.01"}, "(0.01, which is 36 s) must be at"),
        ({"LAKEBUS_BUS_INTENT_TTL_S": "5"}, "bus.intent_ttl_s (5) must be at least"),
    ],
)
def test_wrong_settings_say_what_to_change(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(environ)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[bus]\nshard = 3", "Did you mean bus.shards?"),
        ("[bus]\nshards = 0", "bus.shards (file"),
        ("data_dir = '/x'", "cannot stand in the settings file"),
        ("[bus\n", "cannot be read"),
    ],
)
def test_wrong_file_says_what_to_change(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        load(config=file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean http\.port"):
        load(http__prt=1)


def test_A13_window_below_24_hours_only_in_profile_test() -> None:
    with pytest.raises(ConfigurationError, match="at least 24"):
        load(bus__idempotency_window_hours=23.9)
    assert load(bus__idempotency_window_hours=0.01, profile="test").bus.idempotency_window_hours


def test_secrets_appear_nowhere() -> None:
    settings = load({"LAKEBUS_POSTGRES_DSN": DSN})
    shown = {one.name: one.value for one in settings.describe()}
    assert shown["postgres.dsn"] == "<secret>"
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(shown)):
        assert "hunter2" not in text
    with pytest.raises(ConfigurationError) as error:
        load({"LAKEBUS_POSTGRES_DSN": DSN, "LAKEBUS_BUS_SHARDS": "hunter2"})
    assert "hunter2" not in str(error.value)


def test_private_json_keeps_every_value() -> None:
    settings = load({"LAKEBUS_POSTGRES_DSN": DSN}, profile="test", http__port=1)
    written = json.dumps(settings.private_json())
    assert Settings.from_private_json(json.loads(written)) == settings
    assert "hunter2" in written
    with pytest.raises(ConfigurationError):
        Settings.from_private_json({"bus.shard": 1})


def test_settings_travel_between_processes() -> None:
    settings = load(profile="test")
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_every_row_has_help_and_a_unit_or_is_plain() -> None:
    for row in rows():
        assert row.help.endswith("."), row.name
        assert row.variable == row.variable.upper()
    assert len({row.variable for row in rows()}) == len(rows())


def test_document_is_the_table() -> None:
    assert settings_table_markdown() in DOCUMENT.read_text(), "run `make docs`"
