"""What the operators of a step add up to: FLOPs, and values that the host waits for."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Their results, or the shapes of these, are needed on the host.
_READS = {
    "aten::_local_scalar_dense",  # item(), bool(), float()
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
_COPIES = {"aten::_to_copy", "aten::copy_"}
# On a CPU our ops look at their arguments' values, which on a GPU they do not; and AdamW's step
# counters lie on the CPU always.
_READ_ON_A_CPU_ONLY = ("memdlm_kernels.", "torch.optim.")


class OperatorCounts(TorchDispatchMode):
    """Inside this context, counts FLOPs and where the host reads off the device.

    Counts the FLOPs that `torch.utils.flop_counter.FlopCounterMode` does, by the same formulas; but
    that one looks for a decomposition of every operator, a minute for a loop over experts.

    The same reads count on a CPU, where they cost little, so that a run there shows about what
    would wait on a GPU: some of torch's own checks (`F.one_hot`) read on a CPU alone, and what an
    operator reads inside its own kernel is not seen.

    Args:
        device: the one whose values count.

    Attributes:
        flops: of the operators so far.
        host_reads: how often the host read a value so far, or a shape that depends on values.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.flops = 0
        self.host_reads = 0
        self._device = device.type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        if self._reads(func._schema.name, args, out):
            self.host_reads += 1
        return out

    def _reads(self, name: str, args: tuple[Any, ...], out: Any) -> bool:
        if name in _READS:
            return args[0].device.type == self._device and not self._reads_on_a_cpu_only()
        if name in _INDEXING:
            indices = (leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor))
            return any(index.dtype == torch.bool for index in indices)
        if name in _COPIES and self._device != "cpu":
            source = args[1] if name == "aten::copy_" else args[0]
            return source.device.type == self._device and out.device.type == "cpu"
        return False

    def _reads_on_a_cpu_only(self) -> bool:
        if self._device != "cpu":
            return False
        frame = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(_READ_ON_A_CPU_ONLY):
                return True
            frame = frame.f_back
        return False
