"""Rows added up where their keys say, in an order that does not vary: no atomics.

The rows are sorted by key. A run of equal keys that lies in one block of positions is added by one
program. A longer one is cut where blocks begin: `sum_long_runs` adds up each piece, and the program
that adds the run reads the pieces' sums. Neither walks more than about sqrt(M) positions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fewest positions of a block: shorter runs are not worth being cut.
_FEWEST_POSITIONS = 64
_STEP = 8  # rows that a program reads at a time: each is a wait for the memory


@triton.jit
def sum_of_rows(
    coefficient,
    source,
    order,
    begin,
    end,
    c,
    columns,
    source_row,
    SOURCE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over positions [begin, end) of coefficient[order] * source[order], or * 1: [BC]."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, STEP):
        position = start + tl.arange(0, STEP)  # [S]
        row = tl.load(order + position, mask=position < end, other=0)
        scale = tl.load(coefficient + row, mask=position < end, other=0.0)
        if SOURCE:
            value = tl.load(
                source + row[:, None] * source_row + c[None, :],
                mask=(position < end)[:, None] & (c < columns)[None, :],
                other=0.0,
            )  # [S, BC]
            total += tl.sum(scale[:, None] * value.to(tl.float32), 0)
        else:
            total += tl.sum(scale, 0)
    return total


@triton.jit
def sum_pieces_kernel(
    pieces,
    coefficient,
    source,
    order,
    key,
    end,
    rows,
    columns,
    source_row,
    SOURCE: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """pieces[2 b + side] = sum of the piece of a long run in block b of positions.

    A block has at most two: on side 0 the piece at its first position, on side 1 one that begins
    later, and goes on behind the block. Others are not written.
    """
    block, side = tl.program_id(0) // 2, tl.program_id(0) % 2
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BC]
    first = block * POSITIONS
    behind = tl.minimum(first + POSITIONS, rows)
    at = tl.where(side == 0, first, behind - 1)
    this = tl.load(key + at)
    position = first + tl.arange(0, POSITIONS)
    here = tl.load(key + position, mask=position < behind, other=0)
    length = tl.sum(((here == this) & (position < behind)).to(tl.int32), 0)
    begin = tl.where(side == 0, first, behind - length)
    goes_on = tl.load(end + at) > behind
    came = (first > 0) & (tl.load(key + first - 1, mask=first > 0, other=0) == this)
    long = tl.where(side == 0, came | goes_on, (begin > first) & goes_on)
    if long & (this >= 0):
        total = sum_of_rows(
            coefficient,
            source,
            order,
            begin,
            begin + length,
            c,
            columns,
            source_row,
            SOURCE,
            STEP,
            BLOCK,
        )
        tl.store(pieces + tl.program_id(0).to(tl.int64) * columns + c, total, mask=c < columns)


@triton.jit
def add_rows_kernel(
    out,
    coefficient,
    source,
    pieces,
    order,
    key,
    end,
    first_key,
    keys,
    columns,
    out_row,
    source_row,
    SOURCE: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[key[k] - first_key] += sum over k of coefficient[order[k]] * source[order[k]].

    `key` is sorted and `end[k]` is where its run of equal keys ends. The first of a run adds all of
    it, always in the same order: nothing is added twice, and the result does not vary.
    """
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BC]
    this = tl.load(key + k)
    previous = tl.load(key + k - 1, mask=k > 0, other=0)
    this_row = this - first_key
    if ((k == 0) | (previous != this)) & (this_row >= 0) & (this_row < keys):
        out += this_row * out_row
        total = tl.load(out + c, mask=c < columns, other=0.0).to(tl.float32)
        behind = tl.load(end + k).to(tl.int32)
        walked = behind
        if pieces is not None:
            block, last_block = k // POSITIONS, (behind - 1) // POSITIONS
            if block < last_block:
                walked = k
                for start in range(block, last_block + 1, STEP):
                    b = start + tl.arange(0, STEP)  # [S]
                    side = ((b == block) & (k % POSITIONS > 0)).to(tl.int64)
                    value = tl.load(
                        pieces + (2 * b + side)[:, None] * columns + c[None, :],
                        mask=(b <= last_block)[:, None] & (c < columns)[None, :],
                        other=0.0,
                    )  # [S, BC]
                    total += tl.sum(value, 0)
        total += sum_of_rows(
            coefficient, source, order, k, walked, c, columns, source_row, SOURCE, STEP, BLOCK
        )
        tl.store(out + c, total.to(out.dtype.element_ty), mask=c < columns)


def groups(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order, sorted keys, end of each one's run): rows with equal keys, next to each other."""
    key, order = torch.sort(key, stable=True)
    return order, key, torch.searchsorted(key, key, right=True)


def sum_long_runs(
    coefficient: Tensor, source: Tensor | None, grouped: tuple[Tensor, Tensor, Tensor]
) -> Tensor | None:
    """What `add_rows` needs of runs in several blocks; None where there is one block alone.

    Float32 [2 * blocks, columns of source or 1]: about 2 sqrt(M) rows at most, and M / 32.
    """
    rows, columns = coefficient.shape[0], 1 if source is None else source.shape[1]
    positions = _positions(rows)
    if rows <= positions:
        return None
    blocks = triton.cdiv(rows, positions)
    pieces = coefficient.new_empty(2 * blocks, columns)
    block = _columns_block(columns)
    sum_pieces_kernel[(2 * blocks, triton.cdiv(columns, block))](
        pieces,
        coefficient,
        source,
        *grouped,
        rows,
        columns,
        0 if source is None else source.stride(0),
        SOURCE=source is not None,
        POSITIONS=positions,
        STEP=_STEP,
        BLOCK=block,
    )
    return pieces


def add_rows(
    out: Tensor,
    coefficient: Tensor,
    source: Tensor | None,
    grouped: tuple[Tensor, Tensor, Tensor],
    pieces: Tensor | None,
    first_key: int,
) -> None:
    """out[key - first_key] += coefficient * source (or 1), for the rows of `grouped = groups(key)`
    and `pieces = sum_long_runs(coefficient, source, grouped)`; negative keys and keys beyond out
    are left alone."""
    columns = out.shape[1]
    block = _columns_block(columns)
    add_rows_kernel[(coefficient.shape[0], triton.cdiv(columns, block))](
        out,
        coefficient,
        source,
        pieces,
        *grouped,
        first_key,
        out.shape[0],
        columns,
        out.stride(0),
        0 if source is None else source.stride(0),
        SOURCE=source is not None,
        POSITIONS=_positions(coefficient.shape[0]),
        STEP=_STEP,
        BLOCK=block,
    )


def scatter_rows(
    coefficient: Tensor, rows: Tensor, index: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """[count, D] with coefficient * rows at `index`, rounded once, after duplicates add up."""
    out = rows.new_zeros((count, rows.shape[1]), dtype=dtype)
    if index.shape[0] > 0:
        coefficient, grouped = coefficient.contiguous(), groups(index)
        add_rows(out, coefficient, rows, grouped, sum_long_runs(coefficient, rows, grouped), 0)
    return out


def _positions(rows: int) -> int:
    """Of a block: a run as long as M is walked in as many steps as it has pieces."""
    return max(_FEWEST_POSITIONS, triton.next_power_of_2(math.isqrt(rows)))


def _columns_block(columns: int) -> int:
    return min(triton.next_power_of_2(columns), 512)
