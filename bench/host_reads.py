"""How often a step makes the host wait for a value of the device."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class HostReads(TorchDispatchMode):
    """Inside this context, counts where the host reads a value, or a shape that depends on values.

    The same operators count on a CPU, where they cost little, so that a run there shows what would
    wait on a GPU. What an operator reads inside its own kernel is not seen.

    Args:
        device: the one whose values count.

    Attributes:
        count: reads so far.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.count = 0
        self._device = device.type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._reads(func._schema.name, args, out):
            self.count += 1
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
