import math
import re

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import grouped_linear
from memdlm_kernels._backends import choose
from memdlm_kernels.grouped_linear import op
from memdlm_kernels.grouped_linear import triton as kernels
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

BACKENDS = backends("grouped_mm@cpu", "grouped_mm@cuda", "triton")
ALL = [*BACKENDS, *backends("reference")]
FUSED = pytest.mark.parametrize(("backend", "device"), BACKENDS)
EVERY = pytest.mark.parametrize(("backend", "device"), ALL)
GROUPED_MM = torch.nn.functional.grouped_mm


def inputs(lengths, columns, out, *, dtype, device="cpu", grad=True):
    """((x, weight), offsets)."""
    torch.manual_seed(0)
    offsets = torch.tensor(lengths).cumsum(0).to(torch.int32)
    x = torch.randn(offsets[-1], columns).to(dtype)
    weight = (torch.randn(len(lengths), out, columns) / math.sqrt(columns)).to(dtype)
    tensors = tuple(tensor.to(device).requires_grad_(grad) for tensor in (x, weight))
    return tensors, offsets.to(device)


def fitted(backend, *sizes):
    """Sizes rounded up to what the backend takes in any dtype."""
    if backend == "grouped_mm":
        return tuple(8 * math.ceil(size / 8) for size in sizes)
    return sizes


def outputs(tensors, offsets, grad_out, backend):
    """(out, grad_x, grad_weight)."""
    out = grouped_linear(*tensors, offsets, backend=backend)
    return out, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Lengths of the groups, in, out.
SHAPES = {
    "one row": ([1], 8, 8),
    "odd": ([3, 7, 11], 33, 65),
    "narrow": ([4, 2], 1, 1),
    "empty first": ([0, 4, 3], 8, 6),
    "empty in the middle": ([4, 0, 0, 3], 8, 6),
    "empty last": ([4, 3, 0], 8, 6),
    "no row": ([0, 0, 0], 8, 6),
    "many groups": ([1, 0, 2] * 6, 20, 10),
    # More than one tile of a group in each direction, and more than one band of tiles.
    "many rows": ([290, 0, 1, 30], 70, 140),
}


@pytest.mark.usefixtures("poisoned")
@FUSED
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_truth(backend, device, dtype, shape):
    lengths, *sizes = SHAPES[shape]
    if device == "cuda" and backend == "grouped_mm" and dtype != torch.bfloat16:
        pytest.skip("not one kernel there")
    tensors, offsets = inputs(lengths, *fitted(backend, *sizes), dtype=dtype, device=device)
    grad_out = torch.randn(len(tensors[0]), tensors[1].shape[1]).to(tensors[0])
    actual = outputs(tensors, offsets, grad_out, backend)
    expected = outputs(tensors, offsets, grad_out, "reference")
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    truth = outputs(exact, offsets, grad_out.double(), "reference")
    names = ("out", "grad_x", "grad_weight")
    for name, *values in zip(names, actual, truth, expected, strict=True):
        assert values[0].dtype == dtype
        assert_as_accurate(name, *values)


def test_float64_is_for_the_reference():
    (x, weight), offsets = inputs([2, 0, 3], 3, 4, dtype=torch.float64)

    def function(x, weight):
        return grouped_linear(x, weight, offsets)

    for row, expert in enumerate((0, 0, 2, 2, 2)):
        torch.testing.assert_close(function(x, weight)[row], weight[expert] @ x[row])
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


