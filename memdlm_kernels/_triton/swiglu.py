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
    g, u = _updated(
        gate + row[:, None] * gate_row + c[None, :], up + row[:, None] * up_row + c[None, :],
        mask, shrink, weight, row, c, end, group, sets, columns, shrink_row, weight_set,
        weight_expert, weight_projection, weight_rank, weight_column,
        RANKS, BLOCK_M, BLOCK_R, BLOCK_C,
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
    g, u = _updated(
        gate + row[:, None] * gate_row + c[None, :], up + row[:, None] * up_row + c[None, :],
        mask, shrink, weight, row, c, end, group, sets, columns, shrink_row, weight_set,
        weight_expert, weight_projection, weight_rank, weight_column,
        RANKS, BLOCK_M, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    # Strides of both, since the gradient of a sum has none.
    place = row[:, None] * grad_h_row + c.to(tl.int64)[None, :] * grad_h_column
    d = tl.load(grad_h + place, mask=mask, other=0).to(tl.float32)
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
    mask,
    shrink,
    weight,
    row,
    c,
    end,
    group,
    sets,
    columns,
    shrink_row,
    weight_set,
    weight_expert,
    weight_projection,
    weight_rank,
    weight_column,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of gate and of up [BM, BC], each plus its half of shrink [N, 2 R] times its weight.

    The products come first: gate and up would take registers while they are computed.
    """
    if shrink is None:
        g = tl.load(gate, mask=mask, other=0).to(tl.float32)
        u = tl.load(up, mask=mask, other=0).to(tl.float32)
    else:
        shrink += row[:, None] * shrink_row  # [BM, 1]
        weight += (group // sets).to(tl.int64) * weight_expert
        weight += (group % sets).to(tl.int64) * weight_set
        weight += c.to(tl.int64)[None, :] * weight_column  # [1, BC]
        g = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        u = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in tl.range(0, RANKS, BLOCK_R, num_stages=1):
            r = start + tl.arange(0, BLOCK_R)  # [BR]
            narrow = (row < end)[:, None] & (r < RANKS)[None, :]
            wide = (r < RANKS)[:, None] & (c < columns)[None, :]
            w_place = weight + r.to(tl.int64)[:, None] * weight_rank
            s = tl.load(shrink + r[None, :], mask=narrow, other=0)  # [BM, BR]
            w = tl.load(w_place, mask=wide, other=0)  # [BR, BC]
            g = tl.dot(s, w.to(s.dtype), g, input_precision="ieee")
            s = tl.load(shrink + RANKS + r[None, :], mask=narrow, other=0)
            w = tl.load(w_place + weight_projection, mask=wide, other=0)
            u = tl.dot(s, w.to(s.dtype), u, input_precision="ieee")
        g += tl.load(gate, mask=mask, other=0).to(tl.float32)
        u += tl.load(up, mask=mask, other=0).to(tl.float32)
    return g, u
