"""Cases of the ops of fast weights: all of them in one flat buffer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.op_cases.case import (
    Case,
    Inputs,
    Make,
    Results,
    Run,
    Variant,
    backends,
    copy_of,
    differentiated,
    randn,
    text,
)
from bench.op_cases.error import largest_error
from memdlm_kernels import fast_weight_reset_, fast_weight_sgd, fast_weight_sgd_

_LR, _MAX_NORM, _BOUND = 0.1, 1.0, 0.05
_INT64_BYTES, _FLOAT32_BYTES = 8, 4
# What is compared is in float32, or the cast, rounded once more: the gradient is exact as it is.
_ROUNDINGS = 3
# Of LLaDA2.x-mini: two layers, 256 experts and a shared one, A and B of gate, up and down.
LLADA2_MINI = tuple(2 * 257 * [32 * n for n in (2_048, 512, 2_048, 512, 512, 2_048)])


def sgd_case(
    sets: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    cast: bool = False,
    bounds: bool = False,
) -> Case:
    """One clipped step of float32 fast weights.

    Args:
        sets: S.
        sizes: elements of each of the P tensors of a set.
        dtype: of the gradients, and of the cast.
        cast: also keep a copy of the new weights in that dtype.
        bounds: also measure a copy of the bytes.
    """
    total = sum(sizes)

    def inputs(generator: torch.Generator) -> Inputs:
        tensors = _step_inputs(generator, sets, sizes, dtype)
        if cast:
            tensors["cast"] = torch.zeros(sets, total, dtype=dtype, device=generator.device)
        return tensors

    def ours(backend: str) -> Make:
        def make(inputs: Inputs) -> Run:
            param, copies = inputs["param"].clone(), _copies(inputs)
            grad, segments = inputs["grad"], inputs["segments"]

            def run() -> Results:
                fast_weight_sgd_(
                    param,
                    grad,
                    segments,
                    _LR,
                    _MAX_NORM,
                    cast=copies[0] if copies else None,
                    backend=backend,
                )
                return (param, *copies)

            return run

        return make

    def truth(inputs: Inputs) -> Run:
        """In float64 the cast is the new weights."""
        step = ours("reference")({name: t for name, t in inputs.items() if name != "cast"})
        return lambda: tuple(step()) * (2 if cast else 1)

    steps: dict[str, Callable[[list[Tensor], list[Tensor]], Callable[[], None]]] = {
        "loop, as published": _loop,
        "torch._foreach": _foreach,
        "SGD(foreach=True), clip_grad_norm_ for each": _sgd_foreach,
        "SGD(fused=True), torch._foreach_norm": _sgd_fused,
    }
    op = "fast_weight_sgd_"
    peers = [Variant(name, _stepped(make, sizes)) for name, make in steps.items()]
    cast_bytes = dtype.itemsize if cast else 0
    per_element = 2 * _FLOAT32_BYTES + dtype.itemsize + cast_bytes
    if bounds:
        # The gradient is read twice: its norm is known only after all of it.
        peers.append(copy_of(sets * total * (per_element + dtype.itemsize)))
    return Case(
        op=op,
        name=f"{_state(sets, sizes)}, float32 state, {text(dtype)} gradient"
        + (" and copy" if cast else ""),
        dtype=dtype,
        inputs=inputs,
        truth=truth,
        variants=backends(op, ours) + tuple(peers),
        roundings=_ROUNDINGS,
        longest_sum=max(sizes),
        bytes=sets * total * per_element + (len(sizes) + 1) * _INT64_BYTES,
    )


def function_case(
    sets: int, sizes: Sequence[int], dtype: torch.dtype, *, bounds: bool = False
) -> Case:
    """The same step as a function of float32 fast weights, and its backward.

    Args:
        sets: S.
        sizes: elements of each of the P tensors of a set.
        dtype: of the gradients.
        bounds: also measure a copy of the bytes.
    """
    total = sum(sizes)

    def inputs(generator: torch.Generator) -> Inputs:
        tensors = _step_inputs(generator, sets, sizes, dtype)
        return tensors | {"grad_out": randn(generator, sets, total)}

    def ours(backend: str) -> Make:
        def function(param: Tensor, grad: Tensor, segments: Tensor) -> Tensor:
            return fast_weight_sgd(param, grad, segments, _LR, _MAX_NORM, backend=backend)[0]

        return differentiated(function, ("param", "grad"))

    def written(step: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]) -> Make:
        def function(param: Tensor, grad: Tensor, segments: Tensor) -> Tensor:
            grad = grad.to(param.dtype)
            params, grads = (t.flatten().split(list(sizes) * sets) for t in (param, grad))
            return torch.cat(step(params, grads)).view_as(param)

        return differentiated(function, ("param", "grad"))

    op = "fast_weight_sgd"
    peers = [
        Variant("loop, clip written plainly", written(_loop_function)),
        Variant("torch._foreach", written(_foreach_function)),
    ]
    state, gradient = _FLOAT32_BYTES, dtype.itemsize
    least = 2 * state + gradient + state + gradient  # forward, then grad_out and grad's gradient
    if bounds:
        # Forward and backward read the gradient twice each, and backward grad_out.
        peers.append(copy_of(sets * total * (least + 3 * gradient + state)))
    return Case(
        op=op,
        name=f"{_state(sets, sizes)}, float32 state, {text(dtype)} gradient, forward and backward",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_ROUNDINGS,
        longest_sum=max(sizes),
        bytes=sets * total * least + (len(sizes) + 1) * _INT64_BYTES,
    )


def reset_case(
    sets: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    cast: bool = False,
    bounds: bool = False,
) -> Case:
    """Fast weights drawn afresh: A uniform and B zero, in turn.

    Args:
        sets: S.
        sizes: elements of each of the P tensors of a set, P even.
        dtype: of the state, or of its cast, where the state is float32.
        cast: also write a copy of the new weights in that dtype.
        bounds: also measure a copy of the bytes.
    """
    total = sum(sizes)
    state_dtype = torch.float32 if cast else dtype

    def inputs(generator: torch.Generator) -> Inputs:
        device = generator.device
        # Not zeros: what is not written shows.
        tensors = {
            "param": torch.ones(sets, total, dtype=state_dtype, device=device),
            "segments": _segments(sizes, device),
            "bounds": torch.tensor([_BOUND, 0.0], device=device).repeat(len(sizes) // 2),
            "seed": torch.arange(sets, device=device),
        }
        if cast:
            tensors["cast"] = torch.ones(sets, total, dtype=dtype, device=device)
        return tensors

    def ours(backend: str) -> Make:
        def make(inputs: Inputs) -> Run:
            param, copies = inputs["param"].clone(), _copies(inputs)
            arguments = (param, inputs["segments"], inputs["bounds"], inputs["seed"])

            def run() -> Results:
                fast_weight_reset_(*arguments, cast=copies[0] if copies else None, backend=backend)
                return (param, *copies)

            return run

        return make

    def truth(inputs: Inputs) -> Run:
        reset = ours("reference")({name: t for name, t in inputs.items() if name != "cast"})
        return lambda: tuple(reset()) * (2 if cast else 1)

    def loop(inputs: Inputs) -> Run:
        param, copies = inputs["param"].clone(), _copies(inputs)
        pieces = [piece for row in param for piece in row.split(list(sizes))]
        generator = torch.Generator(param.device)
        generator.manual_seed(0)

        def run() -> Results:
            for a, b in zip(pieces[::2], pieces[1::2], strict=True):
                a.uniform_(-_BOUND, _BOUND, generator=generator)
                b.zero_()
            for copy in copies:
                copy.copy_(param)
            return (param, *copies)

        return run

    op = "fast_weight_reset_"
    drawn = sets * sum(sizes[::2])
    # The root mean square of n uniform numbers strays from its mean by sqrt(1/5) / sqrt(n) of it.
    # Six of that are not chance; the draws' own rounding is far below.
    stray = 6 * 0.2**0.5 / drawn**0.5 + torch.finfo(dtype).eps
    peers = [Variant("uniform_ and zero_ in a loop", loop, error=_spread_error(sizes), bar=stray)]
    per_element = state_dtype.itemsize + (dtype.itemsize if cast else 0)
    if bounds:
        peers.append(copy_of(sets * total * per_element))
    return Case(
        op=op,
        name=f"{_state(sets, sizes)}, {text(state_dtype)} state" + (" and copy" if cast else ""),
        dtype=dtype,
        inputs=inputs,
        truth=truth,
        variants=backends(op, ours) + tuple(peers),
        roundings=_ROUNDINGS,
        longest_sum=1,
        bytes=sets * total * per_element,
    )


def _step_inputs(
    generator: torch.Generator, sets: int, sizes: Sequence[int], dtype: torch.dtype
) -> Inputs:
    total = sum(sizes)
    # As large as the step that is taken, so that the comparison sees all of the step.
    scale = _LR * (_MAX_NORM / (total / len(sizes)) ** 0.5)
    return {
        "param": randn(generator, sets, total, scale=scale),
        "grad": randn(generator, sets, total, dtype=dtype),
        "segments": _segments(sizes, generator.device),
    }


def _state(sets: int, sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{sets} x {len(sizes)} x {sizes[0]}"
    return f"{sets} x {len(sizes)} tensors of {sum(sizes) / 1e6:.1f} M elements"


def _segments(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes], device=device).cumsum(0)


def _copies(inputs: Inputs) -> list[Tensor]:
    """A cast of a run's own, where the case has one."""
    return [inputs["cast"].clone()] if "cast" in inputs else []


