"""The memory of one training step, by a rehearsal on tensors that have shapes and no values.

The real objective runs forward and backward under torch's fake tensors, and what its tensors hold
is followed from storage to storage. Nothing is allocated, and the rehearsal stays right when the
step changes. It sees what a CPU would hold: the same ops, and attention that makes no scores. It
does not see what an op allocates inside, such as the loss's chunk of logits.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM

from memdlm.backbone import ATTENTION_PROJECTIONS, FFN_PROJECTIONS, Backbone
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.cost.flops import Training
from memdlm.experts import PROJECTIONS
from memdlm.objective import MDLMObjective, MemDLMObjective, anchor_boundary

# NF4 with double quantisation: half a byte; 8 bits of scale for 64 weights, 32 bits for 256 of
# those scales.
_FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of one step.

    Attributes:
        weights: of the model, with the outer LoRA.
        optimizer: AdamW's two moments of what is trained, each in its dtype.
        fast_weights: with their gradient, and their copy for the layers where there is one.
        gradients: of what is trained, as far as they are there at the peak.
        activations: everything else that the step holds at the peak.
    """

    weights: int
    optimizer: int
    fast_weights: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.fast_weights + self.gradients + self.activations


class Rehearsal:
    """A model without values, and the steps that train it.

    Args:
        config: a Hugging Face config; no weights are made of it.
        training: what is trained.
        dtype: of the weights; an outer LoRA is in float32 wherever PEFT makes it so.

    Raises:
        ValueError: a model that cannot be split.
    """

    def __init__(self, config: Any, training: Training, dtype: torch.dtype) -> None:
        self._training = training
        self._dtype = dtype
        self._mode = FakeTensorMode()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for what is to be renamed
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if training.outer != "full":
                model = get_peft_model(model, _lora_config(config, training))
            if training.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        with self._mode:
            _onto_the_cpu(model)
        self._model: Any = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._weights = sum(map(_bytes, model.parameters())) + sum(map(_bytes, model.buffers()))
        self._optimizer = 2 * sum(map(_bytes, trained))
        self._trained = trained

    def saved_by_four_bit(self) -> float:
        """Bytes that `load_in_4bit` saves at the peak: an estimate, nothing is rehearsed."""
        sizes = [
            parameter.numel()
            for name, parameter in self._model.named_parameters()
            if _is_quantised(name, parameter)
        ]
        # The largest is there dequantised too, while it is used.
        stored = sum(sizes) * _FOUR_BIT_BYTES + max(sizes) * self._dtype.itemsize
        return sum(sizes) * self._dtype.itemsize - stored

    def all_rows(self, batch: dict[str, Any]) -> StepMemory:
        """Plain MDLM as trainers run it: logits and loss at every position.

        Args:
            batch: from `MaskCollator`; read for its shape.
        """
        with self._mode:
            backbone = Backbone(self._model)
        held: list[Tensor] = []

        def loss(batch: dict[str, Any]) -> Tensor:
            # Through the split decoder: called the ordinary way, PEFT would add B A to the stacked
            # experts, where the published models have linear layers.
            ids = batch["input_ids"]
            every = torch.arange(ids.shape[1])[None].expand_as(ids)
            everywhere = batch["anchor"] | {"rows": every}
            boundary = anchor_boundary(backbone, batch | {"anchor": everywhere})
            valid = torch.arange(ids.numel())
            hidden = backbone.suffix(
                boundary.activations, valid, boundary.context, contextlib.nullcontext()
            )
            logits = F.linear(hidden, *backbone.head()).unflatten(0, ids.shape)  # [B, L, V]
            nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # [B, L]
            # A trainer's step holds the model's output until its end.
            held.append(logits)
            return (nll * (everywhere["input_ids"] != ids)).sum()

        return self._measure(loss, batch, 0)

    def mdlm(self, batch: dict[str, Any], diffusion: DiffusionConfig) -> StepMemory:
        """Plain MDLM on masked rows.

        Args:
            batch: from `MaskCollator`.
            diffusion: noise and loss.
        """
        with self._mode:
            objective = MDLMObjective(self._model, diffusion)
        return self._measure(lambda batch: objective(batch).loss, batch, 0)

    def memdlm(
        self, batch: dict[str, Any], diffusion: DiffusionConfig, memory: MemoryConfig
    ) -> StepMemory:
        """MemDLM.

        Args:
            batch: from a `MaskCollator` with this memory config.
            diffusion: noise and loss.
            memory: the inner loop; `inner_checkpoint` must not be "auto", which would ask for this
                machine's free memory.
        """
        assert memory.inner_checkpoint != "auto"
        with self._mode:
            objective = MemDLMObjective(self._model, diffusion, memory)
            store = objective.fast_weights
            store.reserve(len(batch["input_ids"]))
            held = sum(map(_bytes, _tensors_of(store)))
        try:
            return self._measure(lambda batch: objective(batch).loss, batch, held)
        finally:
            store.detach()

    def _measure(
        self, loss: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any], fast_weights: int
    ) -> StepMemory:
        batch = tree_map_only(Tensor, self._mode.from_tensor, batch)
        holdings = _Holdings()
        with self._mode, _values_unread(), holdings:
            loss(batch).backward()
        gradients = [p.grad for p in self._trained if p.grad is not None]
        held = sum(_bytes(gradient) for gradient in gradients if holdings.held_at_peak(gradient))
        for parameter in self._trained:
            parameter.grad = None
        return StepMemory(self._weights, self._optimizer, fast_weights, held, holdings.peak - held)


