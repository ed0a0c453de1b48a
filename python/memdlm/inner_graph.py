"""The inner loop as a CUDA graph: launched as one, for batches whose tensors have the same shapes.

With small batches a step of the inner loop is hundreds of launches that the host cannot make as
fast as the GPU finishes them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from memdlm.backbone import Backbone
from memdlm.config import MemoryConfig
from memdlm.data.collator import State
from memdlm.fast_weights import FastWeights
from memdlm.inner_loop import Boundary, InnerTrace, adapt, recomputes
from memdlm.sdpa import sdpa_backend

_READ_BY_ADAPT = ("valid", "target", "weight", "sample")
# Each keeps its own copies of a batch's activations. Batches of one padded length have hardly more
# shapes, whatever their responses (docs/decisions/gpu_engine_options.md).
_MOST_RECORDINGS = 24


class InnerGraph:
    """`FastWeights.reset` and `adapt`, recorded once for each set of shapes, then replayed.

    Replaces the two calls. The recorded steps read copies of the batch at fixed addresses; all
    graphs share one pool of memory, since only one runs at a time.

    Args:
        backbone, fast_weights, config: as for `adapt`.
    """

    def __init__(self, backbone: Backbone, fast_weights: FastWeights, config: MemoryConfig) -> None:
        self._backbone = backbone
        self._fast_weights = fast_weights
        self._config = config
        self._layers = backbone.layers[backbone.boundary // 2 :]
        # In the order of their last use.
        self._recorded: dict[Hashable, tuple[list[Tensor], _Recording]] = {}
        self._addresses: tuple[int, ...] = ()

    def __call__(
        self,
        seeds: Tensor,
        states: list[State],
        boundaries: list[Boundary],
        teachers: list[Boundary | None],
    ) -> InnerTrace:
        """Draw the fast weights and write them.

        Args:
            seeds: as for `FastWeights.reset`.
            states, boundaries, teachers: as for `adapt`.

        Returns:
            The trace, a copy that the next call leaves alone.

        Raises:
            ValueError: a model that is not on a GPU, or an attention mask that is no tensor.
        """
        read: list[dict[str, Any]] = [dict(state) for state in states]
        own = [{k: state[k] for k in _READ_BY_ADAPT} for state in read]
        inputs = (seeds, own, boundaries, teachers)
        tensors: list[Tensor] = []
        key = (_flatten(inputs, tensors), self._modes(seeds.device))
        self._fast_weights.reserve(len(seeds))
        self._forget_moved_weights()
        # Taken out and put back: the last one is the one used last.
        known = key in self._recorded
        fixed, recording = self._recorded.pop(key) if known else self._record(inputs)
        self._recorded[key] = fixed, recording
        # What a graph launches lies in no range of the profiler but this one.
        with record_function("memdlm.inner_graph"):
            with torch.no_grad():
                torch._foreach_copy_(fixed, tensors)
            trace = recording.replay()
        self._fast_weights.mark_written()
        return InnerTrace(
            trace.loss.clone(), trace.norm.clone(), trace.skipped.clone(), captured=not known
        )

    @property
    def nbytes(self) -> int:
        """What the recordings hold: copies of their inputs, and their pool of memory."""
        return sum(
            recording.pool_bytes + sum(tensor.nbytes for tensor in fixed)
            for fixed, recording in self._recorded.values()
        )

    def _modes(self, device: torch.device) -> Hashable:
        """What decides which kernels run, beside the shapes: dropout, autocast, LoRA, attention."""
        autocast = torch.is_autocast_enabled(device.type)
        adapters = [
            (module.disable_adapters, module.merged, tuple(module.active_adapters))
            for layer in self._layers
            for module in layer.modules()
            if hasattr(module, "disable_adapters")
        ]
        dtype = torch.get_autocast_dtype(device.type) if autocast else None
        decoder = self._backbone.decoder
        return decoder.training, dtype, sdpa_backend(decoder), tuple(adapters)

    def _forget_moved_weights(self) -> None:
        """A recording reads and writes fixed addresses: of the model and of the fast weights."""
        own = [weight for layer in self._layers for weight in layer.parameters()]
        weights = [self._fast_weights.param, self._backbone.head()[0], *own]
        addresses = tuple(weight.data_ptr() for weight in weights)
        if addresses != self._addresses:
            self._recorded.clear()
            self._addresses = addresses

    def _record(self, inputs: Any) -> "tuple[list[Tensor], _Recording]":
        while len(self._recorded) >= _MOST_RECORDINGS:
            del self._recorded[next(iter(self._recorded))]
        fixed: list[Tensor] = []
        seeds, states, boundaries, teachers = _copy(inputs, fixed)
        # Decided now: while recording, the free memory cannot be asked for.
        recompute = recomputes(self._config.inner_checkpoint, self._backbone, boundaries)
        config = dataclasses.replace(
            self._config, inner_checkpoint="layer" if recompute else "none"
        )

        def run() -> InnerTrace:
            self._fast_weights.reset(seeds)
            return adapt(self._backbone, self._fast_weights, states, boundaries, teachers, config)

        others = [recording for _, recording in self._recorded.values()]
        try:
            return fixed, _Recording(run, seeds.device, others[0] if others else None)
        except BaseException:
            # The steps before the capture did write.
            self._fast_weights.mark_written()
            raise


class _Recording:
    """A CUDA graph of a function, in the memory pool of another one if there is one."""

    def __init__(
        self, run: Callable[[], InnerTrace], device: torch.device, other: "_Recording | None"
    ) -> None:
        if device.type != "cuda":
            raise ValueError(f"inner_graph must be False on {device.type}: it needs a GPU")
        self._device = device
        with torch.cuda.device(device), _without_autocast_cache():
            # Graphs that share a pool are recorded on one stream.
            self._stream: Any = torch.cuda.Stream() if other is None else other._stream
            # First as it is: kernels are compiled and libraries make their workspaces.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._graph = torch.cuda.CUDAGraph()
            pool = None if other is None else other._graph.pool()
            # "thread_local": a data loader's thread may pin memory meanwhile.
            with torch.cuda.graph(
                self._graph, pool, self._stream, capture_error_mode="thread_local"
            ):
                before = torch.cuda.memory_reserved()
                self._trace = run()
                # By which the shared pool grew.
                self.pool_bytes = torch.cuda.memory_reserved() - before

    def replay(self) -> InnerTrace:
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._trace


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Cast weights within the recording: those cast before it are freed before it is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _flatten(value: Any, tensors: list[Tensor]) -> Hashable:
    """Append the tensors in `value` to a list; return what must be the same to replay a graph."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if dataclasses.is_dataclass(value):
        return tuple(_flatten(getattr(value, f.name), tensors) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return tuple(_flatten(part, tensors) for part in value.values())
    if isinstance(value, (list, tuple)):
        return tuple(_flatten(part, tensors) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        "inner_graph must be False with an attention mask that is no tensor (flex attention): got "
        f"{type(value).__name__}"
    )


def _copy(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with copies of its tensors, which are appended to a list in the same order."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().clone())
        return tensors[-1]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        own = {name: _copy(getattr(value, name), tensors) for name in names}
        return dataclasses.replace(value, **own)  # type: ignore[type-var]
    if isinstance(value, dict):
        return {name: _copy(part, tensors) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(part, tensors) for part in value)
    return value
