"""Rows added up where their keys say, in an order that does not vary: no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rows_kernel(
    out,
    coefficient,
    source,
    order,
    key,
    end,
    first_key,
    keys,
    columns,
    out_row,
    source_row,
    SOURCE: tl.constexpr,
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
        for position in range(k, tl.load(end + k).to(tl.int32)):
            row = tl.load(order + position)
            scale = tl.load(coefficient + row)
            if SOURCE:
                value = tl.load(source + row * source_row + c, mask=c < columns, other=0.0)
                total += scale * value.to(tl.float32)
            else:
                total += scale
        tl.store(out + c, total.to(out.dtype.element_ty), mask=c < columns)


def groups(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order, sorted keys, end of each one's run): rows with equal keys, next to each other."""
    key, order = torch.sort(key, stable=True)
    return order, key, torch.searchsorted(key, key, right=True)


def add_rows(
    out: Tensor,
    coefficient: Tensor,
    source: Tensor | None,
    grouped: tuple[Tensor, Tensor, Tensor],
    first_key: int,
) -> None:
    """out[key - first_key] += coefficient * source (or 1), for the rows of `grouped = groups(key)`;
    keys beyond out are left alone."""
    columns = out.shape[1]
    block = min(triton.next_power_of_2(columns), 512)
    add_rows_kernel[(coefficient.shape[0], triton.cdiv(columns, block))](
        out,
        coefficient,
        source,
        *grouped,
        first_key,
        out.shape[0],
        columns,
        out.stride(0),
        0 if source is None else source.stride(0),
        SOURCE=source is not None,
        BLOCK=block,
    )


def scatter_rows(
    coefficient: Tensor, rows: Tensor, index: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """[count, D] with coefficient * rows at `index`, rounded once, after duplicates add up."""
    out = rows.new_zeros((count, rows.shape[1]), dtype=dtype)
    if index.shape[0] > 0:
        add_rows(out, coefficient.contiguous(), rows, groups(index), 0)
    return out
