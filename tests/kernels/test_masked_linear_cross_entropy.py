"""masked_linear_cross_entropy against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import masked_linear_cross_entropy
from memdlm_kernels._triton import product
from tests.kernels.devices import HAS_GPU, backends
from tests.kernels.truth import assert_as_accurate

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100

BACKENDS = pytest.mark.parametrize(("backend", "device"), backends("cpu", "triton"))
TRAINABLE = pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])


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


@pytest.fixture
def small_tiles(monkeypatch):
    """Triton's tiles of at most 16 rows, and with chunk_bytes=1 of 128 words."""
    triton = pytest.importorskip("memdlm_kernels.masked_linear_cross_entropy.triton")
    monkeypatch.setattr(triton, "_FEWEST_ROWS", 8)


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


def loss_and_gradients(
    inputs, *, backend, device="cpu", trainable=False, grad=None, to=None, **options
):
    """{"nll", "lse", "grad_*"}; grad is the gradient of the rows' losses, 1 for each if None."""
    given = {}
    for name, value in inputs.items():
        needs_grad = name == "hidden" or (trainable and name in ("weight", "bias"))
        if value.is_floating_point():
            value = value.detach().to(to or value.dtype)
        value = value.to(device)
        given[name] = value.requires_grad_(True) if needs_grad else value
    nll, lse = masked_linear_cross_entropy(**given, return_lse=True, backend=backend, **options)
    assert not lse.requires_grad
    grad = torch.ones_like(nll) if grad is None else grad.to(nll)
    leaves = {name: value for name, value in given.items() if value.requires_grad}
    gradients = torch.autograd.grad(nll, list(leaves.values()), grad)
    results = {"nll": nll.detach(), "lse": lse}
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return results


def assert_accurate(inputs, backend, device, **options):
    actual = loss_and_gradients(inputs, backend=backend, device=device, **options)
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


# --- The backends --------------------------------------------------------------------------------


