"""What a compiler made of a Triton kernel, read from the texts that it leaves of its stages."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

# Of what is streamed; integers are indices and tables.
_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
_WIDEST = 16  # bytes, of one load by one thread

# A place in the source: file, line, and file and line of the call, "" and 0 where there is none.
Place = tuple[str, int, str, int]


@dataclass(frozen=True)
class Dot:
    """A matrix product.

    Attributes:
        rows: of the result's tile.
        operands: dtype of the first operand.
        tensor_cores: whether they take such operands: all but float32 in full precision.
        wgmma: whether it is Hopper's asynchronous instruction, by four warps together.
    """

    rows: int
    operands: str
    tensor_cores: bool
    wgmma: bool


@dataclass(frozen=True)
class Load:
    """A load of a tile of floating-point numbers.

    Attributes:
        place: where it is in the source.
        bytes: of its narrowest instruction, 0 if there is none.
        most: what it could be: 16, or a thread's share of the tile if that is less.
    """

    place: str
    bytes: int
    most: int


def dots(ttgir: str) -> list[Dot]:
    """Those of a kernel, from its code after Triton has chosen layouts and instructions."""
    # For Hopper and Blackwell, and what is left for others and for ordinary instructions.
    name = r"(ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot)"
    pattern = name + r" (.+?) : \S*?<(\d+)x\d+x(\w+)"
    return [
        Dot(
            rows=int(rows),
            operands=operands,
            tensor_cores=name != "tt.dot" or operands != "f32" or "inputPrecision" in options,
            wgmma=name == "ttng.warp_group_dot",
        )
        for name, options, rows, operands in re.findall(pattern, ttgir)
    ]


def loads(ttir: str, ptx: str, threads: int) -> list[Load]:
    """Those of a kernel, from its code before any layout is chosen and its instructions.

    They are matched by their place in the source, which both texts have.
    """
    widths = _widths(ptx)
    place_of = _places(ttir)
    pattern = r"= tt\.load .*: tensor<([\dx]+)x!tt\.ptr<(\w+)>> loc\((#loc\d*)\)"
    found = []
    for shape, dtype, location in re.findall(pattern, ttir):
        if dtype in _BYTES:
            share = math.prod(map(int, shape.split("x"))) * _BYTES[dtype] // threads
            place = place_of(location)
            of_a_line = f"{place[0]}:{place[1]}" + (f" from {place[2]}:{place[3]}" * bool(place[2]))
            most = min(_WIDEST, max(share, _BYTES[dtype]))
            found.append(Load(of_a_line, min(widths[place], default=0), most))
    return found


def asynchronous_copies(ptx: str) -> int:
    """Instructions that copy from global memory while the program runs on."""
    return sum("cp.async" in line and ".global" in line for line in ptx.splitlines())


def _places(ttir: str):
    """A function from the name of a location to its place."""
    definitions = dict(re.findall(r"^(#loc\d*) = loc\((.+)\)$", ttir, re.M))

    def innermost(name: str) -> tuple[str, int]:
        text = definitions[name]
        if at := re.match(r'"([^"]*)":(\d+):\d+$', text):
            return at[1].rpartition("/")[2], int(at[2])
        if inner := re.match(r'(?:callsite|"[^"]*")\((#loc\d*)\b', text):
            return innermost(inner[1])
        return "", 0

    def place(name: str) -> Place:
        text = definitions[name]
        if named := re.match(r'"[^"]*"\((#loc\d*)\)$', text):
            return place(named[1])
        if call := re.match(r"callsite\((#loc\d*) at (#loc\d*)\)$", text):
            return *innermost(call[1]), *innermost(call[2])
        return *innermost(name), "", 0

    return place


def _widths(ptx: str) -> dict[Place, Counter[int]]:
    """Bytes of every instruction that reads global memory, by place."""
    files = {}
    for number, path, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', ptx):
        files[number] = (name or path).rpartition("/")[2]
    widths: dict[Place, Counter[int]] = defaultdict(Counter)
    place: Place = ("", 0, "", 0)
    in_block = fixed = False
    for line in ptx.splitlines():
        if line.startswith("\t.loc"):
            # In Triton's blocks of assembly each line counts as one more of the source.
            if not fixed:
                place = _place_of(line, files)
            fixed = in_block
        elif "inline asm" in line:
            in_block, fixed = "begin" in line, False
        elif "global" in line:
            if load := re.search(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", line):
                widths[place][int(load[1] or 1) * int(load[2]) // 8] += 1
            elif copy := re.search(r"\bcp\.async\.c[ag]\.shared\.global.*\], (0x\w+|\d+)", line):
                widths[place][int(copy[1], 0)] += 1
    return widths


def _place_of(loc: str, files: dict[str, str]) -> Place:
    """A line's place; Triton 3.6 has the call in the comment alone."""
    number, line, *_ = loc.removeprefix("\t.loc").split()
    at = files[number], int(line)
    if call := re.search(r"\binlined_at (\d+) (\d+)", loc):
        return *at, files[call[1]], int(call[2])
    if call := re.search(r"@\[ (\S+?):(\d+):", loc):
        return *at, call[1], int(call[2])
    return *at, "", 0
