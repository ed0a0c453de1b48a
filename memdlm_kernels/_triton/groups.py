"""Rows in groups: which group's rows a program of a kernel is to work on.

Rows are sorted into groups. The sizes of the groups are known on the device alone, the number of
rows and of groups on the host too: `most_tiles` programs are enough whatever the sizes are, and
`find_tile` gives each of them its rows. Nothing waits for the device.
"""

import triton
import triton.language as tl


def most_tiles(rows: int, groups: int, block: int) -> int:
    """Tiles of at most `block` rows, none across two groups: at most so many, in any sizes."""
    return triton.cdiv(rows, block) + groups


@triton.jit
def find_tile(ends, length, pid, groups, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end row) of tile `pid`; the tiles are in the rows' order.

    Args:
        ends: int32 pointer to the row at which each group ends, ascending, contiguous; None where
            all groups have `length` rows.
        length: rows of each group where `ends` is None; else not read.
        pid: number of the tile.
        groups: how many groups there are.
        GROUPS: `groups`, rounded up to a power of two.
        BLOCK_M: rows of a tile. The last tile of a group has fewer.

    Returns:
        Three int32 scalars. First and end row are the same for a tile too many; its group is valid.
    """
    if ends is None:
        tiles = tl.maximum(tl.cdiv(length, BLOCK_M), 1)  # an empty group has one tile too many
        group = pid // tiles
        here = group * length
        end = here + length
        tile = pid - group * tiles
    else:
        g = tl.arange(0, GROUPS)  # [G]
        starts = tl.load(ends + g - 1, mask=(g > 0) & (g < groups), other=0)  # [G]
        tiles = tl.cdiv(tl.load(ends + g, mask=g < groups, other=0) - starts, BLOCK_M)  # [G]
        tiles = tl.where(g < groups, tiles, 0)
        before = tl.cumsum(tiles, 0) <= pid  # [G], groups whose tiles are all before this one
        group = tl.sum(before.to(tl.int32))
        tile = pid - tl.sum(tl.where(before, tiles, 0))
        here, end = group_rows(ends, length, tl.minimum(group, groups - 1))
    valid = group < groups
    begin = here + tile * BLOCK_M
    end = tl.maximum(tl.minimum(begin + BLOCK_M, end), begin)
    return tl.where(valid, group, 0), tl.where(valid, begin, 0), tl.where(valid, end, 0)


@triton.jit
def group_rows(ends, length, group):
    """(first row, end row) of a whole group, with `ends` and `length` as in `find_tile`."""
    if ends is None:
        begin = group * length
        end = begin + length
    else:
        begin = tl.load(ends + group - 1, mask=group > 0, other=0)
        end = tl.load(ends + group)
    return begin, end
