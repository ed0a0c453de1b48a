"""How the ops are registered: an eager call reaches its kernel and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memdlm_kernels
from tests.kernels.test_backends import OPS

ROOT = Path(memdlm_kernels.__file__).parent.parent

# Each op's first call, with its backward pass where it has one.
FIRST_CALLS = """
import sys, torch
import memdlm_kernels as kernels

def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)

calls = {
    "combine_rows": lambda: kernels.combine_rows(
        leaf(6, 8), torch.randperm(6).view(3, 2), leaf(3, 2)),
    "fast_weight_reset_": lambda: kernels.fast_weight_reset_(
        torch.empty(1, 8), torch.tensor([0, 8]), torch.ones(1), torch.tensor([1])),
    "fast_weight_sgd": lambda: kernels.fast_weight_sgd(
        leaf(1, 8), leaf(1, 8), torch.tensor([0, 8]), 0.1, 1.0)[0],
    "fast_weight_sgd_": lambda: kernels.fast_weight_sgd_(
        torch.ones(1, 8), torch.ones(1, 8), torch.tensor([0, 8]), 0.1, 1.0),
    "grouped_linear": lambda: kernels.grouped_linear(
        leaf(8, 8), leaf(2, 8, 8), torch.tensor([3, 8], dtype=torch.int32)),
    "grouped_lora_linear": lambda: kernels.grouped_lora_linear(
        leaf(8, 8), leaf(8, 8), leaf(2, 4, 8), leaf(2, 8, 4),
        torch.tensor([3, 8], dtype=torch.int32), 2.0),
    "lora_linear": lambda: kernels.lora_linear(leaf(4, 8), leaf(4, 8), leaf(2, 8), leaf(8, 2), 2.0),
    "lora_swiglu": lambda: kernels.lora_swiglu(
        leaf(4, 8), leaf(4, 6), leaf(4, 6), leaf(4, 8), leaf(12, 2), 2.0),
    "masked_cross_entropy": lambda: kernels.masked_cross_entropy(leaf(4, 9), torch.arange(4)),
    "masked_linear_cross_entropy": lambda: kernels.masked_linear_cross_entropy(
        leaf(4, 8), leaf(9, 8), torch.arange(4)),
    "masked_linear_kl": lambda: kernels.masked_linear_kl(
        leaf(4, 8), torch.randn(4, 8), torch.randn(9, 8)),
    "spread_rows": lambda: kernels.spread_rows(leaf(3, 8), torch.randperm(6).view(3, 2)),
}
out = calls[sys.argv[1]]()
if isinstance(out, torch.Tensor) and out.requires_grad:
    out.sum().backward()
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
"""


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_first_call_imports_no_compiler(op):
    command = [sys.executable, "-c", FIRST_CALLS, op]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_autograd_sees_what_an_op_writes():
    param, segments = torch.zeros(1, 8), torch.tensor([0, 8])
    weight = torch.ones(1, 8, requires_grad=True)
    product = (weight * param).sum()
    memdlm_kernels.fast_weight_reset_(param, segments, torch.ones(1), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_an_op_without_a_derivative_says_so():
    grad = torch.ones(4, 8, requires_grad=True)
    stash = torch.ones(4, 8)
    out = torch.ops.memdlm.masked_linear_cross_entropy_stash_backward(
        grad[:, 0], stash, None, 4, torch.float32, "cpu"
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        out.sum().backward()
