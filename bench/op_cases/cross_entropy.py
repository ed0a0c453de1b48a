"""Cases of masked_linear_cross_entropy, masked_cross_entropy and masked_linear_kl."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.op_cases.case import (
    Case,
    Inputs,
    Make,
    Results,
    Run,
    UnavailableError,
    Variant,
    backends,
    copy_of,
    differentiated,
    randn,
)
from memdlm_kernels import masked_cross_entropy, masked_linear_cross_entropy, masked_linear_kl

_IGNORED = -100
_INT64_BYTES = 8
# Rounded to the dtype: logits, their gradient, its scale, the product with the head.
_ROUNDINGS = 4


def linear_case(
    rows: int,
    masked: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    head_trains: bool = False,
    chunks_mib: tuple[int, ...] = (),
    bounds: bool = False,
) -> Case:
    """Mean NLL of the masked rows through a head, and its gradients.

    Args:
        rows, masked, hidden, vocabulary: N, M, D and V.
        dtype: of hidden states and head.
        head_trains: the head needs a gradient too.
        chunks_mib: also measure ours with so many MiB of logits at a time.
        bounds: also measure the products that it cannot do without.
    """
    wanted = ("hidden", "weight") if head_trains else ("hidden",)

    def inputs(generator: torch.Generator) -> Inputs:
        target, index = _masked(rows, masked, vocabulary, generator)
        return {
            "hidden": randn(generator, rows, hidden, dtype=dtype),
            "weight": randn(generator, vocabulary, hidden, dtype=dtype, scale=hidden**-0.5),
            "target": target,
            "index": index,
        }

    def ours(backend: str, chunk_bytes: int | None = None) -> Make:
        return differentiated(
            partial(_ours_linear, backend=backend, chunk_bytes=chunk_bytes), wanted
        )

    op = "masked_linear_cross_entropy"
    variants = [*backends(op, ours)]
    for mebibytes in chunks_mib:
        chunked = partial(ours, chunk_bytes=mebibytes << 20)
        variants += [
            variant
            for variant in backends(op, chunked, f", {mebibytes} MiB of logits")
            if variant.backend == "triton"
        ]
    gathered: dict[str, Callable[..., Tensor]] = {
        "gather + F.cross_entropy": _cross_entropy,
        "gather + F.cross_entropy, logits.float()": partial(_cross_entropy, widen=True),
    }
    variants += [
        Variant(name, differentiated(partial(_gathered, loss), wanted))
        for name, loss in gathered.items()
    ]
    if rows > masked and not head_trains:
        variants.append(Variant("all rows, F.cross_entropy", differentiated(_all_rows, wanted)))
    variants += [
        Variant(name, partial(_peer, find, wanted))
        for name, find in (
            ("gather + F.linear_cross_entropy", _find_torch),
            ("gather + Liger", _find_liger),
            ("gather + cut-cross-entropy", _find_cut_cross_entropy),
        )
    ]
    if bounds and not head_trains:
        variants.append(Variant("bound: two products", _two_products, "bound"))
    read = masked * hidden + vocabulary * hidden
    written = rows * hidden + (vocabulary * hidden if head_trains else 0)
    head = "head trains" if head_trains else "head frozen"
    return Case(
        op=op,
        name=f"N {rows}, M {masked}, D {hidden}, V {vocabulary}, {head}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=tuple(variants),
        roundings=_ROUNDINGS,
        longest_sum=vocabulary,
        bytes=(read + written) * dtype.itemsize + 2 * masked * _INT64_BYTES,
    )


def logits_case(
    rows: int, masked: int, vocabulary: int, dtype: torch.dtype, *, bounds: bool = False
) -> Case:
    """Mean NLL of the masked rows of logits that a trainer has, and the logits' gradient.

    Args:
        rows, masked, vocabulary: N, M and V.
        dtype: of the logits.
        bounds: also measure a copy of the bytes.
    """
    wanted = ("logits",)

    def inputs(generator: torch.Generator) -> Inputs:
        target, index = _masked(rows, masked, vocabulary, generator)
        return {
            "logits": randn(generator, rows, vocabulary, dtype=dtype),
            "target": target,
            "index": index,
        }

    def ours(backend: str) -> Make:
        return differentiated(partial(_ours_logits, backend=backend), wanted)

    op = "masked_cross_entropy"
    traffic = (masked + rows) * vocabulary * dtype.itemsize + rows * _INT64_BYTES
    losses: dict[str, Callable[..., Tensor]] = {
        "gather + F.cross_entropy": lambda logits, target, index: F.cross_entropy(
            logits[index], target[index]
        ),
        "all rows, F.cross_entropy": lambda logits, target, index: F.cross_entropy(logits, target),
        "all rows, F.cross_entropy, logits.float()": lambda logits, target, index: F.cross_entropy(
            logits.float(), target
        ),
    }
    peers = tuple(Variant(name, differentiated(loss, wanted)) for name, loss in losses.items())
    return Case(
        op=op,
        name=f"N {rows}, M {masked}, V {vocabulary}",
        dtype=dtype,
        inputs=inputs,
        # Rows that are not masked cost the reference time and memory, and change nothing.
        truth=differentiated(
            lambda logits, target, index: masked_cross_entropy(
                logits[index], target[index], reduction="mean", backend="reference"
            ),
            wanted,
        ),
        variants=backends(op, ours) + peers + ((copy_of(traffic),) if bounds else ()),
        roundings=_ROUNDINGS,
        longest_sum=vocabulary,
        bytes=traffic,
    )


def kl_case(
    masked: int, hidden: int, vocabulary: int, dtype: torch.dtype, *, bounds: bool = False
) -> Case:
    """Mean divergence of two hidden states through one head, and the student's gradient.

    Args:
        masked, hidden, vocabulary: M, D and V.
        dtype: of hidden states and head.
        bounds: also measure the products that it cannot do without.
    """
    wanted = ("student",)

    def inputs(generator: torch.Generator) -> Inputs:
        student = randn(generator, masked, hidden)
        # Two states of one trajectory are near each other: what is left of a difference of rounded
        # logits is part of the comparison.
        teacher = student + randn(generator, masked, hidden, scale=0.3)
        return {
            "student": student.to(dtype),
            "teacher": teacher.to(dtype),
            "weight": randn(generator, vocabulary, hidden, dtype=dtype, scale=hidden**-0.5),
        }

    def ours(backend: str) -> Make:
        return differentiated(masked_linear_kl, wanted, reduction="mean", backend=backend)

    def three_products(inputs: Inputs) -> Run:
        student, teacher, weight = inputs["student"], inputs["teacher"], inputs["weight"]
        return lambda: (
            (logits := student @ weight.mT) @ weight,
            torch.mm(teacher, weight.mT, out=logits),
        )

    op = "masked_linear_kl"
    peers = [
        Variant("F.kl_div, logits.float()", differentiated(_kl_div, wanted)),
        Variant("F.kl_div, float32 products", differentiated(partial(_kl_div, wide=True), wanted)),
    ]
    if bounds:
        peers.append(Variant("bound: three products", three_products, "bound"))
    return Case(
        op=op,
        name=f"M {masked}, D {hidden}, V {vocabulary}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_ROUNDINGS,
        longest_sum=vocabulary,
        bytes=(3 * masked * hidden + vocabulary * hidden) * dtype.itemsize,
    )


def _masked(
    rows: int, masked: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(target [N] with M rows that are not ignored, their positions [M])."""
    device = generator.device
    index = torch.randperm(rows, generator=generator, device=device)[:masked].sort().values
    target = torch.full((rows,), _IGNORED, device=device)
    target[index] = torch.randint(vocabulary, (masked,), generator=generator, device=device)
    return target, index