def _stepped(
    step_of: Callable[[list[Tensor], list[Tensor]], Callable[[], None]], sizes: Sequence[int]
) -> Make:
    """A step written over a list of tensors: views of the flat state and of the gradient."""

    def make(inputs: Inputs) -> Run:
        param, copies = inputs["param"].clone(), _copies(inputs)
        # A copy: some clip in place. As wide as the weights, as torch's optimisers ask, for free.
        grad = inputs["grad"].to(param.dtype, copy=True)
        pieces = [piece for row in param for piece in row.split(list(sizes))]
        grads = [piece for row in grad for piece in row.split(list(sizes))]
        step = step_of(pieces, grads)

        def run() -> Results:
            step()
            for copy in copies:
                copy.copy_(param)
            return (param, *copies)

        return run

    return make


def _loop(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """A norm, a test that waits for the device, and an update for each tensor."""

    def step() -> None:
        for param, grad in zip(params, grads, strict=True):
            norm = grad.norm()
            if torch.isfinite(norm):
                param.sub_(grad * torch.clamp(_MAX_NORM / norm, max=1.0), alpha=_LR)

    return step


def _foreach(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        norms = torch.stack(torch._foreach_norm(grads))
        factors = (_LR * torch.clamp(_MAX_NORM / norms, max=1.0)).nan_to_num(nan=0.0)
        torch._foreach_sub_(params, torch._foreach_mul(grads, list(factors)))

    return step


def _sgd_foreach(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    leaves = _leaves(params, grads)
    optimizer = torch.optim.SGD(leaves, lr=_LR, foreach=True)

    def step() -> None:
        for leaf in leaves:
            torch.nn.utils.clip_grad_norm_(leaf, _MAX_NORM)
        optimizer.step()

    return step


def _sgd_fused(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(_leaves(params, grads), lr=_LR, fused=True)

    def step() -> None:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, list(torch.clamp(_MAX_NORM / norms, max=1.0)))
        optimizer.step()

    return step


def _loop_function(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    updated = []
    for param, grad in zip(params, grads, strict=True):
        factor = torch.clamp(_MAX_NORM / grad.norm(), max=1.0)
        updated.append(param - _LR * factor * grad)
    return updated


def _foreach_function(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    norms = torch.stack(torch._foreach_norm(grads))
    factors = _LR * torch.clamp(_MAX_NORM / norms, max=1.0)
    clipped = torch._foreach_mul(grads, list(factors))
    return list(torch._foreach_sub(params, clipped))


def _leaves(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _spread_error(sizes: Sequence[int]) -> Callable[[Results, Results], float]:
    """What can be said of other random numbers: their root mean square and bound, and the zeros."""

    def error(results: Results, truth: Results) -> float:
        if [tensor.shape for tensor in results] != [tensor.shape for tensor in truth]:
            return math.inf
        actual, expected = [], []
        for tensor in results:
            pieces = tensor.double().split(list(sizes), dim=-1)
            drawn = torch.cat([piece.flatten() for piece in pieces[::2]])
            zeros = torch.cat([piece.flatten() for piece in pieces[1::2]])
            beyond = (drawn.abs().max() / _BOUND - 1).clamp(min=0)
            actual += [drawn.square().mean().sqrt(), beyond, zeros]
            expected += [
                drawn.new_tensor(_BOUND / math.sqrt(3)),
                torch.zeros_like(beyond),
                torch.zeros_like(zeros),
            ]
        return largest_error(actual, expected)

    return error
