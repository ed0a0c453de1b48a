import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm_kernels import lora_swiglu
from memdlm_kernels._backends import choose
from memdlm_kernels.lora_swiglu import op
from tests.kernels.devices import backends
from tests.kernels.truth import assert_as_accurate

FUSED = pytest.mark.parametrize(("backend", "device"), backends("triton"))
EVERY = pytest.mark.parametrize(("backend", "device"), backends("triton", "reference"))
STACKED = pytest.mark.parametrize("stacked", [True, False])
# lora_alpha / R of the paper, and as in test_lora_linear.py a power of two.
SCALE = 2.0
NAMES = ("x", "gate", "up", "A", "B")

# Leading dimensions of x and of A, lengths of the groups or None, in, I, R.
SHAPES = {
    "one row": ((1,), (), None, 8, 8, 2),
    "odd": ((3, 7), (), None, 33, 65, 5),
    "rank 1": ((2, 3, 5), (), None, 17, 9, 1),
    "no row": ((2, 0), (), None, 8, 6, 2),
    "tall": ((140,), (), None, 20, 40, 32),
    "per sequence": ((3, 7), (3,), None, 33, 65, 5),
    "per sequence, no row": ((2, 0), (2,), None, 8, 6, 2),
    "experts": ((21,), (3,), [3, 7, 11], 33, 65, 5),
    "rank of two tiles": ((7,), (2,), [4, 3], 40, 9, 35),
    "empty experts": ((7,), (5,), [0, 4, 0, 3, 0], 8, 6, 3),
    "experts, no row": ((0,), (3,), [0, 0, 0], 8, 6, 2),
    "experts per sequence": ((22,), (2, 3), [[3, 5], [2, 7], [4, 1]], 33, 70, 3),
    "experts per sequence, some empty": ((10,), (3, 2), [[0, 5, 0], [4, 1, 0]], 16, 16, 32),
}


def inputs(shape, stacked, *, dtype, weight_dtype=None, device="cpu", grad=True):
    """((x, gate, up, A, B), offsets); up is None if stacked."""
    torch.manual_seed(0)
    leading, own, lengths, columns, inner, rank = SHAPES[shape]
    weight_dtype = weight_dtype or dtype
    tensors = [
        torch.randn(*leading, columns).to(dtype),
        torch.randn(*leading, 2 * inner if stacked else inner).to(dtype),
        None if stacked else torch.randn(*leading, inner).to(dtype),
        (torch.randn(*own, 2 * rank, columns) / math.sqrt(columns)).to(weight_dtype),
        (torch.randn(*own, 2 * inner, rank) / math.sqrt(rank)).to(weight_dtype),
    ]
    offsets = None
    if lengths is not None:
        lengths = torch.tensor(lengths)
        offsets = lengths.flatten().cumsum(0).to(torch.int32).view(lengths.shape).to(device)
    tensors = [t if t is None else t.to(device).requires_grad_(grad) for t in tensors]
    return tuple(tensors), offsets


def grad_of(tensors):
    """A gradient of h."""
    gate, up = tensors[1:3]
    columns = gate.shape[-1] // (2 if up is None else 1)
    return torch.randn(*gate.shape[:-1], columns).to(gate)


def outputs(tensors, offsets, grad_h, backend, **options):
    """h, and by name the gradients of those that need one."""
    h = lora_swiglu(*tensors, SCALE, offsets=offsets, backend=backend, **options)
    wanted = {
        name: tensor
        for name, tensor in zip(NAMES, tensors, strict=True)
        if tensor is not None and tensor.requires_grad
    }
    grads = torch.autograd.grad(h, wanted.values(), grad_h.to(h.dtype), allow_unused=True)
    return {"h": h, **dict(zip(wanted, grads, strict=True))}


def assert_right(tensors, offsets, grad_h, backend):
    """h and the gradients of those that need one are as accurate as the reference's."""
    actual = outputs(tensors, offsets, grad_h, backend)
    expected = outputs(tensors, offsets, grad_h, "reference")
    dtype = tensors[1].dtype
    # The truth casts A and B too: what is judged is the arithmetic, not the dtype asked for.
    exact = tuple(
        t if t is None else t.detach().to(dtype).double().requires_grad_(t.requires_grad)
        for t in tensors
    )
    truth = outputs(exact, offsets, grad_h.double(), "reference")
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
@FUSED
@STACKED
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
def test_matches_truth(backend, device, dtype, weight_dtype, shape, stacked):
    tensors, offsets = inputs(shape, stacked, dtype=dtype, weight_dtype=weight_dtype, device=device)
    actual = assert_right(tensors, offsets, grad_of(tensors), backend)
    for name, value in actual.items():
        assert value.dtype == (weight_dtype if name in "AB" else dtype)


