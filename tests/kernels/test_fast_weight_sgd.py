import math
import re

import pytest
import torch
from torch.library import opcheck

from memdlm_kernels import fast_weight_sgd, fast_weight_sgd_
from memdlm_kernels.fast_weight_sgd import compiled
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

BACKENDS = backends("cpu", "cuda", "reference")
CLIPS = ["tensor", "global", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
# Empty segments at the start, within and at the end; one longer than the kernel's block.
SEGMENTS = torch.tensor([0, 0, 5, 5, 77, 900, 20_003, 20_003])
LR, MAX_NORM = 0.1, 1.0


def inputs(sets=3, segments=SEGMENTS, *, dtype=torch.float32, grad_dtype=None, device="cpu"):
    torch.manual_seed(0)
    columns = int(segments[-1])
    param = torch.randn(sets, columns).to(device, dtype)
    # Norms on both sides of the bound.
    grad = torch.randn(sets, columns) * torch.logspace(-3, 1, max(columns, 1))[:columns]
    return param, grad.to(device, grad_dtype or dtype)


def loop(param, grad, segments, lr, max_norm, clip):
    """The update one tensor at a time, written from the paper and not from the reference."""
    pieces = list(zip(segments.tolist(), segments.tolist()[1:], strict=False))
    norm = torch.zeros(len(param), len(pieces), dtype=torch.float64)
    for row in range(len(param)):
        for p, (begin, end) in enumerate(pieces):
            norm[row, p] = grad[row, begin:end].double().norm()
        for p, (begin, end) in enumerate(pieces):
            size = {"tensor": norm[row, p], "global": norm[row].norm(), "none": torch.tensor(0.0)}
            scale = min(1.0, max_norm / max(size[clip].item(), 1e-300))
            param[row, begin:end] -= lr * scale * grad[row, begin:end]
    return norm


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_is_the_loop_over_tensors(backend, device, clip):
    param, grad = inputs(dtype=torch.float64, device=device)
    expected = param.clone()
    expected_norm = loop(expected, grad, SEGMENTS, LR, MAX_NORM, clip)
    before = grad.clone()
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip)
    norm, skipped = fast_weight_sgd_(param, grad, *args, backend=backend)
    torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm.cpu(), expected_norm, rtol=1e-12, atol=0)
    assert not skipped.any()
    assert torch.equal(grad, before)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_matches_truth(backend, device, dtype, grad_dtype, clip):
    param, grad = inputs(dtype=dtype, grad_dtype=grad_dtype, device=device)
    actual, expected, truth = param.clone(), param.clone(), param.double()
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip)
    norm, skipped = fast_weight_sgd_(actual, grad, *args, backend=backend)
    expected_norm, expected_skipped = fast_weight_sgd_(expected, grad, *args, backend="reference")
    true_norm, _ = fast_weight_sgd_(truth, grad.double(), *args, backend="reference")
    assert torch.equal(skipped, expected_skipped)
    # In float64 the reference is the truth, and its own sum of squares has some rounding.
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    else:
        assert_as_accurate("param", actual, truth, expected)
    if grad_dtype == torch.float64:
        torch.testing.assert_close(norm, expected_norm, rtol=1e-12, atol=0)
    else:
        assert_as_accurate("norm", norm, true_norm, expected_norm)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_non_finite_row_is_left_bit_for_bit(backend, device, clip, bad):
    param, grad = inputs(4, device=device)
    grad[1, 6] = bad
    loss = torch.tensor([0.5, 1.0, bad, 2.0], device=device)
    param[1, 3] = math.nan  # kept as it is, payload and all
    param[2, 4] = -0.0
    before = param.clone()
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip)
    norm, skipped = fast_weight_sgd_(param, grad, *args, loss, backend=backend)
    assert skipped.tolist() == [False, True, True, False]
    assert torch.equal(param[1:3].view(torch.int32), before[1:3].view(torch.int32))
    assert not norm[1, 3].isfinite()
    assert norm[[0, 2, 3]].isfinite().all()
    # The other rows are what they would be without their bad neighbours.
    alone, good = before[[0, 3]], grad[[0, 3]]
    fast_weight_sgd_(alone, good, *args, backend=backend)
    assert torch.equal(param[[0, 3]], alone)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_squares_neither_overflow_nor_underflow(backend, device):
    segments = torch.tensor([0, 4, 8], device=device)
    grad = torch.tensor([[1e30] * 4 + [1e-30] * 4], device=device)
    param = torch.zeros(1, 8, device=device)
    # The factor of the first segment, 5e-66, is no float32 either.
    norm, skipped = fast_weight_sgd_(param, grad, segments, 1.0, 1e-35, backend=backend)
    torch.testing.assert_close(norm.cpu(), torch.tensor([[2e30, 2e-30]]))
    assert not skipped.any()
    torch.testing.assert_close(param, torch.full_like(param, -0.5e-35), atol=0, rtol=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_norm_that_is_no_float32_skips_the_row(backend, device, clip):
    """A segment's norm, not the row's: the second row has the larger one."""
    segments = torch.tensor([0, 4, 8, 12], device=device)
    largest = torch.finfo(torch.float32).max
    grad = torch.zeros(2, 12, device=device)
    grad[0, 4:6] = 0.8 * largest
    grad[1, ::4] = 0.9 * largest
    param = torch.ones_like(grad)
    norm, skipped = fast_weight_sgd_(param, grad, segments, LR, MAX_NORM, clip, backend=backend)
    assert skipped.tolist() == [True, False]
    assert norm.isfinite().tolist() == [[True, False, True], [True, True, True]]
    assert (param[0] == 1).all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_zero_gradient_changes_nothing(backend, device, clip):
    """The first step's dA is exactly zero."""
    param, grad = inputs(device=device)
    before = param.clone()
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip)
    norm, skipped = fast_weight_sgd_(param, torch.zeros_like(grad), *args, backend=backend)
    assert torch.equal(param, before)
    assert not norm.any()
    assert not skipped.any()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_infinite_max_norm_does_not_clip(backend, device, clip):
    param, grad = inputs(device=device)
    expected = param - LR * grad
    fast_weight_sgd_(param, grad, SEGMENTS.to(device), LR, math.inf, clip, backend=backend)
    torch.testing.assert_close(param, expected)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("sets", "segments"), [(0, [0, 3]), (2, [0]), (2, [0, 0, 0]), (1, [0, 1])])
