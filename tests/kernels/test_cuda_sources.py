"""CUDA without a GPU: what nvcc makes of the kernels, and what they compute, run on a CPU."""

import math
import mmap
import re
import shutil
import subprocess

import pytest
import torch

from memdlm_kernels import fast_weight_reset_, fast_weight_sgd, fast_weight_sgd_
from memdlm_kernels.fast_weight_reset.reference import philox_4x32_10
from tests.cuda_on_cpu import fast_weight
from tests.cuda_on_cpu.fast_weight import CHUNK, CLIPS, CSRC, DTYPES
from tests.kernels.truth import assert_as_accurate
from tools.find_nvcc import find_nvcc

SOURCES = sorted(CSRC.glob("*.cu"))
NVCC = find_nvcc()
LR, MAX_NORM = 0.1, 1.0

# For chunks of 512 columns, of which pieces from 64 on are a block's and shorter ones a warp's.
TABLES = {
    "mixed": [0, 0, 5, 5, 77, 900, 4003, 4003],
    "at the chunks' ends": [0, 512, 1024, 1536, 1536, 2048],
    "beside the chunks' ends": [0, 511, 512, 513, 1023, 1025, 1536],
    "empty at the chunks' ends": [0, 0, 0, 512, 512, 512, 1024, 1024, 1024],
    "many to a chunk": list(range(0, 1700, 7)),
    "one to many chunks": [0, 5000],
    "less than a chunk": [0, 3, 63, 127],
    "more than a block finds at once": [*range(0, 1400, 2), 1400, *range(1400, 1500)],
    "no segment": [0],
    "no column": [0, 0, 0],
    "one column": [0, 1],
    "long between short": [0, 3, 700, 701, 1400, 1409],
}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_fit_a_processor(source, architecture, tmp_path):
    """No spills, and half of a processor's threads at once: 64 registers each."""
    command = [NVCC, "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-o", tmp_path / "cubin"]
    command += ["-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings", source]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    kernels = re.findall(r"Compiling entry function '(\S+)'", finished.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", finished.stderr)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", finished.stderr)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", finished.stderr)]
    assert len(kernels) == len(registers) == len(spills) > 0
    assert max(registers) <= 64
    # Four blocks leave the larger part of the smallest processor's 100 KiB to its cache.
    assert max(shared, default=0) <= 12 * 1024
    assert not any(spills)


def test_cuda_headers_know_nothing_of_torch():
    for path in [*SOURCES, *CSRC.glob("*.cuh"), *CSRC.glob("*.h")]:
        assert "torch/" not in path.read_text(encoding="utf-8"), path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in the run's.
    return fast_weight.compile_library(folder.parent if folder.name.startswith("popen") else folder)


def inputs(table, *, rows=3, dtype=torch.float32, grad_dtype=None, offset=0, gap=0):
    """Rows `gap` elements apart, the first `offset` elements from an aligned address."""
    torch.manual_seed(0)
    segments = torch.tensor(table)
    columns = table[-1]
    buffers = []
    for kind in (dtype, grad_dtype or dtype):
        buffer = torch.randn(rows, offset + columns + gap) * torch.logspace(
            -3, 0.5, max(1, offset + columns + gap)
        )
        buffers.append(buffer.to(kind)[:, offset : offset + columns])
    return *buffers, segments


