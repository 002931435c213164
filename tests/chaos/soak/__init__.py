"""The soak: a chaos run with all of maintenance at work, and clients that would notice.

`python -m tests.chaos --maintenance`. One more client process (`process.py`) writes tables of its
own, records questions and asks them again at old snapshots, deletes, follows the change feed and
reads slowly; the run samples files and jobs, and judges at the end (`judging.py`).
"""