@pytest.mark.usefixtures("poisoned")
@FUSED
@STACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("leading", "own", "lengths"),
    [
        pytest.param((515,), (4,), [150, 0, 300, 65], id="experts"),
        pytest.param((2, 260), (2,), None, id="per sequence"),
    ],
)
def test_programs_of_several_tiles(
    monkeypatch, backend, device, dtype, stacked, leading, own, lengths
):
    """As where rows abound: against programs of one tile each, bit for bit."""
    implementation = pytest.importorskip("memdlm_kernels.lora_swiglu.triton")
    monkeypatch.setitem(SHAPES, "many", (leading, own, lengths, 16, 40, 5))
    tensors, offsets = inputs(
        "many", stacked, dtype=dtype, weight_dtype=torch.float32, device=device
    )
    grad_h = grad_of(tensors)
    expected = outputs(tensors, offsets, grad_h, backend)
    monkeypatch.setattr(implementation, "_MANY", 1)
    actual = assert_right(tensors, offsets, grad_h, backend)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@STACKED
@pytest.mark.parametrize(
    "shape", ["odd", "per sequence", "experts", "experts per sequence, some empty"]
)
def test_reference_gradcheck(monkeypatch, shape, stacked):
    leading, own, lengths, *_ = SHAPES[shape]
    monkeypatch.setitem(SHAPES, "small", (leading, own, lengths, 2, 2, 1))
    tensors, offsets = inputs("small", stacked, dtype=torch.float64)
    given = tuple(tensor for tensor in tensors if tensor is not None)

    def function(x, gate, *others):
        up = () if not stacked else (None,)
        arguments = (x, gate, *up, *others)
        return lora_swiglu(*arguments, SCALE, offsets=offsets, backend="reference")

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@STACKED
def test_reference_is_the_dense_expression_of_each_row(stacked):
    (x, gate, up, A, B), offsets = inputs("experts", stacked, dtype=torch.float64, grad=False)
    h = lora_swiglu(x, gate, up, A, B, SCALE, offsets=offsets, backend="reference")
    gates, ups = (gate[:, :65], gate[:, 65:]) if stacked else (gate, up)
    for row, expert in enumerate((0,) * 3 + (1,) * 7 + (2,) * 11):
        to_gate = B[expert, :65] @ A[expert, :5] @ x[row]
        to_up = B[expert, 65:] @ A[expert, 5:] @ x[row]
        expected = F.silu(gates[row] + SCALE * to_gate) * (ups[row] + SCALE * to_up)
        torch.testing.assert_close(h[row], expected)


@pytest.mark.usefixtures("poisoned")
@EVERY
@STACKED
@pytest.mark.parametrize("shape", ["odd", "per sequence", "empty experts", "experts per sequence"])
def test_a_B_of_zeros(backend, device, shape, stacked):
    """What it is promised to be need not be read: the rest is as it would be."""
    tensors, offsets = inputs(shape, stacked, dtype=torch.float32, device=device)
    tensors[4].data.zero_()
    grad_h = grad_of(tensors)
    expected = outputs(tensors, offsets, grad_h, backend)
    actual = outputs(tensors, offsets, grad_h, backend, B_is_zero=True)
    assert actual["A"] is None
    assert actual["x"] is None
    assert not expected["A"].any()
    assert not expected["x"].any()
    for name in ("h", "gate", "B", *([] if stacked else ["up"])):
        torch.testing.assert_close(actual[name], expected[name])
    if backend == "triton":
        tensors[4].data.fill_(math.nan)
        again = outputs(tensors, offsets, grad_h, backend, B_is_zero=True)
        assert all(value is None or value.isfinite().all() for value in again.values())


