"""The keys and values of one pass, for another that computes a part of the tokens anew."""

from typing import Any

from torch import Tensor


class LayerKeys:
    """Keys and values of one layer, without their graph: what its attention takes for its cache.

    It knows neither its layer nor the others: a compiled attention would be compiled for each anew.

    Attributes:
        kept: each [B, H_kv, L, head_dim], after rotation; None before the layer has run.
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The method of a transformers cache that attentions call; hands back what it got."""
        self.kept = key.detach(), value.detach()
        return key, value


class RecordedKeys:
    """Keys and values of every layer of one pass."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerKeys] = {}

    def at(self, index: int) -> LayerKeys:
        """What the attention of this layer stores into."""
        return self._layers.setdefault(index, LayerKeys())

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        kept = self._layers[index].kept
        assert kept is not None
        return kept

    def close(self) -> None:
        """Forget them. A layer that backward recomputes stores once more, until it is done."""
        for layer in self._layers.values():
            layer.kept = None
        self._layers.clear()
