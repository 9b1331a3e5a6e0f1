"""Kernels in C++ for x86 CPUs, built on first use (build.py) for the best instruction set there is (isa.py).

A family of ops is a file here, which unpacks arguments and registers, and one of its name in csrc/, which computes.
Every kernel gives a row the same bits whatever other rows are computed with it: no reduction is cut by a shape that the
batch decides.
"""

from skyline.kernels.cpu import attention, delta, dense, gates, linear, moe, rope  # noqa: F401
