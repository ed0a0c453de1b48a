"""masked_linear_cross_entropy against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import masked_linear_cross_entropy
from tests.kernels.truth import assert_as_accurate

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


def make_inputs(rows, depth, vocabulary, dtype, *, keep=0.6, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = (3 * torch.randn(vocabulary, depth, generator=generator) / depth**0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) >= keep] = IGNORED
    inputs = {"hidden": hidden, "weight": weight, "target": target}
    if bias:
        inputs["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    return inputs


def loss_and_gradients(inputs, *, backend, trainable=False, grad=None, to=None, **options):
    """{"nll", "lse", "grad_*"}; grad is the gradient of the rows' losses, 1 for each if None."""
    given = {}
    for name, value in inputs.items():
        needs_grad = name == "hidden" or (trainable and name in ("weight", "bias"))
        if value.is_floating_point():
            value = value.detach().to(to or value.dtype)
        given[name] = value.requires_grad_(True) if needs_grad else value
    nll, lse = masked_linear_cross_entropy(**given, return_lse=True, backend=backend, **options)
    assert not lse.requires_grad
    grad = torch.ones_like(nll) if grad is None else grad.to(nll.dtype)
    leaves = {name: value for name, value in given.items() if value.requires_grad}
    gradients = torch.autograd.grad(nll, list(leaves.values()), grad)
    results = {"nll": nll.detach(), "lse": lse}
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return results


def assert_cpu_is_accurate(inputs, **options):
    actual = loss_and_gradients(inputs, backend="cpu", **options)
    truth = loss_and_gradients(inputs, backend="reference", to=torch.float64, **options)
    reference = loss_and_gradients(inputs, backend="reference", **options)
    assert actual.keys() == truth.keys()
    for name in truth:
        if actual[name].dtype == torch.float64:  # the truth itself, but for the order of sums
            torch.testing.assert_close(actual[name], truth[name], rtol=1e-12, atol=1e-12)
        else:
            assert_as_accurate(name, actual[name], truth[name], reference[name])
    assert (actual["nll"] >= 0).all()
    return actual


# --- The reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("index", [False, True])
def test_reference_gradients(softcap, index):
    inputs = make_inputs(5, 3, 7, torch.float64, bias=True)
    if index:
        inputs["index"] = torch.tensor([4, 0, 0, 2, 1])
    hidden, weight, bias = (inputs.pop(name) for name in ("hidden", "weight", "bias"))
    token_weight = torch.rand(5, dtype=torch.float64)

    def loss(hidden, weight, bias, token_weight):
        return masked_linear_cross_entropy(
            hidden,
            weight,
            bias=bias,
            token_weight=token_weight,
            softcap=softcap,
            backend="reference",
            **inputs,
        )

    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias, token_weight)]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reference_is_cross_entropy(reduction):
    inputs = make_inputs(20, 8, 30, torch.float64, bias=True)
    logits = inputs["hidden"] @ inputs["weight"].mT + inputs["bias"]
    expected = F.cross_entropy(logits, inputs["target"], reduction=reduction)
    actual = masked_linear_cross_entropy(**inputs, reduction=reduction, backend="reference")
    torch.testing.assert_close(actual, expected)