@with_dtypes(*DTYPES)
@TRAINABLE
@pytest.mark.parametrize(
    ("rows", "depth", "vocabulary"), [(1, 1, 1), (7, 5, 11), (50, 33, 301), (20, 130, 1000)]
)
def test_sizes(backend, device, dtype, trainable, rows, depth, vocabulary):
    inputs = make_inputs(rows, depth, vocabulary, dtype)
    assert_accurate(inputs, backend, device, trainable=trainable, grad=torch.rand(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@TRAINABLE
@pytest.mark.parametrize(("rows", "depth", "vocabulary"), [(70, 130, 1000), (600, 20, 50)])
def test_more_rows_than_a_block_of_the_cpu(dtype, trainable, rows, depth, vocabulary):
    inputs = make_inputs(rows, depth, vocabulary, dtype)
    assert_accurate(inputs, "cpu", "cpu", trainable=trainable, grad=torch.rand(rows))


@with_dtypes(*DTYPES)
@TRAINABLE
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bias_softcap_and_small_chunks(small_tiles, backend, device, dtype, trainable, softcap):
    inputs = make_inputs(30, 40, 333, dtype, bias=True)
    for chunk_bytes in (1, 20_000, None):
        assert_accurate(
            inputs, backend, device, trainable=trainable, softcap=softcap, chunk_bytes=chunk_bytes
        )


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@TRAINABLE
def test_tile_wider_than_a_block(monkeypatch, small_tiles, backend, device, dtype, trainable):
    triton = pytest.importorskip("memdlm_kernels.masked_linear_cross_entropy.triton")
    monkeypatch.setattr(triton, "_WIDEST_BLOCK", 32)
    inputs = make_inputs(20, 16, 333, dtype)
    for chunk_bytes in (1, None):
        assert_accurate(inputs, backend, device, trainable=trainable, chunk_bytes=chunk_bytes)


@with_dtypes(torch.float32, torch.bfloat16)
def test_one_word_for_most_rows(backend, device, dtype):
    """As where responses are padded with the token that ends them."""
    inputs = make_inputs(150, 16, 20, dtype, keep=1.0, bias=True)
    inputs["target"][20:] = 7
    assert_accurate(inputs, backend, device, trainable=True, grad=torch.rand(150))


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
@TRAINABLE
def test_small_gradients_survive_float16(backend, device, trainable):
    """p and its product with the row's gradient are below the least number of float16."""
    inputs = make_inputs(6, 16, 20_000, torch.float16, keep=1.0)
    inputs["weight"] *= 0.01
    grad = torch.full((6,), 1e-4)
    assert_accurate(inputs, backend, device, trainable=trainable, grad=grad)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunk_bytes", "tile"),
    [
        (1, 1, None, (1, 128)),
        (1024, 157_184, None, (1024, 7936)),
        (2048, 157_184, None, (2048, 4096)),
        (8192, 157_184, None, (2048, 4096)),
        (3000, 157_184, None, (1500, 5504)),
        (100_000, 157_184, 1, (2041, 128)),  # never fewer rows because there are more of them
        (4096, 157_184, 2**31, (2048, 157_184)),
        (300, 157_184, 2**28, (300, 157_184)),
    ],
)
def test_tile_size(rows, vocabulary, chunk_bytes, tile):
    triton = pytest.importorskip("memdlm_kernels.masked_linear_cross_entropy.triton")
    assert triton.tile_size(rows, vocabulary, chunk_bytes) == tile


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
def test_offsets_past_two_gibi_elements(backend, device):
    """Rows of hidden and of weight that lie 1 Gi elements apart: memory is taken when touched."""
    if device != "cpu":
        pytest.skip("a GPU takes the memory at once")
    inputs = make_inputs(4, 8, 4, torch.bfloat16, keep=1.0)
    inputs["index"] = torch.tensor([3, 0, 1, 3])
    expected = loss_and_gradients(inputs, backend=backend)
    far = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16).as_strided((4, 8), (2**30, 1))
    for name in ("hidden", "weight"):
        actual = loss_and_gradients(inputs | {name: far.copy_(inputs[name])}, backend=backend)
        for result, value in expected.items():
            assert torch.equal(actual[result], value), result


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets(monkeypatch, capability, dtype):
    """The fallbacks for CPUs without bfloat16, AVX-512 or AVX2."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    inputs = make_inputs(60, 40, 333, dtype, bias=True)
    assert_accurate(inputs, "cpu", "cpu", trainable=True, softcap=9.0)
    assert_accurate(inputs, "cpu", "cpu")


@with_dtypes(*DTYPES)
@TRAINABLE
@pytest.mark.parametrize("keep", [0.0, 1.0], ids=["no row", "every row"])
def test_masks(backend, device, dtype, trainable, keep):
    inputs = make_inputs(30, 16, 64, dtype, keep=keep, bias=True)
    actual = assert_accurate(inputs, backend, device, trainable=trainable)
    if keep == 0:
        assert all(not value.any() for value in actual.values())


@with_dtypes(*DTYPES)
@TRAINABLE
def test_no_rows_at_all(backend, device, dtype, trainable):
    inputs = make_inputs(0, 16, 64, dtype)
    actual = assert_accurate(inputs, backend, device, trainable=trainable)
    assert actual["grad_hidden"].shape == (0, 16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["hidden"].requires_grad_()
    loss = masked_linear_cross_entropy(**inputs, reduction="mean", backend=backend)
    loss.backward()  # connected to the graph
    assert loss.item() == 0


@with_dtypes(*DTYPES)
@TRAINABLE
def test_index_with_duplicates(small_tiles, backend, device, dtype, trainable):
    inputs = make_inputs(40, 24, 100, dtype)
    inputs["index"] = torch.randint(5, 12, (40,), generator=torch.Generator().manual_seed(1))
    actual = assert_accurate(inputs, backend, device, trainable=trainable, grad=torch.rand(40))
    assert not actual["grad_hidden"][:5].any()
    assert not actual["grad_hidden"][12:].any()


@pytest.mark.parametrize(("backend", "device"), backends("cpu", "triton", "reference"))
@TRAINABLE
@pytest.mark.parametrize("index", [False, True])
def test_ignored_rows_are_not_read(backend, device, trainable, index):
    inputs = make_inputs(20, 16, 64, torch.float32)
    if index:
        inputs["index"] = torch.arange(20).flip(0)
    options = {"backend": backend, "device": device, "trainable": trainable}
    clean = loss_and_gradients(inputs, **options)
    ignored = inputs["target"] == IGNORED
    inputs["hidden"][ignored.flip(0) if index else ignored] = float("nan")
    dirty = loss_and_gradients(inputs, **options)
    for name, value in clean.items():
        torch.testing.assert_close(dirty[name], value)


@pytest.fixture
def multiplications(monkeypatch):
    """A list to which each product of Triton's backend adds how many multiplications it takes."""
    triton = pytest.importorskip("memdlm_kernels.masked_linear_cross_entropy.triton")
    counts = []

    def product_(out, a, b, accumulate):
        counts.append(a.numel() * b.shape[1])
        product.product_(out, a, b, accumulate)

    monkeypatch.setattr(triton, "product_", product_)
    return counts


