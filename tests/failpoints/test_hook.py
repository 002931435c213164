"""The import hook and the rewriting: markers become calls, and only where failpoints are on."""

from __future__ import annotations

import asyncio
import dis
import json
import os
import subprocess
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import pytest

from tests.failpoints import hook, rewriting
from tests.failpoints.actions import Raise
from tests.failpoints.folder import SITE
from tests.failpoints.markers import ROOT, all_markers
from tests.failpoints.points import Failpoints

MARKED = sorted({marker.path for marker in all_markers().values() if not marker.in_sql})

SAMPLE = """\
async def waits(seen):
    if seen:
        seen.append(1)
        # failpoint: sample.after_one
    async def inner():
        return [n async for n in numbers()]
        # failpoint: sample.after_never
    def plain():
        # failpoint: sample.before_raise
        raise KeyError('line 9')
    return inner, plain
"""


def calls_of(code: CodeType) -> list[tuple[int, str]]:
    """(line, name) of each call of a failpoint, in nested code too."""
    found, names = [], {rewriting.ASYNC_CALL, rewriting.SYNC_CALL}
    line = 0
    for step in dis.get_instructions(code):
        line = step.starts_line or line
        if step.argval in names:
            found.append((line, str(step.argval)))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += calls_of(constant)
    return sorted(found)


def test_a_marker_becomes_a_call_on_its_own_line() -> None:
    code = rewriting.compile_with_calls(SAMPLE, "sample.py")
    # What stands after a return is compiled to nothing, with or without a marker.
    assert calls_of(code) == [(4, rewriting.ASYNC_CALL), (9, rewriting.SYNC_CALL)]


def test_tracebacks_name_the_lines_of_the_source() -> None:
    space: dict[str, object] = {rewriting.SYNC_CALL: lambda name: None}

    async def reach(name: str) -> None: ...

    space[rewriting.ASYNC_CALL] = reach
    exec(rewriting.compile_with_calls(SAMPLE, "sample.py"), space)
    _, plain = asyncio.run(space["waits"]([1]))  # type: ignore[operator]
    with pytest.raises(KeyError) as caught:
        plain()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].lineno == 10


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("# failpoint: sample.after_one\n", "inside a function"),
        ("class A:\n    # failpoint: sample.after_one\n    x = 1\n", "inside a function"),
        ("def f():\n    x = 1  # failpoint: sample.after_one\n", "line of its own"),
        ("def f():\n    x = [\n        # failpoint: sample.after_one\n    ]\n", "statement"),
        ("def f():\n    x = [\n        # failpoint: sample.after_one\n    1]\n", "no statement"),
        ("def f():\n    # failpoint: sample\n    pass\n", "<before|after>"),
        ("def f():\n    # Failpoint: sample.after_one\n    pass\n", "write the marker"),
        ("def f():\n    # failpoint sample.after_one\n    pass\n", "write the marker"),
    ],
)
def test_a_marker_that_cannot_be_a_call_is_refused(source: str, words: str) -> None:
    with pytest.raises(rewriting.BadMarker, match=words):
        rewriting.compile_with_calls(source, "sample.py")


def test_words_in_a_string_are_no_marker() -> None:
    source = 'def f():\n    """\n    # failpoint: sample.after_one\n    """\n'
    assert rewriting.markers_in(source, filename="sample.py") == {}


def test_in_this_process_the_marked_modules_hold_calls() -> None:
    from storage.postgres import group_commit

    assert vars(group_commit)[rewriting.ASYNC_CALL] is not None
    assert calls_of(group_commit.GroupWriter._commit.__code__)


@pytest.mark.parametrize("path", MARKED)
def test_normally_imported_a_marked_module_is_the_code_without_markers(path: str) -> None:
    """Off, the markers are comments: same instructions, same constants, same line table."""
    source = (ROOT / path).read_text()
    markers = rewriting.markers_in(source, filename=path)
    lines = source.split("\n")
    for line in markers:
        lines[line - 1] = ""
    without = compile("\n".join(lines), str(ROOT / path), "exec", dont_inherit=True)
    loader = SourceFileLoader(path.removesuffix(".py").replace("/", "."), str(ROOT / path))
    normal = loader.get_code(loader.name)
    assert isinstance(normal, CodeType)
    assert normal == without
    assert _lines(normal) == _lines(without)


