"""csrc/cuda's kernels of fast weights, compiled by g++ (fast_weight.cpp here) and run on a CPU."""

import ctypes
import fcntl
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc/cuda"
CHUNK = 512  # columns, against 16,384 on a GPU: short rows have many chunks
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # as in fast_weight.h
CLIPS = ["tensor", "global", "none"]


class Flat(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    )


class Sgd(ctypes.Structure):
    _fields_ = (
        *((name, Flat) for name in ("param", "grad", "cast", "loss")),
        ("segments", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rows", "count")),
        *((name, ctypes.c_double) for name in ("lr", "max_norm")),
        ("clip", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("norm", "skipped", "scratch")),
    )


class SgdBackward(ctypes.Structure):
    _fields_ = (
        *((name, Flat) for name in ("grad_updated", "grad", "grad_grad")),
        ("segments", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rows", "count")),
        *((name, ctypes.c_double) for name in ("lr", "max_norm")),
        ("clip", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("skipped", "scratch")),
    )


class Reset(ctypes.Structure):
    _fields_ = (
        *((name, Flat) for name in ("param", "cast", "bounds")),
        *((name, ctypes.c_void_p) for name in ("segments", "seed")),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rows", "count")),
    )


def flat(tensor: Tensor | None) -> Flat:
    if tensor is None:
        return Flat(None, 0, 0)
    return Flat(tensor.data_ptr(), tensor.stride(0), DTYPES.index(tensor.dtype))


def compile_library(folder: Path) -> ctypes.CDLL:
    """The library, made once in `folder`, which all test processes may share."""
    library = folder / "fast_weight_on_cpu.so"
    with open(folder / "fast_weight_on_cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            command = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC"]
            command += [f"-DMEMDLM_FAST_WEIGHT_CHUNK={CHUNK}", f"-I{HERE}", f"-I{CSRC}"]
            subprocess.run([*command, HERE / "fast_weight.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for scratch in (loaded.scratch, loaded.backward_scratch):
        scratch.restype = ctypes.c_int64
        scratch.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    for launch in (loaded.sgd, loaded.sgd_backward, loaded.reset):
        launch.restype = ctypes.c_char_p
    loaded.run_blocks.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
    loaded.run_blocks.restype = None
    return loaded


def sgd(
    library: ctypes.CDLL,
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None = None,
    cast: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step, in place; every output is poisoned before."""
    rows, columns = param.shape
    count = segments.numel() - 1
    wide = grad.dtype == torch.float64
    norm = torch.full((rows, count), torch.nan, dtype=torch.float64 if wide else torch.float32)
    skipped = torch.full((rows,), 77, dtype=torch.uint8)
    size = library.scratch(rows, columns, count)
    guard = 3
    scratch = torch.full((size + guard,), torch.nan, dtype=torch.float64)
    pointers = (norm.data_ptr(), skipped.data_ptr(), scratch.data_ptr())
    step = Sgd(
        *(flat(tensor) for tensor in (param, grad, cast, loss)),
        *(segments.data_ptr(), columns, rows, count),
        *(lr, max_norm, CLIPS.index(clip), *pointers),
    )
    before = library.launches()
    assert library.sgd(ctypes.byref(step)) is None
    assert library.launches() - before == (2 if rows else 0)
    assert scratch[size:].isnan().all()
    assert ((skipped == 0) | (skipped == 1)).all()
    return norm, skipped.bool()


def sgd_backward(
    library: ctypes.CDLL,
    grad_updated: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    skipped: Tensor,
    grad_grad: Tensor,
) -> None:
    """The step's derivative, into `grad_grad`."""
    rows, columns = grad.shape
    count = segments.numel() - 1
    size = library.backward_scratch(rows, columns, count)
    guard = 3
    scratch = torch.full((size + guard,), torch.nan, dtype=torch.float64)
    step = SgdBackward(
        *(flat(tensor) for tensor in (grad_updated, grad, grad_grad)),
        *(segments.data_ptr(), columns, rows, count),
        *(lr, max_norm, CLIPS.index(clip), skipped.data_ptr(), scratch.data_ptr()),
    )
    before = library.launches()
    assert library.sgd_backward(ctypes.byref(step)) is None
    assert library.launches() - before == (2 if rows else 0)
    assert scratch[size:].isnan().all()


def reset(
    library: ctypes.CDLL,
    param: Tensor,
    segments: Tensor,
    bounds: Tensor,
    seed: Tensor,
    cast: Tensor | None = None,
) -> None:
    rows, columns = param.shape
    arguments = Reset(
        *(flat(param), flat(cast), Flat(bounds.data_ptr(), 1, DTYPES.index(bounds.dtype))),
        *(segments.data_ptr(), seed.data_ptr(), columns, rows, segments.numel() - 1),
    )
    before = library.launches()
    assert library.reset(ctypes.byref(arguments)) is None
    assert library.launches() - before == (1 if rows else 0)
