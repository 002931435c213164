"""Seeded simulation of a whole lake: real roles, one thread, virtual time, faults by a seed.

`python -m tests.simulation --seed 7 --count 100` runs a hundred schedules. The same seed gives the
same history, bit for bit. What is simulated and what is not: `world.py`.
"""
