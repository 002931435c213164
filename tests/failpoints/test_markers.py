"""The markers of the product: names are unique, and each is armed by a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.failpoints import markers
from tests.failpoints.hook import PACKAGES
from tests.failpoints.markers import ROOT, all_markers, markers_of, require_known
from tests.failpoints.rewriting import BadMarker, compile_with_calls

#: Tests of the mechanism arm any marker at hand, which proves nothing about the product.
_MECHANISM = ROOT / "tests" / "failpoints"
#: Roles and functions whose tests are still to come. Only ever gets shorter.
NOT_YET: set[str] = set()


def armed_in(folder: Path) -> set[str]:
    """Names that tests below a folder arm: spelled out, or all of a role by `markers_of`."""
    found: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if path.is_relative_to(_MECHANISM):
            continue
        source = path.read_text()
        if "markers_of" not in source and not any(name in source for name in all_markers()):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "markers_of":
                (prefix,) = (ast.literal_eval(argument) for argument in node.args)
                found.update(markers_of(prefix))
    return found & set(all_markers())


def test_every_marker_is_armed_by_a_test() -> None:
    idle = set(all_markers()) - armed_in(ROOT / "tests")
    left = sorted(name for name in idle if name.partition(".")[0] not in NOT_YET)
    assert not left, f"no test arms these failpoints: {', '.join(left)}"
    done = sorted(NOT_YET - {name.partition(".")[0] for name in idle})
    assert not done, f"strike these off NOT_YET, all of theirs are armed: {', '.join(done)}"


def test_every_marker_in_python_can_be_a_call() -> None:
    for path in {marker.path for marker in all_markers().values() if not marker.in_sql}:
        assert path.split("/")[0] in PACKAGES
        compile_with_calls((ROOT / path).read_text(), path)


def test_the_scan_sees_every_marker_that_the_text_shows() -> None:
    shown = [
        text
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.*")
        if path.suffix in (".py", ".sql")
        for text in path.read_text().splitlines()
        if text.strip().startswith(("# failpoint", "-- failpoint"))
    ]
    assert len(shown) == len(all_markers())


def test_a_name_may_be_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "storage"
    package.mkdir()
    function = "def f():\n    # failpoint: sample.after_one\n    pass\n"
    (package / "one.py").write_text(function)
    monkeypatch.setattr(markers, "ROOT", tmp_path)
    assert list(all_markers.__wrapped__()) == ["sample.after_one"]
    (package / "two.py").write_text(function)
    with pytest.raises(BadMarker, match=r"one\.py:2 and storage/two\.py:2"):
        all_markers.__wrapped__()


def test_a_marker_in_sql_is_written_one_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "storage" / "sql"
    folder.mkdir(parents=True)
    monkeypatch.setattr(markers, "ROOT", tmp_path)
    for text in ("x := 1; -- failpoint: a.after_b", "-- failpoint a.after_b"):
        (folder / "one.sql").write_text(text)
        with pytest.raises(BadMarker, match="on its own line"):
            all_markers.__wrapped__()


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"holds no marker.*publish\.after_fence"):
        require_known("publish.after_everything")
    with pytest.raises(AssertionError, match="begins with nothing"):
        markers_of("nothing")
