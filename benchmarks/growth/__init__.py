"""What things cost as work grows: files, snapshots and tables in a catalog on a PostgreSQL of its
own, without Ray. `benchmarks.goals.growth` drives these programs and adds clients, with a stack.

Each is a program that speaks the protocol of `benchmarks.windows`: its order names an empty
database, and a window grows the lake to a size and measures it there. By hand, one axis at sizes of
one's choice: `python -m benchmarks.growth files 10 1000 100000`.
"""
