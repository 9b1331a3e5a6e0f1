"""What weights of several formats are kept as together."""

from __future__ import annotations

import torch

from skyline.ops import linear
from skyline.ops.formats import IntegerFormat, plain_bytes, set_integers, together, widened

Q4_0, Q4_K = IntegerFormat(4, 32), IntegerFormat(4, 32, zeros=True, blocks=True)
Q4_1, Q8_0 = IntegerFormat(4, 32, zeros=True), IntegerFormat(8, 32, widened=True)
Q6_K, Q5_K = IntegerFormat(6, 16, widened=True, blocks=True), IntegerFormat(8, 16, True, widened=True, blocks=True)
MXFP4, FP8 = IntegerFormat(4, 32, fp4=True), IntegerFormat(8, 128, fp8=True)


def test_one_format_stays_what_it_is() -> None:
    for format in (Q4_0, Q4_K, Q8_0, Q6_K, MXFP4, FP8):
        assert together([format, format]) == format
    assert together([Q4_1, Q4_K]) == Q4_1  # both are int4 in groups of 32 with zero points
    assert together([None, None]) is None


def test_several_are_bytes_if_one_is() -> None:
    joined = together([Q4_K, Q4_K, Q6_K])
    assert joined == IntegerFormat(8, 16, zeros=True, widened=True) and joined.blocks
    assert together([Q6_K, Q5_K]) == joined
    assert together([Q4_0, Q8_0]) == IntegerFormat(8, 32, widened=True)
    assert widened(Q4_K) == joined and widened(Q6_K) is Q6_K


def test_others_are_plain() -> None:
    for formats in ([Q4_0, Q4_1], [Q8_0, Q6_K], [Q4_0, Q6_K], [Q8_0, None], [Q8_0, MXFP4], [FP8, None], [FP8, Q4_0]):
        assert together(formats) is None


def test_what_a_plain_op_reads_of_bytes() -> None:
    x, weight = torch.zeros(1, 1024), torch.zeros(64, 1024, dtype=torch.bfloat16)
    before = linear.cost(x, weight).bytes
    set_integers(weight, Q6_K)
    assert plain_bytes(weight) == 64 * (1024 * 6 // 8 + 4 * 2 + 64)
    assert before - linear.cost(x, weight).bytes == weight.nbytes - plain_bytes(weight)
