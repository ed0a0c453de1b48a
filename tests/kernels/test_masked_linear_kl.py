"""masked_linear_kl against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import masked_linear_kl, reference_ops
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "reverse"])
TRITON = pytest.mark.parametrize(("backend", "device"), backends("triton"))
BACKENDS = pytest.mark.parametrize(("backend", "device"), backends("triton", "reference"))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at least 4 rows, and blocks of 64 words."""
    triton = pytest.importorskip("memdlm_kernels.masked_linear_kl.triton")
    monkeypatch.setattr(triton, "_FEWEST_ROWS", 4)
    monkeypatch.setattr(triton, "_WIDEST_BLOCK", 64)


def make_inputs(rows, depth, vocabulary, dtype, *, apart=0.5, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, depth, generator=generator)
    teacher = student + apart * torch.randn(rows, depth, generator=generator)
    weight = 3 * torch.randn(vocabulary, depth, generator=generator) / depth**0.5
    inputs = {"student": student, "teacher": teacher, "weight": weight}
    if bias:
        inputs["bias"] = torch.randn(vocabulary, generator=generator)
    return {name: value.to(dtype) for name, value in inputs.items()}


def kl_and_gradient(inputs, *, backend, device="cpu", grad=None, to=None, **options):
    given = {}
    for name, value in inputs.items():
        value = value.detach().to(device)
        given[name] = value.to(to or value.dtype) if value.is_floating_point() else value
    student = given["student"].requires_grad_()
    kl = masked_linear_kl(**given, backend=backend, **options)
    grad = torch.ones_like(kl) if grad is None else grad.to(kl)
    (grad_student,) = torch.autograd.grad(kl, student, grad)
    return {"kl": kl.detach(), "grad_student": grad_student}


def assert_accurate(inputs, backend, device, **options):
    actual = kl_and_gradient(inputs, backend=backend, device=device, **options)
    truth = kl_and_gradient(inputs, backend="reference", to=torch.float64, **options)
    reference = kl_and_gradient(inputs, backend="reference", **options)
    for name in truth:
        assert_as_accurate(name, actual[name], truth[name], reference[name])
    assert (actual["kl"] >= 0).all()
    return actual


@DIRECTIONS
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_gradients(direction, softcap):
    inputs = make_inputs(4, 3, 7, torch.float64, bias=True)
    student = inputs.pop("student").requires_grad_()
    token_weight = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def loss(student, token_weight):
        return masked_linear_kl(
            student,
            **inputs,
            direction=direction,
            temperature=1.7,
            token_weight=token_weight,
            softcap=softcap,
            index=torch.tensor([3, 0, 0, 2, 1]),
            backend="reference",
        )

    assert torch.autograd.gradcheck(loss, [student, token_weight])
    assert torch.autograd.gradgradcheck(loss, [student, token_weight])


@DIRECTIONS
@pytest.mark.parametrize("apart", [0.1, 2.0])
def test_reference_is_kl_divergence(direction, apart):
    inputs = make_inputs(10, 8, 30, torch.float64, bias=True, apart=apart)
    p, q = (
        F.log_softmax((inputs[side] @ inputs["weight"].mT + inputs["bias"]) / 0.7, -1)
        for side in ("student", "teacher")
    )
    p, q = (p, q) if direction == "forward" else (q, p)
    expected = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    actual = masked_linear_kl(**inputs, direction=direction, temperature=0.7, backend="reference")
    torch.testing.assert_close(actual, expected)


@TRITON
@DTYPES
@DIRECTIONS
@pytest.mark.parametrize("apart", [1e-2, 3.0])
@pytest.mark.parametrize(
    ("rows", "depth", "vocabulary"), [(1, 1, 1), (7, 5, 11), (9, 33, 301), (5, 130, 5000)]
)
def test_sizes(backend, device, dtype, direction, apart, rows, depth, vocabulary):
    inputs = make_inputs(rows, depth, vocabulary, dtype, apart=apart)
    assert_accurate(inputs, backend, device, direction=direction, grad=torch.rand(rows))


@TRITON
@DTYPES
@DIRECTIONS
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 0.5), (4.0, 1.0), (6.0, 3.0)])
def test_bias_softcap_temperature_and_small_chunks(
    small_chunks, backend, device, dtype, direction, softcap, temperature
):
    inputs = make_inputs(10, 40, 333, dtype, bias=True)
    options = {"direction": direction, "softcap": softcap, "temperature": temperature}
    for chunk_bytes in (1, None):
        assert_accurate(inputs, backend, device, chunk_bytes=chunk_bytes, **options)


@TRITON
@DTYPES
@DIRECTIONS
def test_index_with_duplicates(small_chunks, backend, device, dtype, direction):
    inputs = make_inputs(12, 24, 100, dtype)
    inputs["index"] = torch.tensor([3, 4, 4, 5, 3, 4, 7])
    actual = assert_accurate(
        inputs, backend, device, direction=direction, grad=torch.rand(7), chunk_bytes=1
    )
    unnamed = torch.tensor([0, 1, 2, 6, 8, 9, 10, 11])
    assert not actual["grad_student"][unnamed].any()