def _ours_linear(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    index: Tensor,
    backend: str,
    chunk_bytes: int | None,
) -> Tensor:
    return masked_linear_cross_entropy(
        hidden,
        weight,
        target[index],
        index=index,
        reduction="mean",
        chunk_bytes=chunk_bytes,
        backend=backend,
    )


def _ours_logits(logits: Tensor, target: Tensor, index: Tensor, backend: str) -> Tensor:
    return masked_cross_entropy(logits, target, reduction="mean", backend=backend)


def _all_rows(hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """What trainers run today."""
    return _cross_entropy(hidden, weight, target)


def _gathered(
    loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor
) -> Tensor:
    return loss(hidden[index], weight, target[index])


def _cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, widen: bool = False) -> Tensor:
    logits = hidden @ weight.mT
    return F.cross_entropy(logits.float() if widen else logits, target)


def _peer(
    find: Callable[[torch.device], Callable[..., Tensor]], wanted: tuple[str, ...], inputs: Inputs
) -> Run:
    loss = find(inputs["hidden"].device)
    return differentiated(partial(_gathered, loss), wanted)(inputs)


def _find_torch(device: torch.device) -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has none")
    return F.linear_cross_entropy


def _find_liger(device: torch.device) -> Callable[..., Tensor]:
    _require_gpu(device)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise UnavailableError(f"liger-kernel is not installed: {error}") from error
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def _find_cut_cross_entropy(device: torch.device) -> Callable[..., Tensor]:
    _require_gpu(device)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"cut-cross-entropy is not installed: {error}") from error
    return linear_cross_entropy


def _require_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        raise UnavailableError("its kernels are Triton's: they need a GPU")


def _two_products(inputs: Inputs) -> Run:
    """The logits and the gradient of hidden, into and out of one buffer."""
    hidden, head = inputs["hidden"][inputs["index"]], inputs["weight"]
    logits = hidden.new_empty(hidden.shape[0], head.shape[0])

    def run() -> Results:
        torch.mm(hidden, head.mT, out=logits)
        return (torch.mm(logits, head),)

    return run


def _kl_div(student: Tensor, teacher: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    if wide:
        student, teacher, weight = student.float(), teacher.float(), weight.float()
    with torch.no_grad():
        log_teacher = (teacher @ weight.mT).float().log_softmax(-1)
    log_student = (student @ weight.mT).float().log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
