"""Triton kernels and their launchers, `mtu_fast.kernels`: one file per op, named as in `mtu_fast._ops`.

A launcher has its op's name and arguments. It returns `NotImplemented` for what it does not serve,
a dtype or a size, and the reference does.
"""
