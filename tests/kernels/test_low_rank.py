import pytest
import torch

from memdlm_kernels._triton import low_rank
from tests.kernels.devices import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"
FAR = 2**30  # elements from one row to the next: the third is out of reach of 32 bits

pytestmark = pytest.mark.gpu


@pytest.fixture
def far(tmp_path):
    """A function that makes a tensor [3, ...] of `FAR` between its first dimension's elements.

    On the CPU all that lies between them is a hole in a file.
    """

    def tensor(*shape):
        size = 2 * FAR + 4096
        if HAS_GPU:
            flat = torch.empty(size, dtype=torch.float16, device=DEVICE)
        else:
            flat = torch.from_file(str(tmp_path / "far"), True, size, dtype=torch.float16)
        near = torch.randn(3, *shape, device=DEVICE).half()
        result = flat.as_strided(near.shape, (FAR, *near[0].stride()))
        return result.copy_(near)

    return tensor


def ends(*rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def near(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def test_rows_beyond_32_bits(far):
    rows, weight = far(24), torch.randn(1, 2, 1, 5, 24, device=DEVICE)
    few = torch.randn(3, 5, device=DEVICE).half()
    groups = ends(2, 3)
    for wide in (rows, near(rows)):
        grad = torch.empty_like(weight)
        low_rank.outer(few, wide, groups, grad)
        of_rows = (
            low_rank.shrink(wide, weight, groups, 2.0),
            low_rank.expand(few, weight, groups, wide),
            grad,
        )
        if wide is rows:
            first = of_rows
    torch.testing.assert_close(of_rows, first, rtol=0, atol=0)


def test_narrow_rows_beyond_32_bits(far):
    rows, weight = far(5), torch.randn(1, 2, 1, 5, 24, device=DEVICE)
    groups = ends(2, 3)
    torch.testing.assert_close(
        low_rank.expand(rows, weight, groups),
        low_rank.expand(near(rows), weight, groups),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4], ids=["set", "expert", "projection", "rank", "col"])
def test_weights_beyond_32_bits(far, dim):
    """Far apart in one dimension of three."""
    shape = [1, 1, 1, 2, 2]
    shape[dim] = 3
    others = [size for d, size in enumerate(shape) if d != dim]
    weight = far(*others).movedim(0, dim)
    assert list(weight.shape) == shape
    sets, experts, projections, ranks, columns = shape
    groups = ends(*range(1, sets * experts + 1))
    wide = torch.randn(sets * experts, projections * columns, device=DEVICE).half()
    narrow = torch.randn(sets * experts, projections * ranks, device=DEVICE).half()
    for function in (
        lambda weight: low_rank.shrink(wide, weight, groups, 2.0),
        lambda weight: low_rank.expand(narrow, weight, groups),
    ):
        torch.testing.assert_close(function(weight), function(near(weight)), rtol=0, atol=0)
    grad = near(weight)
    low_rank.outer(narrow, wide, groups, grad)
    low_rank.outer(narrow, wide, groups, weight)
    assert torch.equal(weight, grad)


@pytest.mark.parametrize("rows", [3, 200])
def test_equal_groups_need_no_ends(rows):
    """Of one row block and of several, against the same groups with ends."""
    groups = ends(rows, 2 * rows)
    weight = torch.randn(1, 2, 1, 5, 24, device=DEVICE)
    wide, narrow = (torch.randn(2 * rows, n, device=DEVICE) for n in (24, 5))
    grads = [torch.empty_like(weight) for _ in range(2)]
    for cut, grad in zip((None, groups), grads, strict=True):
        low_rank.outer(narrow, wide, cut, grad)
    for first, second in (
        [low_rank.shrink(wide, weight, cut, 2.0) for cut in (None, groups)],
        [low_rank.expand(narrow, weight, cut, wide) for cut in (None, groups)],
        grads,
    ):
        assert torch.equal(first, second)


def test_rows_that_are_not_dense_are_copied():
    wide = torch.randn(24, 6, device=DEVICE).mT
    weight = torch.randn(1, 1, 1, 5, 24, device=DEVICE)
    torch.testing.assert_close(
        low_rank.shrink(wide, weight, None, 2.0), 2 * wide @ weight[0, 0, 0].mT
    )