def check_step(library, param, grad, segments, clip, loss=None, cast=None):
    """One step of the kernels against the reference's."""
    truth, expected = param.to(torch.float64, copy=True), param.clone()
    expected_cast = None if cast is None else cast.clone()
    args = (segments, LR, MAX_NORM, clip, loss)
    true_norm, _ = fast_weight_sgd_(truth, grad.double(), *args, backend="reference")
    expected_norm, expected_skipped = fast_weight_sgd_(
        expected, grad, *args, cast=expected_cast, backend="reference"
    )
    outside = param._base.clone() if param._base is not None else None
    norm, skipped = fast_weight.sgd(library, param, grad, *args, cast)

    assert torch.equal(skipped, expected_skipped)
    kept = (
        param.view(torch.uint8) if param.is_contiguous() else param.contiguous().view(torch.uint8)
    )
    before = expected.view(torch.uint8)
    assert torch.equal(kept[skipped], before[skipped])
    if grad.dtype == torch.float64:
        torch.testing.assert_close(norm, expected_norm, rtol=1e-12, atol=0, equal_nan=True)
    else:
        finite = expected_norm.isfinite()
        assert torch.equal(norm.isnan(), expected_norm.isnan())
        assert torch.equal(norm.isfinite(), finite)
        assert_as_accurate("norm", norm[finite], true_norm[finite], expected_norm[finite])
    if param.dtype == torch.float64:
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14, equal_nan=True)
    else:
        assert_as_accurate("param", param[~skipped], truth[~skipped], expected[~skipped])
    if cast is not None:
        assert torch.equal(cast[~skipped], param[~skipped].to(cast.dtype))
        assert torch.equal(cast[skipped], expected_cast[skipped])
    if outside is not None:
        width = param.shape[1]
        start = param.storage_offset() % param.stride(0)
        after = param._base
        assert torch.equal(after[:, :start], outside[:, :start])
        assert torch.equal(after[:, start + width :], outside[:, start + width :])


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_sgd_tables(library, table):
    check_step(library, *inputs(table), "tensor")
    check_step(library, *inputs(table, rows=1), "global")


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_dtypes(library, dtype, grad_dtype):
    param, grad, segments = inputs(TABLES["mixed"], dtype=dtype, grad_dtype=grad_dtype)
    # Each dtype of param with each of cast, and none.
    cast_dtype = DTYPES[(DTYPES.index(dtype) + DTYPES.index(grad_dtype)) % 4]
    cast = None if cast_dtype == dtype else torch.full(param.shape, 7.0).to(cast_dtype)
    loss = torch.tensor([1.0, math.nan, 2.0], dtype=cast_dtype)
    check_step(library, param, grad, segments, "tensor", loss, cast)


