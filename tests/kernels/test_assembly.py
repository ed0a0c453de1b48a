"""The checks of compiled kernels fail where they should, on texts cut from real ones."""

import dataclasses

import pytest
import torch

from tests.kernels.ahead_of_time import Compiled, has_whole_vectors, in_place, problems, wrong
from tests.kernels.assembly import Dot, Load, asynchronous_copies, dots, loads

WGMMA = """
  %s = ttng.warp_group_dot %a, %b, %c {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared, #smem> \
* !ttg.memdesc<64x64xbf16, #shared1, #smem> -> tensor<128x64xf32, #mma> loc(#loc9)
"""
TF32 = WGMMA.replace("{", "{inputPrecision = 0 : i32, ").replace("bf16", "f32")
BLACKWELL = """
  ttng.tc_gen5_mma %a, %b, %c, %on, %on, %d[%on] {is_async} : !ttg.memdesc<128x32xf32, #shared>, \
!ttg.memdesc<32x128xf32, #shared1>, !ttg.memdesc<128x128xf32, #tmem, mutable> loc(#loc9)
"""
OTHER = """
  %s = tt.dot %a, %b, %c : tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> \
* tensor<32x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma}>> -> tensor<64x64xf32, #mma> loc(#loc9)
"""

# A row that a function `load_row` loads, called on line 9 for a tile and on line 5 for one element.
TTIR = """
#loc1 = loc("/a/kernel.py":5:3)
#loc2 = loc("/a/kernel.py":9:3)
#loc3 = loc("/a/shared.py":70:8)
#loc4 = loc("value"(#loc3))
#loc5 = loc(callsite(#loc4 at #loc1))
#loc6 = loc(callsite(#loc4 at #loc2))
    %one = tt.load %p, %m, %z : !tt.ptr<f32> loc(#loc5)
    %row = tt.load %q, %m, %z : tensor<1024x!tt.ptr<f32>> loc(#loc6)
    %index = tt.load %r : tensor<1024x!tt.ptr<i64>> loc(#loc1)
"""
ONE = """
\t.file\t1 "/a" "kernel.py"
\t.file\t2 "/a" "shared.py"
\t.loc\t2 70 8, function_name $L__info_string0, inlined_at 1 5 3
\t// begin inline asm
\t.loc\t2 70 8, function_name $L__info_string0, inlined_at 1 5 3
\t@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
\t// end inline asm
"""
# The assembler's lines count on from the first one's place.
WIDE = """
\t.loc\t1 9 3
\t// begin inline asm
\t.loc\t2 70 8, function_name $L__info_string0, inlined_at 1 9 3
\tmov.u32 %r2, %r9;
\t.loc\t2 71 8, function_name $L__info_string0, inlined_at 1 9 3
\tmov.u32 %r3, %r9;
\t@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 + 0 ];
\t// end inline asm
"""
# Triton 3.6 has the call in a comment.
COMMENT = """
\t.loc\t2 70 8\t// shared.py:70:8 @[ kernel.py:9:3 ]
\t// begin inline asm
\tmov.u32 %r2, %r9;
\t@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 + 0 ];
\t// end inline asm
"""
NARROW = WIDE.replace(".v4.b32 { %r2, %r3, %r4, %r5 }", ".b32 { %r2 }")
COPY = """
\t// begin inline asm
\t.loc\t2 70 8, function_name $L__info_string0, inlined_at 1 9 3
\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
\t// end inline asm
\tcp.async.wait_group 0;
"""

GOOD = Compiled("a_kernel", "a test", whole_vectors=True, registers=40)


def but(**changes):
    return wrong(dataclasses.replace(GOOD, **changes), 90)


def test_a_good_kernel_has_nothing_wrong():
    assert but(dots=dots(WGMMA), loads=loads(TTIR, ONE + WIDE, 128), asynchronous_copies=8) == []


