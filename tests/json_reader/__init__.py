"""Whether the compiled JSON reader reads what the exact pass reads: bodies made from a seed.

`python -m tests.json_reader` builds the reader with the sanitizers of addresses and of undefined
behaviour into a temporary folder, gives it groups of bodies (right ones, odd ones, and ones whose
bytes went wrong), and holds what it accepts against the exact pass: the same Arrow columns bit by
bit, and the same identity. It may refuse whatever it likes, but not everything.
"""