def test_small_shapes(backend, device, sets, segments):
    segments = torch.tensor(segments, device=device)
    param, grad = inputs(sets, segments, device=device)
    expected = param - LR * grad
    norm, skipped = fast_weight_sgd_(param, grad, segments, LR, 1e9, backend=backend)
    torch.testing.assert_close(param, expected)
    assert norm.shape == (sets, len(segments) - 1)
    assert skipped.tolist() == [False] * sets


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_strides(backend, device):
    """Rows of a wider buffer, columns apart; expanded and transposed gradients; sliced tables."""
    segments = torch.tensor([0, 9, 3, 9, 7, 9], device=device)[::2]
    wide, tall, broad = (torch.randn(n, m, device=device) for n, m in ((3, 20), (7, 3), (3, 14)))
    grads = (tall.T, torch.randn(7, device=device).expand(3, 7), broad[:, ::2])
    for param in (wide[:, 5:12], wide[:, 3:17:2], torch.randn(7, 3, device=device).T):
        for grad in grads:
            base, expected = param._base, param.clone(memory_format=torch.contiguous_format)
            loop(expected, grad, segments, LR, MAX_NORM, "tensor")
            outside = base.sum() - param.sum()
            fast_weight_sgd_(param, grad, segments, LR, MAX_NORM, backend=backend)
            torch.testing.assert_close(param, expected)
            torch.testing.assert_close(base.sum() - param.sum(), outside)