@pytest.fixture
def searches(monkeypatch):
    """A list with one element for each search for the rows not ignored: a GPU's host waits."""
    found, nonzero = [], torch.nonzero

    def spy(*args, **options):
        found.append(nonzero(*args, **options))
        return found[-1]

    monkeypatch.setattr(torch, "nonzero", spy)
    return found


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@TRAINABLE
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0], ids=["no row", "some rows", "every row"])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 4.0)], ids=["plain", "capped"])
def test_ignored_rows_cost_no_product(
    multiplications, backend, device, dtype, trainable, keep, bias, softcap
):
    inputs = make_inputs(30, 16, 64, dtype, keep=keep, bias=bias)
    ignored = inputs["target"] == IGNORED
    inputs["hidden"][ignored] = float("nan")
    options = {"trainable": trainable, "softcap": softcap, "grad": torch.rand(30)}
    actual = assert_accurate(inputs, backend, device, **options)
    for name in ("nll", "lse", "grad_hidden"):
        assert not actual[name].cpu()[ignored].any(), name
    products = 4 if trainable else 2
    assert sum(multiplications) == products * int((~ignored).sum()) * 16 * 64


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
@TRAINABLE
def test_ignored_rows_that_are_not_left_out(multiplications, backend, device, trainable):
    inputs = make_inputs(30, 16, 64, torch.bfloat16, keep=0.4)
    options = {"trainable": trainable, "grad": torch.rand(30), "compact": False}
    inputs["hidden"][inputs["target"] == IGNORED] = float("nan")
    assert_accurate(inputs, backend, device, **options)
    assert sum(multiplications) == (4 if trainable else 2) * 30 * 16 * 64


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
@pytest.mark.parametrize(("trainable", "waits"), [(False, 1), (True, 2)])
def test_waits(searches, backend, device, trainable, waits):
    inputs = make_inputs(30, 16, 64, torch.bfloat16)
    options = {"backend": backend, "device": device, "trainable": trainable}
    loss_and_gradients(inputs, **options, compact=False)
    loss_and_gradients(inputs | {"index": torch.arange(30)}, **options)
    assert not searches
    loss_and_gradients(inputs, **options)
    assert len(searches) == waits


