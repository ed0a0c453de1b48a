import math
import re

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import lora_linear
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

BACKENDS = backends("cpu", "triton")
WITH_REFERENCE = backends("cpu", "triton", "reference")
# lora_alpha / R of the paper. With a scale that is no power of two the reference rounds once more
# than a backend, and by luck, in a 16-bit tensor of a few elements, back towards the truth.
SCALE = 2.0


def inputs(
    leading,
    columns,
    out,
    rank,
    *,
    dtype,
    weight_dtype=None,
    per_sample=False,
    grad=True,
    device="cpu",
):
    torch.manual_seed(0)
    weight_dtype = weight_dtype or dtype
    sets = leading[:1] if per_sample else ()
    tensors = (
        torch.randn(*leading, columns).to(dtype),
        torch.randn(*leading, out).to(dtype),
        (torch.randn(*sets, rank, columns) / math.sqrt(columns)).to(weight_dtype),
        torch.randn(*sets, out, rank).to(weight_dtype),
    )
    return tuple(tensor.to(device).requires_grad_(grad) for tensor in tensors)


def outputs(tensors, grad_out, backend, scale=SCALE):
    """(out, grad_x, grad_base, grad_A, grad_B)."""
    out = lora_linear(*tensors, scale, backend=backend)
    return out, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))


SHAPES = {
    "one token": ((1,), 8, 8, 2),
    "odd": ((3, 7), 33, 65, 5),
    "rank 1": ((2, 3, 5), 17, 9, 1),
    "rank above the width": ((2, 6), 4, 3, 8),
    "no row": ((2, 0), 8, 6, 2),
    "many rows": ((2, 300), 96, 130, 32),
    "rank 64": ((2, 30), 48, 40, 64),
    "rank 150": ((5,), 20, 24, 150),
}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
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
def test_matches_truth(backend, device, dtype, weight_dtype, shape, per_sample):
    leading, columns, out, rank = SHAPES[shape]
    if per_sample:
        leading = (2, math.prod(leading))
    tensors = inputs(
        leading,
        columns,
        out,
        rank,
        dtype=dtype,
        weight_dtype=weight_dtype,
        per_sample=per_sample,
        device=device,
    )
    grad_out = torch.randn(*leading, out).to(device, dtype)
    actual = outputs(tensors, grad_out, backend)
    expected = outputs(tensors, grad_out, "reference")
    # The truth casts A and B too: what is judged is the arithmetic, not the dtype asked for.
    exact = tuple(tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors)
    truth = outputs(exact, grad_out.double(), "reference")
    names = ("out", "grad_x", "grad_base", "grad_A", "grad_B")
    dtypes = (dtype, dtype, dtype, weight_dtype, weight_dtype)
    for name, wanted, *values in zip(names, dtypes, actual, truth, expected, strict=True):
        assert values[0].dtype == wanted
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("per_sample", [False, True])
def test_float64(per_sample):
    tensors = inputs((2, 150), 33, 65, 5, dtype=torch.float64, per_sample=per_sample)
    grad_out = torch.randn(2, 150, 65, dtype=torch.float64)
    actual, expected = (outputs(tensors, grad_out, name, 2.3) for name in ("cpu", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
def test_reference_gradcheck(per_sample):
    tensors = inputs((2, 3), 4, 5, 2, dtype=torch.float64, per_sample=per_sample)

    def function(*tensors):
        return lora_linear(*tensors, SCALE, backend="reference")

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("per_sample", [False, True])
def test_cpu_gradcheck(per_sample):
    tensors = inputs((2, 3), 4, 5, 2, dtype=torch.float64, per_sample=per_sample)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, SCALE, backend="cpu"), tensors)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_per_sample_is_each_sample_alone(backend, device):
    tensors = inputs((3, 5), 8, 6, 2, dtype=torch.float32, per_sample=True, device=device)
    grad_out = torch.randn(3, 5, 6, device=device)
    together = outputs(tensors, grad_out, backend)
    for i in range(3):
        one = tuple(tensor[i].detach().requires_grad_() for tensor in tensors)
        alone = outputs(one, grad_out[i], backend)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[i], part)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_strides(backend, device, per_sample):
    """Transposed x, expanded base, sliced A and B, and the stride-0 gradient of a sum."""
    sets = (2,) if per_sample else ()
    tensors = (
        torch.randn(8, 5, 2, device=device).permute(2, 1, 0),
        torch.randn(6, device=device).expand(2, 5, 6),
        torch.randn(*sets, 8, 3, device=device).mT,
        torch.randn(*sets, 6, 7, device=device)[..., ::3],
    )
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    before = tensors[1].detach().clone()
    grad_out = torch.ones((), device=device).expand(2, 5, 6)
    actual, expected = (outputs(tensors, grad_out, name) for name in (backend, "reference"))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(tensors[1], before)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("needed", ["x", "base", "A", "B", "xbase", "AB", ""])
