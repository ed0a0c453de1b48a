"""combine_rows and spread_rows in Triton: every row is read or written once, in one launch.

A row is one block of threads' in the sum, which has no need to meet; it is one warp's in backward
and in spreading, so that a product over the columns needs no more than the warp's own shuffles.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_VECTOR_BYTES = 16  # of a thread's widest load
_WARP = 32


@triton.jit
def combine_rows_kernel(
    rows,
    index,
    weight,
    out,
    columns,
    rows_row,
    rows_column,
    index_row,
    index_column,
    weight_row,
    weight_column,
    CHOICES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n] = sum over j of weight[n, j] * rows[index[n, j]]: some columns of it."""
    column_tiles = tl.cdiv(columns, BLOCK_C)
    n = (tl.program_id(0) // column_tiles).to(tl.int64)
    c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    index += n * index_row
    if weight is not None:
        weight += n * weight_row
    rows += c.to(tl.int64) * rows_column  # [BC]
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHOICES, BLOCK_J):
        # Written out: all of these rows are on their way at once.
        for step in tl.static_range(BLOCK_J):
            j = start + step
            place = tl.load(index + j * index_column)
            value = tl.load(rows + place * rows_row, mask=c < columns, other=0)  # [BC]
            if weight is None:
                total += value.to(tl.float32)
            else:
                w = tl.load(weight + j * weight_column).to(tl.float32)
                total += w * value.to(tl.float32)
    tl.store(out + n * columns + c, total.to(out.dtype.element_ty), mask=c < columns)


@triton.jit
def spread_rows_kernel(
    source,
    rows,
    index,
    weight,
    out,
    dots,
    columns,
    source_row,
    source_column,
    rows_row,
    rows_column,
    index_row,
    index_column,
    weight_row,
    weight_column,
    CHOICES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[index[n, j]] = weight[n, j] * source[n], and dots[n, j] = <rows[index[n, j]], source[n]>.

    Of a weighted sum these are the gradients, where source is the sum's. Without weight they are
    ones; without out, or without rows, only the other is computed.
    """
    n = tl.program_id(0).to(tl.int64)
    source += n * source_row
    for start in range(0, CHOICES, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)  # [BJ]
        place = tl.load(index + n * index_row + j * index_column, mask=j < CHOICES, other=0)
        if weight is not None:
            own = weight + n * weight_row + j * weight_column
            w = tl.load(own, mask=j < CHOICES, other=0).to(tl.float32)  # [BJ]
        dot = tl.zeros([BLOCK_J], tl.float32)
        for first in range(0, columns, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)  # [BC]
            c_64 = c.to(tl.int64)
            inside = (j < CHOICES)[:, None] & (c < columns)[None, :]  # [BJ, BC]
            s = tl.load(source + c_64 * source_column, mask=c < columns, other=0).to(tl.float32)
            if rows is not None:
                at = rows + place[:, None] * rows_row + c_64[None, :] * rows_column  # [BJ, BC]
                value = tl.load(at, mask=inside, other=0).to(tl.float32)
                dot += tl.sum(value * s[None, :], axis=1)
            if out is not None:
                spread = tl.broadcast_to(s[None, :], [BLOCK_J, BLOCK_C])
                if weight is not None:
                    spread *= w[:, None]
                at = out + place[:, None] * columns + c[None, :]
                tl.store(at, spread.to(out.dtype.element_ty), mask=inside)
        if rows is not None:
            at = dots + n * CHOICES + j
            tl.store(at, dot.to(dots.dtype.element_ty), mask=j < CHOICES)


def combine_rows(rows: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    (count, choices), columns = index.shape, rows.shape[1]
    out = rows.new_empty(count, columns, dtype=dtype)
    warps = 4
    block = _columns(columns, warps, rows)
    if out.numel():
        combine_rows_kernel[count * triton.cdiv(columns, block),](
            rows,
            index,
            weight,
            out,
            columns,
            *rows.stride(),
            *_index_and_weight(index, weight),
            CHOICES=choices,
            BLOCK_J=_at_once(choices),
            BLOCK_C=block,
            num_warps=warps,
        )
    return out


def combine_rows_backward(
    grad_out: Tensor,
    rows: Tensor | None,
    index: Tensor,
    weight: Tensor,
    count: int,
    dtype: torch.dtype,
    need_grad_rows: bool,
) -> tuple[Tensor, Tensor]:
    grad_rows = _places(grad_out, index, count, dtype) if need_grad_rows else None
    grad_weight = None if rows is None else weight.new_empty(weight.shape)
    _spread(grad_out, rows, index, weight, grad_rows, grad_weight)
    return (
        grad_out.new_empty(0, dtype=dtype) if grad_rows is None else grad_rows,
        weight.new_empty(0) if grad_weight is None else grad_weight,
    )


def spread_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    out = _places(rows, index, count, rows.dtype)
    _spread(rows, None, index, None, out, None)
    return out


def _places(source: Tensor, index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[P, D], zeros if some of it will not be written."""
    named = index.numel() == count
    make = source.new_empty if named else source.new_zeros
    return make(count, source.shape[1], dtype=dtype)


def _spread(
    source: Tensor,
    rows: Tensor | None,
    index: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    dots: Tensor | None,
) -> None:
    count, choices = index.shape
    if count == 0:
        return
    columns = source.shape[1]
    spread_rows_kernel[count,](
        source,
        rows,
        index,
        weight,
        out,
        dots,
        columns,
        *source.stride(),
        *((0, 0) if rows is None else rows.stride()),
        *_index_and_weight(index, weight),
        CHOICES=choices,
        BLOCK_J=min(triton.next_power_of_2(choices), 8),
        BLOCK_C=_columns(columns, 1, *(tensor for tensor in (rows, out) if tensor is not None)),
        num_warps=1,
    )


def _index_and_weight(index: Tensor, weight: Tensor | None) -> tuple[Any, ...]:
    return (*index.stride(), *((0, 0) if weight is None else weight.stride()))


def _at_once(choices: int) -> int:
    """How many rows a program of the sum reads side by side: so many that none is left over."""
    return next(many for many in range(8, 0, -1) if choices % many == 0)


def _columns(columns: int, warps: int, *moved: Tensor) -> int:
    """As many as the threads have in one vector each of the widest."""
    itemsize = max(tensor.dtype.itemsize for tensor in moved)
    most = warps * _WARP * _VECTOR_BYTES // itemsize
    return min(triton.next_power_of_2(max(columns, 1)), most)
