import math
import re

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import grouped_lora_linear
from memdlm_kernels._backends import choose
from memdlm_kernels.grouped_lora_linear import grouped_mm, op, reference
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

BACKENDS = backends("cpu", "triton", "grouped_mm@cpu")
WITH_REFERENCE = backends("cpu", "triton", "grouped_mm@cpu", "reference")
# lora_alpha / R of the paper, and as in test_lora_linear.py a power of two.
SCALE = 2.0
NAMES = ("x", "base", "A", "B")
GROUPED_MM = torch.nn.functional.grouped_mm


def offsets_of(lengths, device="cpu"):
    """Offsets [E], or [E, S] where each expert has a list of lengths."""
    lengths = torch.tensor(lengths)
    return lengths.flatten().cumsum(0).to(device, torch.int32).view(lengths.shape)


def inputs(
    lengths,
    columns,
    out,
    rank,
    projections=1,
    *,
    dtype,
    weight_dtype=None,
    grad=True,
    device="cpu",
):
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
    tensors = tuple(tensor.to(device).requires_grad_(grad) for tensor in tensors)
    return tensors, offsets.to(device)


def fitted(backend, columns, out, rank, projections=1):
    """(in, out, R, P) rounded up to what the backend takes in any dtype."""
    if backend == "grouped_mm":
        columns, rank = (8 * math.ceil(size / 8) for size in (columns, rank))
        out = 8 * projections * math.ceil(out / projections / 8)
    return columns, out, rank, projections


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
    if request.param > 1 and request.node.callspec.params.get("backend") == "triton":
        pytest.skip("uses no thread of torch's")
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
    "empty first": ([0, 4, 3], 24, 30, 5, 2),
    "empty in the middle": ([4, 0, 0, 3], 24, 30, 5, 2),
    "empty last": ([4, 3, 0], 24, 30, 5, 2),
    "all rows in one": ([0, 0, 30, 0], 24, 30, 5, 2),
    "no row": ([0, 0, 0], 8, 6, 2, 2),
    "per sample": ([[3, 5], [2, 7], [4, 1]], 33, 66, 5, 2),
    "per sample, some empty": ([[0, 5, 0], [0, 0, 0], [4, 1, 0]], 33, 65, 5, 1),
    "per sample, no row": ([[0, 0], [0, 0]], 8, 6, 2, 2),
    # 4 threads cut the first group, and its 3 columns are fewer than their shares of it.
    "many rows": ([290, 0, 1, 30], 3, 130, 32, 2),
    "rank 64, P 2": ([70, 0, 5], 40, 48, 64, 2),
    "rank 150": ([5, 9], 20, 24, 150, 1),
}


@pytest.mark.usefixtures("poisoned", "threads")
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
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
def test_matches_truth(backend, device, dtype, weight_dtype, shape):
    lengths, *sizes = SHAPES[shape]
    sizes = fitted(backend, *sizes)
    tensors, offsets = inputs(
        lengths, *sizes, dtype=dtype, weight_dtype=weight_dtype, device=device
    )
    grad_out = torch.randn(tensors[1].shape).to(device, dtype)
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
@pytest.mark.parametrize("lengths", [[150, 0, 61], [[40, 60], [0, 50], [61, 0]]])
def test_float64(lengths):
    tensors, offsets = inputs(lengths, 33, 66, 5, 2, dtype=torch.float64)
    grad_out = torch.randn(211, 66, dtype=torch.float64)
    actual, expected = (
        outputs(tensors, offsets, grad_out, name, 2.3) for name in ("cpu", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("lengths", [[2, 0, 3], [[1, 2], [0, 2]]])
def test_gradcheck(lengths, projections):
    tensors, offsets = inputs(lengths, 3, 4, 2, projections, dtype=torch.float64)

    def function(backend):
        return lambda *t: grouped_lora_linear(*t, offsets, SCALE, backend=backend)

    for backend in ("cpu", "reference"):
        assert torch.autograd.gradcheck(function(backend), tensors)
    assert torch.autograd.gradgradcheck(function("reference"), tensors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_dense_product_of_each_row(backend):
    """Written out for one row: what the reference itself must be."""
    (x, base, A, B), offsets = inputs([2, 0, 3], 4, 6, 2, 2, dtype=torch.float64, grad=False)
    out = grouped_lora_linear(x, base, A, B, offsets, SCALE, backend=backend)
    for row, expert in enumerate((0, 0, 2, 2, 2)):
        gate = B[expert, :3] @ A[expert, :2] @ x[row]
        up = B[expert, 3:] @ A[expert, 2:] @ x[row]
        torch.testing.assert_close(out[row], base[row] + SCALE * torch.cat([gate, up]))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_per_sample_is_each_sample_alone(backend, device):
    """Even where another sample is not finite."""
    lengths = torch.tensor([[3, 0, 4], [2, 5, 1]])
    sizes = fitted(backend, 8, 6, 2, 2)
    tensors, offsets = inputs(
        lengths.tolist(), *sizes, dtype=torch.float32, grad=False, device=device
    )
    sample = torch.arange(3).repeat(2).repeat_interleave(lengths.flatten()).to(device)
    tensors[0][sample == 2] = math.nan
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    grad_out = torch.randn(15, sizes[1], device=device)
    together = outputs(tensors, offsets, grad_out, backend)
    for s in range(3):
        mine = (sample == s,) * 3 + (s,) * 2
        x, base, A, B = (t[i].detach() for t, i in zip(tensors, mine[1:], strict=True))
        one = tuple(tensor.requires_grad_() for tensor in (x, base, A, B))
        mine_alone = offsets_of(lengths[:, s].tolist(), device)
        alone = outputs(one, mine_alone, grad_out[sample == s], backend)
        for whole, index, part in zip(together, mine, alone, strict=True):
            torch.testing.assert_close(whole[index], part, equal_nan=True)
            assert s == 2 or part.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 2], [0, 1, 0], [[1, 2], [0, 1], [0, 1]]])
