"""What the inner loop did since the last log, summed on the device and read once."""

from collections.abc import Callable

import torch
from torch import Tensor

from memdlm.config import MemoryConfig
from memdlm.inner_loop import InnerTrace


class InnerLog:
    """Running sums over the traces of many batches.

    Args:
        config: the inner loop's options.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._total: Tensor | None = None
        self._captures = 0
        self._hits = 0

    def add(self, trace: InnerTrace) -> None:
        """Add one batch; nothing waits for the device."""
        config = self._config
        loss = trace.loss.double().unflatten(0, (config.inner_epochs, config.inner_steps))
        norm = trace.norm.double()
        whole = norm.square().sum(-1).sqrt() if config.inner_clip == "global" else norm
        sums = (
            _sum_and_count(loss, (0, 2))  # [2, K]
            + _sum_and_count(norm)
            + _sum_and_count((whole > config.inner_max_norm).double())
            + (trace.skipped.sum(),)
        )
        total = torch.cat([value.double().reshape(-1) for value in sums])
        self._total = total if self._total is None else self._total + total
        self._captures += trace.captured is True
        self._hits += trace.captured is False

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last reading, and begin anew.

        Args:
            reduce: sums a tensor over the processes.

        Returns:
            `inner_loss/stage_{k}` for state k = 1 (the noisiest) to K, `inner_grad_norm` (mean over
            tensors, before the clip), `inner_clipped_fraction` (absent without a clip) and
            `inner_skipped`, the number of updates left out. Values that are not finite are not in
            the means. With `inner_graph`, `inner_graph_captures` counts the batches whose shapes
            were new, which cost a few inner loops each, and `inner_graph_hits` the others. Empty
            where nothing was added.
        """
        if self._total is None:
            return {}
        counts = self._total.new_tensor([self._captures, self._hits])
        *values, captures, hits = reduce(torch.cat([self._total, counts])).tolist()
        self._total = None
        self._captures = self._hits = 0
        stages = self._config.inner_steps
        losses, finite = values[:stages], values[stages : 2 * stages]
        norm, norms, clipped, clips, skipped = values[2 * stages :]
        logs = {
            f"inner_loss/stage_{k}": _mean(loss, count)
            for k, (loss, count) in enumerate(zip(losses, finite, strict=True), start=1)
        }
        logs["inner_grad_norm"] = _mean(norm, norms)
        if self._config.inner_clip != "none":
            logs["inner_clipped_fraction"] = _mean(clipped, clips)
        logs["inner_skipped"] = skipped
        if self._config.inner_graph:
            logs["inner_graph_captures"], logs["inner_graph_hits"] = captures, hits
        return logs


def _sum_and_count(values: Tensor, dims: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the finite values, and their number."""
    finite = values.isfinite()
    return values.where(finite, 0).sum(dims), finite.sum(dims)


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")