# --- The CPU backend -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    ("rows", "depth", "vocabulary"),
    [(1, 1, 1), (7, 5, 11), (50, 33, 301), (70, 130, 1000), (600, 20, 50)],
)
def test_sizes(dtype, trainable, rows, depth, vocabulary):
    inputs = make_inputs(rows, depth, vocabulary, dtype)
    assert_cpu_is_accurate(inputs, trainable=trainable, grad=torch.rand(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bias_softcap_and_small_chunks(dtype, trainable, softcap):
    inputs = make_inputs(60, 40, 333, dtype, bias=True)
    for chunk_bytes in (1, 10_000, None):
        assert_cpu_is_accurate(
            inputs, trainable=trainable, softcap=softcap, chunk_bytes=chunk_bytes
        )


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets(monkeypatch, capability, dtype):
    """The fallbacks for CPUs without bfloat16, AVX-512 or AVX2."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    assert_cpu_is_accurate(make_inputs(60, 40, 333, dtype, bias=True), trainable=True, softcap=9.0)
    assert_cpu_is_accurate(make_inputs(60, 40, 333, dtype, bias=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("keep", [0.0, 1.0], ids=["no row", "every row"])
def test_masks(dtype, trainable, keep):
    inputs = make_inputs(30, 16, 64, dtype, keep=keep, bias=True)
    actual = assert_cpu_is_accurate(inputs, trainable=trainable)
    if keep == 0:
        assert all(not value.any() for value in actual.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_rows_at_all(dtype, trainable):
    inputs = make_inputs(0, 16, 64, dtype)
    actual = assert_cpu_is_accurate(inputs, trainable=trainable)
    assert actual["grad_hidden"].shape == (0, 16)
    inputs["hidden"].requires_grad_()
    loss = masked_linear_cross_entropy(**inputs, reduction="mean", backend="cpu")
    loss.backward()  # connected to the graph
    assert loss.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_index_with_duplicates(dtype, trainable):
    inputs = make_inputs(40, 24, 100, dtype)
    inputs["index"] = torch.randint(5, 12, (40,), generator=torch.Generator().manual_seed(1))
    actual = assert_cpu_is_accurate(inputs, trainable=trainable, grad=torch.rand(40))
    assert not actual["grad_hidden"][:5].any()
    assert not actual["grad_hidden"][12:].any()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_ignored_rows_are_not_read(trainable):
    inputs = make_inputs(20, 16, 64, torch.float32)
    clean = loss_and_gradients(inputs, backend="cpu", trainable=trainable)
    inputs["hidden"][inputs["target"] == IGNORED] = float("nan")
    for backend in ("cpu", "reference"):
        dirty = loss_and_gradients(inputs, backend=backend, trainable=trainable)
        for name, value in clean.items():
            torch.testing.assert_close(dirty[name], value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows_and_stays_in_its_row(bad, dtype):
    inputs = make_inputs(20, 16, 64, dtype, keep=1.0)
    clean = loss_and_gradients(inputs, backend="cpu")
    inputs["hidden"][3, 5] = bad
    dirty = loss_and_gradients(inputs, backend="cpu")
    assert not dirty["nll"][3].isfinite()
    assert not dirty["grad_hidden"][3].isfinite().any()
    others = torch.arange(20) != 3
    for name in ("nll", "grad_hidden"):
        assert torch.equal(dirty[name][others], clean[name][others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forbidden_words(dtype):
    """A bias of -inf takes a word out of the softmax."""
    inputs = make_inputs(20, 16, 200, dtype, bias=True)
    forbidden = torch.ones(200, dtype=torch.bool)
    forbidden[inputs["target"].clamp(min=0)] = False
    inputs["bias"][forbidden] = -float("inf")
    actual = assert_cpu_is_accurate(inputs)
    assert actual["nll"].isfinite().all()


def test_inputs_that_are_not_contiguous():
    inputs = make_inputs(30, 16, 64, torch.float32, bias=True)
    expected = loss_and_gradients(inputs, backend="cpu", trainable=True)
    strided = {name: value.repeat_interleave(2, 0)[::2] for name, value in inputs.items()}
    strided["hidden"] = inputs["hidden"].mT.contiguous().mT
    strided["weight"] = inputs["weight"].repeat(1, 2)[:, :16]
    actual = loss_and_gradients(strided, backend="cpu", trainable=True)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_stride_0_gradient(trainable):
    inputs = make_inputs(30, 16, 64, torch.float32)
    grad = torch.tensor(0.5).expand(30)
    expected = loss_and_gradients(inputs, backend="cpu", trainable=trainable, grad=grad.clone())
    actual = loss_and_gradients(inputs, backend="cpu", trainable=trainable, grad=grad)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_two_backwards(trainable):
    inputs = make_inputs(30, 16, 64, torch.bfloat16)
    hidden = inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)
    loss = masked_linear_cross_entropy(**inputs, reduction="mean", backend="cpu")
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_second_derivative_is_refused(trainable):
    inputs = make_inputs(30, 16, 64, torch.float32)
    hidden = inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)
    loss = masked_linear_cross_entropy(**inputs, reduction="mean", backend="cpu")
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), hidden)


def confident_inputs(dtype, margin):
    """Tokens with p(target) above 0.997 from margin 18."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 128, generator=generator).to(dtype)
    target = torch.randint(4000, (64,), generator=generator)
    direction = weight[target].double()
    hidden = margin * direction / direction.square().sum(-1, keepdim=True)
    noise = 0.05 * torch.randn(64, 128, generator=generator)
    return {"hidden": (hidden + noise).to(dtype), "weight": weight, "target": target}


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("margin", [18.0, 24.0])
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.bfloat16, 2e-3), (torch.float32, 1e-5)], ids=["bfloat16", "float32"]
)
def test_confident_tokens(dtype, bar, margin, trainable):
    inputs = confident_inputs(dtype, margin)
    truth = loss_and_gradients(inputs, backend="reference", to=torch.float64, trainable=trainable)
    assert torch.exp(-truth["nll"]).min() > 0.997
    actual = loss_and_gradients(inputs, backend="cpu", trainable=trainable)
    for name in truth.keys() - {"lse"}:
        error = (actual[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= bar, name


def test_losses_are_never_negative():
    inputs = confident_inputs(torch.bfloat16, 200.0)
    actual = loss_and_gradients(inputs, backend="cpu")
    assert (actual["nll"] >= 0).all()
    assert actual["grad_hidden"].isfinite().all()


def test_result_does_not_depend_on_timing():
    inputs = make_inputs(300, 64, 2000, torch.bfloat16)
    first = loss_and_gradients(inputs, backend="cpu", trainable=True)
    for _ in range(3):
        again = loss_and_gradients(inputs, backend="cpu", trainable=True)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


# --- Reduction, registration, errors -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reductions(backend):
    inputs = make_inputs(30, 16, 64, torch.bfloat16)
    token_weight = torch.rand(30, dtype=torch.bfloat16, requires_grad=True)
    nll = masked_linear_cross_entropy(**inputs, backend=backend)
    assert nll.dtype == torch.float32
    weighted = nll * token_weight.float()

    def loss(**options):
        return masked_linear_cross_entropy(
            **inputs, token_weight=token_weight, backend=backend, **options
        )

    torch.testing.assert_close(loss(), weighted)
    torch.testing.assert_close(loss(reduction="sum"), weighted.sum())
    kept = (inputs["target"] != IGNORED).sum()
    torch.testing.assert_close(loss(reduction="mean"), weighted.sum() / kept)
    torch.testing.assert_close(loss(reduction="mean", normalizer=7.0), weighted.sum() / 7)
    of_tensor = loss(reduction="mean", normalizer=torch.tensor([7.0]))
    torch.testing.assert_close(of_tensor, weighted.sum() / 7)
    (grad,) = torch.autograd.grad(loss(reduction="sum"), token_weight)
    torch.testing.assert_close(grad, nll.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_opcheck(dtype, trainable):
    inputs = make_inputs(6, 5, 9, dtype, bias=True)
    for name in ("hidden", "weight", "bias") if trainable else ("hidden",):
        inputs[name].requires_grad_()
    hidden, weight, target, bias = inputs.values()
    for index in (None, torch.tensor([0, 0, 5, 2, 1, 3])):
        arguments = (hidden, weight, target, bias, index, IGNORED, 3.0, None, not trainable, "cpu")
        torch.library.opcheck(torch.ops.memdlm.masked_linear_cross_entropy.default, arguments)


def test_opcheck_of_the_backward_ops():
    inputs = make_inputs(6, 5, 9, torch.bfloat16, bias=True)
    hidden, weight, target, bias = inputs.values()
    nll, lse, stash = torch.ops.memdlm.masked_linear_cross_entropy(
        hidden, weight, target, bias, None, IGNORED, None, None, True, "cpu"
    )
    grad_nll = torch.rand(6)
    torch.library.opcheck(
        torch.ops.memdlm.masked_linear_cross_entropy_stash_backward.default,
        (grad_nll, stash, None, 6, torch.bfloat16, "cpu"),
    )
    for needed in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            torch.ops.memdlm.masked_linear_cross_entropy_backward.default,
            (grad_nll, hidden, weight, target, bias, None, nll, lse, IGNORED, None, None, *needed)
            + ("cpu",),
        )


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_compile(trainable):
    inputs = make_inputs(6, 5, 9, torch.float32)
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)

    def loss(hidden, weight, target):
        return masked_linear_cross_entropy(hidden, weight, target, reduction="mean")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaves = [value for value in inputs.values() if value.requires_grad]
    expected, actual = loss(**inputs), compiled(**inputs)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_flops():
    inputs = make_inputs(6, 5, 9, torch.float32)
    inputs["hidden"].requires_grad_()
    product = 2 * 6 * 5 * 9
    for trainable, expected in ((False, 2 * product), (True, 4 * product)):
        inputs["weight"].requires_grad_(trainable)
        with FlopCounterMode(display=False) as counter:
            masked_linear_cross_entropy(**inputs, reduction="sum", backend="cpu").backward()
        assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        masked_linear_cross_entropy(**inputs, backend="cpu")
    assert counter.get_total_flops() == product


def test_autocast():
    inputs = make_inputs(6, 5, 9, torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = masked_linear_cross_entropy(**inputs)
    rounded = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    assert torch.equal(actual, masked_linear_cross_entropy(**rounded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must be \[M, D\], got \[2, 3, 4\]"),
        (
            {"hidden": torch.zeros(6, 5, dtype=torch.int32)},
            "hidden must be one of .* got torch.int32",
        ),
        ({"weight": torch.zeros(9, 4)}, r"weight must be \[V, 5\]"),
        ({"weight": torch.zeros(0, 5)}, "V at least 1"),
        ({"weight": torch.zeros(9, 5).double()}, "weight must have hidden's dtype torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias must be \[9\].* got \[8\]"),
        ({"target": torch.zeros(6)}, "target must be torch.int64, got torch.float32"),
        ({"target": torch.zeros(5).long()}, r"target must be \[6\], the rows of hidden, got \[5\]"),
        (
            {"target": torch.full((6,), 9)},
            r"target must be in \[0, 9\) or ignore_index -100, got 9",
        ),
        ({"target": torch.full((6,), -1)}, "got -1"),
        ({"index": torch.zeros(5).long()}, r"index must be \[6\] like target, got \[5\]"),
        ({"index": torch.full((6,), 6)}, r"index must be in \[0, 6\), got 6"),
        ({"target": torch.zeros(6, device="meta").long()}, "target must be on hidden's device cpu"),
        ({"token_weight": torch.ones(5)}, r"token_weight must be \[6\] like target, got \[5\]"),
        ({"token_weight": torch.ones(6).long()}, "token_weight must be floating-point"),
        ({"softcap": 0.0}, "softcap must be None or positive and finite, got 0.0"),
        ({"chunk_bytes": 0}, "chunk_bytes must be None or at least 1, got 0"),
        ({"reduction": "avg"}, "reduction must be one of 'none', 'sum', 'mean', got 'avg'"),
        ({"normalizer": 2.0}, "normalizer must be None unless reduction='mean'"),
        ({"reduction": "mean", "normalizer": 0.0}, "normalizer must be positive, got 0.0"),
        ({"reduction": "mean", "normalizer": torch.ones(2)}, "normalizer must have one element"),
        ({"backend": "cuda"}, "backend must be None or one of 'cpu', 'reference', got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    inputs = make_inputs(6, 5, 9, torch.float32) | change
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(**inputs)
