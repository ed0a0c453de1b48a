"""grouped_lora_linear by Triton: the products of `_triton/low_rank.py`, offsets on their device.

Forward is two launches, shrink and expand; backward one for each of grad_shrink, grad_x, grad_A and
grad_B that is needed. Nothing is cast, reordered or added by a launch of its own, and x, base, out
and their gradients are each read or written once by each launch.
"""

from torch import Tensor

from memdlm_kernels._triton import low_rank


def shrink_of(x: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float) -> Tensor:
    return low_rank.shrink(x, _of_A(A), _ends(offsets), scale)


def grouped_lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    shrink = shrink_of(x, A, B, offsets, scale)
    return low_rank.expand(shrink, _of_B(B, A), _ends(offsets), base), shrink


def grouped_lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, ends = low_rank.in_rows(grad_out), _ends(offsets)
    grad_x = grad_out.new_empty(0)
    grad_A = A.new_empty(A.shape if x is not None else (0,))
    grad_B = B.new_empty(B.shape if shrink is not None else (0,))
    if need_grad_x or x is not None:
        grad_shrink = low_rank.shrink(grad_out, _of_B(B, A), ends, scale)
        if need_grad_x:
            grad_x = low_rank.expand(grad_shrink, _of_A(A), ends)
        if x is not None:
            low_rank.outer(grad_shrink, x, ends, _of_A(grad_A))
    if shrink is not None:
        low_rank.outer(shrink, grad_out, ends, _of_B(grad_B, A))
    return grad_x, grad_A, grad_B


def _of_A(A: Tensor) -> Tensor:
    """As [S, E, 1, P R, in]: all projections read the same columns of x."""
    return (A if A.dim() == 4 else A.unsqueeze(0)).unsqueeze(2)


def _of_B(B: Tensor, A: Tensor) -> Tensor:
    """As [S, E, P, R, out / P]."""
    projections = A.shape[-2] // B.shape[-1]
    return (B if B.dim() == 4 else B.unsqueeze(0)).unflatten(-2, (projections, -1)).mT


def _ends(offsets: Tensor) -> Tensor:
    return offsets.flatten().contiguous()