@FUSED
def test_differentiates_twice(backend, device):
    def penalties(dtype, backend):
        (x, weight), offsets = inputs([3, 0, 2], 8, 16, dtype=torch.float32, device=device)
        x, weight = x.to(dtype), weight.to(dtype)
        out = grouped_linear(x, weight, offsets, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(penalty, (x, weight))

    dtype = torch.bfloat16 if device == "cuda" and backend == "grouped_mm" else torch.float32
    for actual, truth, expected in zip(
        penalties(dtype, backend),
        penalties(torch.float64, "reference"),
        penalties(dtype, "reference"),
        strict=True,
    ):
        assert_as_accurate("second derivative", actual, truth, expected)


@pytest.mark.usefixtures("poisoned")
@FUSED
@pytest.mark.parametrize("lengths", [[3, 0, 2], [0, 1, 0]])
def test_strides(backend, device, lengths):
    """Transposed x and weight, in a buffer, and the stride-0 gradient of a sum."""
    dtype = torch.bfloat16
    offsets = torch.tensor(lengths, device=device).cumsum(0).to(torch.int32)
    rows = sum(lengths)
    flat = torch.randn(5 + 3 * 16 * 8, device=device, dtype=dtype)
    tensors = (
        torch.randn(8, rows, device=device, dtype=dtype).mT.requires_grad_(),
        flat[5:].unflatten(0, (3, 8, 16)).mT.detach().requires_grad_(),
    )
    spread = torch.zeros(3, 2, dtype=torch.int32, device=device)
    spread[:, 0] = offsets
    grad_out = torch.ones((), device=device).expand(rows, 16)
    actual, expected = (
        outputs(tensors, spread[:, 0], grad_out, name) for name in (backend, "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert actual[0].is_contiguous()


@pytest.mark.usefixtures("poisoned")
@FUSED
def test_a_group_alone(backend, device):
    """Whatever is not finite in another group."""
    (x, weight), offsets = inputs([3, 4], 8, 8, dtype=torch.bfloat16, device=device, grad=False)
    x[3:], weight[1] = math.nan, math.inf
    tensors = (x.requires_grad_(), weight.requires_grad_())
    out, grad_x, grad_weight = outputs(tensors, offsets, torch.ones_like(x), backend)
    for mine in (out[:3], grad_x[:3], grad_weight[0]):
        assert mine.isfinite().all()
    assert out[3:].isnan().all()


@FUSED
@pytest.mark.parametrize("needed", ["x", "weight", "x weight", ""])
def test_only_the_gradients_that_are_needed(backend, device, needed):
    tensors, offsets = inputs([3, 0, 2], 8, 8, dtype=torch.bfloat16, device=device, grad=False)
    for name, tensor in zip(("x", "weight"), tensors, strict=True):
        tensor.requires_grad_(name in needed.split())
    out = grouped_linear(*tensors, offsets, backend=backend)
    assert out.requires_grad == bool(needed)
    if not needed:
        return
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) == 1 + len(needed.split())
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    expected = grouped_linear(*tensors, offsets, backend="reference")
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    )


@EVERY
def test_autocast(backend, device):
    tensors, offsets = inputs([3, 0, 2], 8, 8, dtype=torch.float32, device=device)
    narrow = tuple(tensor.bfloat16() for tensor in tensors)
    expected = grouped_linear(*narrow, offsets, backend=backend)
    grads = torch.autograd.grad(expected.sum(), tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = grouped_linear(*tensors, offsets, backend=backend)
        actual = torch.autograd.grad(out.sum(), tensors)
    assert torch.equal(out, expected)
    torch.testing.assert_close(actual, grads)


@FUSED
@pytest.mark.parametrize("lengths", [[3, 0, 2], [0, 0]])
def test_opcheck(backend, device, lengths):
    tensors, offsets = inputs(lengths, 8, 16, dtype=torch.bfloat16, device=device)
    opcheck(torch.ops.memdlm.grouped_linear.default, (*tensors, offsets, backend))
    grad_out = torch.randn(len(tensors[0]), 16).to(tensors[0]).requires_grad_()
    for a in (grad_out, grad_out.detach()):
        opcheck(torch.ops.memdlm.grouped_linear_outer.default, (a, tensors[0], offsets, backend))


@FUSED
def test_compiles_whole(backend, device):
    tensors, offsets = inputs([3, 0, 2], 8, 16, dtype=torch.bfloat16, device=device)

    def loss(*tensors):
        return grouped_linear(*tensors, offsets, backend=backend).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
    )


@EVERY
def test_flops(backend, device):
    tensors, offsets = inputs([3, 0, 2], 8, 16, dtype=torch.bfloat16, device=device)
    with FlopCounterMode(display=False) as forward:
        loss = grouped_linear(*tensors, offsets, backend=backend).sum()
    assert forward.get_total_flops() == 2 * 5 * 8 * 16
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * 2 * 5 * 8 * 16


def test_whatever_grouped_mm_leaves_for_an_empty_group(monkeypatch):
    """As on sm100."""

    def leaves_nan(a, b, *, offs):
        product = GROUPED_MM(a, b, offs=offs)
        if b.dim() == 2:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = math.nan
        return product

    tensors, offsets = inputs([3, 0, 2], 8, 16, dtype=torch.float32)
    grad_out = torch.ones(5, 16)
    expected = outputs(tensors, offsets, grad_out, "reference")
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_nan)
    torch.testing.assert_close(outputs(tensors, offsets, grad_out, "grouped_mm"), expected)


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
def test_elements_past_2_to_the_31(backend, device):
    """Rows and experts so far apart that their addresses need 64 bits; memory is not touched."""
    apart = 2**30  # elements; the third row is 2^31 away
    dtype = torch.bfloat16
    (x, weight), offsets = inputs([0, 0, 3], 20, 20, dtype=dtype, device=device, grad=False)
    expected = grouped_linear(x, weight, offsets, backend=backend)
    expected_outer = kernels.grouped_linear_outer(x, expected, offsets)

    def spread(tensor):
        far = torch.empty(2 * apart + tensor[0].numel(), dtype=dtype, device=device)
        inner = tensor[0].stride()
        return far.as_strided(tensor.shape, (apart, *inner)).copy_(tensor)

    out = spread(torch.zeros_like(expected))
    far_x, far_weight = spread(x), spread(weight)
    kernels.product(far_x, far_weight, offsets, out)
    assert torch.equal(out, expected)
    assert torch.equal(kernels.grouped_linear_outer(far_x, out, offsets), expected_outer)


