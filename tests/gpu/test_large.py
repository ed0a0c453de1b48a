"""More than 2**31 elements: the end of each tensor is as right as its beginning."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from memdlm_kernels import (
    fast_weight_reset_,
    fast_weight_sgd_,
    lora_linear,
    masked_cross_entropy,
    masked_linear_cross_entropy,
)
from tests.kernels.devices import HAS_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]

LARGE = 2**31
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()


def test_logits():
    vocabulary = 157_184
    rows = LARGE // vocabulary + 100
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=DTYPE).requires_grad_()
    target = torch.full((rows,), -100, device="cuda")
    masked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    target[masked] = torch.tensor([0, 7, 99, 1234, vocabulary - 1], device="cuda")
    nll = masked_cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    few = logits.detach()[masked].double().requires_grad_()
    expected = F.cross_entropy(few, target[masked], reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), few)
    torch.testing.assert_close(nll[masked].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[masked].double(), expected_grad, rtol=1e-2, atol=1e-6)
    assert not nll[2 : rows // 2].any()
    assert not grad[rows - 5].any()


def test_masked_rows_times_vocabulary():
    vocabulary, width = 157_184, 64
    rows = LARGE // vocabulary + 100
    hidden = torch.randn(rows, width, device="cuda", dtype=DTYPE).requires_grad_()
    head = torch.randn(vocabulary, width, device="cuda", dtype=DTYPE)
    target = torch.randint(vocabulary, (rows,), device="cuda")
    nll = masked_linear_cross_entropy(hidden, head, target, chunk_bytes=16 << 30)
    (grad,) = torch.autograd.grad(nll.sum(), hidden)
    for some in (slice(0, 8), slice(rows - 8, rows)):
        few = hidden.detach()[some].float().requires_grad_()
        expected = F.cross_entropy(few @ head.float().mT, target[some], reduction="none")
        (expected_grad,) = torch.autograd.grad(expected.sum(), few)
        torch.testing.assert_close(nll[some], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(grad[some].float(), expected_grad, rtol=2e-2, atol=2e-2)


def test_fast_weights():
    total = LARGE + 12_345
    segments = torch.tensor([0, 1000, LARGE - 7, LARGE + 5, total], device="cuda")
    bounds = torch.tensor([0.5, 0.0, 0.25, 1.0], device="cuda")
    seed = torch.tensor([3], device="cuda")
    param = torch.empty(1, total, device="cuda", dtype=DTYPE)
    fast_weight_reset_(param, segments, bounds, seed)
    ends = [param[0, a:b].float() for a, b in pairwise(segments.tolist())]
    for values, bound in zip(ends, bounds.tolist(), strict=True):
        assert values.abs().max() <= bound
        assert bool(values.any()) == (bound > 0)
    grad = torch.zeros_like(param)
    grad[0, LARGE - 7 :] = 1
    before = param[0, LARGE - 100 :].clone()
    norm, skipped = fast_weight_sgd_(param, grad, segments, 0.1, 1.0)
    lengths = torch.tensor([0, 0, 12, total - LARGE - 5], device="cuda", dtype=torch.float32)
    torch.testing.assert_close(norm[0], lengths.sqrt())
    assert not skipped.any()
    step = torch.zeros_like(before, dtype=torch.float32)
    step[93:105] = 0.1 / 12**0.5
    step[105:] = 0.1 / (total - LARGE - 5) ** 0.5
    after = param[0, LARGE - 100 :]
    torch.testing.assert_close(after.float(), (before.float() - step).to(DTYPE).float())


def test_rows_times_outputs():
    out, width = 8192, 64
    rows = LARGE // out + 300
    x = torch.randn(rows, width, device="cuda", dtype=DTYPE)
    base = torch.randn(rows, out, device="cuda", dtype=DTYPE)
    A = torch.randn(16, width, device="cuda", dtype=DTYPE) / 8
    B = torch.randn(out, 16, device="cuda", dtype=DTYPE) / 4
    actual = lora_linear(x, base, A, B, 2.0)
    for some in (slice(0, 8), slice(rows - 8, rows)):
        expected = base[some].float() + 2 * (x[some].float() @ A.float().mT) @ B.float().mT
        torch.testing.assert_close(actual[some].float(), expected, rtol=2e-2, atol=2e-2)
