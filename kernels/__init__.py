"""Triton kernels and their launchers, one file per op, same stem as in `mtu_fast._ops`; installed as `mtu_fast.kernels`.

A launcher has its op's name and arguments. It returns `NotImplemented` for what it does not serve, a dtype or a size,
and the reference does.
"""