@pytest.mark.parametrize("cast_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_cast_follows_param(backend, device, dtype, cast_dtype):
    if dtype == cast_dtype:
        return
    param, grad = inputs(dtype=dtype, device=device)
    loss = torch.tensor([1.0, math.inf, 2.0], device=device)
    plain = param.clone()
    # Rows and columns apart; a skipped row keeps what is there.
    cast = torch.full((3, 2 * param.shape[1]), 7.0, dtype=cast_dtype, device=device)[:, ::2]
    for view in (cast, cast.clone(memory_format=torch.contiguous_format)):
        args = (grad, SEGMENTS.to(device), LR, MAX_NORM, "tensor", loss)
        fast_weight_sgd_(plain, *args, backend=backend)
        fast_weight_sgd_(param, *args, cast=view, backend=backend)
        assert torch.equal(param, plain)
        assert torch.equal(view[[0, 2]], param[[0, 2]].to(cast_dtype))
        assert (view[1] == 7).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_leaf_that_requires_grad(backend, device):
    param, grad = inputs(device=device)
    param.requires_grad_()
    kept = param.square().sum()
    fast_weight_sgd_(param, grad, SEGMENTS.to(device), LR, MAX_NORM, backend=backend)
    assert param.is_leaf
    assert param.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_same_bits_whatever_the_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param, grad = inputs()
            norm, _ = fast_weight_sgd_(param, grad, SEGMENTS, LR, MAX_NORM, backend="cpu")
            results.append((param, norm))
    finally:
        torch.set_num_threads(threads)
    for param, norm in results[1:]:
        assert torch.equal(param, results[0][0])
        assert torch.equal(norm, results[0][1])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_function_is_the_step_bit_for_bit(backend, device, dtype, grad_dtype, clip):
    param, grad = inputs(dtype=dtype, grad_dtype=grad_dtype, device=device)
    loss = torch.tensor([1.0, math.nan, 2.0], device=device)
    before, grad_before, stepped = param.clone(), grad.clone(), param.clone()
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip, loss)
    updated, norm, skipped = fast_weight_sgd(param, grad, *args, backend=backend)
    expected_norm, expected_skipped = fast_weight_sgd_(stepped, grad, *args, backend=backend)
    assert updated.dtype == dtype
    assert torch.equal(updated, stepped)
    assert torch.equal(norm, expected_norm)
    assert torch.equal(skipped, expected_skipped)
    assert torch.equal(param, before)
    assert torch.equal(grad, grad_before)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_function_takes_one_set_for_all_rows(backend, device):
    """Which nothing could write in place."""
    param, grad = inputs(device=device)
    wide = param[:1].expand_as(param)
    args = (SEGMENTS.to(device), LR, MAX_NORM)
    updated, _, _ = fast_weight_sgd(wide, grad, *args, backend=backend)
    expected, _, _ = fast_weight_sgd(wide.contiguous(), grad, *args, backend=backend)
    assert torch.equal(updated, expected)


def slopes(param, grad, grad_updated, *args, backend):
    """The gradients of param and grad."""
    leaves = param.detach().requires_grad_(), grad.detach().requires_grad_()
    updated, _, _ = fast_weight_sgd(*leaves, *args, backend=backend)
    return torch.autograd.grad(updated, leaves, grad_updated)


