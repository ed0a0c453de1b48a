import math
import re

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import combine_rows, reference_ops, spread_rows
from memdlm_kernels._backends import choose
from memdlm_kernels.combine_rows import op
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

FAST = pytest.mark.parametrize(("backend", "device"), backends("cpu", "triton"))
EVERY = pytest.mark.parametrize(("backend", "device"), backends("cpu", "triton", "reference"))
TRITON = pytest.mark.parametrize(("backend", "device"), backends("triton"))
WEIGHTED = pytest.mark.parametrize("weighted", [True, False])

# N, k, D, and how many rows are not named.
SHAPES = {
    "one row": (1, 1, 8, 0),
    "one column": (5, 3, 1, 0),
    "one choice": (7, 1, 33, 0),
    "no row": (0, 2, 8, 0),
    "no row, some not named": (0, 2, 8, 3),
    "odd": (9, 3, 65, 0),
    "many choices": (3, 11, 20, 0),
    "several blocks": (3, 8, 1100, 0),
    "some not named": (6, 4, 36, 5),
    "wide and even": (4, 2, 512, 0),
}
DTYPES = {
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "float16": (torch.float16, torch.float16, None),
    "wider weights": (torch.bfloat16, torch.float32, torch.bfloat16),
    "wider result": (torch.bfloat16, torch.bfloat16, torch.float32),
    "narrower weights": (torch.float32, torch.bfloat16, torch.float32),
    "half": (torch.float16, torch.float32, None),
}


def inputs(shape, dtype, weight_dtype=None, *, device="cpu", grad=True, weighted=True):
    """(rows, index, weight); rows that are not named hold NaN."""
    torch.manual_seed(0)
    count, choices, columns, others = SHAPES[shape]
    order = torch.randperm(count * choices + others)
    index, left = order[: count * choices].view(count, choices), order[count * choices :]
    rows = torch.randn(len(order), columns).to(dtype)
    rows[left] = math.nan
    weight = torch.rand(count, choices).to(weight_dtype or dtype)
    rows, weight = (t.to(device).requires_grad_(grad) for t in (rows, weight))
    return rows, index.to(device), weight if weighted else None


def grad_of(rows, index):
    """A gradient of the sums."""
    return torch.randn(index.shape[0], rows.shape[1]).to(rows.device)


def outputs(rows, index, weight, grad_out, backend, dtype=None):
    """The sums, and by name the gradients of those that need one."""
    out = combine_rows(rows, index, weight, dtype=dtype, backend=backend)
    wanted = {
        name: tensor
        for name, tensor in (("rows", rows), ("weight", weight))
        if tensor is not None and tensor.requires_grad
    }
    grads = torch.autograd.grad(out, wanted.values(), grad_out.to(out.dtype))
    return {"out": out, **dict(zip(wanted, grads, strict=True))}


def assert_right(rows, index, weight, grad_out, backend, dtype=None):
    """The sums and the gradients of those that need one are as accurate as the reference's."""
    actual = outputs(rows, index, weight, grad_out, backend, dtype)
    expected = outputs(rows, index, weight, grad_out, "reference", dtype)
    exact = (
        t if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for t in (rows, weight)
    )
    exact_rows, exact_weight = exact
    # The truth reads the gradient that the backend was given.
    given = grad_out.to(actual["out"].dtype).double()
    truth = outputs(exact_rows, index, exact_weight, given, "reference")
    for name, value in actual.items():
        assert_as_accurate(name, value, truth[name], expected[name])
    return actual


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@FAST
@WEIGHTED
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_truth(backend, device, dtypes, shape, weighted):
    dtype, weight_dtype, result = DTYPES[dtypes]
    rows, index, weight = inputs(shape, dtype, weight_dtype, device=device, weighted=weighted)
    actual = assert_right(rows, index, weight, grad_of(rows, index), backend, result)
    assert actual["out"].dtype == (result or (weight_dtype if weighted else dtype))
    assert actual["rows"].dtype == dtype
    if weighted:
        assert actual["weight"].dtype == weight_dtype
    named = torch.zeros(len(rows), dtype=torch.bool)
    named[index.flatten()] = True
    assert not actual["rows"][~named].any()