def test_strides(backend, device, lengths):
    """Transposed x, expanded base, A and B in a flat buffer, and the stride-0 gradient of a sum."""
    offsets = offsets_of(lengths, device)
    columns, out, rank, _ = fitted(backend, 8, 6, 2, 2)
    sets, (in_A, in_B) = offsets.shape[1:], (3 * 2 * rank * columns, 3 * out * rank)
    flat = torch.randn(*sets, 5 + in_A + in_B, device=device)
    rows = offsets.flatten()[-1]
    tensors = (
        torch.randn(columns, rows, device=device).mT,
        torch.randn(out, device=device).expand(rows, out),
        flat[..., 5 : 5 + in_A].unflatten(-1, (3, 2 * rank, columns)),
        flat[..., 5 + in_A :].unflatten(-1, (3, rank, out)).mT,
    )
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    before = tensors[1].detach().clone()
    spread = torch.zeros(*offsets.shape, 2, dtype=torch.int32, device=device)
    spread[..., 0] = offsets
    grad_out = torch.ones((), device=device).expand(rows, out)
    actual, expected = (
        outputs(tensors, spread[..., 0], grad_out, name) for name in (backend, "reference")
    )
    torch.testing.assert_close(actual, expected)
    assert actual[0].is_contiguous()
    assert torch.equal(tensors[1], before)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("needed", ["x", "base", "A", "B", "xbase", "AB", ""])
def test_only_the_gradients_that_are_needed(backend, device, needed):
    sizes = fitted(backend, 8, 6, 2, 2)
    tensors, offsets = inputs([3, 0, 2], *sizes, dtype=torch.float32, grad=False, device=device)
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
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_modes_and_two_backwards(backend, device):
    sizes = fitted(backend, 8, 6, 2, 2)
    tensors, offsets = inputs([120, 0, 80], *sizes, dtype=torch.float32, device=device)
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
@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(backend, device, dtype):
    """The products are in base's dtype, forward and backward."""
    sizes = fitted(backend, 8, 6, 2, 2)
    (x, base, A, B), offsets = inputs([120, 0, 80], *sizes, dtype=torch.float32, device=device)
    base = base.detach().to(dtype)
    expected = grouped_lora_linear(x.to(dtype), base, A, B, offsets, SCALE, backend=backend)
    grads = torch.autograd.grad(expected.sum(), (x, A, B))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = grouped_lora_linear(x, base, A, B, offsets, SCALE, backend=backend)
        actual = torch.autograd.grad(out.sum(), (x, A, B))
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    # The reference's are plain PyTorch's, which autocast reaches.
    assert backend == "reference" or all(map(torch.equal, actual, grads))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 2], [0, 0], [[1, 2], [0, 1], [0, 1]]])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_opcheck(backend, device, lengths, weight_dtype):
    sizes = fitted(backend, 8, 6, 2, 2)
    tensors, offsets = inputs(
        lengths, *sizes, dtype=torch.bfloat16, weight_dtype=weight_dtype, device=device
    )
    forward = torch.ops.memdlm.grouped_lora_linear.default
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        opcheck(forward, (*tensors, offsets, SCALE, *needs, backend))

    x, grad_out, A, B = (tensor.detach() for tensor in tensors)
    _, shrink = forward(x, grad_out, A, B, offsets, SCALE, False, False, True, backend)
    backward = torch.ops.memdlm.grouped_lora_linear_backward.default
    for saved in ((x, shrink), (None, shrink), (x, None), (None, None)):
        opcheck(backward, (grad_out, *saved, A, B, offsets, SCALE, True, backend))
    opcheck(backward, (grad_out, x, shrink, A, B, offsets, SCALE, False, backend))
    of_B = torch.ops.memdlm.grouped_lora_linear_grad_B.default
    opcheck(of_B, (grad_out, x, A, B, offsets, SCALE, backend))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 2], [[1, 2], [0, 1], [0, 1]]])
