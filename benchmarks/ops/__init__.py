"""Microbenchmarks of the ops: op × implementation × size, on inputs on which each implementation was found right.

`cases()` is the one table. `python -m benchmarks.ops` times it interleaved and appends rows to a
CSV; `groups.py` shows the same cases in pytest-benchmark's groups.
"""