@pytest.mark.usefixtures("poisoned")
@EVERY
@STACKED
@pytest.mark.parametrize("shape", ["odd", "experts", "no row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_fast_weights(backend, device, shape, stacked, dtype):
    tensors, offsets = inputs(shape, stacked, dtype=dtype, device=device)
    grad_h = grad_of(tensors)

    def plain(gate, up):
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return F.silu(gate) * up

    wanted = [tensor for tensor in tensors[1:3] if tensor is not None]

    def gradients(h, wanted):
        return (h, *torch.autograd.grad(h, wanted, grad_h.to(h.dtype)))

    exact = [tensor.detach().double().requires_grad_() for tensor in wanted]
    truth = gradients(plain(*exact, *([None] * stacked)), exact)
    expected = gradients(plain(*tensors[1:3]), wanted)
    for x in (None, tensors[0]):
        h = lora_swiglu(x, *tensors[1:3], None, None, 1.0, offsets=offsets, backend=backend)
        assert len([t for t in getattr(h.grad_fn, "saved_tensors", ()) if t is not None]) <= 2
        for name, *values in zip(
            ("h", "gate", "up"), gradients(h, wanted), truth, expected, strict=False
        ):
            assert_as_accurate(name, *values)


@pytest.mark.usefixtures("poisoned")
@FUSED
@STACKED
@pytest.mark.parametrize("shape", ["odd", "per sequence", "empty experts", "experts per sequence"])
def test_strides(backend, device, shape, stacked):
    """Everything transposed, or in a larger buffer, and the stride-0 gradient of a sum."""
    tensors, offsets = inputs(shape, stacked, dtype=torch.float32, device=device, grad=False)

    def spread(tensor, name):
        if tensor is None:
            return None
        if name in ("x", "gate"):
            return tensor.mT.contiguous().mT.requires_grad_()
        wider = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        return wider[..., 1::2].copy_(tensor).requires_grad_()

    tensors = tuple(map(spread, tensors, NAMES))
    before = [tensor if tensor is None else tensor.detach().clone() for tensor in tensors]
    ones = torch.ones((), device=device).expand(grad_of(tensors).shape)
    actual = assert_right(tensors, offsets, ones, backend)
    assert actual["h"].is_contiguous()
    for tensor, value in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor, value)


@FUSED
def test_a_group_alone(backend, device):
    """Whatever is not finite in another group."""
    tensors, offsets = inputs("experts", True, dtype=torch.bfloat16, device=device, grad=False)
    x, gate, _, A, B = tensors
    for tensor in (x[3:], gate[3:], A[1:], B[1:]):
        tensor.fill_(math.nan)
    for tensor in (x, gate, A, B):
        tensor.requires_grad_()
    values = outputs(tensors, offsets, grad_of(tensors), backend)
    assert all(values[name][:3].isfinite().all() for name in ("h", "x", "gate"))
    assert all(values[name][0].isfinite().all() for name in ("A", "B"))


@FUSED
@STACKED
@pytest.mark.parametrize("needed", ["x", "gate", "up", "A", "B", "x gate up", "A B", ""])
def test_only_the_gradients_that_are_needed(backend, device, stacked, needed):
    needed = needed.split()
    tensors, offsets = inputs("experts", stacked, dtype=torch.float32, device=device, grad=False)
    for name, tensor in zip(NAMES, tensors, strict=True):
        if tensor is not None and name in needed:
            tensor.requires_grad_()
    if stacked and needed == ["up"]:
        return
    h = lora_swiglu(*tensors, SCALE, offsets=offsets, backend=backend)
    assert h.requires_grad == bool(needed)
    if not needed:
        return
    # Beside its inputs the shrink alone; and x only for A.
    saved = [tensor for tensor in h.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) == (5 if stacked else 6) + ("A" in needed)
    assert_right(tensors, offsets, grad_of(tensors), backend)


@FUSED
def test_modes_and_two_backwards(backend, device):
    tensors, offsets = inputs("experts", False, dtype=torch.float32, device=device)
    h = lora_swiglu(*tensors, SCALE, offsets=offsets, backend=backend)
    with torch.no_grad():
        again = lora_swiglu(*tensors, SCALE, offsets=offsets, backend=backend)
    assert not again.requires_grad
    assert torch.equal(again, h)
    first = torch.autograd.grad(h.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(h.sum(), tensors)
    assert all(map(torch.equal, first, second))


@EVERY
def test_autocast(backend, device):
    """The products are in gate's dtype."""
    (x, gate, up, A, B), offsets = inputs("experts", False, dtype=torch.float32, device=device)
    gate, up = gate.detach().bfloat16(), up.detach().bfloat16()
    expected = lora_swiglu(x.bfloat16(), gate, up, A, B, SCALE, offsets=offsets, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        h = lora_swiglu(x, gate, up, A, B, SCALE, offsets=offsets, backend=backend)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, expected)


@FUSED
@STACKED
@pytest.mark.parametrize("shape", ["odd", "per sequence", "experts"])
def test_opcheck(backend, device, shape, stacked):
    tensors, offsets = inputs(
        shape, stacked, dtype=torch.bfloat16, weight_dtype=torch.float32, device=device
    )
    forward = torch.ops.memdlm.lora_swiglu.default
    opcheck(forward, (*tensors, SCALE, offsets, False, True, backend))
    x, gate, up, A, B = (t if t is None else t.detach() for t in tensors)
    _, shrink = forward(x, gate, up, A, B, SCALE, offsets, False, True, backend)
    backward = torch.ops.memdlm.lora_swiglu_backward.default
    rest = (A, B, SCALE, offsets)
    for needs in ((True, True, True), (True, False, False), (False, False, False)):
        opcheck(backward, (grad_of(tensors), x, gate, up, shrink, *rest, *needs, backend))


@FUSED
@STACKED
def test_opcheck_of_less_than_an_update(backend, device, stacked):
    tensors, offsets = inputs("experts", stacked, dtype=torch.float32, device=device)
    forward = torch.ops.memdlm.lora_swiglu.default
    # Of B alone: the gradients of x and A are None, which opcheck does not take.
    only_B = tuple(
        t if t is None or name == "B" else t.detach()
        for name, t in zip(NAMES, tensors, strict=True)
    )
    opcheck(forward, (*only_B, SCALE, offsets, True, True, backend))
    plain = (None, *tensors[1:3], None, None)
    opcheck(forward, (*plain, SCALE, None, False, True, backend))
    x, gate, up, A, B = (t if t is None else t.detach() for t in tensors)
    backward = torch.ops.memdlm.lora_swiglu_backward.default
    rest = (A, B, SCALE, offsets, False, False, True, backend)
    opcheck(backward, (grad_of(tensors), x, gate, up, None, *rest))


@FUSED
@STACKED
@pytest.mark.parametrize("shape", ["odd", "experts"])
@pytest.mark.parametrize("B_is_zero", [False, True])
def test_compiles_whole(backend, device, shape, stacked, B_is_zero):
    tensors, offsets = inputs(shape, stacked, dtype=torch.float32, device=device)
    if B_is_zero:
        tensors = tuple(t if t is None else t.detach() for t in tensors)
        tensors[4].zero_().requires_grad_()
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def loss(*tensors):
        options = dict(offsets=offsets, B_is_zero=B_is_zero, backend=backend)
        return lora_swiglu(*tensors, SCALE, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors), wanted),
        torch.autograd.grad(loss(*tensors), wanted),
    )


