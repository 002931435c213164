"""Histories made on purpose: valid ones by a model and a seed, broken ones by single mutations."""

from tests.history.forging import (
    catalog_mutations,
    entry_mutations,
    read_mutations,
    receipt_mutations,
    snapshot_mutations,
)
from tests.history.forging.forged import OPERATORS, Forged
from tests.history.forging.valid import valid_history

__all__ = [
    "OPERATORS",
    "Forged",
    "catalog_mutations",
    "entry_mutations",
    "read_mutations",
    "receipt_mutations",
    "snapshot_mutations",
    "valid_history",
]
