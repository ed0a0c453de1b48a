"""The gated activation silu(gate) * up and its gradient, with a low-rank update of both inputs.

One pass over gate and up each: the updated ones are made tile by tile in registers, forward and
again in backward, in float32. A program takes some tiles of the same group and columns, one below
the other: it looks for its group and reads the weights once.
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
    TILES: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_C)
    group, begin, end = find_tile(
        ends, length, tl.program_id(0) // column_tiles, groups, GROUPS, TILES * BLOCK_M
    )
    if begin == end:
        return
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    w_gate, w_up = 0.0, 0.0
    if shrink is not None:
        weight += (group // sets).to(tl.int64) * weight_expert
        weight += (group % sets).to(tl.int64) * weight_set
        weight += c.to(tl.int64)[None, :] * weight_column  # [1, BC]
        if EARLY:
            w_gate, w_up = _held(weight, c, columns, weight_projection, weight_rank, RANKS, BLOCK_R)
    if TILES == 1:
        _forward_tile(
            begin, gate, up, shrink, weight, w_gate, w_up, h, c, end, columns, gate_row, up_row,
            shrink_row, weight_projection, weight_rank, RANKS, EARLY, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        for start in tl.range(begin, end, BLOCK_M, num_stages=1):
            _forward_tile(
                start, gate, up, shrink, weight, w_gate, w_up, h, c, end, columns, gate_row, up_row,
                shrink_row, weight_projection, weight_rank, RANKS, EARLY, BLOCK_M, BLOCK_R, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _forward_tile(
    start,
    gate,
    up,
    shrink,
    weight,
    w_gate,
    w_up,
    h,
    c,
    end,
    columns,
    gate_row,
    up_row,
    shrink_row,
    weight_projection,
    weight_rank,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    mask = (row < end)[:, None] & (c < columns)[None, :]  # [BM, BC]
    g, u = _updated(
        gate + row[:, None] * gate_row + c[None, :], up + row[:, None] * up_row + c[None, :],
        mask, shrink, weight, w_gate, w_up, row, c, end, columns, shrink_row,
        weight_projection, weight_rank, RANKS, EARLY, BLOCK_M, BLOCK_R, BLOCK_C,
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
    TILES: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_C)
    group, begin, end = find_tile(
        ends, length, tl.program_id(0) // column_tiles, groups, GROUPS, TILES * BLOCK_M
    )
    if begin == end:
        return
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    w_gate, w_up = 0.0, 0.0
    if shrink is not None:
        weight += (group // sets).to(tl.int64) * weight_expert
        weight += (group % sets).to(tl.int64) * weight_set
        weight += c.to(tl.int64)[None, :] * weight_column  # [1, BC]
        if EARLY:
            w_gate, w_up = _held(weight, c, columns, weight_projection, weight_rank, RANKS, BLOCK_R)
    if TILES == 1:
        _backward_tile(
            begin, grad_h, gate, up, shrink, weight, w_gate, w_up, grad_gate, grad_up, c, end,
            columns, grad_h_row, grad_h_column, gate_row, up_row, shrink_row, grad_row,
            weight_projection, weight_rank, RANKS, EARLY, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        for start in tl.range(begin, end, BLOCK_M, num_stages=1):
            _backward_tile(
                start, grad_h, gate, up, shrink, weight, w_gate, w_up, grad_gate, grad_up, c, end,
                columns, grad_h_row, grad_h_column, gate_row, up_row, shrink_row, grad_row,
                weight_projection, weight_rank, RANKS, EARLY, BLOCK_M, BLOCK_R, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _backward_tile(
    start,
    grad_h,
    gate,
    up,
    shrink,
    weight,
    w_gate,
    w_up,
    grad_gate,
    grad_up,
    c,
    end,
    columns,
    grad_h_row,
    grad_h_column,
    gate_row,
    up_row,
    shrink_row,
    grad_row,
    weight_projection,
    weight_rank,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    mask = (row < end)[:, None] & (c < columns)[None, :]  # [BM, BC]
    g, u = _updated(
        gate + row[:, None] * gate_row + c[None, :], up + row[:, None] * up_row + c[None, :],
        mask, shrink, weight, w_gate, w_up, row, c, end, columns, shrink_row,
        weight_projection, weight_rank, RANKS, EARLY, BLOCK_M, BLOCK_R, BLOCK_C,
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
def _held(
    weight, c, columns, weight_projection, weight_rank, RANKS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The gate's and the up's weights of these columns, each [BR, BC]."""
    r = tl.arange(0, BLOCK_R)  # [BR]
    weight += r.to(tl.int64)[:, None] * weight_rank
    wide = (r < RANKS)[:, None] & (c < columns)[None, :]
    w_gate = tl.load(weight, mask=wide, other=0)
    return w_gate, tl.load(weight + weight_projection, mask=wide, other=0)


@triton.jit
def _updated(
    gate,
    up,
    mask,
    shrink,
    weight,
    w_gate,
    w_up,
    row,
    c,
    end,
    columns,
    shrink_row,
    weight_projection,
    weight_rank,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of gate and of up [BM, BC], each plus its half of shrink [N, 2 R] times its weight.

    If EARLY, all is loaded before the products, so that it comes at once. If not, the products come
    first: gate and up would take registers while they are computed.
    """
    if shrink is None:
        g = tl.load(gate, mask=mask, other=0).to(tl.float32)
        u = tl.load(up, mask=mask, other=0).to(tl.float32)
    elif EARLY:
        gate_alone = tl.load(gate, mask=mask, other=0)  # [BM, BC]
        up_alone = tl.load(up, mask=mask, other=0)
        r = tl.arange(0, BLOCK_R)  # [BR]
        narrow = (row < end)[:, None] & (r < RANKS)[None, :]
        shrink += row[:, None] * shrink_row + r[None, :]
        s_gate = tl.load(shrink, mask=narrow, other=0)  # [BM, BR]
        s_up = tl.load(shrink + RANKS, mask=narrow, other=0)
        g = tl.dot(s_gate, w_gate.to(s_gate.dtype), input_precision="ieee")
        u = tl.dot(s_up, w_up.to(s_up.dtype), input_precision="ieee")
        g += gate_alone.to(tl.float32)
        u += up_alone.to(tl.float32)
    else:
        shrink += row[:, None] * shrink_row  # [BM, 1]
        g = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        u = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for first in tl.range(0, RANKS, BLOCK_R, num_stages=1):
            r = first + tl.arange(0, BLOCK_R)  # [BR]
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
