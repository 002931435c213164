"""The settings of one stack: read from their sources, checked, and told apart by source.

The table is `lakebus.settings_table`. A value comes from the first of these that gives one: a flag,
the environment (``LAKEBUS_<SECTION>_<NAME>``), the file (``lakebus.toml`` in the data folder, or
``--config``), the profile, the default. `Settings.describe()` says which it was. An unknown name
anywhere is an error, with the name that was probably meant: a typing mistake must never pass as
"the default it is". Secrets are `SecretStr`, so they appear in no repr, log or error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pydantic
from pydantic import SecretStr
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from lakebus.errors import ConfigurationError
from lakebus.settings_direct import DirectSettings
from lakebus.settings_limits import LimitsSettings
from lakebus.settings_store import StoreSettings
from lakebus.settings_table import (
    ENVIRONMENT_PREFIX,
    PROFILES,
    ActorsSettings,
    BusSettings,
    HttpSettings,
    LogSettings,
    MaintenanceSettings,
    PostgresSettings,
    Profile,
    PublishSettings,
    QuerySettings,
    RaySettings,
    Section,
    SettingRow,
    TelemetrySettings,
    defaults_words,
    describe_row,
    setting,
    words,
)
from lakebus.settings_windows import window_problems

FILE_NAME = "lakebus.toml"
NO_SETTINGS = frozenset({"CONFIG", "URL", "API_KEY", "TEST_POSTGRES_DSN", "STACK_ID"})
"""What may follow the prefix in the environment without being a setting: for the CLI, the client
and the tests."""


class Settings(BaseSettings):
    """All settings of one stack; frozen. Made by `Settings.load`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    profile: Profile = setting("local", "Set of defaults: local, test or production.")
    data_dir: Path = setting(
        Path(".lakebus"), "Folder of the stack: database, files, logs, secrets."
    )
    postgres: PostgresSettings = PostgresSettings()
    bus: BusSettings = BusSettings()
    publish: PublishSettings = PublishSettings()
    store: StoreSettings = StoreSettings()
    query: QuerySettings = QuerySettings()
    http: HttpSettings = HttpSettings()
    direct: DirectSettings = DirectSettings()
    limits: LimitsSettings = LimitsSettings()
    actors: ActorsSettings = ActorsSettings()
    maintenance: MaintenanceSettings = MaintenanceSettings()
    ray: RaySettings = RaySettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    _sources: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Equal values are equal settings, wherever each came from."""
        return isinstance(other, Settings) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `load` orders the sources and remembers where a value is from."""
        return (init_settings,)

    @classmethod
    def load(
        cls,
        *,
        environ: Mapping[str, str],
        flags: Mapping[str, Any] | None = None,
        config: Path | None = None,
    ) -> Self:
        """Settings from all sources.

        :param environ: usually `os.environ`.
        :param flags: dotted names (`http.port`); None as a value means not given.
        :param config: a TOML file; default `LAKEBUS_CONFIG`, or `lakebus.toml` in the data folder.

        Raises ConfigurationError naming the setting, where it was set, and what is allowed.
        """
        given = {name: value for name, value in (flags or {}).items() if value is not None}
        for name in given:
            _require_known(name, "the command line")
        environment = _from_environment(environ)
        path = _file_path(config, environ, given, environment)
        file = {} if path is None else _from_file(cls, path)
        chosen = [given, environment, file]
        profile = next((layer["profile"] for layer in chosen if "profile" in layer), "local")
        layers = [
            ("flag", given),
            ("environment", environment),
            (f"file {path}", file),
            (f"profile {profile}", _from_profile(profile)),
        ]
        merged: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for source, layer in reversed(layers):
            merged |= layer
            sources |= dict.fromkeys(layer, source)
        made = cls._validated(merged, sources)
        made._sources.update(sources)
        made._check_together()
        return made

    @classmethod
    def _validated(cls, values: Mapping[str, Any], sources: Mapping[str, str]) -> Self:
        try:
            return cls(**_nested(values))
        except pydantic.ValidationError as error:
            # Messages are made of names and bounds only: hide_input_in_errors keeps values out.
            said = [
                f"{name} ({sources.get(name, 'default')}): {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False)
                for name in [".".join(str(part) for part in problem["loc"][:2])]
            ]
            raise ConfigurationError("Wrong settings: " + "; ".join(said)) from None

    def _check_together(self) -> None:
        """Bounds that concern more than one setting."""
        problems = []
        if self.bus.idempotency_window_hours < 24 and self.profile != "test":
            problems.append("bus.idempotency_window_hours must be at least 24")
        if self.query.timeout_ms_default > self.query.timeout_ms_max:
            problems.append("query.timeout_ms_default must not exceed query.timeout_ms_max")
        if 0 < self.http.query_replicas_max < self.http.query_replicas_min:
            problems.append("http.query_replicas_min must not exceed http.query_replicas_max")
        if self.postgres.dsn is None and not self.postgres.embedded:
            problems.append("postgres.dsn must be given, because postgres.embedded is off")
        upkeep = self.maintenance
        if upkeep.small_file_bytes > upkeep.target_file_bytes:
            problems.append(
                "maintenance.small_file_bytes must not exceed maintenance.target_file_bytes"
            )
        if upkeep.compact_inputs_min > upkeep.small_files_max:
            problems.append(
                "maintenance.compact_inputs_min must not exceed maintenance.small_files_max"
            )
        problems += window_problems(bus=self.bus, query=self.query, maintenance=upkeep)
        if problems:
            raise ConfigurationError("Wrong settings: " + "; ".join(problems) + ".")

    @property
    def request_timeout_s(self) -> float:
        """Of whole HTTP requests: a little above our own budget, so that our own typed answer comes
        first."""
        return self.query.timeout_ms_max / 1000 + 5

    def describe(self) -> list[SettingValue]:
        """Every setting with its value in words (secrets as "<secret>") and where it is from."""
        return [
            SettingValue(
                name=row.name,
                value=words(row.read(self), secret=row.secret),
                source=self.source_of(row.name),
            )
            for row in rows()
        ]

    def source_of(self, name: str) -> str:
        """Where the value of one setting came from: `flag`, `environment`, …, `default`."""
        return self._sources.get(name, "default")

    def private_json(self) -> dict[str, Any]:
        """All values with the secrets in clear, for a 0600 file; `from_private_json` reads it."""
        values = {row.name: row.read(self) for row in rows()}
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else _plain(value)
            for name, value in values.items()
        }

    @classmethod
    def from_private_json(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `private_json` wrote."""
        for name in values:
            _require_known(name, "the stack's own settings file")
        made = cls._validated(values, dict.fromkeys(values, "stack"))
        made._sources.update(dict.fromkeys(values, "stack"))
        return made


@dataclass(frozen=True, slots=True)
class SettingValue:
    """One line of `lakebus config show`."""

    name: str
    value: str
    source: str


def rows() -> list[SettingRow]:
    """The table, in the order in which it is written above."""
    return list(_rows())


def _rows() -> Iterator[SettingRow]:
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for inner, inner_field in kind.model_fields.items():
                yield describe_row(f"{name}.{inner}", inner_field)
        else:
            yield describe_row(name, field)


def settings_table_markdown() -> str:
    """The table as the tables of `docs/settings.md`."""
    parts = []
    by_section: dict[str, list[SettingRow]] = {}
    for row in rows():
        by_section.setdefault(row.name.rpartition(".")[0], []).append(row)
    for section, members in by_section.items():
        kind = Settings.model_fields[section].annotation if section else None
        parts.append(f"## `{section}`" if section else "## Stack")
        if kind is not None:
            parts.append((kind.__doc__ or "").strip())
        lines = ["| setting | default | allowed | what it does |", "|---|---|---|---|"]
        lines += [
            f"| `{row.name}` | {defaults_words(row)} | {row.bounds or row.kind} | {row.help} |"
            for row in members
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


# --- sources -------------------------------------------------------------------------------


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {row.variable: row.name for row in rows()}
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable in names:
            found[names[variable]] = text
        elif variable.removeprefix(ENVIRONMENT_PREFIX) not in NO_SETTINGS:
            raise ConfigurationError(
                f"The environment variable {variable} is no setting of lakebus."
                + _did_you_mean(variable, list(names))
            )
    return found


def _file_path(
    config: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Path | None:
    named = config or environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigurationError(f"There is no settings file {named}.")
        return Path(named)
    folder = flags.get("data_dir") or environment.get("data_dir") or ".lakebus"
    beside = Path(folder) / FILE_NAME
    return beside if beside.is_file() else None


def _from_file(kind: type[Settings], path: Path) -> dict[str, Any]:
    try:
        read = TomlConfigSettingsSource(kind, toml_file=path)()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The settings file {path} cannot be read: {error}.") from None
    found: dict[str, Any] = {}
    for name, value in read.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            found[name] = value
    for name in found:
        _require_known(name, f"the settings file {path}")
    if "data_dir" in found:
        raise ConfigurationError(
            f"data_dir cannot stand in the settings file {path}, which may lie in that folder."
            " Use --data-dir or LAKEBUS_DATA_DIR."
        )
    return found


def _from_profile(profile: Any) -> dict[str, Any]:
    if profile not in PROFILES:
        raise ConfigurationError(
            f"There is no profile {profile!r}; choose one of {', '.join(PROFILES)}."
        )
    usual = {row.name: row.defaults["local"] for row in rows()}
    return {
        row.name: row.defaults[profile]
        for row in rows()
        if row.defaults[profile] != usual[row.name]
    }


def _require_known(name: str, place: str) -> None:
    names = [row.name for row in rows()]
    if name not in names:
        raise ConfigurationError(
            f"{name}, given in {place}, is no setting of lakebus." + _did_you_mean(name, names)
        )


def _did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else " `lakebus config show` lists all."


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, inner = name.rpartition(".")
        if section:
            nested.setdefault(section, {})[inner] = value
        else:
            nested[inner] = value
    return nested


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
