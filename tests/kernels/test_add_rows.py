"""Rows added up by key, against the same sums in float64."""

import pytest
import torch

from tests.kernels.devices import HAS_GPU

add_rows = pytest.importorskip("memdlm_kernels._triton.add_rows")

DEVICE = "cuda" if HAS_GPU else "cpu"

pytestmark = pytest.mark.gpu


# Lengths of the runs of equal keys, in the keys' order. Blocks have 64 positions.
RUNS = {
    "one row": [1],
    "a block": [64],
    "less than a block": [63],
    "more than a block": [65],
    "one row before a block": [1, 64],
    "ends with its block": [10, 54, 3],
    "begins with its block": [64, 65, 2],
    "ends with the next block": [1, 127],
    "one row behind the block": [1, 64, 63, 1, 64],
    "each about a block": [63, 64, 65, 63, 64, 65, 1, 1],
    "two long ones meet in a block": [100, 100, 100],
    "the end of a sequence": [1, 3, 1, 2000, 1, 7],
    "all equal": [300],
    "none equal": [1] * 70,
}


def of_runs(lengths, *, step=1, first=0):
    """A key for each row, in any order: each run's, `step` apart."""
    keys = first + step * torch.arange(len(lengths))
    key = keys.repeat_interleave(torch.tensor(lengths))
    return key[torch.randperm(len(key), generator=torch.Generator().manual_seed(0))]


def added(key, source, coefficient, out, first_key=0):
    """`out` with the rows added, and the sum in float64 and of the terms' absolute values."""
    grouped = add_rows.groups(key.to(DEVICE))
    own = None if source is None else source.to(DEVICE)
    scale = coefficient.to(DEVICE)
    pieces = add_rows.sum_long_runs(scale, own, grouped)
    actual = out.to(DEVICE, copy=True)
    add_rows.add_rows(actual, scale, own, grouped, pieces, first_key)
    here = (key >= max(first_key, 0)) & (key < first_key + len(out))
    terms = coefficient.double()[:, None]
    if source is not None:
        terms = terms * source.double()
    truth = out.double().index_add(0, key[here] - first_key, terms[here])
    size = out.double().abs().index_add(0, key[here] - first_key, terms[here].abs())
    return actual.cpu(), truth, size


def assert_sum(actual, truth, size):
    """As close as float32 sums of few terms each, and one rounding, can be."""
    bar = 16 * torch.finfo(torch.float32).eps * size
    if actual.dtype != torch.float32:
        bar = bar + torch.finfo(actual.dtype).eps / 2 * truth.abs()
    assert ((actual.double() - truth).abs() <= bar).all()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", RUNS)
def test_runs(runs, dtype):
    key = of_runs(RUNS[runs])
    source, coefficient = torch.randn(len(key), 5).to(dtype), torch.randn(len(key))
    assert_sum(*added(key, source, coefficient, torch.randn(len(RUNS[runs]), 5)))


@pytest.mark.parametrize("runs", RUNS)
def test_coefficients_alone(runs):
    key = of_runs(RUNS[runs])
    assert_sum(*added(key, None, torch.randn(len(key)), torch.randn(len(RUNS[runs]), 1)))


def test_some_keys_alone():
    """Of keys 3 apart, a part that begins and ends between two of them; negative ones are none."""
    key = of_runs([70, 130, 1, 90, 5], step=3, first=-3)
    source, coefficient = torch.randn(len(key), 5), torch.randn(len(key))
    for first_key, count in ((0, 10), (1, 5), (4, 100), (20, 3)):
        out = torch.randn(count, 5)
        assert_sum(*added(key, source, coefficient, out, first_key))


def test_rows_of_no_key_are_not_read():
    key = of_runs([200, 70], first=-1)
    source, coefficient = torch.randn(270, 5), torch.randn(270)
    source[key < 0] = float("nan")
    out, (few, scale) = torch.randn(1, 5), (source[key == 0], coefficient[key == 0])
    actual, *_ = added(key, source, coefficient, out)
    assert_sum(actual, *added(key[key == 0], few, scale, out)[1:])


def test_wide_rows():
    key = of_runs([1, 150, 2])
    source = torch.randn(153, 1100).bfloat16()
    assert_sum(*added(key, source, torch.randn(153), torch.randn(3, 1100).bfloat16()))


def test_blocks_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(add_rows, "_FEWEST_POSITIONS", 2)
    for lengths in ([1, 60, 3, 200], [33] * 9, [400]):
        key = of_runs(lengths)
        source, coefficient = torch.randn(len(key), 5), torch.randn(len(key))
        assert_sum(*added(key, source, coefficient, torch.randn(len(lengths), 5)))
    assert [add_rows._positions(rows) for rows in (1, 4, 17, 8192, 65_536)] == [2, 2, 4, 128, 256]


def test_pieces_take_few_rows():
    grouped = add_rows.groups(torch.zeros(64, dtype=torch.int64, device=DEVICE))
    coefficient = torch.ones(64, device=DEVICE)
    assert add_rows.sum_long_runs(coefficient, None, grouped) is None
    grouped = add_rows.groups(torch.zeros(2000, dtype=torch.int64, device=DEVICE))
    pieces = add_rows.sum_long_runs(torch.ones(2000, device=DEVICE), None, grouped)
    assert pieces.shape == (64, 1)


def test_same_bits_every_time():
    key = of_runs([1, 500, 64, 63, 65])
    source, coefficient = torch.randn(len(key), 5).bfloat16(), torch.randn(len(key))
    out = torch.randn(5, 5)
    first, *_ = added(key, source, coefficient, out)
    again, *_ = added(key, source, coefficient, out)
    assert torch.equal(first, again)


def test_scattered_rows_add_up_before_they_are_rounded():
    index = of_runs([1, 130, 2, 64])
    rows, coefficient = torch.randn(len(index), 5), torch.randn(len(index))
    given = (tensor.to(DEVICE) for tensor in (coefficient, rows, index))
    actual = add_rows.scatter_rows(*given, 6, torch.bfloat16).cpu()
    terms = coefficient.double()[:, None] * rows.double()
    truth = torch.zeros(6, 5, dtype=torch.float64).index_add(0, index, terms)
    size = torch.zeros(6, 5, dtype=torch.float64).index_add(0, index, terms.abs())
    assert actual.dtype == torch.bfloat16
    assert_sum(actual, truth, size)
