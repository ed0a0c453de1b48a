"""grouped_linear in Triton, for GPUs, dtypes and sizes that the library's grouped product lacks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memdlm_kernels._triton.groups import find_tile, group_rows, most_tiles

# Row tiles that run side by side over all columns: they share a group's weights in the L2 cache.
_BAND = 8


@triton.jit
def grouped_linear_kernel(
    x,
    weight,
    ends,
    out,
    row_tiles,
    groups,
    columns,
    out_columns,
    x_row,
    x_column,
    weight_group,
    weight_row,
    weight_column,
    out_row,
    GROUPS: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[n] = weight[g] x[n] for each row n of group g: one tile of it."""
    pid = tl.program_id(0)
    in_band = BAND * tl.cdiv(out_columns, BLOCK_N)
    first = pid // in_band * BAND
    height = tl.minimum(row_tiles - first, BAND)
    row_tile = first + pid % in_band % height
    column_tile = pid % in_band // height
    group, begin, end = find_tile(ends, 0, row_tile, groups, GROUPS, BLOCK_M)
    if begin == end:
        return

    row = begin + tl.arange(0, BLOCK_M)  # [BM]
    i = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    # 64 bits: rows times their width, and stacked weights, have more than 2^31 elements.
    row_64, i_64, k_64 = row.to(tl.int64), i.to(tl.int64), k.to(tl.int64)
    x += row_64[:, None] * x_row + k_64[None, :] * x_column  # [BM, BK]
    weight += group.to(tl.int64) * weight_group
    weight += k_64[:, None] * weight_column + i_64[None, :] * weight_row  # [BK, BN]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = start + k < columns
        x_tile = tl.load(x, mask=(row < end)[:, None] & inside[None, :], other=0)
        w_tile = tl.load(weight, mask=inside[:, None] & (i < out_columns)[None, :], other=0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        x += BLOCK_K * x_column
        weight += BLOCK_K * weight_column
    out += row_64[:, None] * out_row + i_64[None, :]  # [BM, BN]
    stored = (row < end)[:, None] & (i < out_columns)[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def grouped_linear_outer_kernel(
    a,
    b,
    ends,
    out,
    a_columns,
    b_columns,
    a_row,
    a_column,
    b_row,
    b_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[g] = sum of a[n]ᵀ b[n] over the rows n of group g, 0 if it has none: one tile of it."""
    wide = tl.cdiv(b_columns, BLOCK_N)
    tiles = tl.cdiv(a_columns, BLOCK_M) * wide
    group = tl.program_id(0) // tiles  # all tiles of a group side by side: they share its rows
    tile = tl.program_id(0) % tiles
    i = tile // wide * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    j = tile % wide * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    i_64, j_64 = i.to(tl.int64), j.to(tl.int64)
    begin, end = group_rows(ends, 0, group)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + k
        row_64 = row.to(tl.int64)
        a_tile = tl.load(
            a + i_64[:, None] * a_column + row_64[None, :] * a_row,
            mask=(i < a_columns)[:, None] & (row < end)[None, :],
            other=0,
        )  # [BM, BK]
        b_tile = tl.load(
            b + row_64[:, None] * b_row + j_64[None, :] * b_column,
            mask=(row < end)[:, None] & (j < b_columns)[None, :],
            other=0,
        )  # [BK, BN]
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
    out += (group.to(tl.int64) * a_columns + i_64)[:, None] * b_columns + j_64[None, :]  # [BM, BN]
    stored = (i < a_columns)[:, None] & (j < b_columns)[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=stored)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    if out.numel():
        product(x, weight, offsets, out)
    return out


def product(x: Tensor, weight: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write the product to out [N, out], whose rows may have any stride."""
    groups, out_columns, columns = weight.shape
    blocks = _blocks(x.shape[0] // groups, x, weight)
    row_tiles = most_tiles(x.shape[0], groups, blocks["BLOCK_M"])
    grid = (row_tiles * triton.cdiv(out_columns, blocks["BLOCK_N"]),)
    grouped_linear_kernel[grid](
        x,
        weight,
        offsets.contiguous(),
        out,
        row_tiles,
        groups,
        columns,
        out_columns,
        *x.stride(),
        *weight.stride(),
        out.stride(0),
        GROUPS=triton.next_power_of_2(groups),
        BAND=_BAND,
        **blocks,
    )


def grouped_linear_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    groups, a_columns, b_columns = len(offsets), a.shape[1], b.shape[1]
    out = a.new_empty(groups, a_columns, b_columns)
    blocks = _blocks(a_columns, a, b)
    tiles = triton.cdiv(a_columns, blocks["BLOCK_M"]) * triton.cdiv(b_columns, blocks["BLOCK_N"])
    if out.numel():
        grouped_linear_outer_kernel[groups * tiles,](
            a,
            b,
            offsets.contiguous(),
            out,
            a_columns,
            b_columns,
            *a.stride(),
            *b.stride(),
            **blocks,
        )
    return out


def _blocks(rows: int, *read: Tensor) -> dict[str, Any]:
    """Block sizes and options of a launch that reads these tensors, for tiles of about `rows`."""
    fits = 16 if rows <= 16 else 64 if rows <= 64 else 128
    # Without vectors each element has its own address in registers: smaller tiles, no stages.
    vectors = all(n == 1 or n % 16 == 0 for tensor in read for n in tensor.stride())
    size = read[0].dtype.itemsize
    # torch's own switch; its products in float32 are exact unless it is set.
    tf32 = size == 4 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if vectors and (size == 2 or tf32):
        blocks = dict(BLOCK_M=fits, BLOCK_N=128, BLOCK_K=128 // size)
        warps = 8 if fits == 128 else 4
    else:
        blocks = dict(BLOCK_M=min(64, fits), BLOCK_N=64, BLOCK_K=64 // size)
        warps = 4 if vectors or size == 2 else 8
    return dict(
        blocks,
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=warps,
        num_stages=3 if vectors else 1,
    )