def assert_slopes(param, grad, grad_updated, *args, backend):
    """Against the reference's in float64; returns grad's."""
    grad_before = grad.clone()
    grad_param, actual = slopes(param, grad, grad_updated, *args, backend=backend)
    _, expected = slopes(param, grad, grad_updated, *args, backend="reference")
    wide = param.double(), grad.double(), grad_updated.double()
    _, truth = slopes(*wide, *args, backend="reference")
    assert torch.equal(grad, grad_before)
    assert torch.equal(grad_param, grad_updated)
    assert actual.dtype == grad.dtype
    if grad.dtype == torch.float64:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-14)
    else:
        assert_as_accurate("grad_grad", actual, truth, expected)
    return actual


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_derivative_matches_truth(backend, device, dtype, grad_dtype, clip):
    param, grad = inputs(dtype=dtype, grad_dtype=grad_dtype, device=device)
    grad[2] = 0  # neither is any norm of this row above the bound
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip)
    assert_slopes(param, grad, torch.randn_like(param), *args, backend=backend)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_derivative_of_what_is_clipped_has_no_part_along_the_gradient(backend, device, clip):
    """Not even the rounding of a norm."""
    param, grad = inputs(device=device)
    args = (SEGMENTS.to(device), LR, 5e-3, clip)
    _, slope = slopes(param, grad, grad, *args, backend=backend)
    # The first segment of five columns is not clipped on its own.
    first = {"tensor": 5, "global": 0, "none": slope.shape[1]}[clip]
    torch.testing.assert_close(slope[:, :first], -LR * grad[:, :first])
    assert (slope[:, first:].abs() < 1e-12).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_derivative_of_a_skipped_row_is_zero(backend, device, clip, bad):
    param, grad = inputs(5, device=device)
    grad[1, 6] = bad
    grad[4] = bad
    loss = torch.tensor([0.5, 1.0, bad, 2.0, 3.0], device=device)
    above = torch.randn_like(param)
    above[2, 7] = math.nan
    args = (SEGMENTS.to(device), LR, MAX_NORM, clip)
    grad_param, slope = slopes(param, grad, above, *args, loss, backend=backend)
    assert torch.equal(grad_param.nan_to_num(7.0), above.nan_to_num(7.0))
    assert not slope[[1, 2, 4]].any()
    good = [0, 3]
    _, alone = slopes(param[good], grad[good], above[good], *args, backend=backend)
    assert torch.equal(slope[good], alone)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("max_norm", [MAX_NORM, math.inf])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_derivative_at_zero_gradient_or_without_bound(backend, device, clip, max_norm):
    param, grad = inputs(device=device)
    grad *= max_norm == math.inf
    above = torch.randn_like(param)
    args = (SEGMENTS.to(device), LR, max_norm, clip)
    _, slope = slopes(param, grad, above, *args, backend=backend)
    torch.testing.assert_close(slope, -LR * above)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradient_as_long_as_the_bound_is_not_clipped(backend, device):
    segments = torch.tensor([0, 2, 4], device=device)
    grad = torch.tensor([[3.0, 4.0, 3.0, 4.0 + 1e-5]], device=device)
    above = torch.ones_like(grad)
    _, slope = slopes(torch.zeros_like(grad), grad, above, segments, LR, 5.0, backend=backend)
    torch.testing.assert_close(slope[0, :2].cpu(), torch.tensor([-LR, -LR]))
    across = torch.tensor([1.0, 1.0]) - torch.tensor([3.0, 4.0]) * 7 / 25
    torch.testing.assert_close(slope[0, 2:].cpu(), -LR * across, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_derivative_clips_what_the_step_clipped(backend, device):
    """Backward sums the squares again, to the last bit as forward does."""
    param, grad = inputs(1, torch.tensor([0, 50_007]), dtype=torch.float64, device=device)
    segments = torch.tensor([0, 50_007], device=device)
    _, norm, _ = fast_weight_sgd(param, grad, segments, LR, MAX_NORM, backend=backend)
    below = math.nextafter(norm.item(), 0)
    _, kept = slopes(param, grad, grad, segments, LR, norm.item(), backend=backend)
    _, clipped = slopes(param, grad, grad, segments, LR, below, backend=backend)
    torch.testing.assert_close(kept, -LR * grad, rtol=1e-15, atol=0)
    assert (clipped.abs() < 1e-12).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_derivative_of_huge_and_tiny_gradients(backend, device):
    segments = torch.tensor([0, 4, 8], device=device)
    grad = torch.tensor([[1e30, -1e30, 1e30, 1e30, 1e-30, 1e-30, -1e-30, 1e-30]], device=device)
    above = torch.arange(8.0, device=device)[None]
    args = (segments, 1e30, 1e-35)
    assert assert_slopes(torch.zeros_like(grad), grad, above, *args, backend=backend).any()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("sets", "segments"), [(0, [0, 3]), (2, [0]), (2, [0, 0, 0]), (1, [0, 1])])
