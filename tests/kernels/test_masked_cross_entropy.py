"""masked_cross_entropy against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import masked_cross_entropy
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100

BACKENDS = pytest.mark.parametrize(("backend", "device"), backends("cpu", "triton"))
ALL_BACKENDS = pytest.mark.parametrize(
    ("backend", "device"), backends("cpu", "triton", "reference")
)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def with_dtypes(*dtypes):
    """Parameters (backend, device, dtype): every one that the backend has."""
    return pytest.mark.parametrize(
        ("backend", "device", "dtype"),
        [
            pytest.param(*backend.values, dtype, id=f"{backend.id}-{dtype}", marks=backend.marks)
            for backend in backends("cpu", "triton")
            for dtype in dtypes
            if (backend.id, dtype) != ("triton", torch.float64)
        ],
    )


def make_inputs(shape, vocabulary, dtype, *, keep=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocabulary, generator=generator)).to(dtype)
    target = torch.randint(vocabulary, shape, generator=generator)
    target[torch.rand(shape, generator=generator) >= keep] = IGNORED
    return logits, target


def loss_and_gradient(
    logits, target, *, backend, device="cpu", grad=None, to=None, inplace=False, **options
):
    logits = logits.detach().to(device, to or logits.dtype).requires_grad_()
    nll, lse = masked_cross_entropy(
        logits.clone() if inplace else logits,
        target.to(device),
        return_lse=True,
        backend=backend,
        inplace=inplace,
        **options,
    )
    assert not lse.requires_grad
    grad = torch.ones_like(nll) if grad is None else grad.to(nll)
    (grad_logits,) = torch.autograd.grad(nll, logits, grad)
    return {"nll": nll.detach(), "lse": lse, "grad_logits": grad_logits}


def assert_accurate(logits, target, backend, device, *, inplace=False, **options):
    on = {"backend": backend, "device": device, "inplace": inplace}
    actual = loss_and_gradient(logits, target, **on, **options)
    truth = loss_and_gradient(logits, target, backend="reference", to=torch.float64, **options)
    reference = loss_and_gradient(logits, target, backend="reference", **options)
    for name in truth:
        if actual[name].dtype == torch.float64:  # the truth itself, but for the order of sums
            torch.testing.assert_close(actual[name], truth[name], rtol=1e-12, atol=1e-12)
        else:
            assert_as_accurate(name, actual[name], truth[name], reference[name])
    assert (actual["nll"] >= 0).all()
    ignored = target == IGNORED
    for value in actual.values():
        assert not value[ignored].any()
    return actual


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_gradients(softcap):
    logits, target = make_inputs((2, 3), 7, torch.float64)
    token_weight = torch.rand(2, 3, dtype=torch.float64)

    def loss(logits, token_weight):
        return masked_cross_entropy(
            logits, target, token_weight=token_weight, softcap=softcap, backend="reference"
        )

    leaves = [logits.requires_grad_(), token_weight.requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # of float64
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_is_cross_entropy(backend, reduction):
    logits, target = make_inputs((4, 5), 30, torch.float64)
    expected = F.cross_entropy(logits.mT, target, reduction=reduction)
    actual = masked_cross_entropy(logits, target, reduction=reduction, backend=backend)
    torch.testing.assert_close(actual, expected)


@with_dtypes(*DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    ("shape", "vocabulary"),
    [((), 9), ((1,), 1), ((7,), 11), ((2, 5), 65), ((3, 2, 4), 1000), ((6,), 9003)],
)
def test_sizes(backend, device, dtype, inplace, softcap, shape, vocabulary):
    inputs = make_inputs(shape, vocabulary, dtype)
    grad = torch.rand(shape)
    assert_accurate(*inputs, backend, device, inplace=inplace, grad=grad, softcap=softcap)


@with_dtypes(*DTYPES)
@pytest.mark.parametrize("keep", [0.0, 1.0], ids=["no row", "every row"])
def test_masks(backend, device, dtype, keep):
    logits, target = make_inputs((4, 5), 100, dtype, keep=keep)
    assert_accurate(logits, target, backend, device, grad=torch.rand(4, 5))
    logits, target = logits.to(device).requires_grad_(), target.to(device)
    loss = masked_cross_entropy(logits, target, reduction="mean", backend=backend)
    loss.backward()  # connected to the graph also where no row is left
    assert logits.grad.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows_at_all(backend, device, inplace):
    inputs = make_inputs((0,), 10, torch.float32)
    actual = assert_accurate(*inputs, backend, device, inplace=inplace)
    assert actual["grad_logits"].shape == (0, 10)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(monkeypatch, capability, dtype):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    assert_accurate(*make_inputs((20,), 333, dtype), "cpu", "cpu", softcap=9.0)


@with_dtypes(torch.float64, torch.float32, torch.bfloat16)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_confident_and_forbidden_words(backend, device, dtype, inplace, softcap):
    logits, target = make_inputs((20,), 500, dtype, keep=1.0)
    logits.scatter_(1, target[:, None], 25.0)
    if softcap is None:  # capped, they would be words like others
        logits[:, 490:].masked_fill_(target[:, None] < 490, -float("inf"))
    actual = assert_accurate(logits, target, backend, device, inplace=inplace, softcap=softcap)
    truth = loss_and_gradient(
        logits, target, backend="reference", to=torch.float64, softcap=softcap
    )
    assert actual["nll"].max() < 0.003
    error = (actual["grad_logits"].cpu().double() - truth["grad_logits"]).norm()
    assert error <= {torch.bfloat16: 2e-3}.get(dtype, 1e-5) * truth["grad_logits"].norm()


@ALL_BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_not_read(backend, device, inplace):
    logits, target = make_inputs((20,), 64, torch.float32)
    options = {"backend": backend, "device": device, "inplace": inplace, "grad": torch.rand(20)}
    clean = loss_and_gradient(logits, target, **options)
    logits[target == IGNORED] = float("nan")
    dirty = loss_and_gradient(logits, target, **options)
    for name, value in clean.items():
        torch.testing.assert_close(dirty[name], value)


@ALL_BACKENDS
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_inplace(backend, device, softcap):
    logits, target = make_inputs((2, 5), 33, torch.bfloat16)
    logits, target = logits.to(device).requires_grad_(), target.to(device)
    copy = logits.clone()
    options = {"softcap": softcap, "backend": backend}
    loss = masked_cross_entropy(copy, target, inplace=True, **options)
    expected = masked_cross_entropy(logits, target, **options)
    assert torch.equal(loss, expected)
    (unit,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    assert torch.equal(copy, unit)  # in forward
    (grad,) = torch.autograd.grad((2 * loss).sum(), logits, retain_graph=True)
    assert torch.equal(grad, 2 * unit)
    assert torch.equal(copy, grad)  # no other buffer
    with pytest.raises(RuntimeError, match="a second backward needs inplace=False"):
        torch.autograd.grad(loss.sum(), logits)


@ALL_BACKENDS
def test_inplace_without_a_gradient_leaves_the_logits(backend, device):
    logits, target = (value.to(device) for value in make_inputs((6,), 33, torch.float32))
    before = logits.clone()
    loss = masked_cross_entropy(logits, target, inplace=True, backend=backend)
    with torch.no_grad():
        masked_cross_entropy(logits.requires_grad_(), target, inplace=True, backend=backend)
    assert torch.equal(logits, before)
    assert torch.equal(loss, masked_cross_entropy(logits, target, backend=backend))


def test_inplace_tells_who_saved_the_logits():
    logits, target = make_inputs((6,), 33, torch.float32)
    saved = torch.tanh(logits.requires_grad_())
    loss = masked_cross_entropy(saved, target, inplace=True, reduction="sum")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BACKENDS
def test_nan_shows(backend, device):
    logits, target = make_inputs((4,), 64, torch.float32, keep=1.0)
    logits[2, 5] = float("nan")
    actual = loss_and_gradient(logits, target, backend=backend, device=device)
    assert actual["nll"].isnan().tolist() == [False, False, True, False]
    assert actual["grad_logits"][2].isnan().all()


@BACKENDS
def test_strides(backend, device):
    logits, target = make_inputs((6, 4), 33, torch.float32)
    grad = torch.tensor(0.5, device=device).expand(6, 4)
    on = {"backend": backend, "device": device}
    expected = loss_and_gradient(logits, target, **on, grad=grad.clone())
    strided = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    actual = loss_and_gradient(strided, target.mT.contiguous().mT, **on, grad=grad)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
def test_offsets_past_two_gibi_elements(backend, device):
    """Rows that lie 1 Gi elements apart: memory is taken when it is touched."""
    if device != "cpu":
        pytest.skip("a GPU takes the memory at once")
    logits, target = make_inputs((4,), 9, torch.bfloat16, keep=1.0)
    far = torch.empty(3 * 2**30 + 9, dtype=torch.bfloat16).as_strided((4, 9), (2**30, 1))
    far.copy_(logits)
    expected, actual = (loss_and_gradient(each, target, backend=backend) for each in (logits, far))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@BACKENDS
def test_two_backwards_and_no_second_derivative(backend, device):
    logits, target = (value.to(device) for value in make_inputs((6,), 33, torch.bfloat16))
    loss = masked_cross_entropy(logits.requires_grad_(), target, reduction="mean", backend=backend)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(second.sum(), logits)


@with_dtypes(torch.float32, torch.bfloat16)
def test_opcheck(backend, device, dtype):
    logits, target = (value.to(device) for value in make_inputs((2, 3), 9, dtype))
    torch.library.opcheck(
        torch.ops.memdlm.masked_cross_entropy.default,
        (logits.clone().requires_grad_(), target, IGNORED, 3.0, backend),
    )
    nll, lse = torch.ops.memdlm.masked_cross_entropy(logits, target, IGNORED, 3.0, backend)
    torch.library.opcheck(
        torch.ops.memdlm.masked_cross_entropy_backward.default,
        (torch.rand(2, 3, device=device), logits, target, nll, lse, IGNORED, 3.0, backend),
    )
    torch.library.opcheck(
        torch.ops.memdlm.masked_cross_entropy_.default,
        (logits.clone(), target, IGNORED, 3.0, backend),
    )
    torch.library.opcheck(
        torch.ops.memdlm.masked_cross_entropy_scale_.default,
        (logits.clone(), torch.rand(2, 3, device=device), target, IGNORED, backend),
    )


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_compile(backend, device, inplace):
    logits, target = (value.to(device) for value in make_inputs((2, 3), 9, torch.float32))
    logits.requires_grad_()

    def loss(logits, target):
        logits = 2 * logits
        return masked_cross_entropy(
            logits, target, reduction="mean", inplace=inplace, backend=backend
        )

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, actual = loss(logits, target), compiled(logits, target)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_flops():
    logits, target = make_inputs((6,), 9, torch.float32)
    with FlopCounterMode(display=False) as counter:
        masked_cross_entropy(logits.requires_grad_(), target, reduction="sum").backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(())}, r"logits must be \[..., V\], with V at least 1, got \[\]"),
        ({"logits": torch.zeros(6, 0)}, "V at least 1"),
        ({"logits": torch.zeros(6, 9).long()}, "logits must be one of .* got torch.int64"),
        ({"target": torch.zeros(6)}, "target must be torch.int64, got torch.float32"),
        ({"target": torch.zeros(5).long()}, r"target must be \[6\] for logits \[6, 9\], got \[5\]"),
        (
            {"target": torch.full((6,), 9)},
            r"target must be in \[0, 9\) or ignore_index -100, got 9",
        ),
        ({"target": torch.zeros(6, device="meta").long()}, "target must be on logits' device cpu"),
        ({"token_weight": torch.ones(5)}, r"token_weight must be \[6\] like target, got \[5\]"),
        ({"softcap": -1.0}, "softcap must be None or positive and finite, got -1.0"),
        ({"reduction": "avg"}, "reduction must be one of 'none', 'sum', 'mean', got 'avg'"),
        (
            {"logits": torch.zeros(9, 6).mT, "inplace": True},
            r"logits must be contiguous with inplace=True, got strides \[1, 6\]",
        ),
        (
            {"logits": torch.zeros(6, 9, requires_grad=True), "inplace": True},
            "logits must not be a leaf that requires grad with inplace=True",
        ),
        (
            {"backend": "cuda"},
            "backend must be None or one of 'cpu', 'triton', 'reference', got 'cuda'",
        ),
    ],
)
def test_bad_input(change, message):
    logits, target = make_inputs((6,), 9, torch.float32)
    with pytest.raises(ValueError, match=message):
        masked_cross_entropy(**({"logits": logits, "target": target} | change))
