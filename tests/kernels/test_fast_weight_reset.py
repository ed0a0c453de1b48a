import math
import re

import pytest
import torch
from torch.library import opcheck

from memdlm_kernels import fast_weight_reset_
from memdlm_kernels.fast_weight_reset.reference import philox_4x32_10
from tests.kernels.devices import backends

BACKENDS = backends("cpu", "cuda", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
# Starts within a counter's four words; empty segments; one longer than the kernel's block.
SEGMENTS = torch.tensor([0, 0, 5, 5, 77, 900, 20_003, 20_003])
BOUNDS = torch.tensor([9.0, 0.3, 9.0, 0.7, 0.0, 1 / math.sqrt(2048), 9.0], dtype=torch.float64)
SEEDS = torch.tensor([0, -5, 2**62 + 3])


def drawn(
    seed=SEEDS,
    segments=SEGMENTS,
    bounds=BOUNDS,
    *,
    dtype=torch.float32,
    backend=None,
    device="cpu",
    cast=None,
):
    # A value left over from before would show.
    param = torch.full((len(seed), int(segments[-1])), math.nan, dtype=dtype, device=device)
    tables = (table.to(device) for table in (segments, bounds, seed))
    assert fast_weight_reset_(param, *tables, cast=cast, backend=backend) is None
    return param.cpu()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Random123's known answers where the last three counter words are zero, and two more
        # computed with its definition in Python's own integers (below).
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (7, 0x0123456789ABCDEF, None),
        (2**32 - 1, -1, None),
    ],
)
def test_philox(counter, key, words):
    if words is None:
        words = philox_of_python(counter, key)
    actual = philox_4x32_10(torch.tensor(counter), torch.tensor(key))
    assert tuple(actual.tolist()) == words


