"""The Parametric Memory: all fast weights in one flat buffer, and how layers read them.

They are plain tensors, neither parameters nor buffers, so no optimiser, gradient bucket, clip norm
or checkpoint ever sees them. A forward hook on each adapted linear layer adds them to its output; a
layer of stacked experts is handed them as an update of its weights.
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.config import MemoryConfig
from memdlm.experts import PROJECTIONS, Update
from memdlm.gated_ffn import LowRank, defer
from memdlm_kernels import fast_weight_reset_, fast_weight_sgd_, lora_linear


@dataclass(frozen=True)
class _Stack:
    """Fast-weight tensors of one shape, kept as one: a linear layer's, or those of all experts.

    Attributes:
        shape: [*, rows, columns], without the S sets.
        count: how many tensors, each a segment of its own: 1, or one for each expert and
            projection.
        bound: each is drawn uniform in plus or minus this; 0 for zeros.
    """

    shape: tuple[int, ...]
    count: int
    bound: float


def _stacks(module: Any, config: MemoryConfig) -> list[_Stack]:
    """(A, B) or (delta,) of a linear layer; those of both projections of a layer of experts."""
    if isinstance(module, nn.Linear):
        return _adapter((), 1, module.out_features, module.in_features, config)
    experts, hidden, inner = module.num_experts, module.hidden_dim, module.intermediate_dim
    # Gate and up are two projections, stacked, that one shrink can serve.
    gate_up = _adapter((experts,), 2, 2 * inner, hidden, config)
    return gate_up + _adapter((experts,), 1, hidden, inner, config)


def _adapter(
    leading: tuple[int, ...], projections: int, outputs: int, inputs: int, config: MemoryConfig
) -> list[_Stack]:
    count = projections * (leading[0] if leading else 1)
    if config.adapter == "full":
        return [_Stack((*leading, outputs, inputs), count, 0.0)]
    A = _Stack((*leading, projections * config.rank, inputs), count, inputs**-0.5)
    return [A, _Stack((*leading, outputs, config.rank), count, 0.0)]


class FastWeights:
    """Fast weights of a set of layers: [S, T], one row for a batch or for each sequence.

    A linear layer's output x Wᵀ becomes x Wᵀ + (lora_alpha / R) (x Aᵀ) Bᵀ with A [R, in] and
    B [out, R], or x Wᵀ + x deltaᵀ with the "full" adapter, while a `reading` context is entered.
    Every expert of a layer has such tensors for its gate, its up and its down projection.

    Args:
        modules: name to linear layer, or to a module of stacked experts.
        config: adapter, rank, lora_alpha, state_dtype, and the update's options.

    Attributes:
        param: [S, T], the fast weights.
        grad: [S, T], their gradient, in the dtype that the layers read them in.
        blank: whether every B (or delta) is still zero, as after a reset.
        segments: [P + 1] int64, where each tensor begins in a row.
        bounds: [P] float64, each tensor is drawn uniform in plus or minus this; 0 for zeros.
        read_dtype: what the layers read them in.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: MemoryConfig) -> None:
        self.modules = modules
        self.config = config
        per_module = [_stacks(module, config) for module in modules.values()]
        self._counts = [len(stacks) for stacks in per_module]
        self._stacks = [stack for stacks in per_module for stack in stacks]
        sizes = [torch.Size(stack.shape).numel() for stack in self._stacks]
        self._offsets = list(itertools.accumulate(sizes, initial=0))
        self._sizes = sizes
        self._read: Sequence[Sequence[Tensor]] | None = None
        self._writes = 0
        self.blank = False
        self.read_dtype = self._dtype_of_layers()
        self._allocate(1, self._device())
        self._handles = [
            self._attach(index, module) for index, module in enumerate(modules.values())
        ]
        # torch.compile takes two layers that differ by a hook for the same, and would run one as it
        # compiled the other: without its memory, and say nothing.
        torch._dynamo.config.skip_nnmodule_hook_guards = False

    def _attach(self, index: int, module: nn.Module) -> Any:
        if isinstance(module, nn.Linear):
            return module.register_forward_hook(_LinearHook(self, index))
        return module.register_forward_pre_hook(_ExpertsHook(self, index), with_kwargs=True)

    def _device(self) -> torch.device:
        return next(next(iter(self.modules.values())).parameters()).device

    def _dtype_of_layers(self) -> torch.dtype:
        """That of their weights; a quantised layer tells its compute dtype."""
        module: Any = next(iter(self.modules.values()))
        weight = module.weight if isinstance(module, nn.Linear) else module.gate_up_proj
        dtype: torch.dtype = weight.dtype
        if dtype.is_floating_point:
            return dtype
        return getattr(module, "compute_dtype", None) or torch.float32

    def _allocate(self, sets: int, device: torch.device) -> None:
        shape = (sets, self._offsets[-1])
        begins, bounds = [0], []
        for stack, begin in zip(self._stacks, self._offsets, strict=False):
            size = torch.Size(stack.shape).numel() // stack.count
            begins += [begin + size * (number + 1) for number in range(stack.count)]
            bounds += [stack.bound] * stack.count
        self.segments = torch.tensor(begins, device=device)
        self.bounds = torch.tensor(bounds, dtype=torch.float64, device=device)
        read = self.read_dtype
        widen = self.config.state_dtype == "float32" and read.itemsize < torch.float32.itemsize
        self.param = torch.zeros(shape, dtype=torch.float32 if widen else read, device=device)
        # What the layers read, so that no product has to cast: the state itself, or its copy.
        self._cast = torch.zeros(shape, dtype=read, device=device) if widen else None
        self.grad = torch.zeros(shape, dtype=read, device=device)
        self._frozen = self._views(self.param if self._cast is None else self._cast)
        self._leaves = [view.detach().requires_grad_() for view in self._frozen]
        self._grad_views = self._views(self.grad)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Each stack as a view, [S, *, rows, columns]; without S in "batch" scope."""
        columns = flat.split(self._sizes, dim=1)
        per_set = [c.unflatten(1, s.shape) for c, s in zip(columns, self._stacks, strict=True)]
        return per_set if self.config.scope == "sample" else [view[0] for view in per_set]

    @property
    def nbytes(self) -> int:
        """Of the fast weights, their gradient, and their copy for the layers where there is one."""
        own = (self.param, self.grad, self._cast)
        return sum(tensor.nbytes for tensor in own if tensor is not None)

    @property
    def leaves(self) -> list[Tensor]:
        """What an inner step differentiates by: views of `param`, or of its copy for the layers."""
        return self._leaves

    def named(self) -> dict[str, tuple[Tensor, ...]]:
        """Layer name to its tensors: views, [S, ...] in "sample" scope.

        Returns:
            (A, B) or (delta,) of a linear layer; of a layer of experts those of gate and up,
            A [E, 2 R, D] and B [E, 2 I, R], then those of down, A [E, R, I] and B [E, D, R]. To be
            read alone: what is written there may not be what the layers use.
        """
        return dict(zip(self.modules, self._grouped(self._views(self.param)), strict=True))

    def reserve(self, batch_size: int) -> None:
        """Allocate what a batch needs, unless it is there; values are lost where it is not.

        Args:
            batch_size: B; "batch" scope keeps one set for them all.
        """
        sets = 1 if self.config.scope == "batch" else batch_size
        if sets != len(self.param) or self.param.device != self._device():
            self._allocate(sets, self._device())

    def reset(self, seeds: Tensor) -> None:
        """Draw A anew, uniform in plus or minus 1/sqrt(in), and set B (or delta) to zero.

        Args:
            seeds: [B] int64 on the fast weights' device, one per sequence; "batch" scope reads the
                first.
        """
        self.reserve(len(seeds))
        self._writes += 1
        self.blank = True
        own = seeds[: len(self.param)]
        fast_weight_reset_(self.param, self.segments, self.bounds, own, cast=self._cast)

    def step(self, gradients: Sequence[Tensor | None], loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients and take one SGD step; nothing waits for the GPU.

        Args:
            gradients: one for each of the `leaves`; None where it is exactly zero.
            loss: [S]; a set whose loss or gradient is not finite is left as it is.

        Returns:
            Gradient norms before clipping [S, P], and which sets were skipped [S] bool.
        """
        config = self.config
        self._writes += 1
        self.blank = False
        pairs = list(zip(self._grad_views, gradients, strict=True))
        known = [(view, gradient) for view, gradient in pairs if gradient is not None]
        zeros = [view for view, gradient in pairs if gradient is None]
        torch._foreach_copy_([view for view, _ in known], [gradient for _, gradient in known])
        if zeros:
            torch._foreach_zero_(zeros)
        return fast_weight_sgd_(
            self.param,
            self.grad,
            self.segments,
            config.inner_lr,
            config.inner_max_norm,
            clip=config.inner_clip,
            loss=loss,
            cast=self._cast,
        )

    def fill(self, values: Tensor) -> None:
        """Take fast weights that were written before, all sets at once.

        Args:
            values: [S, T] in `param`'s dtype, as `param` held them; "batch" scope has one set.
        """
        self.reserve(len(values))
        self._writes += 1
        self.blank = False
        self.param.copy_(values)
        if self._cast is not None:
            self._cast.copy_(values)

    def mark_written(self) -> None:
        """Take note that a recorded graph has reset and stepped the fast weights."""
        self._writes += 1
        self.blank = False

    def reading(self, *, trainable: bool = False) -> contextlib.AbstractContextManager[None]:
        """Under this context the adapted layers add the fast weights to their outputs.

        Args:
            trainable: read the leaves, so that gradients reach `grad`; False reads constants.

        Returns:
            A context that can be entered again and again, also while backward recomputes a layer.
            Entering one of constants raises RuntimeError after they were written again.
        """
        if trainable:
            return _Reading(self, self._grouped(self._leaves), None)
        return _Reading(self, self._grouped(self._frozen), self._writes)

    def reading_of(self, values: Tensor) -> contextlib.AbstractContextManager[None]:
        """Under this context the adapted layers add fast weights that are kept elsewhere.

        Args:
            values: [S, T] in `param`'s dtype or in the one that the layers read; gradients reach
                it.

        Returns:
            A context that can be entered again and again; no later write concerns it.
        """
        views = self._views(values.to(self.read_dtype))
        return _Reading(self, self._grouped(views), None, blank=False)

    def _grouped(self, tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
        rest = iter(tensors)
        return [tuple(next(rest) for _ in range(count)) for count in self._counts]

    def guard(self, embedding: nn.Module) -> None:
        """Refuse a batch of another size than the sets of fast weights that it would read.

        Layers of experts see rows without their sequences, and could not tell.

        Args:
            embedding: the model's, called with token ids [B, L].
        """

        def check(module: nn.Module, inputs: tuple[Tensor]) -> None:
            sets = len(self.param)
            if self._read is None or self.config.scope == "batch" or len(inputs[0]) == sets:
                return
            raise ValueError(
                f"input_ids must have {sets} sequences, one for each that the memory was written "
                f"from, got {len(inputs[0])}"
            )

        self._handles.append(embedding.register_forward_pre_hook(check))

    def detach(self) -> None:
        """Remove the hooks: the layers are as they were before."""
        for handle in self._handles:
            handle.remove()


class _Reading(contextlib.AbstractContextManager[None]):
    def __init__(
        self,
        store: FastWeights,
        tensors: list[tuple[Tensor, ...]],
        writes: int | None,
        blank: bool | None = None,
    ) -> None:
        self._store = store
        self._tensors = tensors
        self._writes = writes
        self._blank = blank
        self._outer: list[Any] = []

    def __enter__(self) -> None:
        # A layer that is recomputed in backward would read another batch's memory, and say nothing.
        if self._writes is not None and self._writes != self._store._writes:
            raise RuntimeError(
                "the fast weights were written again before a backward pass that reads them: call "
                "backward before the next batch's forward"
            )
        self._outer.append((self._store._read, self._store.blank))
        self._store._read = self._tensors
        if self._blank is not None:
            self._store.blank = self._blank

    def __exit__(self, *error: object) -> None:
        read, blank = self._outer.pop()
        self._store._read = read
        if self._blank is not None:
            self._store.blank = blank


class _LinearHook:
    def __init__(self, store: FastWeights, index: int) -> None:
        self._store = store
        self._index = index
        self._scale = store.config.lora_alpha / store.config.rank

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._store._read is None:
            return None
        if self._store.config.adapter == "lora":
            A, B = self._store._read[self._index]
            blank = self._store.blank
            if defer(LowRank(A, B, self._scale, blank)):
                return None
            return lora_linear(inputs[0], output, A, B, self._scale, B_is_zero=blank)
        (delta,) = self._store._read[self._index]
        return output + inputs[0].to(output.dtype) @ delta.to(output.dtype).mT


class _ExpertsHook:
    def __init__(self, store: FastWeights, index: int) -> None:
        self._store = store
        self._index = index
        self._scale = store.config.lora_alpha / store.config.rank

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]] | None:
        if self._store._read is None:
            return None
        tensors = self._store._read[self._index]
        half = len(tensors) // 2
        own = zip(PROJECTIONS, (tensors[:half], tensors[half:]), strict=True)
        blank = self._store.blank
        updates = [Update(name, tuple(pair), self._scale, blank) for name, pair in own]
        return inputs, options | {"updates": (*options.get("updates", ()), *updates)}
