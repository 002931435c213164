"""The mutation run: does the suite notice when the product breaks a promise?

A mutant is a small, named way of breaking one statement of the contract, as data: an exact text of
a product file and its replacement, and the tests that must notice (`tests/mutation/mutants`).
`python -m tests.mutation` puts one mutant after the other into a copy of the tree, never into the
checkout, and runs its tests there. A mutant that all its tests let pass is a hole in the suite.
"""
