"""The documentation says what the code does: routes, error codes, links, and examples' names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lakebus.errors import LakebusError, all_errors
from serve_app.app import API_ROUTES, QUERY_ROUTES
from serve_app.problems import STATUS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_DESCRIBING = {("GET", "/openapi.json"), ("GET", "/docs")}


def table_of(page: str, columns: int) -> list[list[str]]:
    """The cells of all table rows of a page that have so many columns."""
    rows = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == columns:
                rows.append(cells)
    return rows


def test_errors_page_is_the_table_of_the_code() -> None:
    written = {
        code.strip("`"): (int(status), retryable == "yes", title)
        for status, code, retryable, title, _ in table_of("errors.md", 5)
        if status.isdigit()
    }
    # Depth first: a class comes after the group whose code it shares, and stays.
    kinds: dict[str, type[LakebusError]] = {kind.code: kind for kind in all_errors()}
    built = {
        code: (status, kinds[code].retryable, kinds[code].title) for code, status in STATUS.items()
    }
    built["internal_error"] = (500, False, LakebusError.title)
    assert written == built


def test_errors_page_names_every_group() -> None:
    groups = {cells[0].strip("`") for cells in table_of("errors.md", 3)}
    assert {kind.__name__ for kind in LakebusError.__subclasses__()} <= groups


def test_api_page_lists_exactly_the_routes() -> None:
    written = {
        tuple(cells[0].strip("`").split(" ", 1))
        for cells in table_of("api.md", 3)
        if re.match(r"`[A-Z]+ /", cells[0])
    }
    routes = {(route.method, route.path) for route in (*API_ROUTES, *QUERY_ROUTES)}
    assert written == routes | _DESCRIBING


def test_api_page_names_the_scope_of_every_route() -> None:
    scopes = {cells[0].strip("`"): cells[1] for cells in table_of("api.md", 3)}
    for route in (*API_ROUTES, *QUERY_ROUTES):
        wanted = "no key" if route.open else route.scope or "-"
        assert wanted in scopes[f"{route.method} {route.path}"], route.path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