@WEIGHTED
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_truth_up_to_the_order_of_sums(shape, weighted):
    rows, index, weight = inputs(shape, torch.float64, weighted=weighted)
    grad_out = grad_of(rows, index)
    actual, truth = (outputs(rows, index, weight, grad_out, own) for own in ("cpu", "reference"))
    for name, value in actual.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("poisoned")
@EVERY
@pytest.mark.parametrize("shape", [name for name in SHAPES if "not named" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spread_rows(backend, device, shape, dtype):
    places, index, _ = inputs(shape, dtype, device=device, grad=False)
    source = grad_of(places, index).to(dtype).requires_grad_()
    out = spread_rows(source, index, backend=backend)
    assert out.dtype == dtype
    expected = torch.empty_like(places)
    for row, own in zip(source, index, strict=True):
        expected[own] = row.detach()
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out, source, places)
    summed = combine_rows(places, index, backend="reference")
    truth = combine_rows(places.double(), index, backend="reference")
    assert_as_accurate("grad", grad, truth, summed)


@WEIGHTED
@pytest.mark.parametrize("shape", ["odd", "one choice", "some not named"])
def test_reference_gradcheck(monkeypatch, shape, weighted):
    count, choices, _, others = SHAPES[shape]
    monkeypatch.setitem(SHAPES, "small", (count, choices, 2, others))
    rows, index, weight = inputs("small", torch.float64, weighted=weighted)
    rows = rows.detach().nan_to_num().requires_grad_()

    def function(rows, *weight):
        return combine_rows(rows, index, *weight, backend="reference")

    given = (rows, weight) if weighted else (rows,)
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@FAST
def test_without_weights_all_can_be_differentiated_twice(backend, device):
    rows, index, _ = inputs("odd", torch.float32, device=device)
    source = grad_of(rows, index).requires_grad_()
    for function, given in ((spread_rows, source), (combine_rows, rows)):

        def curvature(backend, function=function, given=given):
            out = function(given, index, backend=backend)
            (grad,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), given)[0]

        torch.testing.assert_close(curvature(backend), curvature("reference"))
    weight = torch.rand(index.shape, device=device)
    out = combine_rows(rows, index, weight, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), rows)


def test_reference_is_the_sum_of_each_row():
    rows, index, weight = inputs("some not named", torch.float64, grad=False)
    for own in (weight, None):
        out = combine_rows(rows, index, own, backend="reference")
        for n, names in enumerate(index):
            factors = torch.ones(len(names)) if own is None else own[n]
            expected = sum(w * rows[place] for w, place in zip(factors, names, strict=True))
            torch.testing.assert_close(out[n], expected)


@pytest.mark.usefixtures("poisoned")
@FAST
@WEIGHTED
@pytest.mark.parametrize("shape", ["odd", "some not named", "many choices"])
def test_strides(backend, device, shape, weighted):
    """Everything transposed, or in a larger buffer, and the stride-0 gradient of a sum."""
    rows, index, weight = inputs(shape, torch.float32, device=device, grad=False)
    index = index.mT.contiguous().mT
    for change in (
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.new_zeros(len(tensor), 2 * tensor.shape[1] + 1)[:, 1::2].copy_(
            tensor
        ),
    ):
        own = change(rows).requires_grad_()
        own_weight = change(weight).requires_grad_() if weighted else None
        before = own.detach().clone()
        ones = torch.ones((), device=device).expand(index.shape[0], rows.shape[1])
        for grad_out in (ones, change(grad_of(rows, index))):
            actual = assert_right(own, index, own_weight, grad_out, backend)
            assert actual["out"].is_contiguous()
        assert torch.equal(own.nan_to_num(), before.nan_to_num())


