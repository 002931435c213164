"""What the system must show: exactly-once, read after write, crashes, time travel.

Each scenario drives a running stack over HTTP, as a user would, and returns a report; `verdict` is
"held" or a list of what did not hold. `python -m benchmarks.show` runs them.
"""