def test_only_the_gradients_that_are_needed(backend, device, needed):
    tensors = inputs((4,), 8, 6, 2, dtype=torch.float32, grad=False, device=device)
    names = ("x", "base", "A", "B")
    for name, tensor in zip(names, tensors, strict=True):
        tensor.requires_grad_(name in needed)
    out = lora_linear(*tensors, SCALE, backend=backend)
    expected = lora_linear(*tensors, SCALE, backend="reference")
    assert out.requires_grad == bool(needed)
    if not needed:
        return
    # The outer pass differentiates in x alone: then neither x nor the shrink is kept.
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) == 2 + ("A" in needed) + ("B" in needed)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_no_grad_and_two_backwards(backend, device):
    tensors = inputs((4,), 8, 6, 2, dtype=torch.float32, device=device)
    with torch.no_grad():
        assert not lora_linear(*tensors, SCALE, backend=backend).requires_grad
    out = lora_linear(*tensors, SCALE, backend=backend)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
def test_autocast(backend, device):
    x, base, A, B = inputs((4,), 8, 6, 2, dtype=torch.float32, device=device)
    base = base.detach().bfloat16()
    expected = lora_linear(x.bfloat16(), base, A, B, SCALE, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = lora_linear(x, base, A, B, SCALE, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_opcheck(backend, device, per_sample, weight_dtype):
    tensors = inputs(
        (2, 3),
        8,
        6,
        2,
        dtype=torch.bfloat16,
        weight_dtype=weight_dtype,
        per_sample=per_sample,
        device=device,
    )
    forward = torch.ops.memdlm.lora_linear.default
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        opcheck(forward, (*tensors, SCALE, *needs, backend))

    x, grad_out, A, B = (tensor.detach() for tensor in tensors)
    shrink = SCALE * x @ A.to(x.dtype).mT
    backward = torch.ops.memdlm.lora_linear_backward.default
    for saved in ((x, shrink), (None, shrink), (x, None), (None, None)):
        opcheck(backward, (grad_out, *saved, A, B, SCALE, True, backend))
    opcheck(backward, (grad_out, x, shrink, A, B, SCALE, False, backend))
    opcheck(torch.ops.memdlm.lora_linear_grad_B.default, (grad_out, x, A, B, SCALE, backend))


@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
def test_compiles_whole(backend, device):
    tensors = inputs((2, 5), 8, 6, 2, dtype=torch.float32, device=device)

    def loss(*tensors):
        return lora_linear(*tensors, SCALE, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
    )


@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
def test_flops(backend, device):
    rows, columns, out, rank = 12, 8, 6, 2
    tensors = inputs((3, 4), columns, out, rank, dtype=torch.float32, device=device)
    with FlopCounterMode(display=False) as forward:
        loss = lora_linear(*tensors, SCALE, backend=backend).sum()
    assert forward.get_total_flops() == 2 * rows * rank * (columns + out)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * 2 * rows * rank * (columns + out)


def zero_B(leading, columns, out, rank, **options):
    x, base, A, B = inputs(leading, columns, out, rank, **options)
    return x, base, A, torch.zeros_like(B, requires_grad=True)


@pytest.mark.parametrize(("backend", "device"), WITH_REFERENCE)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_B_is_zero(backend, device, dtype, per_sample):
    options = dict(dtype=dtype, weight_dtype=torch.float32, per_sample=per_sample, device=device)
    tensors = zero_B((2, 70), 33, 65, 5, **options)
    out = lora_linear(*tensors, SCALE, B_is_zero=True, backend=backend)
    plain = lora_linear(*tensors, SCALE, backend=backend)
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
    rows, columns, out, rank = 12, 8, 6, 2
    tensors = zero_B((3, 4), columns, out, rank, dtype=torch.float32, device=device)
    with FlopCounterMode(display=False) as forward:
        result = lora_linear(*tensors, SCALE, B_is_zero=True, backend=backend)
    assert forward.get_total_flops() == 0
    assert result.data_ptr() == tensors[1].data_ptr()
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    assert backward.get_total_flops() == 2 * rows * rank * (columns + out)
    with torch.no_grad():
        assert lora_linear(*tensors, SCALE, B_is_zero=True, backend=backend) is tensors[1]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_B_is_zero_compiles_whole(backend, device):
    x, base, A, B = zero_B((2, 5), 8, 6, 2, dtype=torch.float32, device=device)

    def loss(x, base, A, B):
        out = lora_linear(x, base * 2, A, B, SCALE, B_is_zero=True, backend=backend)
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, base, A, B), loss(x, base, A, B))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, base, A, B), (base, B)),
        torch.autograd.grad(loss(x, base, A, B), (base, B)),
    )


