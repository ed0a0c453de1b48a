"""The gated activation silu(gate) * up and its gradient, with a low-rank update of both inputs.

One pass over gate and up each: the updated ones are made tile by tile in registers, forward and
again in backward, in float32.
"""

import triton
import triton.language as tl

from memdlm_kernels._triton.groups import find_tile


@triton.jit
def swiglu_forward_kernel(
    gate,
    up,
    shrink,
    weight,
    ends,
    h,
    length,
    groups,
    sets,
    columns,
    gate_row,
    up_row,
    shrink_row,
    weight_set,
    weight_expert,
    weight_projection,
    weight_rank,
    weight_column,
    GROUPS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_C)
    group, begin, end = find_tile(
        ends, length, tl.program_id(0) // column_tiles, groups, GROUPS, BLOCK_M
    )
    if begin == end:
        return
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    row = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    mask = (row < end)[:, None] & (c < columns)[None, :]  # [BM, BC]
    g = tl.load(gate + row[:, None] * gate_row + c[None, :], mask=mask, other=0).to(tl.float32)
    u = tl.load(up + row[:, None] * up_row + c[None, :], mask=mask, other=0).to(tl.float32)
    if shrink is not None:
        weight += (group // sets).to(tl.int64) * weight_expert
        weight += (group % sets).to(tl.int64) * weight_set
        g, u = _updated(
            g, u, shrink, weight, row, c, end, columns, shrink_row,
            weight_projection, weight_rank, weight_column, RANKS, BLOCK_R,
        )  # fmt: skip
    out = g * tl.sigmoid(g) * u  # [BM, BC]
    tl.store(h + row[:, None] * columns + c[None, :], out.to(h.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    grad_h,
    gate,
    up,
    shrink,
    weight,
    ends,
    grad_gate,
    grad_up,
    length,
    groups,
    sets,
    columns,
    grad_h_row,
    grad_h_column,
    gate_row,
    up_row,
    shrink_row,
    grad_row,
    weight_set,
    weight_expert,
    weight_projection,
    weight_rank,
    weight_column,
    GROUPS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_C)
    group, begin, end = find_tile(
        ends, length, tl.program_id(0) // column_tiles, groups, GROUPS, BLOCK_M
    )
    if begin == end:
        return
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    row = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    mask = (row < end)[:, None] & (c < columns)[None, :]  # [BM, BC]
    # Strides of both, since the gradient of a sum has none.
    place = row[:, None] * grad_h_row + c.to(tl.int64)[None, :] * grad_h_column
    d = tl.load(grad_h + place, mask=mask, other=0).to(tl.float32)
    g = tl.load(gate + row[:, None] * gate_row + c[None, :], mask=mask, other=0).to(tl.float32)
    u = tl.load(up + row[:, None] * up_row + c[None, :], mask=mask, other=0).to(tl.float32)
    if shrink is not None:
        weight += (group // sets).to(tl.int64) * weight_expert
        weight += (group % sets).to(tl.int64) * weight_set
        g, u = _updated(
            g, u, shrink, weight, row, c, end, columns, shrink_row,
            weight_projection, weight_rank, weight_column, RANKS, BLOCK_R,
        )  # fmt: skip
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    d_gate = d * u * (sigmoid + silu * (1 - sigmoid))  # [BM, BC]
    d_up = d * silu  # [BM, BC]
    place = row[:, None] * grad_row + c[None, :]
    tl.store(grad_gate + place, d_gate.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + place, d_up.to(grad_up.dtype.element_ty), mask=mask)


@triton.jit
def _updated(
    gate,
    up,
    shrink,
    weight,
    row,
    c,
    end,
    columns,
    shrink_row,
    weight_projection,
    weight_rank,
    weight_column,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """gate and up [BM, BC], each plus its half of shrink [N, 2 R] times its weight [R, columns]."""
    shrink += row[:, None] * shrink_row  # [BM, 1]
    weight += c.to(tl.int64)[None, :] * weight_column  # [1, BC]
    for start in tl.static_range(0, RANKS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)  # [BR]
        narrow = (row < end)[:, None] & (r < RANKS)[None, :]
        wide = (r < RANKS)[:, None] & (c < columns)[None, :]
        s = tl.load(shrink + r[None, :], mask=narrow, other=0)  # [BM, BR]
        w = tl.load(weight + r.to(tl.int64)[:, None] * weight_rank, mask=wide, other=0)  # [BR, BC]
        gate = tl.dot(s, w.to(s.dtype), gate, input_precision="ieee")
        s = tl.load(shrink + RANKS + r[None, :], mask=narrow, other=0)
        w = tl.load(
            weight + weight_projection + r.to(tl.int64)[:, None] * weight_rank, mask=wide, other=0
        )
        up = tl.dot(s, w.to(s.dtype), up, input_precision="ieee")
    return gate, up