@TRITON
@DIRECTIONS
def test_small_divergence_of_a_flat_distribution(backend, device, direction):
    """Gradients of single words are below the least number of float16."""
    inputs = make_inputs(6, 16, 20_000, torch.float16, apart=0.1)
    inputs["weight"] *= 0.01
    assert_accurate(inputs, backend, device, direction=direction)


@BACKENDS
@DTYPES
@DIRECTIONS
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (4.0, 0.7)])
def test_equal_sides_give_exactly_0(backend, device, dtype, direction, softcap, temperature):
    inputs = make_inputs(9, 32, 400, dtype, apart=0.0, bias=True)
    actual = kl_and_gradient(
        inputs,
        backend=backend,
        device=device,
        direction=direction,
        softcap=softcap,
        temperature=temperature,
    )
    assert not actual["kl"].any()
    assert not actual["grad_student"].any()


@TRITON
@DIRECTIONS
def test_forbidden_words(backend, device, direction):
    """A bias of -inf takes a word out of both distributions."""
    inputs = make_inputs(6, 16, 200, torch.float32, bias=True)
    inputs["bias"][5:150] = -float("inf")
    actual = assert_accurate(inputs, backend, device, direction=direction)
    assert actual["kl"].isfinite().all()
    assert actual["grad_student"].isfinite().all()


@BACKENDS
@DIRECTIONS
def test_nan_shows_and_stays_in_its_row(backend, device, direction):
    inputs = make_inputs(6, 16, 40, torch.float32)
    inputs["student"][2, 3] = float("nan")
    actual = kl_and_gradient(inputs, backend=backend, device=device, direction=direction)
    for value in actual.values():
        finite = value.isfinite().view(6, -1)
        assert finite.all(-1).tolist() == [True, True, False, True, True, True]
        assert not finite[2].any()


