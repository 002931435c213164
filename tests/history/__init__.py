"""The record of operations and the checker that judges it. Begin with `record.py`."""
