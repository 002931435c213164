"""How tests are spread over processes."""

from __future__ import annotations

from pathlib import Path

from tests.side_by_side import RAY, unit_of

TESTS = Path(__file__).parents[1]


def test_all_that_starts_ray_is_one_unit() -> None:
    marked = {
        path.relative_to(TESTS.parent).as_posix()
        for path in TESTS.rglob("test_*.py")
        if "pytest.mark.ray" in path.read_text() and path != Path(__file__)
    }
    assert len(marked) > 3
    assert {unit_of(f"{file}::test_some[x-1]") for file in marked} == {"ray"}
    assert all(any(file.startswith(place) for file in marked) for place in RAY)


def test_other_files_are_units_and_the_suite_of_a_backend_is_cut() -> None:
    assert unit_of("tests/unit/test_house.py::test_names[a::b]") == "tests/unit/test_house.py"
    conformance = "tests/test_conformance_postgres.py::test_A1_a_thing"
    assert unit_of(f"{conformance}[1-a::b]") == unit_of(f"{conformance}[2]") == conformance
