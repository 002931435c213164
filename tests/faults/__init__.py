"""Faults made on purpose, at exact places: on the wire, in the store, in clocks, on disks."""