def _lines(code: CodeType) -> list[object]:
    nested = [_lines(c) for c in code.co_consts if isinstance(c, CodeType)]
    return [code.co_code, list(code.co_lines()), nested]


_LOOK = """
import importlib, json, sys
given = json.loads(sys.argv[1])
for name in given:
    module = importlib.import_module(name)
    calls = [n for n in vars(module) if "failpoint" in n]
    print(json.dumps([name, type(module.__loader__).__name__, calls]))
print(json.dumps(sorted(n for n in sys.modules if n.startswith("tests"))))
"""


def look(environment: dict[str, str]) -> list[list[object]]:
    names = [path.removesuffix(".py").replace("/", ".") for path in MARKED]
    child = subprocess.run(
        [sys.executable, "-c", _LOOK, json.dumps(names)],
        env=environment,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in child.stdout.splitlines()]


def plain_environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more


def test_an_ordinary_process_knows_nothing_of_failpoints() -> None:
    *modules, ours = look(plain_environment())
    assert ours == []
    for name, loader, calls in modules:
        assert (loader, calls) == ("SourceFileLoader", []), name


def test_pythonpath_alone_switches_a_process_on() -> None:
    *modules, ours = look(plain_environment(PYTHONPATH=str(SITE)))
    assert "tests.failpoints.points" in ours
    for name, loader, calls in modules:
        assert (loader, len(calls)) == ("_Loader", 2), name  # type: ignore[arg-type]


def test_a_process_without_the_product_pays_next_to_nothing() -> None:
    child = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sorted(sys.modules))"],
        env=plain_environment(PYTHONPATH=str(SITE)),
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = child.stdout.split()
    assert "tests.failpoints.hook" in loaded
    assert "asyncio" not in loaded
    assert "ast" not in loaded


def test_a_hidden_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.hidden_ran = __file__\n")
    child = subprocess.run(
        [sys.executable, "-c", "import sys, tests.failpoints; print(sys.hidden_ran)"],
        env=plain_environment(PYTHONPATH=f"{SITE}{os.pathsep}{tmp_path}"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert child.stdout.strip() == str(tmp_path / "sitecustomize.py")


def test_a_hook_that_comes_too_late_says_so() -> None:
    program = "import storage.postgres.group_commit\nimport tests.failpoints.installed"
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode != 0
    assert "come too late: storage.postgres" in child.stderr


def test_the_bytecode_cache_is_not_touched(tmp_path: Path) -> None:
    package = tmp_path / "storage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sample.py").write_text("def f():\n    # failpoint: sample.after_one\n    pass\n")
    for path, cached in (("", True), (str(SITE), False)):
        environment = plain_environment(PYTHONPATH=os.pathsep.join([path, str(tmp_path)]))
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run(
            [sys.executable, "-c", "import storage.sample"],
            env=environment,
            cwd=tmp_path,
            check=True,
        )
        caches = list((package / "__pycache__").glob("sample.*"))
        assert bool(caches) is cached
        for cache in caches:
            cache.unlink()


def test_installing_again_changes_nothing() -> None:
    before = list(sys.meta_path)
    hook.install()
    assert sys.meta_path == before


async def test_an_armed_failpoint_of_the_product_is_met(failpoints: Failpoints) -> None:
    from storage.postgres.purging import purge

    assert calls_of(purge.__code__)
    space = vars(sys.modules["storage.postgres.purging"])
    failpoints.arm("purging.after_trim", Raise(KeyError("here")))
    with pytest.raises(KeyError, match="here"):
        await space[rewriting.ASYNC_CALL]("purging.after_trim")