def test_the_order_of_backends(monkeypatch):
    def chosen(device="cuda", dtype=torch.bfloat16, columns=64, out=64, groups=1023):
        facts = (torch.device(device), dtype, columns, out, groups)
        return choose("grouped_linear", op._ORDER, None, *facts)

    for capability in ((9, 0), (10, 0), (8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        fast = "grouped_mm" if capability[0] in (9, 10) else "triton"
        assert chosen() == fast
        for slow in (dict(dtype=torch.float32), dict(columns=65), dict(out=60), dict(groups=1024)):
            assert chosen(**slow) == "triton"
        assert chosen(dtype=torch.float64) == "reference"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen("cpu", dtype, groups=5000) == "grouped_mm"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert chosen("cpu", columns=65) == "reference"
    assert chosen("mps") == "reference"


UNFIT = {
    "grouped_mm: x must be float32, bfloat16 or float16, got torch.float64": dict(
        dtype=torch.float64, backend="grouped_mm"
    ),
    "grouped_mm: in and out must be multiples of 4 for torch.float32, above 0, got 6 and 8": dict(
        columns=6, backend="grouped_mm"
    ),
    "multiples of 8 for torch.bfloat16, above 0, got 8 and 12": dict(
        out=12, dtype=torch.bfloat16, backend="grouped_mm"
    ),
    "above 0, got 0 and 8": dict(columns=0, backend="grouped_mm"),
    "triton: the tensors must be float32, bfloat16 or float16, got torch.float64": dict(
        dtype=torch.float64, backend="triton"
    ),
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_a_backend_does_not_take(message):
    arguments = {**dict(columns=8, out=8, dtype=torch.float32), **UNFIT[message]}
    backend = arguments.pop("backend")
    tensors, offsets = inputs([3, 0, 2], **arguments, grad=False)
    with pytest.raises(ValueError, match=f"no backend can run .*{message}"):
        grouped_linear(*tensors, offsets, backend=backend)


INT32 = torch.int32
BAD = {
    "x must be [N, in]": dict(x=torch.zeros(1, 5, 8)),
    "x must be floating-point": dict(x=torch.zeros(5, 8, dtype=torch.int64)),
    "weight must have x's dtype torch.float32, got torch.bfloat16": dict(
        weight=torch.zeros(3, 6, 8, dtype=torch.bfloat16)
    ),
    "weight must be ['E', 'out', 8] for x [5, 8], got [3, 6, 7]": dict(weight=torch.zeros(3, 6, 7)),
    "weight must be ['E', 'out', 8] for x [5, 8], got [6, 8]": dict(weight=torch.zeros(6, 8)),
    "weight must be on x's device": dict(weight=torch.zeros(3, 6, 8, device="meta")),
    "offsets must be int32 [3] for weight": dict(offsets=torch.tensor([2, 2, 5])),
    "and not empty, got torch.int32 [4]": dict(offsets=torch.zeros(4, dtype=INT32)),
    "offsets must be on x's device": dict(offsets=torch.zeros(3, dtype=INT32, device="meta")),
    "offsets must run from 0 or more to N = 5, got 2 to 4": dict(
        offsets=torch.tensor([2, 2, 4], dtype=INT32)
    ),
    "offsets must ascend, got [3, 2, 5]": dict(offsets=torch.tensor([3, 2, 5], dtype=INT32)),
    "backend must be None or one of 'grouped_mm', 'triton', 'reference'": dict(backend="cpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(
        x=torch.zeros(5, 8),
        weight=torch.zeros(3, 6, 8),
        offsets=torch.tensor([2, 2, 5], dtype=INT32),
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_linear(**{**good, **BAD[message]})
