"""Registration of the ops, torch.ops.memdlm: an eager call reaches its kernel directly.

`torch.library.custom_op` wraps each kernel so that torch.compile does not trace it, and that
wrapper imports the whole compiler at the first call. A kernel given to the dispatcher is opaque to
the compiler as it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("memdlm", "FRAGMENT")


class Op:
    """An op of the namespace `memdlm`; `op` makes it of its kernel."""

    def __init__(self, name: str, kernel: Callable[..., Any], mutates: Sequence[str]) -> None:
        self._name = f"memdlm::{name}"
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., Any] | None = None
        schema = torch.library.infer_schema(kernel, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        if mutates:
            arguments = getattr(torch.ops.memdlm, name).default._schema.arguments
            written = [n for n, argument in enumerate(arguments) if argument.name in mutates]
            kernel = _marks_written(kernel, written)
        else:
            torch.library.register_autograd(
                self._name, self._differentiate, setup_context=self._keep, lib=_LIBRARY
            )
        _LIBRARY.impl(name, kernel, "CPU")
        _LIBRARY.impl(name, _on_its_device(kernel), "CUDA")
        self._overload = getattr(torch.ops.memdlm, name).default
        self._call = self._overload._op  # the same, without the Python around it

    def __call__(self, *args: Any) -> Any:
        """Call torch.ops.memdlm.<name>; where autograd is off, skip it: half of a call."""
        if torch.compiler.is_compiling():
            return self._overload(*args)
        if torch.is_grad_enabled():
            return self._call(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._call(*args)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Say how to make empty outputs: a function of the kernel's arguments."""
        torch.library.register_fake(self._name, fake, lib=_LIBRARY)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        """Say how to differentiate, as `torch.library.register_autograd` does."""
        self._backward, self._setup_context = backward, setup_context

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> Any:
        if self._backward is None:
            # Without this, torch would go on with zeros.
            raise RuntimeError(
                f"{self._name} cannot be differentiated: no autograd formula was registered; "
                'with backend="reference" the op can be, any number of times'
            )
        return self._backward(ctx, *grads)


def op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Register the function below as the kernel of torch.ops.memdlm.<name>.

    Args:
        name: of the op.
        mutates: names of the arguments that the kernel writes to. Such an op has no derivative.

    Returns:
        A decorator of the kernel. The op's schema is read off its annotations. It runs on a CPU and
        on a GPU, there with the device of its first tensor as the current one.
    """
    return lambda kernel: Op(name, kernel, mutates)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let an op launch its kernels where its first tensor is: Triton takes the current GPU."""

    @functools.wraps(kernel)
    def on_device(*args: Any) -> Any:
        with torch.cuda.device_of(next(each for each in args if isinstance(each, Tensor))):
            return kernel(*args)

    return on_device


def _marks_written(kernel: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """Let autograd see that arguments were written: backward through one that was kept fails."""

    @functools.wraps(kernel)
    def marking(*args: Any) -> Any:
        result = kernel(*args)
        for number in written:
            if args[number] is not None and not args[number].is_inference():
                torch.autograd.graph.increment_version(args[number])
        return result

    return marking