def test_no_copy_where_no_row_is_ignored():
    triton = pytest.importorskip("memdlm_kernels.masked_linear_cross_entropy.triton")
    target = torch.arange(5)
    assert triton._kept_rows(target, IGNORED) is None
    assert triton._kept_rows(target, 2).tolist() == [0, 1, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@TRAINABLE
def test_in_a_cuda_graph_all_rows_are_taken(trainable):
    inputs = make_inputs(30, 16, 64, torch.bfloat16)
    inputs = {name: value.cuda() for name, value in inputs.items()}
    options = {"backend": "triton", "device": "cuda", "trainable": trainable}
    expected = loss_and_gradients(inputs, **options, compact=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        loss_and_gradients(inputs, **options)  # the first call of a library may not be captured
        with torch.cuda.graph(graph, stream=stream):
            actual = loss_and_gradients(inputs, **options)
    graph.replay()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@with_dtypes(torch.float32, torch.bfloat16)
def test_what_is_not_finite_shows_and_stays_in_its_row(bad, backend, device, dtype):
    inputs = make_inputs(20, 16, 64, dtype, keep=1.0)
    clean = loss_and_gradients(inputs, backend=backend, device=device)
    inputs["hidden"][3, 5] = bad
    dirty = loss_and_gradients(inputs, backend=backend, device=device)
    assert not dirty["nll"][3].isfinite()
    assert not dirty["grad_hidden"][3].isfinite().any()
    others = torch.arange(20) != 3
    for name in ("nll", "grad_hidden"):
        assert torch.equal(dirty[name][others], clean[name][others])


@with_dtypes(torch.float64, torch.float32, torch.bfloat16)
def test_forbidden_words(backend, device, dtype):
    """A bias of -inf takes a word out of the softmax."""
    inputs = make_inputs(20, 16, 200, dtype, bias=True)
    forbidden = torch.ones(200, dtype=torch.bool)
    forbidden[inputs["target"].clamp(min=0)] = False
    inputs["bias"][forbidden] = -float("inf")
    actual = assert_accurate(inputs, backend, device, chunk_bytes=1)
    assert actual["nll"].isfinite().all()


@BACKENDS
def test_inputs_that_are_not_contiguous(backend, device):
    inputs = make_inputs(30, 16, 64, torch.float32, bias=True)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    options = {"backend": backend, "device": device, "trainable": True}
    expected = loss_and_gradients(inputs, **options)
    strided = {name: value.repeat_interleave(2, 0)[::2] for name, value in inputs.items()}
    strided["hidden"] = inputs["hidden"].mT.contiguous().mT
    strided["weight"] = inputs["weight"].repeat(1, 2)[:, :16]
    actual = loss_and_gradients(strided, **options)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@BACKENDS
@TRAINABLE
@pytest.mark.parametrize("index", [False, True])
def test_stride_0_gradient(backend, device, trainable, index):
    inputs = make_inputs(30, 16, 64, torch.float32)
    if index:
        inputs["index"] = torch.arange(30).flip(0)
    grad = torch.tensor(0.5, device=device).expand(30)
    options = {"backend": backend, "device": device, "trainable": trainable}
    expected = loss_and_gradients(inputs, **options, grad=grad.clone())
    actual = loss_and_gradients(inputs, **options, grad=grad)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@BACKENDS
@TRAINABLE
def test_two_backwards(backend, device, trainable):
    inputs = make_inputs(30, 16, 64, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    hidden = inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)
    loss = masked_linear_cross_entropy(**inputs, reduction="mean", backend=backend)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


@BACKENDS
@TRAINABLE
def test_second_derivative_is_refused(backend, device, trainable):
    inputs = make_inputs(30, 16, 64, torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    hidden = inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)
    loss = masked_linear_cross_entropy(**inputs, reduction="mean", backend=backend)
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


@BACKENDS
@TRAINABLE
@pytest.mark.parametrize("margin", [18.0, 24.0])
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.bfloat16, 2e-3), (torch.float32, 1e-5)], ids=["bfloat16", "float32"]
)
def test_confident_tokens(backend, device, dtype, bar, margin, trainable):
    inputs = confident_inputs(dtype, margin)
    truth = loss_and_gradients(inputs, backend="reference", to=torch.float64, trainable=trainable)
    assert torch.exp(-truth["nll"]).min() > 0.997
    actual = loss_and_gradients(inputs, backend=backend, device=device, trainable=trainable)
    for name in truth.keys() - {"lse"}:
        error = (actual[name].cpu().double() - truth[name]).norm() / truth[name].norm()
        assert error <= bar, name


