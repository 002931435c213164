"""Builds of the compiled reader from the source as it is, in folders that are given.

What an installation built may be older than the source, and some have none.
"""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from storage.rows import compiled_json

SOURCE = Path(compiled_json.__file__).with_name("json_columns.c")
#: What an installation calls it.
INSTALLED_NAME = f"json_columns{importlib.machinery.EXTENSION_SUFFIXES[0]}"
#: A fault ends the process: what happens behind one says nothing.
SANITIZED = (
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
#: The C++ library comes along, because Arrow's exceptions are thrown through the sanitizer's hooks.
_PRELOADED = ("libasan.so", "libstdc++.so.6")


def compiler() -> str | None:
    return shutil.which("cc")


def build(source: Path, target: Path, options: Sequence[str] = ()) -> Path:
    """Raises FileNotFoundError without a compiler, CalledProcessError when it fails."""

    command = [compiler() or "cc", "-std=c11", "-O1", "-shared", "-fPIC", *options]
    subprocess.run([*command, "-o", str(target), str(source)], check=True, capture_output=True)
    return target


def sanitizer_environment(folder: Path) -> dict[str, str] | None:
    """What a Python needs in its environment to load a sanitized build; None where the compiler
    has no sanitizers. `folder` is for a trial."""

    trial = folder / "trial.c"
    trial.write_text("int trial(void) { return 0; }\n")
    try:
        build(trial, folder / "trial.so", SANITIZED)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    libraries = [_library(name) for name in _PRELOADED]
    if None in libraries:
        return None
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(filter(None, libraries)),
        # Each object in a block of its own, so that what is read beyond a body is seen.
        "PYTHONMALLOC": "malloc",
        # Python keeps until its end what a search for leaks would report.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:exitcode=86",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=86",
    }


def _library(name: str) -> str | None:
    command = [compiler() or "cc", f"-print-file-name={name}"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else None
