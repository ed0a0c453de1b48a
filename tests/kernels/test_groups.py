import pytest
import torch
import triton
import triton.language as tl

from memdlm_kernels._triton.groups import find_tile, group_rows, most_tiles
from tests.kernels.devices import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"
BLOCK_M = 16

pytestmark = pytest.mark.gpu

LENGTHS = {
    "one group": [40],
    "one row": [1],
    "around a block": [15, 16, 17, 31, 32, 33],
    "empty first": [0, 0, 20, 3],
    "empty in the middle": [20, 0, 0, 16, 0, 1],
    "empty last": [5, 48, 0, 0],
    "all in one": [0, 0, 50, 0, 0],
    "no row": [0, 0, 0],
    "many groups": [0, 3, 1, 17] * 75,
}


@triton.jit
def tiles_of(ends, length, groups, out, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    pid = tl.program_id(0)
    group, begin, end = find_tile(ends, length, pid, groups, GROUPS, BLOCK_M)
    tl.store(out + 3 * pid, group)
    tl.store(out + 3 * pid + 1, begin)
    tl.store(out + 3 * pid + 2, end)


@triton.jit
def rows_of(ends, length, out):
    group = tl.program_id(0)
    begin, end = group_rows(ends, length, group)
    tl.store(out + 2 * group, begin)
    tl.store(out + 2 * group + 1, end)


def expected_tiles(lengths):
    """(group, begin, end) of each tile."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [
        [group, begin, min(begin + BLOCK_M, end)]
        for group, (length, end) in enumerate(zip(lengths, ends, strict=True))
        for begin in range(end - length, end, BLOCK_M)
    ]


def check(lengths, ends, length):
    groups = len(lengths)
    programs = most_tiles(sum(lengths), groups, BLOCK_M)
    tiles = torch.full((programs, 3), -1, dtype=torch.int32, device=DEVICE)
    padded = triton.next_power_of_2(groups)
    tiles_of[(programs,)](ends, length, groups, tiles, GROUPS=padded, BLOCK_M=BLOCK_M)
    expected = expected_tiles(lengths)
    assert tiles[: len(expected)].tolist() == expected
    surplus = tiles[len(expected) :]
    assert torch.equal(surplus[:, 1], surplus[:, 2])
    assert (surplus[:, 0] < groups).all()

    rows = torch.full((groups, 2), -1, dtype=torch.int32, device=DEVICE)
    rows_of[(groups,)](ends, length, rows)
    after = torch.tensor(lengths).cumsum(0).tolist()
    assert rows.tolist() == [[end - n, end] for n, end in zip(lengths, after, strict=True)]


@pytest.mark.parametrize("case", LENGTHS)
def test_tiles_of_groups(case):
    lengths = LENGTHS[case]
    ends = torch.tensor(lengths).cumsum(0).to(torch.int32).to(DEVICE)
    check(lengths, ends, 0)


@pytest.mark.parametrize(("groups", "length"), [(1, 40), (1, 0), (3, 16), (3, 17), (4, 1), (2, 0)])
def test_tiles_of_equal_groups(groups, length):
    check([length] * groups, None, length)


def test_tiles_of_the_most_groups():
    lengths = [0] * 4096
    lengths[7], lengths[4000] = 17, 1
    ends = torch.tensor(lengths).cumsum(0).to(torch.int32).to(DEVICE)
    tiles = torch.full((3, 3), -1, dtype=torch.int32, device=DEVICE)
    tiles_of[(3,)](ends, 0, 4096, tiles, GROUPS=4096, BLOCK_M=BLOCK_M)
    assert tiles.tolist() == expected_tiles(lengths)