@FUSED
@STACKED
@pytest.mark.parametrize("shape", ["odd", "experts"])
def test_flops(backend, device, shape, stacked):
    tensors, offsets = inputs(shape, stacked, dtype=torch.float32, device=device)
    through_A, through_B = 2 * 21 * 2 * 5 * 33, 2 * 21 * 2 * 65 * 5

    def counted(**options):
        with FlopCounterMode(display=False) as forward:
            h = lora_swiglu(*tensors, SCALE, offsets=offsets, backend=backend, **options)
        with FlopCounterMode(display=False) as backward:
            h.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    # In backward gate and up are updated once more.
    assert counted() == (through_A + through_B, 2 * through_A + 3 * through_B)
    assert counted(B_is_zero=True) == (0, through_A + through_B)


@FUSED
def test_elements_past_2_to_the_31(backend, device):
    """Rows so far apart that their addresses need 64 bits; the memory between is not touched."""
    apart = 2**30  # elements; the third row is 2^31 away
    (_, gate, _, _, _), _ = inputs("odd", True, dtype=torch.bfloat16, device=device, grad=False)
    gate = gate[0, :3]
    far = torch.empty(2 * apart + gate.shape[1], dtype=gate.dtype, device=device)
    far = far.as_strided(gate.shape, (apart, 1)).copy_(gate)

    def run(gate):
        gate = gate.requires_grad_()
        h = lora_swiglu(None, gate, None, None, None, 1.0, backend=backend)
        return h, *torch.autograd.grad(h.sum(), gate)

    assert all(map(torch.equal, run(far), run(gate)))