def test_derivative_of_small_shapes(backend, device, sets, segments):
    segments = torch.tensor(segments, device=device)
    param, grad = inputs(sets, segments, device=device)
    above = torch.ones_like(param)
    _, slope = slopes(param, grad, above, segments, LR, 1e9, backend=backend)
    torch.testing.assert_close(slope, -LR * above)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_derivative_with_strides(backend, device):
    """Columns apart, transposed, expanded: a sum's gradient has no stride at all."""
    segments = torch.tensor([0, 3, 7], device=device)
    param = torch.randn(3, 7, device=device)
    tall, broad = torch.randn(7, 3, device=device), torch.randn(3, 14, device=device)
    one = torch.ones((), device=device)
    for grad in (tall.T, broad[:, ::2], broad[:, 3:10], tall[:, 0].expand(3, 7)):
        for above in (one.expand(3, 7), tall.T, broad[:, 1:8], param[:1].expand(3, 7)):
            args = (segments, LR, MAX_NORM)
            _, actual = slopes(param, grad, above, *args, backend=backend)
            plain = grad.contiguous(), above.contiguous()
            _, expected = slopes(param, *plain, *args, backend="reference")
            torch.testing.assert_close(actual, expected)


def test_same_derivative_whatever_the_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param, grad = inputs()
            args = (SEGMENTS, LR, MAX_NORM)
            results.append(slopes(param, grad, param, *args, backend="cpu")[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradcheck(backend, device, clip):
    torch.manual_seed(0)
    segments = torch.tensor([0, 2, 2, 5, 7], device=device)
    param = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    grad = torch.randn(3, 7, dtype=torch.float64, device=device)
    grad[:, :2] *= 0.1  # not clipped
    grad.requires_grad_()
    loss = torch.tensor([1.0, math.nan, 2.0], device=device)

    def function(param, grad):
        args = (segments, LR, 1.5, clip, loss)
        return fast_weight_sgd(param, grad, *args, backend=backend)[0]

    assert torch.autograd.gradcheck(function, (param, grad))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, (param, grad))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_norm_and_skipped_are_constants(backend, device):
    param, grad = inputs(device=device)
    leaves = param.requires_grad_(), grad.requires_grad_()
    updated, *others = fast_weight_sgd(*leaves, SEGMENTS.to(device), LR, MAX_NORM, backend=backend)
    assert updated.requires_grad
    assert not any(other.requires_grad for other in others)


@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_second_derivative_says_that_there_is_none(backend, device):
    param, grad = inputs(device=device)
    grad.requires_grad_()
    updated, _, _ = fast_weight_sgd(param, grad, SEGMENTS.to(device), LR, MAX_NORM, backend=backend)
    (slope,) = torch.autograd.grad(updated.square().sum(), grad, create_graph=True)
    with pytest.raises(RuntimeError, match="fast_weight_sgd_backward"):
        slope.sum().backward()


@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_only_what_requires_grad_has_a_backward_pass(backend, device, monkeypatch):
    param, grad = inputs(device=device)
    monkeypatch.delattr(compiled, "fast_weight_sgd_backward")
    args = (SEGMENTS.to(device), LR, MAX_NORM)
    updated, _, _ = fast_weight_sgd(param.requires_grad_(), grad, *args, backend=backend)
    (slope,) = torch.autograd.grad(updated.sum(), param)
    assert (slope == 1).all()


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_opcheck(backend, device, optional):
    param, grad = inputs(dtype=torch.bfloat16, grad_dtype=torch.float32, device=device)
    loss = torch.tensor([1.0, math.nan, 2.0], device=device) if optional else None
    cast = param.float() if optional else None
    args = (param, grad, SEGMENTS.to(device), LR, MAX_NORM, "tensor", loss, cast, backend)
    opcheck(torch.ops.memdlm.fast_weight_sgd_.default, args)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_opcheck_of_the_function(backend, device, optional):
    param, grad = inputs(dtype=torch.bfloat16, grad_dtype=torch.float32, device=device)
    loss = torch.tensor([1.0, math.nan, 2.0], device=device) if optional else None
    leaves = param.requires_grad_(), grad.requires_grad_()
    args = (SEGMENTS.to(device), LR, MAX_NORM, "tensor")
    opcheck(torch.ops.memdlm.fast_weight_sgd.default, (*leaves, *args, loss, backend))
    skipped = torch.tensor([False, True, False], device=device)
    above = torch.randn_like(param).detach()
    args = (above, grad.detach(), *args, skipped, backend)
    opcheck(torch.ops.memdlm.fast_weight_sgd_backward.default, args)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole(backend, device):
    segments = SEGMENTS.to(device)

    def step(param, grad, loss, cast):
        norm, skipped = fast_weight_sgd_(
            param, grad, segments, LR, MAX_NORM, loss=loss, cast=cast, backend=backend
        )
        return norm, skipped, param.sum(), cast.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = torch.tensor([1.0, math.nan, 2.0], device=device)
    for requires_grad in (False, True):
        param, grad = inputs(device=device)
        eager, cast = param.clone(), param.bfloat16()
        eager_cast = cast.clone()
        expected = step(eager.requires_grad_(requires_grad), grad, loss, eager_cast)
        actual = compiled(param.requires_grad_(requires_grad), grad, loss, cast)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(param, eager)
        assert torch.equal(cast, eager_cast)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_function_compiles_whole(backend, device):
    segments = SEGMENTS.to(device)

    def function(param, grad, loss):
        args = (segments, LR, MAX_NORM, "tensor", loss)
        updated, norm, skipped = fast_weight_sgd(param, grad, *args, backend=backend)
        return updated.square().sum(), norm, skipped

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    loss = torch.tensor([1.0, math.nan, 2.0], device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs(device=device)]
    expected, actual = function(*leaves, loss), compiled(*leaves, loss)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual[0], leaves), torch.autograd.grad(expected[0], leaves)
    )