def philox_of_python(counter, key):
    c, k = [counter, 0, 0, 0], [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_values_are_what_is_promised(backend, device):
    param = drawn(dtype=torch.float64, backend=backend, device=device)
    for row, column in ((0, 0), (1, 4), (2, 5), (1, 76), (0, 901), (2, 20_002)):
        segment = int(torch.searchsorted(SEGMENTS[1:], column, right=True))
        word = philox_of_python(column // 4, SEEDS[row].item())[column % 4]
        expected = (2 * ((word >> 8) / 2**24) - 1) * BOUNDS[segment].item()
        assert param[row, column].item() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [BOUNDS, BOUNDS.float(), torch.full((7,), 1e-60).double()])
@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
def test_backends_agree_bit_for_bit(backend, device, dtype, bounds):
    actual = drawn(bounds=bounds, dtype=dtype, backend=backend, device=device)
    expected = drawn(bounds=bounds, dtype=dtype, backend="reference")
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("cast_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_cast_is_param_rounded(backend, device, dtype, cast_dtype):
    if dtype == cast_dtype:
        return
    columns = int(SEGMENTS[-1])
    wide = torch.full((3, 2 * columns), math.nan, dtype=cast_dtype, device=device)
    for cast in (wide[:, ::2], wide[:, 1 : columns + 1], wide[:, :columns].contiguous()):
        param = drawn(dtype=dtype, backend=backend, device=device, cast=cast)
        assert torch.equal(param, drawn(dtype=dtype, backend=backend, device=device))
        assert torch.equal(cast.cpu(), param.to(cast_dtype))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_uniform_within_the_bounds(backend, device):
    param = drawn(backend=backend, device=device)
    for p, bound in enumerate(BOUNDS.tolist()):
        piece = param[:, SEGMENTS[p] : SEGMENTS[p + 1]]
        assert ((piece >= -bound) & ((piece < bound) | (bound == 0))).all()
    long = param[:, 900:20_003] / BOUNDS[5]
    assert long.mean().abs() < 0.02
    assert (long.square().mean() - 1 / 3).abs() < 0.01
    assert len(long.unique()) > 0.99 * long.numel()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_zero_bound_writes_positive_zero(backend, device):
    zeros = drawn(backend=backend, device=device)[:, 77:900]
    assert (zeros.view(torch.int32) == 0).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_depends_on_the_seed_and_the_column_alone(backend, device):
    param = drawn(backend=backend, device=device)
    assert torch.equal(param, drawn(backend=backend, device=device))
    # Another batch position, and batch size one.
    assert torch.equal(param.flip(0), drawn(SEEDS.flip(0), backend=backend, device=device))
    assert torch.equal(param[1:2], drawn(SEEDS[1:2], backend=backend, device=device))
    # Other seeds, in either half, give other numbers.
    others = drawn(torch.tensor([1, 2**32, 2**33]), backend=backend, device=device)
    everything = torch.cat((param, others))[:, 900:]
    for row in range(6):
        for other in range(row):
            assert (everything[row] != everything[other]).float().mean() > 0.99
    # Cutting the row elsewhere moves no number.
    whole = drawn(segments=SEGMENTS[[0, -1]], bounds=BOUNDS[5:6], backend=backend, device=device)
    assert torch.equal(whole[:, 900:], param[:, 900:])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("sets", "segments"), [(0, [0, 3]), (2, [0]), (2, [0, 0, 0]), (1, [0, 1])])
def test_small_shapes(backend, device, sets, segments):
    bounds = torch.ones(len(segments) - 1)
    param = drawn(
        torch.arange(sets), torch.tensor(segments), bounds, backend=backend, device=device
    )
    assert param.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_strides(backend, device):
    expected = drawn(backend=backend, device=device)
    columns = expected.shape[1]
    tables = (SEGMENTS.to(device), BOUNDS.to(device), SEEDS.to(device))
    wide, tall = (torch.zeros(n, m, device=device) for n, m in ((3, 2 * columns), (columns, 3)))
    for buffer in (wide, tall.T):
        for param in (buffer[:, 7 : 7 + columns], buffer[:, ::2], buffer):
            if param.shape != expected.shape:
                continue
            buffer.zero_()
            fast_weight_reset_(param, *tables, backend=backend)
            assert torch.equal(param.cpu(), expected)
            assert buffer.count_nonzero() == expected.count_nonzero()


def test_same_bits_whatever_the_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = drawn(backend="cpu")
        torch.set_num_threads(3)
        three = drawn(backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_leaf_that_requires_grad(backend, device):
    param = torch.zeros(3, 20_003, requires_grad=True, device=device)
    tables = (SEGMENTS.to(device), BOUNDS.to(device), SEEDS.to(device))
    kept = param.square().sum()
    fast_weight_reset_(param, *tables, backend=backend)
    assert param.is_leaf
    assert param.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize(("backend", "device"), backends("cpu", "cuda"))
@pytest.mark.parametrize("cast_dtype", [None, torch.float32])
def test_opcheck(backend, device, cast_dtype):
    param = torch.zeros(3, 20_003, dtype=torch.bfloat16, device=device)
    cast = None if cast_dtype is None else param.to(cast_dtype)
    args = (param, SEGMENTS.to(device), BOUNDS.to(device), SEEDS.to(device), cast, backend)
    opcheck(torch.ops.memdlm.fast_weight_reset_.default, args)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiles_whole(backend, device):
    tables = (SEGMENTS.to(device), BOUNDS.to(device), SEEDS.to(device))

    def reset(param, cast):
        fast_weight_reset_(param, *tables, cast=cast, backend=backend)
        return param.sum()

    compiled = torch.compile(reset, fullgraph=True, backend="aot_eager")
    for requires_grad in (False, True):
        param = torch.zeros(3, 20_003, requires_grad=requires_grad, device=device)
        cast = torch.zeros_like(param, dtype=torch.bfloat16)
        total = compiled(param, cast)
        assert torch.equal(cast, param.bfloat16())
        assert torch.equal(param.cpu(), drawn(backend=backend, device=device))
        torch.testing.assert_close(total, param.sum())


BAD = {
    "param must be a floating-point tensor [S, T]": dict(param=torch.zeros(2, 9).long()),
    "param is written in place and must not be expanded": dict(param=torch.zeros(9).expand(2, 9)),
    "param must have at most 17179869184 columns": dict(
        param=torch.zeros(2, 2**34 + 1, device="meta")
    ),
    "segments must start at 0 and end at T = 9, got 1 and 9": dict(
        segments=torch.tensor([1, 4, 9])
    ),
    "segments must ascend": dict(segments=torch.tensor([0, 5, 3, 9]), bounds=torch.ones(3)),
    "bounds must be float32 or float64 [P] = [2]": dict(bounds=torch.ones(3)),
    "bounds must be on param's device": dict(bounds=torch.ones(2, device="meta")),
    "bounds must be finite and at least 0": dict(bounds=torch.tensor([-0.1, 1.0])),
    "seed must be int64 [S] = [2]": dict(seed=torch.tensor(3)),
    "seed must be on param's device": dict(seed=torch.zeros(2, dtype=torch.int64, device="meta")),
    "cast must be [2, 9], like param, of another dtype": dict(cast=torch.zeros(2, 9)),
    "backend must be None or one of 'cpu', 'cuda', 'reference'": dict(backend="triton"),
    "cuda: the tensors are on cpu": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(
        param=torch.zeros(2, 9),
        segments=torch.tensor([0, 4, 9]),
        bounds=torch.ones(2),
        seed=torch.tensor([1, 2]),
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fast_weight_reset_(**{**good, **BAD[message]})
    assert not good["param"].any()
