"""Products of the libraries with a float32 result, whatever the dtype of the factors."""

import torch
from torch import Tensor


def product_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b; out is float32."""
    if a.dtype != out.dtype:
        if out.is_cuda:
            _mixed_product_(out, a, b, accumulate)
            return
        a, b = a.to(out.dtype), b.to(out.dtype)  # the CPU's products have no out_dtype
    if accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _mixed_product_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    # The overloads themselves: not every torch that has them takes out= beside out_dtype=.
    if accumulate:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
