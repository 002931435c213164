"""Write the parts of the documentation that are made from code: `make docs`."""

from __future__ import annotations

from pathlib import Path

from cluster.formats_page import formats_page
from cluster.results_page import results_page
from lakebus.settings import settings_table_markdown

_SETTINGS_HEAD = """\
# Settings

<!-- Made from lakebus/settings_table.py by `make docs`; a test compares them. -->

A value comes from the first of these that gives one:

1. a flag of the command (`lakebus up --port 9000`);
2. the environment: `LAKEBUS_`, the section, the name, in capitals (`LAKEBUS_HTTP_PORT=9000`);
3. the settings file: `lakebus.toml` in the data folder, or the one named by `--config` or
   `LAKEBUS_CONFIG`; TOML, with a table for each section;
4. the profile (`local`, `test`, `production`), where its default differs;
5. the default.

`lakebus config show` lists every setting with its value and where the value came from; secrets are
shown as `<secret>`. An unknown name, in the file or in the environment, is an error. Names carry
their unit; bytes and milliseconds are whole numbers.

"""


def main() -> None:
    docs = Path(__file__).parents[1] / "docs"
    (docs / "settings.md").write_text(_SETTINGS_HEAD + settings_table_markdown())
    (docs / "formats.md").write_text(formats_page(), encoding="utf-8")
    (docs / "results.md").write_text(results_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