@FAST
@pytest.mark.parametrize("needed", ["rows", "weight", "rows weight", ""])
def test_only_the_gradients_that_are_needed(backend, device, needed):
    needed = needed.split()
    rows, index, weight = inputs("odd", torch.float32, device=device, grad=False)
    for name, tensor in (("rows", rows), ("weight", weight)):
        tensor.requires_grad_(name in needed)
    out = combine_rows(rows, index, weight, backend=backend)
    assert out.requires_grad == bool(needed)
    if not needed:
        return
    # The rows for the weights' gradient alone.
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) == 2 + ("weight" in needed)
    assert_right(rows, index, weight, grad_of(rows, index), backend)


@FAST
def test_nothing_wider_than_the_rows_is_kept(backend, device):
    rows, index, weight = inputs("odd", torch.bfloat16, torch.float32, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        combine_rows(rows, index, weight, dtype=torch.bfloat16, backend=backend)
    assert {tensor.data_ptr() for tensor in kept} == {
        tensor.data_ptr() for tensor in (rows, index, weight)
    }


@FAST
def test_modes_and_two_backwards(backend, device):
    rows, index, weight = inputs("odd", torch.float32, device=device)
    out = combine_rows(rows, index, weight, backend=backend)
    with torch.no_grad():
        again = combine_rows(rows, index, weight, backend=backend)
    assert not again.requires_grad
    assert torch.equal(again, out)
    first = torch.autograd.grad(out.sum(), (rows, weight), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (rows, weight))
    assert all(map(torch.equal, first, second))


@EVERY
def test_autocast_changes_nothing(backend, device):
    rows, index, weight = inputs("odd", torch.bfloat16, torch.float32, device=device)
    expected = combine_rows(rows, index, weight, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = combine_rows(rows, index, weight, backend=backend)
        grads = torch.autograd.grad(out.sum(), (rows, weight))
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert [grad.dtype for grad in grads] == [rows.dtype, weight.dtype]


def test_references_run_where_they_are_preferred():
    rows, index, weight = inputs("odd", torch.float32)
    with reference_ops():
        out = combine_rows(rows, index, weight)
        spread = spread_rows(out, index)
    (grad,) = torch.autograd.grad(spread.square().sum(), weight, create_graph=True)
    assert torch.autograd.grad(grad.sum(), weight)[0].isfinite().all()


@FAST
@WEIGHTED
@pytest.mark.parametrize("shape", ["odd", "some not named"])
def test_opcheck(backend, device, shape, weighted):
    rows, index, weight = inputs(
        shape, torch.bfloat16, torch.float32, device=device, weighted=weighted
    )
    rows = rows.detach().nan_to_num().requires_grad_()
    opcheck(torch.ops.memdlm.combine_rows.default, (rows, index, weight, torch.float32, backend))
    source = grad_of(rows, index).requires_grad_()
    opcheck(torch.ops.memdlm.spread_rows.default, (source, index, len(rows), backend))
    if not weighted:
        return
    backward = torch.ops.memdlm.combine_rows_backward.default
    source, rows, weight = source.detach(), rows.detach(), weight.detach()
    for own, need_grad_rows in ((rows, True), (rows, False), (None, True)):
        rest = (index, weight, len(rows), rows.dtype, need_grad_rows, backend)
        opcheck(backward, (source, own, *rest))


@FAST
@WEIGHTED
@pytest.mark.parametrize("shape", ["odd", "some not named"])
def test_compiles_whole(backend, device, shape, weighted):
    rows, index, weight = inputs(shape, torch.float32, device=device, weighted=weighted)
    rows = rows.detach().nan_to_num().requires_grad_()
    wanted = [tensor for tensor in (rows, weight) if tensor is not None]

    def loss(rows, index, weight):
        out = combine_rows(rows, index, weight, dtype=torch.float32, backend=backend)
        if rows.shape[0] == index.numel():
            out = spread_rows(out, index, backend=backend)
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, index, weight), loss(rows, index, weight))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(rows, index, weight), wanted),
        torch.autograd.grad(loss(rows, index, weight), wanted),
    )