def test_the_order_of_backends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))

    def chosen(device="cuda", dtype=torch.bfloat16, groups=4096):
        return choose("lora_swiglu", op._ORDER, None, torch.device(device), dtype, groups)

    assert chosen() == "triton"
    assert chosen(dtype=torch.float64) == "reference"
    assert chosen(groups=4097) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert chosen("cpu") == "reference"


INT32 = torch.int32
SETS = dict(A=torch.zeros(2, 4, 8), B=torch.zeros(2, 12, 2))
EXPERTS = dict(
    x=torch.zeros(5, 8),
    gate=torch.zeros(5, 12),
    A=torch.zeros(3, 4, 8),
    B=torch.zeros(3, 12, 2),
    offsets=torch.tensor([2, 2, 5], dtype=INT32),
)
BAD = {
    "gate must be floating-point": dict(gate=torch.zeros(2, 5, 12, dtype=torch.int64)),
    "gate must be [..., 2 * I] where up is None, got [2, 5, 11]": dict(gate=torch.zeros(2, 5, 11)),
    "up must be [2, 5, 12] as gate is, got [2, 5, 11]": dict(up=torch.zeros(2, 5, 11)),
    "up must be torch.float32 on cpu as gate is": dict(up=torch.zeros(2, 5, 12).half()),
    "x, A and B must be given together, got None for A": dict(A=None),
    "got None for x, B": dict(x=None, B=None),
    "x must be [2, 5, 'in'] for gate": dict(x=torch.zeros(5, 8)),
    "x must have gate's dtype torch.float32": dict(x=torch.zeros(2, 5, 8).half()),
    "A must be floating-point": dict(A=torch.zeros(4, 8, dtype=torch.int64)),
    "A must be on gate's device": dict(A=torch.zeros(4, 8, device="meta")),
    "A must be ['2 * R', 8] for x [2, 5, 8], got [4, 7]": dict(A=torch.zeros(4, 7)),
    "A must be ['2 * R', 8] for x [2, 5, 8], got [3, 8]": dict(A=torch.zeros(3, 8)),
    "A must be [2 * R, in] or [S, 2 * R, in], got [8]": dict(A=torch.zeros(8)),
    "x must be [3, 'L', 'in'] for A [3, 4, 8]": dict(A=torch.zeros(3, 4, 8)),
    "B must be [2, 12, 2]": dict(SETS, B=torch.zeros(12, 2)),
    "B must be [12, 2]": dict(B=torch.zeros(6, 2)),
    "B must be [24, 2]": dict(up=torch.zeros(2, 5, 12)),
    "R at least 1": dict(A=torch.zeros(0, 8), B=torch.zeros(12, 0)),
    "x must be [N, in] with offsets": dict(offsets=torch.zeros(3, dtype=INT32)),
    "A must be [E, 2 * R, in] or [S, E, 2 * R, in] with offsets": dict(
        EXPERTS, A=torch.zeros(4, 8)
    ),
    "A must be [3, '2 * R', 8]": dict(EXPERTS, A=torch.zeros(3, 4, 7)),
    "offsets must be int32 [3] for A": dict(EXPERTS, offsets=torch.tensor([2, 2, 5])),
    "offsets must run from 0 or more to N = 5, got 2 to 4": dict(
        EXPERTS, offsets=torch.tensor([2, 2, 4], dtype=INT32)
    ),
    "scale must be finite": dict(scale=math.inf),
    "backend must be None or one of 'triton', 'reference'": dict(backend="cpu"),
    "triton: the tensors must be float32, bfloat16 or float16, got torch.float64": dict(
        x=torch.zeros(2, 5, 8).double(), gate=torch.zeros(2, 5, 12).double(), backend="triton"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(
        x=torch.zeros(2, 5, 8),
        gate=torch.zeros(2, 5, 12),
        up=None,
        A=torch.zeros(4, 8),
        B=torch.zeros(12, 2),
        scale=1.0,
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_swiglu(**{**good, **BAD[message]})
