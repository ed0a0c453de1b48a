"""The three products of a low-rank update, for rows in groups: each is one launch, for any sizes.

    shrink  narrow[n, p R + r] = scale * sum_c wide[n, p C + c] * weight[g, p, r, c]
    expand  wide[n, p C + c] = base[n, p C + c] + sum_r narrow[n, p R + r] * weight[g, p, r, c]
    outer   grad[g, p, r, c] = sum_n of g narrow[n, p R + r] * wide[n, p C + c]

g is the group of row n, p one of P projections, r a rank (few) and c a column (many). Each product
makes an output and a gradient: shrink is x Aᵀ and grad_out B, expand is the update and grad_x. All
of them wait for memory: rows are read and written once, sums and the base are added in float32,
and the weights, float32 or not, are cast to the rows' dtype where they are read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memdlm_kernels._triton.groups import find_tile, group_rows, most_tiles


@triton.jit
def shrink_kernel(
    wide,
    weight,
    narrow,
    ends,
    scale,
    length,
    groups,
    sets,
    projections,
    ranks,
    columns,
    wide_row,
    narrow_row,
    weight_set,
    weight_expert,
    weight_projection,
    weight_rank,
    weight_column,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Tiles of the same rows are neighbours: all but one of them find the rows in the cache.
    rank_tiles = tl.cdiv(ranks, BLOCK_R)
    tile = tl.program_id(0) // (projections * rank_tiles)
    part = tl.program_id(0) % (projections * rank_tiles)
    group, begin, end = find_tile(ends, length, tile, groups, GROUPS, BLOCK_M)
    if begin == end:
        return
    projection = part // rank_tiles
    r = part % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    row = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    weight += (group // sets).to(tl.int64) * weight_expert
    weight += (group % sets).to(tl.int64) * weight_set
    weight += projection.to(tl.int64) * weight_projection
    weight += r.to(tl.int64)[None, :] * weight_rank  # [1, BR]
    wide += row[:, None] * wide_row + projection * columns  # [BM, 1]
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, columns, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)  # [BC]
        x = tl.load(
            wide + c[None, :], mask=(row < end)[:, None] & (c < columns)[None, :], other=0.0
        )  # [BM, BC]
        w = tl.load(
            weight + c.to(tl.int64)[:, None] * weight_column,
            mask=(c < columns)[:, None] & (r < ranks)[None, :],
            other=0.0,
        )  # [BC, BR]
        total = tl.dot(x, w.to(x.dtype), total, input_precision="ieee")  # [BM, BR]
    tl.store(
        narrow + row[:, None] * narrow_row + (projection * ranks + r)[None, :],
        (total * scale).to(narrow.dtype.element_ty),
        mask=(row < end)[:, None] & (r < ranks)[None, :],
    )


@triton.jit
def expand_kernel(
    narrow,
    weight,
    base,
    wide,
    ends,
    length,
    groups,
    sets,
    projections,
    columns,
    narrow_row,
    base_row,
    wide_row,
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
    tile = tl.program_id(0) // (projections * column_tiles)
    part = tl.program_id(0) % (projections * column_tiles)
    group, begin, end = find_tile(ends, length, tile, groups, GROUPS, BLOCK_M)
    if begin == end:
        return
    projection = part // column_tiles
    c = part % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    row = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    place = (projection * columns + c)[None, :]  # [1, BC]
    mask = (row < end)[:, None] & (c < columns)[None, :]  # [BM, BC]
    if base is not None:
        # Under way while the product is computed.
        before = tl.load(base + row[:, None] * base_row + place, mask=mask)  # [BM, BC]
    weight += (group // sets).to(tl.int64) * weight_expert
    weight += (group % sets).to(tl.int64) * weight_set
    weight += projection.to(tl.int64) * weight_projection
    weight += c.to(tl.int64)[None, :] * weight_column  # [1, BC]
    narrow += row[:, None] * narrow_row + projection * RANKS  # [BM, 1]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, RANKS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)  # [BR]
        s = tl.load(
            narrow + r[None, :], mask=(row < end)[:, None] & (r < RANKS)[None, :], other=0.0
        )  # [BM, BR]
        w = tl.load(
            weight + r.to(tl.int64)[:, None] * weight_rank,
            mask=(r < RANKS)[:, None] & (c < columns)[None, :],
            other=0.0,
        )  # [BR, BC]
        total = tl.dot(s, w.to(s.dtype), total, input_precision="ieee")  # [BM, BC]
    if base is not None:
        total += before.to(tl.float32)
    tl.store(wide + row[:, None] * wide_row + place, total.to(wide.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    narrow,
    wide,
    grad,
    ends,
    length,
    sets,
    projections,
    ranks,
    columns,
    narrow_row,
    wide_row,
    grad_set,
    grad_expert,
    grad_projection,
    grad_rank,
    grad_column,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rank_tiles, column_tiles = tl.cdiv(ranks, BLOCK_R), tl.cdiv(columns, BLOCK_C)
    parts = projections * column_tiles * rank_tiles
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    projection = part // (column_tiles * rank_tiles)
    c = part // rank_tiles % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    r = part % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    wide += (projection * columns + c)[:, None]  # [BC, 1]
    narrow += (projection * ranks + r)[None, :]  # [1, BR]
    begin, end = group_rows(ends, length, group)
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
        x = tl.load(
            wide + row[None, :] * wide_row,
            mask=(c < columns)[:, None] & (row < end)[None, :],
            other=0.0,
        )  # [BC, BM]
        s = tl.load(
            narrow + row[:, None] * narrow_row,
            mask=(row < end)[:, None] & (r < ranks)[None, :],
            other=0.0,
        )  # [BM, BR]
        total = tl.dot(x, s, total, input_precision="ieee")  # [BC, BR]
    grad += (group // sets).to(tl.int64) * grad_expert + (group % sets).to(tl.int64) * grad_set
    grad += projection.to(tl.int64) * grad_projection
    grad += c.to(tl.int64)[:, None] * grad_column  # [BC, 1]
    tl.store(
        grad + r.to(tl.int64)[None, :] * grad_rank,
        total.to(grad.dtype.element_ty),
        mask=(c < columns)[:, None] & (r < ranks)[None, :],
    )


def shrink(wide: Tensor, weight: Tensor, ends: Tensor | None, scale: float) -> Tensor:
    """scale * wide @ weightᵀ of each group and projection.

    Bytes of a row, in elements: P C read, P R written. A tile of BLOCK_M rows reads the weights of
    its group, most of them from the cache: no fewer rows than these keep that below the rows' own.

    Args:
        wide: [N, P * C], or [N, C] for one projection; rows sorted by group.
        weight: [S, E, P, R, C], any strides and floating-point dtype; of group g = e * S + s.
        ends: int32 [E * S], contiguous; the row at which each group ends. None: of equal length.
        scale: finite.

    Returns:
        [N, P * R] in wide's dtype.
    """
    sets, experts, projections, ranks, columns = weight.shape
    rows, groups = wide.shape[0], experts * sets
    narrow = wide.new_empty(rows, projections * ranks)
    if narrow.numel() == 0:
        return narrow
    wide = in_rows(wide)
    block_m = _row_block(wide, groups)
    block_r = min(_padded(ranks), _most(wide, 128))
    grid = most_tiles(rows, groups, block_m) * projections * triton.cdiv(ranks, block_r)
    shrink_kernel[(grid,)](
        wide,
        weight,
        narrow,
        ends,
        scale,
        rows // groups,
        groups,
        sets,
        projections,
        ranks,
        columns,
        wide.stride(0),
        narrow.stride(0),
        *weight.stride(),
        GROUPS=triton.next_power_of_2(groups),
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_C=_inner(wide),
        num_warps=block_m // 16,
        num_stages=3,
    )
    return narrow


def expand(
    narrow: Tensor, weight: Tensor, ends: Tensor | None, base: Tensor | None = None
) -> Tensor:
    """base + narrow @ weight of each group and projection, rounded once.

    Bytes of a row, in elements: P C of the base read and as many written, and P R read for each
    128 columns, all but the first from the cache.

    Args:
        narrow: [N, P * R]; rows sorted by group.
        weight: [S, E, P, R, C], as in `shrink`.
        ends: as in `shrink`.
        base: [N, P * C], or None for zeros.

    Returns:
        [N, P * C] in narrow's dtype.
    """
    sets, experts, projections, ranks, columns = weight.shape
    rows, groups = narrow.shape[0], experts * sets
    wide = narrow.new_empty(rows, projections * columns)
    if wide.numel() == 0:
        return wide
    narrow = in_rows(narrow)
    base = None if base is None else in_rows(base)
    block_m = _row_block(narrow, groups)
    # Columns that no 16-byte access fits have an address each: fewer of them in the registers.
    block_c = _most(narrow, 128) if columns % 8 == 0 else 64
    grid = most_tiles(rows, groups, block_m) * projections * triton.cdiv(columns, block_c)
    expand_kernel[(grid,)](
        narrow,
        weight,
        base,
        wide,
        ends,
        rows // groups,
        groups,
        sets,
        projections,
        columns,
        narrow.stride(0),
        0 if base is None else base.stride(0),
        wide.stride(0),
        *weight.stride(),
        GROUPS=triton.next_power_of_2(groups),
        RANKS=ranks,
        BLOCK_M=block_m,
        BLOCK_R=min(_padded(ranks), _inner(narrow)),
        BLOCK_C=block_c,
        num_warps=8 if narrow.itemsize == 4 else block_m // 16,
    )
    return wide


def outer(narrow: Tensor, wide: Tensor, ends: Tensor | None, grad: Tensor) -> None:
    """Write narrowᵀ @ wide of each group and projection to grad, zeros for an empty group.

    Bytes of a row, in elements: P C read, and P R for each 128 columns, all but the first from the
    cache. A group's rows are one program's loop: one group of many rows is the library's work.

    Args:
        narrow: [N, P * R]; rows sorted by group.
        wide: [N, P * C], narrow's dtype.
        ends: as in `shrink`.
        grad: [S, E, P, R, C], any strides and floating-point dtype; written.
    """
    sets, experts, projections, ranks, columns = grad.shape
    rows, groups = wide.shape[0], experts * sets
    narrow, wide = in_rows(narrow), in_rows(wide)
    block_r, block_c = min(_padded(ranks), _most(wide, 128)), _most(wide, 128)
    parts = projections * triton.cdiv(ranks, block_r) * triton.cdiv(columns, block_c)
    outer_kernel[(groups * parts,)](
        narrow,
        wide,
        grad,
        ends,
        rows // groups,
        sets,
        projections,
        ranks,
        columns,
        narrow.stride(0),
        wide.stride(0),
        *grad.stride(),
        BLOCK_M=_inner(wide),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=8 if block_r > 64 else 4,
        num_stages=3,
    )


def in_rows(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if its rows are not dense: the gradient of a sum has stride 0."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def _padded(ranks: int) -> int:
    return max(16, triton.next_power_of_2(ranks))  # what tl.dot takes


def _inner(rows: Tensor) -> int:
    """How much a product sums over in one step: in float32 its operands are all in registers."""
    return 16 if rows.itemsize == 4 else 64


def _most(rows: Tensor, size: int) -> int:
    return size // 2 if rows.itemsize == 4 else size


def _row_block(rows: Tensor, groups: int) -> int:
    # Half of a group's last tile is empty, on average: not worth it where groups are small.
    return _most(rows, 128) if rows.shape[0] >= 128 * groups else 64
