"""grouped_lora_linear by torch.nn.functional.grouped_mm alone: offsets stay on their device.

Only its bfloat16 on sm90 and sm100 is one kernel for all groups; elsewhere it reads offsets on the
host itself and calls a product for each group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm_kernels._backends import Backend

_ALIGNMENT_BYTES = 16  # of every address and stride, for the copy engine of the GPU
_MAX_GROUPS = 1023  # the kernel prepares all of them in one block of threads


def _unfit(
    device: torch.device,
    dtype: torch.dtype,
    columns: int,
    out: int,
    rank: int,
    projections: int,
    groups: int,
) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x must be float32, bfloat16 or float16, got {dtype}"
    step = _ALIGNMENT_BYTES // dtype.itemsize
    sizes = (columns, out // projections, rank)
    if any(size == 0 or size % step for size in sizes):
        return (
            f"in, out / P and R must be multiples of {step} for {dtype}, above 0, got "
            f"{columns}, {out // projections} and {rank}"
        )
    if groups > _MAX_GROUPS:
        return f"there must be at most {_MAX_GROUPS} groups, got {groups}"
    return None


GROUPED_MM = Backend("grouped_mm", _unfit)


def shrink_of(x: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float) -> Tensor:
    shrink = x.new_empty(x.shape[0], A.shape[-2])
    if x.shape[0] > 0:
        ends = offsets.flatten().contiguous()
        product = F.grouped_mm(_rows(x), _by_group(A, x.dtype).mT, offs=ends)
        torch.mul(product, scale, out=shrink)
    return shrink


def grouped_lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = base.new_empty(base.shape)
    shrink = shrink_of(x, A, B, offsets, scale)
    if x.shape[0] == 0:
        return out, shrink
    projections = A.shape[-2] // B.shape[-1]
    ends = offsets.flatten().contiguous()
    for o, b, s, w in zip(
        out.chunk(projections, -1),  # P of [N, out / P]
        base.chunk(projections, -1),
        shrink.chunk(projections, -1),  # P of [N, R]
        _by_group(B, x.dtype).chunk(projections, -2),  # P of [G, out / P, R]
        strict=True,
    ):
        torch.add(b, F.grouped_mm(s, w.mT, offs=ends), out=o)
    return out, shrink


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
    rows, dtype = grad_out.shape[0], grad_out.dtype
    grad_x = grad_out.new_empty(0)
    grad_A = A.new_empty(A.shape if x is not None else (0,))
    grad_B = B.new_empty(B.shape if shrink is not None else (0,))
    if rows == 0:
        grad_x = grad_out.new_empty((0, A.shape[-1]) if need_grad_x else (0,))
        return grad_x, grad_A.zero_(), grad_B.zero_()
    projections = A.shape[-2] // B.shape[-1]
    ends = offsets.flatten().contiguous()
    empty = (ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1)
    grads = _rows(grad_out).chunk(projections, -1)  # P of [N, out / P]
    if need_grad_x or x is not None:
        grad_shrink = grad_out.new_empty(rows, A.shape[-2])
        for o, g, w in zip(
            grad_shrink.chunk(projections, -1),
            grads,
            _by_group(B, dtype).chunk(projections, -2),
            strict=True,
        ):
            torch.mul(F.grouped_mm(g, w, offs=ends), scale, out=o)
        if need_grad_x:
            grad_x = F.grouped_mm(grad_shrink, _by_group(A, dtype), offs=ends)
        if x is not None:
            _store(grad_A, [F.grouped_mm(grad_shrink.mT, _rows(x), offs=ends)], empty)
    if shrink is not None:
        shrinks = _rows(shrink).chunk(projections, -1)
        blocks = [F.grouped_mm(g.mT, s, offs=ends) for g, s in zip(grads, shrinks, strict=True)]
        _store(grad_B, blocks, empty)
    return grad_x, grad_A, grad_B


def _by_group(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [E, m, n] or [S, E, m, n] as [G, m, n], by expert and then by sequence."""
    if weight.dim() == 4:
        # Cast and reordered by one copy.
        weight = weight.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)
        weight = weight.flatten(0, 1)
    return _rows(weight.to(dtype))


def _rows(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it is not in rows that are aligned as grouped_mm wants them."""
    *strides, last = tensor.stride()
    aligned = all(n * tensor.itemsize % _ALIGNMENT_BYTES == 0 for n in strides)
    in_rows = last == 1 and strides[-1] >= tensor.shape[-1]
    if in_rows and aligned and tensor.data_ptr() % _ALIGNMENT_BYTES == 0:
        return tensor
    # Not contiguous(), which takes a row of any stride, and any address.
    return tensor.clone(memory_format=torch.contiguous_format)


def _store(gradient: Tensor, blocks: list[Tensor], empty: Tensor) -> None:
    """Write blocks, P of [G, m / P, n], to gradient [E, m, n] or [S, E, m, n]."""
    by_group = gradient.transpose(0, 1) if gradient.dim() == 4 else gradient
    for o, block in zip(by_group.chunk(len(blocks), -2), blocks, strict=True):
        # On sm100 the block of an empty group is not zero (pytorch/pytorch issue 172439).
        o.copy_(block.masked_fill_(empty, 0).view(o.shape))
