"""The conformance suite of a lakebus backend. See README.md in this folder."""

import pytest

# The suite's modules are imported by a backend's test module, not collected themselves, so pytest
# has to be told that their asserts deserve explanations too.
pytest.register_assert_rewrite(
    "tests.conformance.bus",
    "tests.conformance.catalog",
    "tests.conformance.contents",
    "tests.conformance.creating",
    "tests.conformance.delete_rig",
    "tests.conformance.deletes",
    "tests.conformance.door",
    "tests.conformance.failure",
    "tests.conformance.harness",
    "tests.conformance.jobs",
    "tests.conformance.keys",
    "tests.conformance.leases",
    "tests.conformance.machine",
    "tests.conformance.machine_rules",
    "tests.conformance.memory",
    "tests.conformance.model",
    "tests.conformance.partitions",
    "tests.conformance.postgres",
    "tests.conformance.publication",
    "tests.conformance.publication_time",
    "tests.conformance.querying",
    "tests.conformance.reader",
    "tests.conformance.reading",
    "tests.conformance.restart",
    "tests.conformance.restore",
    "tests.conformance.sql",
    "tests.conformance.upkeep",
    "tests.conformance.upkeep_files",
    "tests.conformance.worker",
    "tests.conformance.write_intents",
)