@BACKENDS
def test_losses_are_never_negative(backend, device):
    inputs = confident_inputs(torch.bfloat16, 200.0)
    actual = loss_and_gradients(inputs, backend=backend, device=device)
    assert (actual["nll"] >= 0).all()
    assert actual["grad_hidden"].isfinite().all()


@BACKENDS
def test_result_does_not_depend_on_timing(backend, device):
    rows = 30 if (backend, device) == ("triton", "cpu") else 300
    inputs = make_inputs(rows, 64, 2000, torch.bfloat16)
    inputs["index"] = torch.arange(rows) // 3
    options = {"backend": backend, "device": device, "trainable": True}
    first = loss_and_gradients(inputs, **options)
    for _ in range(3):
        again = loss_and_gradients(inputs, **options)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


# --- Reduction, registration, errors -------------------------------------------------------------


@pytest.mark.parametrize(("backend", "device"), backends("cpu", "triton", "reference"))
def test_reductions(backend, device):
    inputs = make_inputs(30, 16, 64, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    token_weight = torch.rand(30, dtype=torch.bfloat16, device=device, requires_grad=True)
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
    of_tensor = loss(reduction="mean", normalizer=torch.tensor([7.0], device=device))
    torch.testing.assert_close(of_tensor, weighted.sum() / 7)
    (grad,) = torch.autograd.grad(loss(reduction="sum"), token_weight)
    torch.testing.assert_close(grad, nll.to(torch.bfloat16))


@with_dtypes(torch.float32, torch.bfloat16)
@TRAINABLE
def test_opcheck(backend, device, dtype, trainable):
    inputs = make_inputs(6, 5, 9, dtype, bias=True)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    for name in ("hidden", "weight", "bias") if trainable else ("hidden",):
        inputs[name].requires_grad_()
    hidden, weight, target, bias = inputs.values()
    for index in (None, torch.tensor([0, 0, 5, 2, 1, 3], device=device)):
        arguments = (hidden, weight, target, bias, index, IGNORED, 3.0, None, not trainable)
        arguments += (True, backend)
        torch.library.opcheck(torch.ops.memdlm.masked_linear_cross_entropy.default, arguments)


@BACKENDS
def test_opcheck_of_the_backward_ops(backend, device):
    inputs = make_inputs(6, 5, 9, torch.bfloat16, bias=True)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    hidden, weight, target, bias = inputs.values()
    nll, lse, stash = torch.ops.memdlm.masked_linear_cross_entropy(
        hidden, weight, target, bias, None, IGNORED, None, None, True, True, backend
    )
    grad_nll = torch.rand(6, device=device)
    torch.library.opcheck(
        torch.ops.memdlm.masked_linear_cross_entropy_stash_backward.default,
        (grad_nll, stash, None, 6, torch.bfloat16, backend),
    )
    for needed in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            torch.ops.memdlm.masked_linear_cross_entropy_backward.default,
            (grad_nll, hidden, weight, target, bias, None, nll, lse, IGNORED, None, None, *needed)
            + (True, backend),
        )


@BACKENDS
@TRAINABLE
def test_compile(backend, device, trainable):
    inputs = make_inputs(6, 5, 9, torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)

    def loss(hidden, weight, target):
        return masked_linear_cross_entropy(
            hidden, weight, target, reduction="mean", backend=backend
        )

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
        (
            {"backend": "cuda"},
            "backend must be None or one of 'cpu', 'triton', 'reference', got 'cuda'",
        ),
    ],
)
def test_bad_input(change, message):
    inputs = make_inputs(6, 5, 9, torch.float32) | change
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(**inputs)
