"""The keys and values of one pass, for another that computes a part of the tokens anew."""

from typing import Any

from torch import Tensor


class RecordedKeys:
    """Keys and values of every layer of one pass, without their graph.

    A layer's attention is handed `at(index)` as its cache: it stores, and hands back what it got.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._closed = False

    def at(self, index: int) -> "LayerRecorder":
        """What records the layer of this index."""
        return LayerRecorder(self, index)

    def store(self, index: int, key: Tensor, value: Tensor) -> None:
        """Keep a layer's, each [B, H_kv, L, head_dim], after rotation; nothing once closed."""
        # A layer that is recomputed in backward comes by again.
        if not self._closed:
            self._layers[index] = key.detach(), value.detach()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._layers[index]

    def close(self) -> None:
        """Forget them, and record no more."""
        self._layers.clear()
        self._closed = True


class LayerRecorder:
    """What an attention takes for its cache; see `RecordedKeys`."""

    def __init__(self, recorded: RecordedKeys, index: int) -> None:
        self._recorded = recorded
        self._index = index

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The method of a transformers cache that attentions call."""
        self._recorded.store(self._index, key, value)
        return key, value
