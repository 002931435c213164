"""`python -m tests.mutation [NAME…]`: judge all mutants, or those of these names.

`--write FOLDER` keeps the report there as mutation.md and mutation.json. Exit code 1: a mutant
survived, is invalid, hangs, or its patch does not apply any more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.mutation.mutants import ALL
from tests.mutation.report import document, markdown
from tests.mutation.run import run, say_aloud


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants (a part of their name)")
    parser.add_argument("--list", action="store_true", help="list the mutants and end")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where the report is kept")
    arguments = parser.parse_args()
    names = arguments.names
    chosen = [m for m in ALL if not names or any(name in m.name for name in names)]
    if not chosen:
        parser.error(f"no mutant is called {' or '.join(names)}; --list shows them")
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name} ({' '.join(mutant.statements)}): {mutant.breaks}")
        return 0
    report = run(chosen, say=say_aloud)
    text = markdown(report)
    print(text)
    if arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / "mutation.md").write_text(text, encoding="utf-8")
        (arguments.write / "mutation.json").write_text(
            json.dumps(document(report), indent=1) + "\n", encoding="utf-8"
        )
    return 0 if report.good else 1


if __name__ == "__main__":
    raise SystemExit(main())
