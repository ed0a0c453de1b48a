"""What an op is measured on, and beside what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.op_cases.error import largest_error
from memdlm_kernels import list_backends

Inputs = dict[str, Tensor]
Results = Sequence[Tensor]
Run = Callable[[], Results]
Make = Callable[[Inputs], Run]


class UnavailableError(Exception):
    """Why a variant cannot run here: its reason goes into the row."""


# Not compared by value: pytest would order tests by variants that cases share, not by case.
@dataclass(frozen=True, eq=False)
class Variant:
    """One way to compute a case.

    Attributes:
        name: what a row calls it.
        make: of the case's inputs, what is timed. The first run's results are compared.
        role: "ours" must be right; "peer" is reported where it is wrong; a "bound" computes
            something else, which the op cannot do without, and is not compared.
        backend: the op's, where it is one of them.
        error: of results and truth, what is held against the bar.
        bar: largest error; None for the case's.
    """

    name: str
    make: Make
    role: str = "peer"
    backend: str | None = None
    error: Callable[[Results, Results], float] = largest_error
    bar: float | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One op on one set of inputs.

    Attributes:
        op: the public name.
        name: its sizes, and which gradients are computed.
        dtype: of activations and weights.
        inputs: of a generator, the tensors on its device; every variant reads the same.
        truth: the reference; it gets the inputs in float64.
        variants: the first of role "ours" that runs is the base.
        roundings: to dtype, on the longest way from an input to a result.
        longest_sum: terms of the longest sum on that way.
        bytes: minimum traffic: each input read once, each output written once.
        flops: of matrix products; None for those that the truth is counted to have.
    """

    op: str
    name: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator], Inputs]
    truth: Make
    variants: tuple[Variant, ...]
    roundings: int
    longest_sum: int
    bytes: int
    flops: int | None = None

    @property
    def bar(self) -> float:
        """Largest error, relative to the truth's norm, that rounding can explain.

        A rounding to the dtype moves a number by at most eps / 2 of it, and a norm by at most as
        much; so many roundings move it by half their count in eps if all of them err the same way,
        about five times what they do in practice. Sums run in float32 at least, where the error of
        n terms in any order grows as sqrt(n) eps.
        """
        rounded = self.roundings / 2 * torch.finfo(self.dtype).eps
        return rounded + self.longest_sum**0.5 * torch.finfo(torch.float32).eps


def differentiated(
    function: Callable[..., Tensor], wanted: Sequence[str] = (), **options: Any
) -> Make:
    """Forward, and backward for what is wanted.

    Args:
        function: of the inputs by name, without `grad_out`, and of `options`.
        wanted: names of inputs whose gradients follow the output in the results. `grad_out` of the
            inputs is the output's gradient; without one the output is a scalar.
        options: passed on.

    Returns:
        What makes a run of inputs.
    """

    def make(inputs: Inputs) -> Run:
        tensors = {name: tensor for name, tensor in inputs.items() if name != "grad_out"}

        def run() -> Results:
            leaves = {
                name: tensor.detach().requires_grad_(name in wanted)
                for name, tensor in tensors.items()
            }
            out = function(**leaves, **options)
            if not wanted:
                return (out,)
            sources = [leaves[name] for name in wanted]
            return (out.detach(), *torch.autograd.grad(out, sources, inputs.get("grad_out")))

        return run

    return make


def backends(op: str, make: Callable[[str], Make], suffix: str = "") -> tuple[Variant, ...]:
    """A variant for each backend of an op, preferred first.

    Args:
        op: the public name.
        make: of a backend's name.
        suffix: of the variants' names.
    """
    return tuple(
        Variant(
            ("reference" if backend == "reference" else f"ours: {backend}") + suffix,
            make(backend),
            "ours",
            backend,
        )
        for backend in list_backends("cpu")[op]
    )


def refusal(op: str, backend: str, device: torch.device) -> str | None:
    """Why a backend is not measured on a device, None where it is."""
    if backend == "triton" and device.type == "cpu":
        return "without a GPU Triton's interpreter runs it: its time says nothing"
    return list_backends(device)[op][backend]


def default_backend(op: str, device: torch.device) -> str:
    """The first backend of an op that is measured on a device."""
    return next(name for name in list_backends("cpu")[op] if refusal(op, name, device) is None)


def default_variant(case: Case, device: torch.device) -> Variant:
    """The first of our own variants of a case that is measured on a device."""
    return next(
        variant
        for variant in case.variants
        if variant.role == "ours"
        and (variant.backend is None or refusal(case.op, variant.backend, device) is None)
    )


def copy_of(bytes_moved: int) -> Variant:
    """The bound of an op that moves so many bytes: a copy, which reads half and writes half."""

    def make(inputs: Inputs) -> Run:
        device = next(iter(inputs.values())).device
        source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source),)

    return Variant("bound: copy of the bytes", make, "bound")


def randn(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal numbers on the generator's device, drawn in float32 and rounded."""
    tensor = torch.randn(shape, generator=generator, device=generator.device)
    return tensor.mul_(scale).to(dtype)


def text(dtype: torch.dtype) -> str:
    """A dtype's name as rows have it."""
    return str(dtype).removeprefix("torch.")
