"""Triton's interpreter, mended where it is silently wrong: bfloat16 is held as raw 16-bit words."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Let the interpreter multiply bfloat16 matrices, and round to bfloat16 as the hardware does.

    As it is, `tl.dot` multiplies the raw words of bfloat16 operands as integers, and a conversion
    to bfloat16 may cut bits off instead of rounding to the nearest.
    """
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *options):
        return dot(self, _widen(a), _widen(b), d, *options)

    def cast_impl(self, src, dst_type):
        to, out = dst_type.scalar, src.dtype.scalar
        if to == tl.bfloat16 and out == tl.float32:
            values = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
            words = values.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(words, to)
        return cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _widen(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    words = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(words.view(np.float32), tl.float32)