def test_compiles_whole(backend, device, lengths):
    sizes = fitted(backend, 8, 6, 2, 2)
    tensors, offsets = inputs(lengths, *sizes, dtype=torch.float32, device=device)

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


@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
def test_flops(backend, device):
    rows, sizes = 5, fitted(backend, 8, 6, 2, 2)
    columns, out, rank, projections = sizes
    tensors, offsets = inputs([3, 0, 2], *sizes, dtype=torch.float32, device=device)
    with FlopCounterMode(display=False) as forward:
        loss = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend).sum()
    expected = 2 * rows * rank * (projections * columns + out)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * expected


@pytest.mark.parametrize("lengths", [[3, 0, 2], [[1, 0], [0, 1], [0, 1]]])
def test_whatever_grouped_mm_leaves_for_an_empty_group(monkeypatch, lengths):
    """As on sm100."""

    def leaves_nan(a, b, *, offs):
        product = GROUPED_MM(a, b, offs=offs)
        if b.dim() == 2:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = math.nan
        return product

    tensors, offsets = inputs(lengths, 8, 16, 8, 2, dtype=torch.float32)
    expected = outputs(tensors, offsets, torch.ones_like(tensors[1]), "reference")
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_nan)
    actual = outputs(tensors, offsets, torch.ones_like(tensors[1]), "grouped_mm")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [[1, 2], [0, 1], [0, 1]]])
def test_grouped_mm_never_waits_for_a_value(lengths):
    """Tensors without values, as those that a GPU has yet to compute."""
    tensors, offsets = inputs(lengths, 8, 16, 8, 2, dtype=torch.bfloat16, grad=False)
    x, base, A, B, offsets = (tensor.to("meta") for tensor in (*tensors, offsets))
    out, shrink = grouped_mm.grouped_lora_linear(x, base, A, B, offsets, SCALE)
    grads = grouped_mm.grouped_lora_linear_backward(
        base, x, shrink, A, B, offsets, SCALE, need_grad_x=True
    )
    assert [t.shape for t in (out, *grads)] == [t.shape for t in (base, x, A, B)]
    with pytest.raises((NotImplementedError, RuntimeError)):
        reference.grouped_lora_linear(x, base, A, B, offsets, SCALE)


