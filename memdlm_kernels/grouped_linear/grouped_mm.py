"""grouped_linear by torch.nn.functional.grouped_mm, where that is one kernel for all groups."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm_kernels._backends import Backend

_ALIGNMENT_BYTES = 16  # of every address and stride, for the copy engine of the GPU
_MAX_GROUPS = 1023  # the kernel prepares all of them in one block of threads


def _unfit(
    device: torch.device, dtype: torch.dtype, columns: int, out: int, groups: int
) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x must be float32, bfloat16 or float16, got {dtype}"
    step = _ALIGNMENT_BYTES // dtype.itemsize
    if any(size == 0 or size % step for size in (columns, out)):
        return (
            f"in and out must be multiples of {step} for {dtype}, above 0, got {columns} and {out}"
        )
    return _slow(device, dtype, groups) if device.type == "cuda" else None


def _slow(device: torch.device, dtype: torch.dtype, groups: int) -> str | None:
    """Why torch would read the offsets on the host and call a product for each group."""
    if dtype != torch.bfloat16:
        return f"on a GPU x must be bfloat16, got {dtype}"
    if groups > _MAX_GROUPS:
        return f"there must be at most {_MAX_GROUPS} groups, got {groups}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in (9, 10) else f"the GPU must be sm_90 or sm_100, got sm_{major}{minor}"


GROUPED_MM = Backend("grouped_mm", _unfit)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    return F.grouped_mm(_aligned(x), _aligned(weight).mT, offs=offsets.contiguous())


def grouped_linear_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if a.shape[0] == 0:
        return a.new_zeros(len(offsets), a.shape[1], b.shape[1])
    ends = offsets.contiguous()
    out = F.grouped_mm(_aligned(a).mT, _aligned(b), offs=ends)
    empty = (ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1)
    # On sm100 the block of an empty group is not zero (pytorch/pytorch issue 172439).
    return out.masked_fill_(empty, 0)


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it is not in rows or columns that are aligned as grouped_mm wants."""
    *outer, row, column = tensor.stride()
    in_rows = column == 1 and row >= tensor.shape[-1]
    in_columns = row == 1 and column >= tensor.shape[-2]
    apart = (*outer, row if in_rows else column)
    aligned = all(n * tensor.itemsize % _ALIGNMENT_BYTES == 0 for n in apart)
    if (in_rows or in_columns) and aligned and tensor.data_ptr() % _ALIGNMENT_BYTES == 0:
        return tensor
    # Not contiguous(), which takes a row of any stride, and any address.
    return tensor.clone(memory_format=torch.contiguous_format)