def test_second_derivatives_with_B_is_zero():
    """The reference has them; a backend has none of the gradient of B, and says so."""
    tensors = zero_B((2, 3), 4, 5, 2, dtype=torch.float64)

    def second(backend, **options):
        out = lora_linear(*tensors, SCALE, backend=backend, **options)
        (grad_B,) = torch.autograd.grad(out.square().sum(), tensors[3], create_graph=True)
        return torch.autograd.grad(grad_B.square().sum(), tensors[:2])

    torch.testing.assert_close(second("reference", B_is_zero=True), second("reference"))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        second("cpu", B_is_zero=True)


def test_triton_takes_no_float64():
    tensors = inputs((4,), 8, 6, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="the tensors must be float32, bfloat16 or float16, got"):
        lora_linear(*tensors, SCALE, backend="triton")


BAD = {
    "x must be [...": dict(x=torch.zeros(())),
    "x must be [S, L, in]": dict(x=torch.zeros(5, 8), A=torch.zeros(2, 3, 8)),
    "base must be [2, 5, 'out']": dict(base=torch.zeros(5, 6)),
    "base must have x's dtype": dict(base=torch.zeros(2, 5, 6, dtype=torch.bfloat16)),
    "base must be floating-point": dict(base=torch.zeros(2, 5, 6, dtype=torch.int64)),
    "A must be ['R', 8]": dict(A=torch.zeros(3, 7)),
    "A must be [2, 'R', 8]": dict(A=torch.zeros(3, 3, 8), B=torch.zeros(3, 6, 3)),
    "A must be [R, in] or": dict(A=torch.zeros(8)),
    "A must be on x's device": dict(A=torch.zeros(3, 8, device="meta")),
    "B must be [6, 3]": dict(B=torch.zeros(3, 6)),
    "B must be [2, 6, 3]": dict(A=torch.zeros(2, 3, 8)),
    "scale must be finite": dict(scale=math.inf),
    "backend must be None or one of 'cpu', 'triton', 'reference'": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(
        x=torch.zeros(2, 5, 8),
        base=torch.zeros(2, 5, 6),
        A=torch.zeros(3, 8),
        B=torch.zeros(6, 3),
        scale=1.0,
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_linear(**{**good, **BAD[message]})