@BACKENDS
def test_no_rows_at_all(backend, device):
    inputs = make_inputs(0, 16, 64, torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    loss = masked_linear_kl(
        inputs.pop("student").requires_grad_(), **inputs, reduction="mean", backend=backend
    )
    loss.backward()  # connected to the graph
    assert loss.item() == 0


@TRITON
@pytest.mark.parametrize("index", [False, True])
def test_strides(backend, device, index):
    inputs = make_inputs(6, 16, 64, torch.float32, bias=True)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    if index:
        inputs["index"] = torch.arange(6, device=device).flip(0)
    grad = torch.tensor(0.5, device=device).expand(6)
    on = {"backend": backend, "device": device}
    expected = kl_and_gradient(inputs, **on, grad=grad.clone())
    strided = {name: value.repeat_interleave(2, 0)[::2] for name, value in inputs.items()}
    strided["student"] = inputs["student"].mT.contiguous().mT
    actual = kl_and_gradient(strided, **on, grad=grad)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@TRITON
def test_two_backwards_and_no_second_derivative(backend, device):
    inputs = make_inputs(6, 16, 64, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    student = inputs["student"].requires_grad_()
    loss = masked_linear_kl(**inputs, reduction="mean", backend=backend)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(second.square().sum(), student)


@BACKENDS
def test_reductions_and_a_constant_teacher(backend, device):
    inputs = make_inputs(6, 16, 64, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    token_weight = torch.rand(6, dtype=torch.bfloat16, device=device, requires_grad=True)
    kl = masked_linear_kl(**inputs, backend=backend)
    assert kl.dtype == torch.float32
    weighted = kl * token_weight.float()
    inputs["student"].requires_grad_()
    inputs["teacher"].requires_grad_()

    def loss(**options):
        return masked_linear_kl(**inputs, token_weight=token_weight, backend=backend, **options)

    torch.testing.assert_close(loss(), weighted)
    torch.testing.assert_close(loss(reduction="sum"), weighted.sum())
    torch.testing.assert_close(loss(reduction="mean"), weighted.mean())
    torch.testing.assert_close(loss(reduction="mean", normalizer=7.0), weighted.sum() / 7)
    seven = torch.tensor([7.0], device=device)
    torch.testing.assert_close(loss(reduction="mean", normalizer=seven), weighted.sum() / 7)
    loss(reduction="sum").backward()
    torch.testing.assert_close(token_weight.grad, kl.to(torch.bfloat16))
    assert inputs["student"].grad.any()
    assert inputs["teacher"].grad is None


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@DIRECTIONS
def test_opcheck(backend, device, dtype, direction):
    inputs = make_inputs(6, 5, 9, dtype, bias=True)
    student, *rest = (value.to(device) for value in inputs.values())
    for index in (None, torch.tensor([0, 0, 5, 2], device=device)):
        options = (index, direction, 2.0, 3.0, None, True, backend)
        torch.library.opcheck(
            torch.ops.memdlm.masked_linear_kl.default,
            (student.clone().requires_grad_(), *rest, *options),
        )
        kl, stash = torch.ops.memdlm.masked_linear_kl(student, *rest, *options)
        torch.library.opcheck(
            torch.ops.memdlm.masked_linear_kl_backward.default,
            (torch.rand_like(kl), stash, index, 6, dtype, backend),
        )


@BACKENDS
def test_compile(backend, device):
    inputs = make_inputs(6, 5, 9, torch.float32)
    student, *rest = (value.to(device) for value in inputs.values())
    student.requires_grad_()

    def loss(student, teacher, weight):
        return masked_linear_kl(student, teacher, weight, reduction="mean", backend=backend)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, actual = loss(student, *rest), compiled(student, *rest)
    torch.testing.assert_close(actual, expected)
    (a,), (b,) = (torch.autograd.grad(each, student) for each in (actual, expected))
    torch.testing.assert_close(a, b)


@TRITON
def test_flops(backend, device):
    inputs = make_inputs(6, 5, 9, torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    product = 2 * 6 * 5 * 9
    with FlopCounterMode(display=False) as counter:
        masked_linear_kl(**inputs, backend=backend)
    assert counter.get_total_flops() == 2 * product
    inputs["student"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        masked_linear_kl(**inputs, reduction="sum", backend=backend).backward()
    assert counter.get_total_flops() == 3 * product


def test_autocast():
    inputs = make_inputs(6, 5, 9, torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = masked_linear_kl(**inputs, backend="reference")
    rounded = {name: value.bfloat16() for name, value in inputs.items()}
    assert torch.equal(actual, masked_linear_kl(**rounded, backend="reference"))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_reference_differentiates_the_students_head_twice(direction):
    torch.manual_seed(0)
    student, teacher, weight, bias = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (4, 3), (6, 3), (6,))
    )
    leaves = tuple(part.requires_grad_() for part in (student, weight, bias))
    constant = (teacher @ weight.mT + bias).detach().log_softmax(-1)

    def written_plainly(student, weight, bias):
        own = (student @ weight.mT + bias).log_softmax(-1)
        first, second = (constant, own) if direction == "forward" else (own, constant)
        return (first.exp() * (first - second)).sum(-1)

    kl = masked_linear_kl(
        student, teacher, weight, bias=bias, direction=direction, backend="reference"
    )
    with reference_ops():
        assert torch.equal(
            kl, masked_linear_kl(student, teacher, weight, bias=bias, direction=direction)
        )
    assert torch.allclose(kl, written_plainly(*leaves), rtol=1e-12)
    truth = torch.autograd.grad(written_plainly(*leaves).sum(), leaves, create_graph=True)
    actual = torch.autograd.grad(kl.sum(), leaves, create_graph=True)
    for one, other in zip(actual, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    ways = [torch.randn_like(leaf) for leaf in leaves]
    second = [
        torch.autograd.grad([(g * w).sum() for g, w in zip(own, ways, strict=True)], leaves)
        for own in (actual, truth)
    ]
    for one, other in zip(*second, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(2, 3, 4)}, r"student must be \[M, D\], got \[2, 3, 4\]"),
        ({"student": torch.zeros(6, 5).int()}, "student must be one of .* got torch.int32"),
        ({"teacher": torch.zeros(5, 5)}, r"teacher must be \[6, 5\] like student, got \[5, 5\]"),
        ({"teacher": torch.zeros(6, 5).double()}, "teacher must have student's dtype"),
        ({"teacher": torch.zeros(6, 5, device="meta")}, "teacher must be on student's device cpu"),
        ({"weight": torch.zeros(9, 4)}, r"weight must be \[V, 5\]"),
        ({"weight": torch.zeros(9, 5, requires_grad=True)}, "weight must not require grad"),
        ({"bias": torch.zeros(9, requires_grad=True)}, "bias must not require grad.* detach it"),
        ({"bias": torch.zeros(8)}, r"bias must be \[9\].* got \[8\]"),
        ({"index": torch.zeros(5)}, r"index must be \[K\] torch.int64, got \[5\] torch.float32"),
        ({"index": torch.full((5,), 6)}, r"index must be in \[0, 6\), got 6"),
        ({"direction": "both"}, "direction must be one of 'forward', 'reverse', got 'both'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"softcap": -1.0}, "softcap must be None or positive and finite, got -1.0"),
        ({"chunk_bytes": 0}, "chunk_bytes must be None or at least 1, got 0"),
        ({"token_weight": torch.ones(5)}, r"token_weight must be \[6\], .* got \[5\]"),
        ({"token_weight": torch.ones(6).long()}, "token_weight must be floating-point"),
        ({"reduction": "avg"}, "reduction must be one of 'none', 'sum', 'mean', got 'avg'"),
        ({"normalizer": 2.0}, "normalizer must be None unless reduction='mean'"),
        ({"backend": "cpu"}, "backend must be None or one of 'triton', 'reference', got 'cpu'"),
    ],
)
def test_bad_input(change, message):
    inputs = make_inputs(6, 5, 9, torch.float32) | change
    with pytest.raises(ValueError, match=message):
        masked_linear_kl(**inputs)