UNFIT = {
    "got torch.float64": dict(dtype=torch.float64),
    "multiples of 4 for torch.float32, above 0, got 6, 16 and 8": dict(columns=6),
    "multiples of 8 for torch.bfloat16, above 0, got 4, 16 and 8": dict(
        columns=4, dtype=torch.bfloat16
    ),
    "above 0, got 8, 6 and 8": dict(out=12),
    "above 0, got 8, 16 and 2": dict(rank=2),
    "above 0, got 0, 16 and 8": dict(columns=0),
    "at most 1023 groups, got 1024": dict(lengths=[0] * 1024),
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_grouped_mm_does_not_take(message):
    good = dict(lengths=[3, 0, 2], columns=8, out=32, rank=8, projections=2, dtype=torch.float32)
    tensors, offsets = inputs(**{**good, **UNFIT[message]}, grad=False)
    with pytest.raises(ValueError, match=rf"no backend can run .*grouped_mm: .*{message}"):
        grouped_lora_linear(*tensors, offsets, SCALE, backend="grouped_mm")


def test_what_triton_does_not_take():
    tensors, offsets = inputs([3, 0, 2], 8, 6, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16, got"):
        grouped_lora_linear(*tensors, offsets, SCALE, backend="triton")
    tensors, offsets = inputs([0] * 4097, 2, 2, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 4096 groups, got 4097"):
        grouped_lora_linear(*tensors, offsets, SCALE, backend="triton")


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "triton"), ((7, 5), "grouped_mm")])
def test_order_on_a_gpu(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    facts = (torch.device("cuda"), torch.bfloat16, 64, 64)
    assert choose("op", op._ORDER, None, *facts, 8, 2, 1023) == first
    assert choose("op", op._ORDER, None, *facts, 4, 2, 4097) == "reference"
    assert choose("op", op._ORDER, None, torch.device("mps"), *facts[1:], 8, 2, 3) == "reference"


def zero_B(lengths, *sizes, **options):
    (x, base, A, B), offsets = inputs(lengths, *sizes, **options)
    return (x, base, A, torch.zeros_like(B, requires_grad=True)), offsets


@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
@pytest.mark.parametrize("lengths", [[70, 0, 15], [[30, 9], [0, 21], [5, 0]], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_B_is_zero(backend, device, dtype, lengths):
    sizes = fitted(backend, 33, 66, 5, 2)
    options = dict(dtype=dtype, weight_dtype=torch.float32, device=device)
    tensors, offsets = zero_B(lengths, *sizes, **options)
    out = grouped_lora_linear(*tensors, offsets, SCALE, B_is_zero=True, backend=backend)
    plain = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend)
    assert torch.equal(out, tensors[1])
    grad_out = torch.randn_like(out)
    grad_x, grad_base, grad_A, grad_B = torch.autograd.grad(
        out, tensors, grad_out, allow_unused=True
    )
    expected = torch.autograd.grad(plain, tensors, grad_out)
    assert torch.equal(grad_base, expected[1])
    torch.testing.assert_close(grad_B, expected[3])
    for mine, zeros in ((grad_x, expected[0]), (grad_A, expected[2])):
        assert mine is None or backend == "reference"
        assert (zeros == 0).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_B_is_zero_computes_nothing_before_backward(backend, device):
    """And there the shrink and the gradient of B."""
    rows, sizes = 5, fitted(backend, 8, 6, 2, 2)
    columns, out, rank, projections = sizes
    tensors, offsets = zero_B([3, 0, 2], *sizes, dtype=torch.float32, device=device)
    with FlopCounterMode(display=False) as forward:
        result = grouped_lora_linear(*tensors, offsets, SCALE, B_is_zero=True, backend=backend)
    assert forward.get_total_flops() == 0
    assert result.data_ptr() == tensors[1].data_ptr()
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    assert backward.get_total_flops() == 2 * rows * rank * (projections * columns + out)
    with torch.no_grad():
        again = grouped_lora_linear(*tensors, offsets, SCALE, B_is_zero=True, backend=backend)
    assert again is tensors[1]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_B_is_zero_compiles_whole(backend, device):
    sizes = fitted(backend, 8, 6, 2, 2)
    (x, base, A, B), offsets = zero_B([3, 0, 2], *sizes, dtype=torch.float32, device=device)

    def loss(base, B):
        out = grouped_lora_linear(
            x, base * 2, A, B, offsets, SCALE, B_is_zero=True, backend=backend
        )
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(base, B), loss(base, B))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(base, B), (base, B)),
        torch.autograd.grad(loss(base, B), (base, B)),
    )


def test_second_derivatives_with_B_is_zero():
    """The reference has them; a backend has none of the gradient of B, and says so."""
    tensors, offsets = zero_B([2, 0, 3], 4, 6, 2, 2, dtype=torch.float64)

    def second(backend, **options):
        out = grouped_lora_linear(*tensors, offsets, SCALE, backend=backend, **options)
        (grad_B,) = torch.autograd.grad(out.square().sum(), tensors[3], create_graph=True)
        return torch.autograd.grad(grad_B.square().sum(), tensors[:2])

    torch.testing.assert_close(second("reference", B_is_zero=True), second("reference"))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        second("cpu", B_is_zero=True)


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
    "backend must be None or one of 'cpu', 'triton', 'grouped_mm', 'reference'": dict(
        backend="cuda"
    ),
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
