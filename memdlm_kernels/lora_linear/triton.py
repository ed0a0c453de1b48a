"""lora_linear on a GPU: the library's products, and one Triton kernel that adds to base.

The library's own out-of-place sum (torch.addmm) first copies base, one more pass over [..., out];
but one group of many rows is what its other products are best at. Launches: forward two, x Aᵀ and
the sum; backward one for each of grad_shrink, grad_x, grad_A and grad_B that is needed. Where A and
B have not x's dtype, each product by the library takes one more, to cast a small tensor: A or B
before it, or their gradient after it.
"""

from torch import Tensor

from memdlm_kernels._triton import low_rank


def shrink_of(x: Tensor, A: Tensor, scale: float) -> Tensor:
    shrink = _product(_rows(x, A), A.to(x.dtype).mT, scale)
    return shrink.view(*x.shape[:-1], A.shape[-2])


def lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    shrink = shrink_of(x, A, scale)
    weight = (
        (B if B.dim() == 3 else B.unsqueeze(0)).mT.unsqueeze(1).unsqueeze(1)
    )  # [S, 1, 1, R, out]
    out = low_rank.expand(
        shrink.view(-1, shrink.shape[-1]), weight, None, base.reshape(-1, base.shape[-1])
    )
    return out.view(base.shape), shrink


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    leading, dtype = grad_out.shape[:-1], grad_out.dtype
    grad_x, grad_A, grad_B = grad_out.new_empty(0), A.new_empty(0), B.new_empty(0)
    # The gradient of a sum has stride 0, which the library does not take as it is.
    grad_out = _rows(grad_out.contiguous(), A)
    if need_grad_x or x is not None:
        grad_shrink = _product(grad_out, B.to(dtype), scale)
        if need_grad_x:
            grad_x = _product(grad_shrink, A.to(dtype)).view(*leading, A.shape[-1])
        if x is not None:
            grad_A = _product(grad_shrink.mT, _rows(x, A)).to(A.dtype)
    if shrink is not None:
        grad_B = _product(grad_out.mT, _rows(shrink, A)).to(B.dtype)
    return grad_x, grad_A, grad_B


def _product(left: Tensor, right: Tensor, scale: float = 1) -> Tensor:
    """scale * left @ right by one call: the scale is in the product's epilogue."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    into = out.addmm_ if out.dim() == 2 else out.baddbmm_
    return into(left, right, beta=0, alpha=scale)


def _rows(tensor: Tensor, A: Tensor) -> Tensor:
    """As A multiplies it: [N, columns], or [S, L, columns] with a set for each sequence."""
    return tensor.reshape(-1, tensor.shape[-1]) if A.dim() == 2 else tensor
