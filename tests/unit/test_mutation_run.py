"""The run itself, on a few mutants that are quick: what is killed, survives, or says nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.mutation.mutant import Edit, Mutant, mutant, unit
from tests.mutation.mutants import ALL
from tests.mutation.report import document, markdown
from tests.mutation.run import run
from tests.mutation.verdicts import End
from tests.mutation.workspace import Workspace
from tests.unit import compiled_rig

_TOKENS = "lakebus/tokens.py"
_KILLERS = unit("test_token_laws.py", "test_D5_what_is_no_token_is_refused")


def _mutant(name: str, find: str, put: str) -> Mutant:
    return mutant(name, "D5", "a probe", Edit(_TOKENS, find, put), killers=_KILLERS)


def test_a_quick_mutant_is_killed_and_others_are_told_apart() -> None:
    """A real mutant, and one of each kind that is not killed."""

    real = [one for one in ALL if one.name == "token_signature_unchecked"]
    probes = [
        _mutant("survivor", "OWN_ENTRIES_MAX = 64", "OWN_ENTRIES_MAX = 63"),
        _mutant("no_name", "refusal = MalformedToken(", "refusal = no_such_name("),
        _mutant("stale", "this text is nowhere", ""),
        mutant(
            "no_c",
            "D5",
            "a probe",
            Edit(
                "storage/rows/json_columns.c", "int64_t json_columns_layout(void)", "no such type"
            ),
            killers=_KILLERS,
        ),
    ]
    assert len(real) == 1
    said: list[str] = []
    report = run([*real, *probes], say=said.append)
    assert report.green == ""
    ends = {judged.mutant.name: judged.verdict.end for judged in report.judged}
    assert ends == {
        "token_signature_unchecked": End.KILLED,
        "survivor": End.SURVIVED,
        "no_name": End.INVALID,
        "stale": End.STALE,
        "no_c": End.INVALID,
    }
    assert not report.good
    assert len(said) == 1 + len(report.judged)
    text = markdown(report)
    assert "1 killed, 1 SURVIVED, 2 INVALID, 1 STALE" in text
    for judged in report.judged:
        assert f"`{judged.mutant.name}`" in text
    assert json.dumps(document(report))


def test_a_mutant_of_the_c_is_in_the_library_that_the_product_loads(tmp_path: Path) -> None:
    compiled_rig.needs_compiler()
    probe = mutant(
        "layout",
        "A10",
        "a probe",
        Edit("storage/rows/json_columns.c", "#define LAYOUT 1", "#define LAYOUT 2"),
        killers=_KILLERS,
    )
    asked = ["-c", "from storage.rows.compiled_json import READER; print(READER is not None)"]

    def is_loaded() -> str:
        return workspace.run(asked, environ={}, within_s=60).output.strip()

    workspace = Workspace(tmp_path)
    assert is_loaded() == "True"
    with workspace.mutated(probe):
        assert is_loaded() == "False"
    assert is_loaded() == "True"


def test_tests_that_fail_without_a_mutant_end_the_run() -> None:
    nothing = mutant(
        "nothing",
        "D5",
        "a probe",
        Edit(_TOKENS, "OWN_ENTRIES_MAX = 64", "OWN_ENTRIES_MAX = 63"),
        killers=unit("test_token_laws.py", "test_that_is_not_there"),
    )
    report = run([nothing], say=lambda _: None)
    assert report.green
    assert report.judged == ()
    assert not report.good
