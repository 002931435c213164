"""The chaos run: a whole stack under a workload and a seeded schedule of faults, judged at the end.

`python -m tests.chaos --seed 7 --minutes 4` (see `--help`). The schedule is a pure function of the
seed; what the clients asked and were told is a record of `tests.history`, judged by its checker.
"""