BAD = {
    "param must be a floating-point tensor [S, T]": dict(param=torch.zeros(9)),
    "param is written in place and must not be expanded": dict(param=torch.zeros(9).expand(2, 9)),
    "grad must be floating-point of param's shape [2, 9]": dict(grad=torch.zeros(2, 8)),
    "grad must be on param's device": dict(grad=torch.zeros(2, 9, device="meta")),
    "segments must be an int64 tensor [P + 1]": dict(segments=torch.tensor([0.0, 9.0])),
    "segments must be on cpu": dict(segments=torch.zeros(2, dtype=torch.int64, device="meta")),
    "segments must start at 0 and end at T = 9, got 0 and 8": dict(segments=torch.tensor([0, 8])),
    "segments must ascend": dict(segments=torch.tensor([0, 5, 3, 9])),
    "cast must be [2, 9], like param, of another dtype": dict(cast=torch.zeros(2, 9)),
    "cast must be a floating-point tensor [S, T]": dict(cast=torch.zeros(2, 9).int()),
    "cast must be on param's device": dict(
        cast=torch.zeros(2, 9, dtype=torch.float16, device="meta")
    ),
    "lr must be finite": dict(lr=math.nan),
    "max_norm must be above 0": dict(max_norm=0.0),
    "clip must be 'tensor', 'global' or 'none'": dict(clip="layer"),
    "loss must be floating-point [S] = [2]": dict(loss=torch.tensor(1.0)),
    "loss must be on param's device": dict(loss=torch.zeros(2, device="meta")),
    "backend must be None or one of 'cpu', 'cuda', 'reference'": dict(backend="triton"),
    "cuda: the tensors are on cpu": dict(backend="cuda"),
}


IN_PLACE_ALONE = {message for message in BAD if "cast" in BAD[message] or "in place" in message}


@pytest.mark.parametrize("message", sorted(BAD.keys() - IN_PLACE_ALONE))
def test_bad_input_of_the_function(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fast_weight_sgd(**{**good_input(), **BAD[message]})


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = good_input()
    with pytest.raises(ValueError, match=re.escape(message)):
        fast_weight_sgd_(**{**good, **BAD[message]})
    assert not good["param"].any()


def good_input():
    return dict(
        param=torch.zeros(2, 9),
        grad=torch.ones(2, 9),
        segments=torch.tensor([0, 4, 9]),
        lr=0.1,
        max_norm=1.0,
    )
