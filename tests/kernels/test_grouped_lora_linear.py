import math
import re

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import grouped_lora_linear
from tests.kernels.truth import assert_as_accurate

BACKENDS = ["cpu"]
# lora_alpha / R of the paper, and as in test_lora_linear.py a power of two.
SCALE = 2.0
NAMES = ("x", "base", "A", "B")


def offsets_of(lengths):
    """Offsets [E], or [E, S] where each expert has a list of lengths."""
    lengths = torch.tensor(lengths)
    return lengths.flatten().cumsum(0).to(torch.int32).view(lengths.shape)


def inputs(lengths, columns, out, rank, projections=1, *, dtype, weight_dtype=None, grad=True):
    """((x, base, A, B), offsets)."""
    torch.manual_seed(0)
    weight_dtype = weight_dtype or dtype
    offsets = offsets_of(lengths)
    rows, groups = offsets.flatten()[-1], offsets.shape[::-1]
    tensors = (
        torch.randn(rows, columns).to(dtype),
        torch.randn(rows, out).to(dtype),
        (torch.randn(*groups, projections * rank, columns) / math.sqrt(columns)).to(weight_dtype),
        torch.randn(*groups, out, rank).to(weight_dtype),
    )
    return tuple(tensor.requires_grad_(grad) for tensor in tensors), offsets


def outputs(tensors, offsets, grad_out, backend, scale=SCALE):
    """(out, grad_x, grad_base, grad_A, grad_B)."""
    out = grouped_lora_linear(*tensors, offsets, scale, backend=backend)
    return out, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Lengths of the groups, in, out, R, P.
SHAPES = {
    "one row": ([1], 8, 8, 2, 1),
    "odd": ([3, 7, 11], 33, 65, 5, 1),
    "odd, P 2": ([3, 7, 11], 33, 66, 5, 2),
    "rank 1, P 3": ([4, 2], 17, 9, 1, 3),
    "rank above the width": ([6, 5], 4, 6, 8, 2),
    "empty first": ([0, 4, 3], 8, 6, 2, 2),
    "empty in the middle": ([4, 0, 0, 3], 8, 6, 2, 2),
    "empty last": ([4, 3, 0], 8, 6, 2, 2),
    "all rows in one": ([0, 0, 30, 0], 8, 6, 2, 2),
    "no row": ([0, 0, 0], 8, 6, 2, 2),
    "per sample": ([[3, 5], [2, 7], [4, 1]], 33, 66, 5, 2),
    "per sample, some empty": ([[0, 5, 0], [0, 0, 0], [4, 1, 0]], 33, 65, 5, 1),
    "per sample, no row": ([[0, 0], [0, 0]], 8, 6, 2, 2),
    # 4 threads cut the first group, and its 3 columns are fewer than their shares of it.
    "many rows": ([290, 0, 1, 30], 3, 130, 32, 2),
}


@pytest.mark.usefixtures("poisoned", "threads")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_matches_truth(backend, dtype, weight_dtype, shape):
    tensors, offsets = inputs(*SHAPES[shape], dtype=dtype, weight_dtype=weight_dtype)
    grad_out = torch.randn(tensors[1].shape).to(dtype)
    actual = outputs(tensors, offsets, grad_out, backend)
    expected = outputs(tensors, offsets, grad_out, "reference")
    # The truth casts A and B too: what is judged is the arithmetic, not the dtype asked for.
    exact = tuple(tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors)
    truth = outputs(exact, offsets, grad_out.double(), "reference")
    names = ("out", "grad_x", "grad_base", "grad_A", "grad_B")
    dtypes = (dtype, dtype, dtype, weight_dtype, weight_dtype)
    for name, wanted, *values in zip(names, dtypes, actual, truth, expected, strict=True):
        assert values[0].dtype == wanted
        assert_as_accurate(name, *values)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[150, 0, 61], [[40, 60], [0, 50], [61, 0]]])
