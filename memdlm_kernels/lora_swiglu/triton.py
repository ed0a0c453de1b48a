"""lora_swiglu by Triton: one pass over gate and up, forward and backward (`_triton/swiglu.py`).

Launches: forward two, the shrink and the pass; backward the pass, and one for each of grad_shrink,
grad_x, grad_A and grad_B that is needed. Where gate and up are two tensors, grad_shrink and grad_B
take one for each, and grad_shrink one to join them. The low-rank products of experts are those of
`_triton/low_rank.py`; others are the library's, which casts A, B and their gradients by launches of
its own.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from memdlm_kernels._triton import dense, low_rank
from memdlm_kernels._triton.groups import most_tiles
from memdlm_kernels._triton.swiglu import swiglu_backward_kernel, swiglu_forward_kernel

# Tiles of a program where rows abound, and how many programs then are enough for any GPU.
_MOST_TILES = 4
_MANY = 1024

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def lora_swiglu(
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    B_is_zero: bool,
) -> tuple[Tensor, Tensor | None]:
    shrink = None
    if x is not None and A is not None and not B_is_zero:
        shrink = _shrink(x, A, offsets, scale)
    halves = _halves(gate, up)
    h = gate.new_empty(halves[0].shape)
    if h.numel():
        grid, arguments = _pass(*halves, shrink, B, offsets)
        swiglu_forward_kernel[grid](h=h, **arguments)
    return h.view(*gate.shape[:-1], h.shape[-1]), shrink


def lora_swiglu_backward(
    grad_h: Tensor,
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    shrink: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
) -> Gradients:
    grads = [gate.new_empty(gate.shape)] + ([] if up is None else [up.new_empty(up.shape)])
    halves, grad_halves = _halves(gate, up), _halves(*grads)
    grad_h = grad_h.reshape(halves[0].shape)
    if grad_h.numel():
        grid, arguments = _pass(*halves, shrink, B, offsets)
        swiglu_backward_kernel[grid](
            grad_h=grad_h,
            grad_gate=grad_halves[0],
            grad_up=grad_halves[1],
            grad_h_row=grad_h.stride(0),
            grad_h_column=grad_h.stride(1),
            grad_row=grad_halves[0].stride(0),
            **arguments,
        )
    # Not one tensor for all: outputs of an op may not share memory.
    grad_x, grad_A, grad_B, no_up = (gate.new_empty(0) for _ in range(4))
    if A is not None and B is not None:
        products, ends = _products(offsets), _ends(offsets)
        wide = [_rows(grad) for grad in grads]  # [N, 2 I], or two of [N, I]
        if need_grad_x or need_grad_A:
            weights = _of_B(B, offsets).split(2 // len(wide), 2)
            parts = [products.shrink(d, w, ends, scale) for d, w in zip(wide, weights, strict=True)]
            grad_shrink = parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # [N, 2 R]
            if need_grad_x:
                grad_x = products.expand(grad_shrink, _of_A(A, offsets), ends)
                grad_x = grad_x.view(*gate.shape[:-1], A.shape[-1])
            if x is not None and need_grad_A:
                grad_A = A.new_empty(A.shape)
                products.outer(grad_shrink, _rows(x), ends, _of_A(grad_A, offsets))
        if need_grad_B:
            if x is not None and shrink is None:  # with a B of zeros, forward had no use for it
                shrink = _shrink(x, A, offsets, scale)
            assert shrink is not None
            grad_B = B.new_empty(B.shape)
            weights = _of_B(grad_B, offsets).split(2 // len(wide), 2)
            for s, d, w in zip(shrink.chunk(len(wide), -1), wide, weights, strict=True):
                products.outer(s, d, ends, w)
    return grad_x, grads[0], no_up if up is None else grads[1], grad_A, grad_B


def _pass(
    gate: Tensor, up: Tensor, shrink: Tensor | None, B: Tensor | None, offsets: Tensor | None
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of both kernels."""
    (rows, columns), sets, experts, ranks = gate.shape, 1, 1, 0
    weight: Tensor | None = None
    strides: tuple[int, ...] = (0,) * 5
    if shrink is not None and B is not None:
        weight = _of_B(B, offsets)
        sets, experts, _, ranks, _ = weight.shape
        strides = weight.stride()
    groups = sets * experts
    blocks = _blocks(gate, ranks)
    across = triton.cdiv(columns, blocks["BLOCK_C"])
    abound = rows // (_MOST_TILES * blocks["BLOCK_M"]) * across >= _MANY
    # Ranks beyond a block, and columns that no 16-byte access fits, take too many registers.
    early = 0 < ranks <= blocks["BLOCK_R"] and columns % 16 == 0
    # Without weights of a group to hold there is nothing to share.
    tiles = _MOST_TILES if abound and early else 1
    names = ("weight_set", "weight_expert", "weight_projection", "weight_rank", "weight_column")
    arguments = dict(
        gate=gate,
        up=up,
        shrink=shrink,
        weight=weight,
        ends=None if shrink is None else _ends(offsets),
        length=rows // groups,
        groups=groups,
        sets=sets,
        columns=columns,
        gate_row=gate.stride(0),
        up_row=up.stride(0),
        shrink_row=2 * ranks,
        **dict(zip(names, strides, strict=True)),
        GROUPS=triton.next_power_of_2(groups),
        TILES=tiles,
        RANKS=ranks,
        EARLY=early,
        **blocks,
    )
    return (most_tiles(rows, groups, tiles * blocks["BLOCK_M"]) * across,), arguments


def _blocks(gate: Tensor, ranks: int) -> dict[str, int]:
    if gate.dtype == torch.float32:
        # Its products are no tensor core's: a thread has rows and columns of both in registers.
        return dict(BLOCK_M=64, BLOCK_R=16, BLOCK_C=32, num_warps=8)
    # Without vectors each element has its own address in registers.
    vectors = gate.stride(0) % 16 == 0
    block_r = 16 if ranks <= 16 else 32
    return dict(BLOCK_M=64, BLOCK_R=block_r, BLOCK_C=64 if vectors else 32, num_warps=8)


def _shrink(x: Tensor, A: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    """[N, 2 R]."""
    return _products(offsets).shrink(_rows(x), _of_A(A, offsets), _ends(offsets), scale)


def _products(offsets: Tensor | None) -> Any:
    return dense if offsets is None else low_rank


def _ends(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.flatten().contiguous()


def _rows(tensor: Tensor) -> Tensor:
    return low_rank.in_rows(tensor.reshape(-1, tensor.shape[-1]))


def _halves(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """gate and up, each [N, I] in dense rows."""
    if up is not None:
        return _rows(gate), _rows(up)
    first, second = _rows(gate).chunk(2, -1)
    return first, second


def _of_A(A: Tensor, offsets: Tensor | None) -> Tensor:
    """As [S, E, 1, 2 R, in]: both projections read the same columns of x."""
    return _stacked(A, offsets).unsqueeze(2)


def _of_B(B: Tensor, offsets: Tensor | None) -> Tensor:
    """As [S, E, 2, R, I]."""
    return _stacked(B, offsets).unflatten(-2, (2, -1)).mT


def _stacked(weight: Tensor, offsets: Tensor | None) -> Tensor:
    """[S, E, m, n] of a weight with any of its leading dimensions."""
    if weight.dim() == 2:
        weight = weight.unsqueeze(0)
    if weight.dim() == 3:
        weight = weight.unsqueeze(1 if offsets is None else 0)
    return weight