class _Holdings(TorchDispatchMode):
    """Follows the storages that ops make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._births = 0
        self._births_at_peak = 0
        # Address to bytes, number of birth, and a reference that tells of the end.
        self._live: dict[int, tuple[int, int, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors_in((args, kwargs)):
            self._follow(tensor, made_here=False)
        out = func(*args, **kwargs)
        for tensor in _tensors_in(out):
            self._follow(tensor, made_here=True)
        return out

    def held_at_peak(self, tensor: Tensor) -> bool:
        """Whether a tensor that is still there was there at the peak."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry[1] <= self._births_at_peak

    def _follow(self, tensor: Tensor, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return
        # What ops read and none made, weights and the batch, was there before the step.
        size = storage.nbytes() if made_here else 0
        self._births += 1
        end = weakref.ref(storage, lambda _: self._forget(address))
        self._live[address] = (size, self._births, end)
        self._now += size
        if self._now > self.peak:
            self.peak, self._births_at_peak = self._now, self._births

    def _forget(self, address: int) -> None:
        self._now -= self._live.pop(address)[0]


@contextlib.contextmanager
def _values_unread() -> Iterator[None]:
    """Ops check the values of their arguments where that is free, and here there are none."""
    asked = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = asked


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tensors_of(store: Any) -> list[Tensor]:
    """The fast weights' own storages, each once."""
    own = {t.untyped_storage()._cdata: t for t in vars(store).values() if isinstance(t, Tensor)}
    return list(own.values())


def _is_quantised(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a frozen matrix of a layer, but no router's."""
    frozen = not parameter.requires_grad and parameter.dim() > 1
    return frozen and ".layers." in name and not name.endswith(".gate.weight")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _lora_config(config: Any, training: Training) -> LoraConfig:
    everything = training.outer == "lora"
    sparse = bool(getattr(config, "num_experts", None))
    return LoraConfig(
        r=training.lora_rank,
        target_modules=[*ATTENTION_PROJECTIONS, *(FFN_PROJECTIONS if everything else ())],
        target_parameters=[f"experts.{name}" for name in PROJECTIONS]
        if everything and sparse
        else None,
    )


def _onto_the_cpu(model: nn.Module) -> None:
    """Replace parameters and buffers of the meta device, for which no op has a backend.

    A model is not made of fake tensors at once: PEFT could not move its layers.
    """
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