def test_dots():
    assert dots(WGMMA) == [Dot(128, "bf16", tensor_cores=True, wgmma=True)]
    assert dots(TF32) == [Dot(128, "f32", tensor_cores=True, wgmma=True)]
    assert dots(BLACKWELL) == [Dot(128, "f32", tensor_cores=True, wgmma=False)]
    exact = OTHER.replace("bf16", "f32")
    assert dots(exact + OTHER) == [
        Dot(64, "f32", tensor_cores=False, wgmma=False),
        Dot(64, "bf16", tensor_cores=True, wgmma=False),
    ]
    assert dots(exact.replace("%c :", "%c, inputPrecision = tf32 :"))[0].tensor_cores


def test_a_product_that_is_no_wgmma_is_wrong():
    assert but(dots=dots(OTHER)) == ["a product of 64 rows in bf16 is no wgmma"]
    assert but(dots=dots(OTHER.replace("64x", "16x"))) == []  # too few rows
    assert but(dots=dots(OTHER.replace("bf16", "f32"))) == []  # in full precision
    assert wrong(dataclasses.replace(GOOD, dots=dots(OTHER)), 80) == []


@pytest.mark.parametrize(
    ("ptx", "width"),
    [
        (ONE + WIDE, 16),
        (ONE + COMMENT, 16),
        (ONE + COPY, 16),
        (ONE + WIDE + NARROW, 4),
        (ONE, 0),
    ],
)
def test_loads(ptx, width):
    """Of the tile alone: not of one element at the same place, and not of indices."""
    assert loads(TTIR, ptx, 128) == [Load("shared.py:70 from kernel.py:9", width, 16)]
    # With more threads a tile has less for each.
    assert loads(TTIR, ptx, 512) == [Load("shared.py:70 from kernel.py:9", width, 8)]


def test_a_narrow_load_is_wrong_where_rows_are_whole_vectors():
    narrow = loads(TTIR, ONE + NARROW, 128)
    text = "shared.py:70 from kernel.py:9 loads 4 bytes at a time, not 16"
    assert but(loads=narrow) == [text]
    assert but(loads=narrow, whole_vectors=False) == []
    assert but(loads=narrow, dots=dots(TF32)) == []
    assert wrong(dataclasses.replace(GOOD, loads=narrow, dots=dots(BLACKWELL)), 100) == []
    alone = dataclasses.replace(GOOD, loads=narrow, whole_vectors=False)
    assert "a_kernel is not launched with whole vectors" in problems([alone], 90)


def test_asynchronous_copies():
    assert asynchronous_copies(ONE + WIDE) == 0
    assert asynchronous_copies(COPY) == 1
    engine = "\tcp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1, {%r2, %r3}];"
    assert asynchronous_copies(engine) == 1


def test_an_asynchronous_copy_over_which_a_kernel_writes_is_wrong():
    text = "writes over what it reads, and reads ahead with asynchronous copies"
    assert but(in_place=True, asynchronous_copies=1) == [text]
    assert but(in_place=True) == []


def test_what_does_not_fit_is_wrong():
    assert but(stack=8) == ["spills: 8 bytes of stack"]
    assert but(shared=232_449) == ["232449 bytes of shared memory"]
    assert but(registers=256) == ["256 registers"]


def test_whole_vectors():
    rows = torch.empty(40, 64)
    assert has_whole_vectors(rows)
    assert has_whole_vectors(rows.mT)
    assert has_whole_vectors(rows[:, :32])
    assert has_whole_vectors(torch.empty(1, 7))  # a vector
    assert has_whole_vectors(torch.empty(40, 7, dtype=torch.int64))
    assert not has_whole_vectors(rows[:, :33])
    assert not has_whole_vectors(torch.empty(40, 72)[:, :64])
    assert not has_whole_vectors(rows[:, ::2])
    assert not has_whole_vectors(torch.empty(64).expand(40, 64))
    # Columns and rows far apart, each of them beside those of other matrices.
    assert not has_whole_vectors(torch.empty(48, 64, 16).permute(2, 0, 1))


def test_in_place():
    logits = torch.empty(4, 64)
    halves = logits.view(torch.bfloat16)
    assert in_place([logits, torch.empty(4), halves[:, :64]])
    assert not in_place([logits[:, :32], logits[:, 32:], torch.empty(4)])