@pytest.mark.parametrize(("offset", "gap"), [(0, 16), (0, 1), (1, 2), (3, 0), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_rows_apart_and_unaligned(library, dtype, offset, gap):
    for grad_offset in (offset, 0):
        table = TABLES["beside the chunks' ends"]
        param, _, segments = inputs(table, dtype=dtype, offset=offset, gap=gap)
        _, grad, _ = inputs(table, dtype=dtype, offset=grad_offset, gap=gap)
        # The copy's rows are aligned as param's are, and otherwise.
        for shift in (offset, offset + 1):
            cast = torch.zeros(3, shift + table[-1] + gap, dtype=torch.float16)[:, shift:]
            cast = cast[:, : table[-1]]
            check_step(library, param, grad, segments, "tensor", cast=cast)


def test_sgd_same_bits_in_any_row(library):
    """Whichever way a row's elements are loaded, its sums have one order."""
    table = TABLES["mixed"]
    grad = torch.randn(1, 2 * table[-1], dtype=torch.float64)[:, : table[-1]]
    results = []
    for offset in range(3):
        buffer = torch.zeros(2, table[-1] + offset, dtype=torch.float64)
        buffer[1, offset:] = grad
        param = torch.ones(2, table[-1], dtype=torch.float64)
        segments = torch.tensor(table)
        norm, _ = fast_weight.sgd(library, param, buffer[:, offset:], segments, LR, 1.0, "tensor")
        results.append((param[1], norm[1]))
    for param, norm in results[1:]:
        assert torch.equal(param, results[0][0])
        assert torch.equal(norm, results[0][1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", CLIPS)
def test_sgd_bad_gradient_or_loss(library, clip, bad):
    param, grad, segments = inputs(TABLES["mixed"], rows=4)
    grad[1, 6] = bad
    param[1, 3], param[2, 4] = math.nan, -0.0
    check_step(library, param, grad, segments, clip, torch.tensor([0.5, 1.0, bad, 2.0]))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sgd_huge_gradients(library, dtype, clip):
    """Whose row's norm is no float and whose segments' are; one with a segment that is too large;
    and one whose square is no double."""
    largest = torch.finfo(dtype).max
    segments = torch.tensor([0, 4, 1000, 1200])
    grad = torch.zeros(3, 1200, dtype=dtype)
    share = 0.9 * largest if dtype == torch.float32 else 0.9 * math.sqrt(largest)
    grad[0, [0, 4, 1000]] = share
    grad[1, 4:900] = share
    grad[2, 3] = share * 1e-10
    param = torch.ones_like(grad)
    expected = param.clone()
    args = (grad, segments, LR, MAX_NORM, clip)
    norm, skipped = fast_weight.sgd(library, param, *args)
    expected_norm, expected_skipped = fast_weight_sgd_(expected, *args, backend="reference")
    assert torch.equal(skipped, expected_skipped)
    assert skipped.tolist() == [False, True, False]
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(param, expected)


def check_derivative(library, above, grad, segments, clip, loss=None, out=None):
    """The kernels' gradient of grad against the reference's; `above` is that of the new weights."""
    args = (segments, LR, MAX_NORM, clip, loss)

    def slope(above, grad):
        leaf = grad.detach().requires_grad_()
        updated, _, skipped = fast_weight_sgd(
            torch.zeros_like(above), leaf, *args, backend="reference"
        )
        return torch.autograd.grad(updated, leaf, above)[0], skipped

    expected, skipped = slope(above, grad)
    truth, _ = slope(above.double(), grad.double())
    out = torch.full(grad.shape, math.nan, dtype=grad.dtype) if out is None else out
    fast_weight.sgd_backward(library, above, grad, segments, LR, MAX_NORM, clip, skipped, out)
    assert not out[skipped].any()
    if grad.dtype == torch.float64:
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-14)
    else:
        assert_as_accurate("grad_grad", out, truth, expected)
    return out


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_derivative_tables(library, table):
    check_derivative(library, *inputs(table), "tensor")
    check_derivative(library, *inputs(table, rows=1), "global")


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivative_dtypes(library, dtype, grad_dtype):
    above, grad, segments = inputs(TABLES["mixed"], dtype=dtype, grad_dtype=grad_dtype)
    check_derivative(library, above, grad, segments, "tensor", torch.tensor([1.0, math.nan, 2.0]))


@pytest.mark.parametrize(("offset", "gap"), [(0, 16), (0, 1), (1, 2), (3, 0), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derivative_rows_apart_and_unaligned(library, dtype, offset, gap):
    table = TABLES["beside the chunks' ends"]
    for grad_offset in (offset, 0):
        above, _, segments = inputs(table, dtype=dtype, offset=offset, gap=gap)
        _, grad, _ = inputs(table, dtype=dtype, offset=grad_offset, gap=gap)
        for shift in (offset, offset + 1):
            wide = torch.full((3, shift + table[-1] + gap), math.nan, dtype=dtype)
            out = wide[:, shift : shift + table[-1]]
            check_derivative(library, above, grad, segments, "tensor", out=out)
            assert wide[:, :shift].isnan().all()
            assert wide[:, shift + table[-1] :].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", CLIPS)
def test_derivative_bad_gradient_or_loss(library, clip, bad):
    above, grad, segments = inputs(TABLES["mixed"], rows=4)
    grad[1, 6] = bad
    above[2, 4] = math.nan
    out = check_derivative(library, above, grad, segments, clip, torch.tensor([0.5, 1.0, bad, 2.0]))
    grad[3] = 0
    above = torch.randn_like(grad)
    out = check_derivative(library, above, grad, segments, clip)
    torch.testing.assert_close(out[3], -LR * above[3])


def derivative(library, above, grad, segments, clip, max_norm=MAX_NORM):
    """Where no row is skipped."""
    out, skipped = torch.full_like(grad, math.nan), torch.zeros(len(grad), dtype=torch.bool)
    fast_weight.sgd_backward(library, above, grad, segments, LR, max_norm, clip, skipped, out)
    return out


@pytest.mark.parametrize("clip", ["tensor", "global"])
def test_derivative_has_no_part_along_what_is_clipped(library, clip):
    _, grad, segments = inputs(TABLES["one to many chunks"])
    assert derivative(library, grad, grad, segments, clip).abs().max() < 1e-12


def test_derivative_clips_what_the_step_clipped(library):
    """It sums the squares again, to the last bit as the step does."""
    _, grad, segments = inputs(TABLES["one to many chunks"], rows=1, grad_dtype=torch.float64)
    zeros = torch.zeros_like(grad)
    norm, _ = fast_weight.sgd(library, zeros, grad, segments, LR, MAX_NORM, "tensor")
    below = math.nextafter(norm.item(), 0)
    for dtype in DTYPES:
        above = grad.to(dtype)
        kept = derivative(library, above, grad, segments, "tensor", norm.item())
        torch.testing.assert_close(kept, -LR * above.double(), rtol=1e-15, atol=0)
        clipped = derivative(library, above, grad, segments, "tensor", below)
        assert clipped.norm() < 1e-2 * kept.norm()


def drawn(library, table, bounds, dtype, *, cast_dtype=None, offset=0, gap=0):
    segments, seed = torch.tensor(table), torch.tensor([0, -5, 2**62 + 3])
    columns = table[-1]
    wide = torch.full((3, offset + columns + gap), math.nan, dtype=dtype)
    param, cast = wide[:, offset : offset + columns], None
    if cast_dtype not in (None, dtype):
        cast = torch.full_like(wide, math.nan, dtype=cast_dtype)[:, offset : offset + columns]
    fast_weight.reset(library, param, segments, bounds, seed, cast)
    expected = torch.empty(3, columns, dtype=dtype)
    fast_weight_reset_(expected, segments, bounds, seed, backend="reference")
    assert torch.equal(param.contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert wide[:, :offset].isnan().all()
    assert wide[:, offset + columns :].isnan().all()
    if cast is not None:
        assert torch.equal(cast, expected.to(cast_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_reset_tables(library, table, dtype):
    bounds = torch.tensor([1 / (p + 1) if p % 3 else 0.0 for p in range(len(table) - 1)])
    drawn(library, table, bounds, dtype)
    drawn(library, table, bounds.double() * 1e-44, dtype)


@pytest.mark.parametrize("cast_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reset_cast_and_strides(library, dtype, cast_dtype):
    for offset, gap in ((0, 0), (0, 8), (3, 1), (8, 0)):
        table = TABLES["long between short"]
        bounds = torch.tensor([0.3, 0.0, 0.5, 0.7, 0.9])
        drawn(library, table, bounds, dtype, cast_dtype=cast_dtype, offset=offset, gap=gap)


def vast(elements, dtype):
    """Zeros that take memory only where they are touched."""
    no_reserve = 0x4000
    size = elements * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


def test_rows_more_than_2_to_the_31_elements_apart(library):
    stride, columns = 2**31 + 8, 700
    segments = torch.tensor([0, 300, columns])
    param, grad, cast = (
        vast(2 * stride, dtype).view(2, stride)[:, :columns]
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16)
    )
    grad.copy_(torch.randn(2, columns))
    expected, expected_cast = param.clone(), torch.zeros(2, columns, dtype=torch.float16)
    args = (segments, LR, MAX_NORM, "tensor")
    fast_weight.sgd(library, param, grad, *args, cast=cast)
    fast_weight_sgd_(expected, grad.contiguous(), *args, cast=expected_cast, backend="reference")
    torch.testing.assert_close(param, expected)
    assert torch.equal(cast, param.half())

    seed, bounds = torch.tensor([1, 2]), torch.tensor([1.0, 0.5])
    fast_weight.reset(library, param, segments, bounds, seed, cast)
    fast_weight_reset_(expected, segments, bounds, seed, backend="reference")
    assert torch.equal(param, expected)
    assert torch.equal(cast, param.half())


def test_row_of_more_than_2_to_the_33_elements(library):
    """Its last chunks alone, which hold a segment's end, a short segment and a part of a third."""
    columns = 2**33 + 700
    table = [0, 10, 2**33 + 5, 2**33 + 20, columns]
    segments, seed = torch.tensor(table), torch.tensor([-3])
    bounds = torch.tensor([1.0, 0.5, 0.0, 0.25])
    param = vast(columns, torch.bfloat16)[None]
    chunks = -(-columns // CHUNK)
    library.run_blocks(chunks - 2, chunks)
    try:
        fast_weight.reset(library, param, segments, bounds, seed)
        count = len(table) - 1
        scratch = vast(library.scratch(1, columns, count), torch.float64)
        step = fast_weight.Sgd(
            *(fast_weight.flat(tensor) for tensor in (param, param, None, None)),
            *(segments.data_ptr(), columns, 1, count, LR, MAX_NORM, 0, None, None),
            scratch.data_ptr(),
        )
        assert library.sgd(fast_weight.ctypes.byref(step)) is None
    finally:
        library.run_blocks(0, 2**63)

    tail = torch.arange(2**33, columns)
    word = philox_4x32_10(tail // 4, seed).gather(1, (tail % 4)[:, None])[:, 0]
    bound = bounds[torch.searchsorted(segments[1:], tail, right=True)]
    expected = ((2 * (word >> 8).float() * 2.0**-24 - 1) * bound).bfloat16()
    assert torch.equal(param[0, 2**33 :], expected.where(bound > 0, torch.zeros_like(expected)))

    # The slot of a pair is chunk + segment.
    square = param[0, 2**33 :].double().square()
    for chunk, segment, begin, end in (
        (chunks - 2, 1, 0, 5),
        (chunks - 2, 2, 5, 20),
        (chunks - 2, 3, 20, 512),
        (chunks - 1, 3, 512, 700),
    ):
        slot = scratch[chunk + segment]
        torch.testing.assert_close(slot, square[begin:end].sum(), rtol=1e-12, atol=0)