@FAST
def test_flops(backend, device):
    rows, index, weight = inputs("odd", torch.float32, device=device)
    product = 2 * 9 * 3 * 65

    def counted(rows, weight):
        with FlopCounterMode(display=False) as forward:
            out = combine_rows(rows, index, weight, backend=backend)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    assert counted(rows, weight) == (product, product)
    assert counted(rows, weight.detach()) == (product, 0)
    assert counted(rows, None) == (0, 0)


@TRITON
def test_elements_past_2_to_the_31(backend, device):
    """Rows so far apart that their addresses need 64 bits; the memory between is not touched."""
    apart = 2**30  # elements; the third row is 2^31 away
    rows, index, weight = inputs("one choice", torch.bfloat16, device=device, grad=False)
    rows, weight = rows[:3], weight[:3]
    index = torch.tensor([[2], [0], [1]], device=device)
    far = torch.empty(2 * apart + rows.shape[1], dtype=rows.dtype, device=device)
    far = far.as_strided(rows.shape, (apart, 1)).copy_(rows)

    def run(rows):
        own = [rows.requires_grad_(), weight.detach().requires_grad_()]
        out = combine_rows(own[0], index, own[1], backend=backend)
        spread = spread_rows(own[0], index, backend=backend)
        return out, spread, *torch.autograd.grad(out.sum() + spread.sum(), own)

    assert all(map(torch.equal, run(far), run(rows)))


def test_the_order_of_backends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))

    def chosen(device="cuda", dtype=torch.bfloat16):
        return choose("combine_rows", op._ORDER, None, torch.device(device), dtype)

    assert chosen() == "triton"
    assert chosen(dtype=torch.float64) == "reference"
    assert chosen("cpu") == chosen("cpu", torch.float64) == "cpu"


INDEX = torch.tensor([[0, 3], [2, 1]])
SUM = dict(rows=torch.zeros(4, 3), index=INDEX, weight=torch.zeros(2, 2))
SPREAD = dict(rows=torch.zeros(2, 3), index=INDEX)
BAD = {
    "rows must be floating-point": dict(SUM, rows=torch.zeros(4, 3, dtype=torch.int64)),
    "rows must be two-dimensional, got [4]": dict(SUM, rows=torch.zeros(4)),
    "index must be on rows' device cpu, got meta": dict(SUM, index=INDEX.to("meta")),
    "index must be int64 [N, k], k at least 1, got torch.int32": dict(SUM, index=INDEX.int()),
    "k at least 1, got torch.int64 [4]": dict(SUM, index=INDEX.flatten()),
    "k at least 1, got torch.int64 [2, 0]": dict(SUM, index=INDEX[:, :0]),
    "index must be in 0 to 2, got 0 to 3": dict(SUM, rows=torch.zeros(3, 3)),
    "index must be in 0 to 3, got -1 to 2": dict(SUM, index=INDEX - 1),
    "index must name no row twice, got 1 twice": dict(SUM, index=torch.tensor([[0, 1], [2, 1]])),
    "weight must be on rows' device cpu, got meta": dict(SUM, weight=SUM["weight"].to("meta")),
    "weight must be floating-point [2, 2] as index is, got torch.int64": dict(SUM, weight=INDEX),
    "weight must be floating-point [2, 2] as index is, got torch.float32 [2, 3]": dict(
        SUM, weight=torch.zeros(2, 3)
    ),
    "dtype must be floating-point, got torch.int32": dict(SUM, dtype=torch.int32),
    "backend must be None or one of 'cpu', 'triton', 'reference'": dict(SUM, backend="cuda"),
    "triton: the tensors must be float32, bfloat16 or float16, got torch.float64": dict(
        SUM, weight=torch.zeros(2, 2).double(), backend="triton"
    ),
    "index must be [2, k] for rows [2, 3], got [1, 2]": dict(SPREAD, index=INDEX[:1]),
    "index must be in 0 to 1, got 0 to 2": dict(SPREAD, index=torch.tensor([[0], [2]])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = BAD[message]
    function = spread_rows if arguments["rows"] is SPREAD["rows"] else combine_rows
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**arguments)
