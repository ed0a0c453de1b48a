"""The Parametric Memory: all fast weights in one flat buffer, and how linear layers read them.

They are plain tensors, neither parameters nor buffers, so no optimiser, gradient bucket, clip norm
or checkpoint ever sees them. A forward hook on each adapted linear layer adds them to its output.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.config import MemoryConfig
from memdlm_kernels import fast_weight_reset_, fast_weight_sgd_, lora_linear


class FastWeights:
    """Fast weights of a set of linear layers: [S, T], one row for a batch or for each sequence.

    A layer's output x Wᵀ becomes x Wᵀ + (lora_alpha / R) (x Aᵀ) Bᵀ with A [R, in] and B [out, R],
    or x Wᵀ + x deltaᵀ with the "full" adapter, while a `reading` context is entered.

    Args:
        modules: name to linear layer, with `in_features` and `out_features`.
        config: adapter, rank, lora_alpha, state_dtype, and the update's options.

    Attributes:
        param: [S, T], the fast weights.
        grad: [S, T], their gradient.
        segments: [P + 1] int64, where each tensor begins in a row.
        bounds: [P] float64, each tensor is drawn uniform in plus or minus this; 0 for zeros.
    """

    def __init__(self, modules: dict[str, nn.Linear], config: MemoryConfig) -> None:
        self.modules = modules
        self.config = config
        self._shapes: list[tuple[int, int]] = []
        bounds: list[float] = []
        for module in modules.values():
            inputs, outputs = module.in_features, module.out_features
            if config.adapter == "lora":
                self._shapes += [(config.rank, inputs), (outputs, config.rank)]
                bounds += [inputs**-0.5, 0.0]
            else:
                self._shapes.append((outputs, inputs))
                bounds.append(0.0)
        sizes = torch.tensor([0] + [rows * columns for rows, columns in self._shapes])
        self._offsets: list[int] = sizes.cumsum(0).tolist()
        self._bounds = bounds
        self._read: Sequence[Sequence[Tensor]] | None = None
        self._writes = 0
        self._allocate(1, self._device())
        self._handles = [
            module.register_forward_hook(_Hook(self, index))
            for index, module in enumerate(modules.values())
        ]

    def _device(self) -> torch.device:
        return next(iter(self.modules.values())).weight.device

    def _dtype(self) -> torch.dtype:
        """fp32, or with "compute" the layers' own; a quantised layer tells its compute dtype."""
        module = next(iter(self.modules.values()))
        dtype = module.weight.dtype
        if not dtype.is_floating_point:
            dtype = getattr(module, "compute_dtype", None) or torch.float32
        narrow = self.config.state_dtype == "compute" or dtype == torch.float64
        return dtype if narrow else torch.float32

    def _allocate(self, sets: int, device: torch.device) -> None:
        shape = (sets, self._offsets[-1])
        self.segments = torch.tensor(self._offsets, device=device)
        self.bounds = torch.tensor(self._bounds, dtype=torch.float64, device=device)
        self.param = torch.zeros(shape, dtype=self._dtype(), device=device)
        self.grad = torch.zeros_like(self.param)
        self._frozen = self._views(self.param)
        self._leaves = [view.detach().requires_grad_() for view in self._frozen]
        self._grad_views = self._views(self.grad)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Each fast-weight tensor as a view, [S, rows, columns]; without S in "batch" scope."""
        pairs = zip(self._offsets[:-1], self._offsets[1:], strict=True)
        columns = [flat[:, begin:end] for begin, end in pairs]
        per_set = [c.unflatten(1, shape) for c, shape in zip(columns, self._shapes, strict=True)]
        return per_set if self.config.scope == "sample" else [view[0] for view in per_set]

    @property
    def tensors_per_module(self) -> int:
        """2 for LoRA (A, B), 1 for a full matrix."""
        return 2 if self.config.adapter == "lora" else 1

    @property
    def leaves(self) -> list[Tensor]:
        """The P tensors, sharing memory with `param`, that an inner step differentiates by."""
        return self._leaves

    def named(self) -> dict[str, tuple[Tensor, ...]]:
        """Layer name to (A, B), or (delta,): views, [S, ...] in "sample" scope."""
        return dict(zip(self.modules, self._grouped(self._frozen), strict=True))

    def reset(self, seeds: Tensor) -> None:
        """Draw A anew, uniform in plus or minus 1/sqrt(in), and set B (or delta) to zero.

        Args:
            seeds: [B] int64 on the fast weights' device, one per sequence; "batch" scope reads the
                first.
        """
        seeds = seeds[:1] if self.config.scope == "batch" else seeds
        if len(seeds) != len(self.param) or self.param.device != self._device():
            self._allocate(len(seeds), self._device())
        self._writes += 1
        fast_weight_reset_(self.param, self.segments, self.bounds, seeds)

    def step(self, gradients: Sequence[Tensor], loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients and take one SGD step; nothing waits for the GPU.

        Args:
            gradients: P tensors, of the `leaves`.
            loss: [S]; a set whose loss or gradient is not finite is left as it is.

        Returns:
            Gradient norms before clipping [S, P], and which sets were skipped [S] bool.
        """
        config = self.config
        self._writes += 1
        torch._foreach_copy_(self._grad_views, list(gradients))
        return fast_weight_sgd_(
            self.param,
            self.grad,
            self.segments,
            config.inner_lr,
            config.inner_max_norm,
            clip=config.inner_clip,
            loss=loss,
        )

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

    def _grouped(self, tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
        size = self.tensors_per_module
        return [tuple(tensors[at : at + size]) for at in range(0, len(tensors), size)]

    def detach(self) -> None:
        """Remove the hooks: the layers are as they were before."""
        for handle in self._handles:
            handle.remove()


class _Reading(contextlib.AbstractContextManager[None]):
    def __init__(
        self, store: FastWeights, tensors: list[tuple[Tensor, ...]], writes: int | None
    ) -> None:
        self._store = store
        self._tensors = tensors
        self._writes = writes
        self._outer: list[Any] = []

    def __enter__(self) -> None:
        # A layer that is recomputed in backward would read another batch's memory, and say nothing.
        if self._writes is not None and self._writes != self._store._writes:
            raise RuntimeError(
                "the fast weights were written again before a backward pass that reads them: call "
                "backward before the next batch's forward"
            )
        self._outer.append(self._store._read)
        self._store._read = self._tensors

    def __exit__(self, *error: object) -> None:
        self._store._read = self._outer.pop()


class _Hook:
    def __init__(self, store: FastWeights, index: int) -> None:
        self._store = store
        self._index = index
        self._scale = store.config.lora_alpha / store.config.rank

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._store._read is None:
            return None
        if self._store.config.adapter == "lora":
            low_rank, up = self._store._read[self._index]
            return lora_linear(inputs[0], output, low_rank, up, self._scale)
        (delta,) = self._store._read[self._index]
        return output + inputs[0].to(output.dtype) @ delta.to(output.dtype).mT