def test_float64(backend, lengths):
    tensors, offsets = inputs(lengths, 33, 66, 5, 2, dtype=torch.float64)
    grad_out = torch.randn(211, 66, dtype=torch.float64)
    actual, expected = (
        outputs(tensors, offsets, grad_out, name, 2.3) for name in (backend, "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("lengths", [[2, 0, 3], [[1, 2], [0, 2]]])
def test_gradcheck(lengths, projections):
    tensors, offsets = inputs(lengths, 3, 4, 2, projections, dtype=torch.float64)

    def function(backend):
        return lambda *t: grouped_lora_linear(*t, offsets, SCALE, backend=backend)

    for backend in (*BACKENDS, "reference"):
        assert torch.autograd.gradcheck(function(backend), tensors)
    assert torch.autograd.gradgradcheck(function("reference"), tensors)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_is_the_dense_product_of_each_row(backend):
    """Written out for one row: what the reference itself must be."""
    (x, base, A, B), offsets = inputs([2, 0, 3], 4, 6, 2, 2, dtype=torch.float64, grad=False)
    out = grouped_lora_linear(x, base, A, B, offsets, SCALE, backend=backend)
    for row, expert in enumerate((0, 0, 2, 2, 2)):
        gate = B[expert, :3] @ A[expert, :2] @ x[row]
        up = B[expert, 3:] @ A[expert, 2:] @ x[row]
        torch.testing.assert_close(out[row], base[row] + SCALE * torch.cat([gate, up]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_sample_is_each_sample_alone(backend):
    """Even where another sample is not finite."""
    lengths = torch.tensor([[3, 0, 4], [2, 5, 1]])
    tensors, offsets = inputs(lengths.tolist(), 8, 6, 2, 2, dtype=torch.float32, grad=False)
    sample = torch.arange(3).repeat(2).repeat_interleave(lengths.flatten())
    tensors[0][sample == 2] = math.nan
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    grad_out = torch.randn(15, 6)
    together = outputs(tensors, offsets, grad_out, backend)
    for s in range(3):
        mine = (sample == s,) * 3 + (s,) * 2
        x, base, A, B = (t[i].detach() for t, i in zip(tensors, mine[1:], strict=True))
        one = tuple(tensor.requires_grad_() for tensor in (x, base, A, B))
        alone = outputs(one, offsets_of(lengths[:, s].tolist()), grad_out[sample == s], backend)
        for whole, index, part in zip(together, mine, alone, strict=True):
            torch.testing.assert_close(whole[index], part, equal_nan=True)
            assert s == 2 or part.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 2], [[1, 2], [0, 1], [0, 1]]])
def test_strides(backend, lengths):
    """Transposed x, expanded base, A and B in a flat buffer, and the stride-0 gradient of a sum."""
    offsets = offsets_of(lengths)
    sets, (in_A, in_B) = offsets.shape[1:], (3 * 4 * 8, 3 * 6 * 2)
    flat = torch.randn(*sets, 5 + in_A + in_B)
    tensors = (
        torch.randn(8, 5).mT,
        torch.randn(6).expand(5, 6),
        flat[..., 5 : 5 + in_A].unflatten(-1, (3, 4, 8)),
        flat[..., 5 + in_A :].unflatten(-1, (3, 2, 6)).mT,
    )
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    before = tensors[1].detach().clone()
    spread = torch.zeros(*offsets.shape, 2, dtype=torch.int32)
    spread[..., 0] = offsets
    grad_out = torch.ones(()).expand(5, 6)
    actual, expected = (
        outputs(tensors, spread[..., 0], grad_out, name) for name in (backend, "reference")
    )
    torch.testing.assert_close(actual, expected)
    assert actual[0].is_contiguous()
    assert torch.equal(tensors[1], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", ["x", "base", "A", "B", "xbase", "AB", ""])
def test_only_the_gradients_that_are_needed(backend, needed):
    tensors, offsets = inputs([3, 0, 2], 8, 6, 2, 2, dtype=torch.float32, grad=False)
    for name, tensor in zip(NAMES, tensors, strict=True):
        tensor.requires_grad_(name in needed)
    out = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend)
    expected = grouped_lora_linear(*tensors, offsets, SCALE, backend="reference")
    assert out.requires_grad == bool(needed)
    if not needed:
        return
    # The outer pass differentiates in x alone: then neither x nor the shrink is kept.
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) == 3 + ("A" in needed) + ("B" in needed)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_and_two_backwards(backend):
    tensors, offsets = inputs([120, 0, 80], 8, 6, 2, 2, dtype=torch.float32)
    out = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend)
            inside = grouped_lora_linear(
                *(tensor.clone() for tensor in tensors), offsets, SCALE, backend=backend
            )
        assert not again.requires_grad
        assert torch.equal(again, out)
        assert torch.equal(inside, out)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast(backend):
    (x, base, A, B), offsets = inputs([120, 0, 80], 8, 6, 2, 2, dtype=torch.float32)
    base = base.detach().bfloat16()
    expected = grouped_lora_linear(x.bfloat16(), base, A, B, offsets, SCALE, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_lora_linear(x, base, A, B, offsets, SCALE, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [[1, 2], [0, 1], [0, 1]]])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_opcheck(lengths, weight_dtype):
    tensors, offsets = inputs(lengths, 8, 6, 2, 2, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    forward = torch.ops.memdlm.grouped_lora_linear.default
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        opcheck(forward, (*tensors, offsets, SCALE, *needs, "cpu"))

    x, grad_out, A, B = (tensor.detach() for tensor in tensors)
    _, shrink = forward(x, grad_out, A, B, offsets, SCALE, False, False, True, "cpu")
    backward = torch.ops.memdlm.grouped_lora_linear_backward.default
    for saved in ((x, shrink), (None, shrink), (x, None), (None, None)):
        opcheck(backward, (grad_out, *saved, A, B, offsets, SCALE, True, "cpu"))
    opcheck(backward, (grad_out, x, shrink, A, B, offsets, SCALE, False, "cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 2], [[1, 2], [0, 1], [0, 1]]])
def test_compiles_whole(backend, lengths):
    tensors, offsets = inputs(lengths, 8, 6, 2, 2, dtype=torch.float32)

    def loss(*tensors):
        return grouped_lora_linear(*tensors, offsets, SCALE, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
    )


@pytest.mark.parametrize("offsets", [[2, 6], [-1, 5], [3, 1], [1, 3]])
def test_bad_offsets_of_the_bare_op(offsets):
    """What a compiled graph calls, without the checks in Python."""
    tensors, _ = inputs([3, 2], 8, 6, 2, 2, dtype=torch.float32, grad=False)
    bad = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="offsets must"):
        torch.ops.memdlm.grouped_lora_linear(*tensors, bad, SCALE, False, False, False, "cpu")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_flops(backend):
    rows, columns, out, rank, projections = 5, 8, 6, 2, 2
    tensors, offsets = inputs([3, 0, 2], columns, out, rank, projections, dtype=torch.float32)
    with FlopCounterMode(display=False) as forward:
        loss = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend).sum()
    expected = 2 * rows * rank * (projections * columns + out)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * expected


INT32 = torch.int32
BAD = {
    "x must be [N, in]": dict(x=torch.zeros(1, 5, 8)),
    "x must be floating-point": dict(x=torch.zeros(5, 8, dtype=torch.int64)),
    "base must be [5, 'out']": dict(base=torch.zeros(4, 6)),
    "base must have x's dtype": dict(base=torch.zeros(5, 6, dtype=torch.bfloat16)),
    "A must be [E, P * R, in] or": dict(A=torch.zeros(4, 8)),
    "A must be [3, 'P * R', 8]": dict(A=torch.zeros(3, 4, 7)),
    "A must be on x's device": dict(A=torch.zeros(3, 4, 8, device="meta")),
    "A must have P * R = P * 2 rows": dict(A=torch.zeros(3, 5, 8)),
    "of at least 1 that divides out = 6": dict(A=torch.zeros(3, 8, 8)),
    "A must have P * R = P * 0 rows": dict(B=torch.zeros(3, 6, 0)),
    "B must be [3, 6, 'R']": dict(B=torch.zeros(3, 2, 6)),
    "B must be [2, 3, 6, 'R']": dict(A=torch.zeros(2, 3, 4, 8)),
    "offsets must be int32 [3]": dict(offsets=torch.tensor([2, 2, 5])),
    "offsets must be int32 [3] for A": dict(offsets=torch.zeros(4, dtype=INT32)),
    "offsets must be int32 [3, 2]": dict(A=torch.zeros(2, 3, 4, 8), B=torch.zeros(2, 3, 6, 2)),
    "offsets must be on x's device": dict(offsets=torch.zeros(3, dtype=INT32, device="meta")),
    "offsets must run from 0 or more to N = 5, got 2 to 4": dict(
        offsets=torch.tensor([2, 2, 4], dtype=INT32)
    ),
    "got -1 to 5": dict(offsets=torch.tensor([-1, 2, 5], dtype=INT32)),
    "offsets must ascend, got [3, 2, 5]": dict(offsets=torch.tensor([3, 2, 5], dtype=INT32)),
    "scale must be finite": dict(scale=math.inf),
    "backend must be None or one of 'cpu', 'reference'": dict(backend="triton"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(
        x=torch.zeros(5, 8),
        base=torch.zeros(5, 6),
        A=torch.zeros(3, 4, 8),
        B=torch.zeros(3, 6, 2),
        offsets=torch.tensor([2, 2, 5], dtype=INT32),
        scale=1.0,
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_lora_linear(**{**good, **BAD[message]})
