"""The conformance suite of a lakebus backend. See README.md in this folder."""

import pytest

# The suite's modules are imported by a backend's test module, not collected themselves, so pytest
# has to be told that their asserts deserve explanations too.
pytest.register_assert_rewrite(
    "tests.conformance.bus",
    "tests.conformance.catalog",
    "tests.conformance.door",
    "tests.conformance.failure",
    "tests.conformance.harness",
    "tests.conformance.machine",
    "tests.conformance.postgres",
    "tests.conformance.publication",
    "tests.conformance.worker",
)
