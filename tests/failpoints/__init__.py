"""Failpoints: places in the product where a test can make something go wrong, and only a test.

The product holds comments (`# failpoint: coordinator.after_claim`, in SQL `-- failpoint: …`), which
are compiled to nothing. `hook` turns them into calls at import, in a process that asked for it;
`sql` does the same to the functions of one test database. See README.md in this folder.
"""
