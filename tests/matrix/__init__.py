"""The failure matrix: one fault at one step, and what must hold (docs/failure-matrix.md).

A test carries its row: `test_M16_…`. `rig` holds the lake that the rows of the database functions
run on, `auditor` what must hold after every one of them.
"""
