"""The options of the method. A name means the same here, in a YAML file and on the command line."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def _check_choices(config: Any) -> None:
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            choices = ", ".join(repr(choice) for choice in get_args(kind))
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_number(config: Any, name: str, must: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{name} must be {must}, got {getattr(config, name)!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise and the outer loss of masked diffusion (MDLM).

    Attributes:
        schedule: alpha(t), the share of tokens that stay visible at time t: "linear" is 1 - t,
            "cosine" is 1 - cos(pi/2 (1 - t)).
        time_epsilon: the smallest time drawn; t ~ U(time_epsilon, 1).
        loss_weight: "schedule" weighs a row's tokens by w(t) = -alpha'(t) / (1 - alpha(t) + 1e-6),
            "uniform" by 1.
        loss_norm: what the weighted sum is divided by: "token" the maskable tokens of the batch,
            "sequence" each row's maskable tokens and the number of rows, "batch" that number alone.
        block_size: tokens of a block in block diffusion (LLaDA2.x): a noisy token sees its own
            block and the clean tokens of the blocks before; at least 1, and it divides the padded
            length. None: every token sees every other.

    Raises:
        ValueError: an option outside its range.
    """

    schedule: Literal["linear", "cosine"] = "linear"
    time_epsilon: float = 1e-3
    loss_weight: Literal["schedule", "uniform"] = "schedule"
    loss_norm: Literal["token", "sequence", "batch"] = "token"
    block_size: int | None = None

    def __post_init__(self) -> None:
        _check_choices(self)
        inside = _is_finite(self.time_epsilon) and 0 < self.time_epsilon < 1
        _check_number(self, "time_epsilon", "a number in (0, 1)", inside)
        block = self.block_size
        whole = block is None or (_is_integer(block) and block >= 1)
        _check_number(self, "block_size", "a whole number, at least 1, or None", whole)


@dataclass(frozen=True)
class MemoryConfig:
    """The inner loop: which fast weights there are, and how K steps write them.

    Attributes:
        inner_steps: K, the number of states that one pass over the trajectory visits, at least 1.
        inner_epochs: passes over the trajectory, at least 1.
        strategy: which states: "anchor_consistent" from a noisier state down to the anchor x_t
            (K = 1 is the anchor alone), "anchor_only" the anchor K times, "pre_anchor_only" the
            noisier state K times, "progressive" shares 0.8 down to 0.2, whatever the anchor is.
            The stage ablations of the paper are K = 1 of the middle two.
        pre_anchor_scale: the noisiest state masks this many times the anchor's tokens, at least 1.
        inner_targets: "all_masked" tokens of a state, or only those that the next state reveals
            ("newly_revealed"; a state without a next one: all masked).
        inner_loss: of a token of a state: "cross_entropy", the NLL of the clean token; or how far
            the token's logits or last hidden state (the head's input) are from those that the same
            weights give, without a gradient, in the next state of the trajectory (the anchor behind
            "pre_anchor_only"; the clean tokens where there is none): "kl" is
            KL(next || this), "reverse_kl" KL(this || next), "hidden_mse" the mean squared
            difference, "hidden_cosine" one minus the cosine.
        inner_temperature: divides the logits of "kl" and "reverse_kl", above 0; no factor makes up
            for it. Read by these two alone.
        inner_lr: learning rate of the plain SGD on the fast weights, above 0.
        inner_max_norm: the gradient norm that clipping keeps, above 0.
        inner_clip: clip each "tensor" on its own, all of one set together ("global"), or "none".
        adapter: "lora" adds scale * B A to a linear layer's weight, "full" a whole matrix.
        rank: R, the LoRA rank, at least 1.
        lora_alpha: the LoRA scale is lora_alpha / rank; above 0.
        target: "ffn" adapts the gate, up and down projections, "ffn+attention" also q, k, v and o.
        layer_fraction: the last share of the layers that is adapted, in (0, 1].
        scope: "batch" keeps one set of fast weights for a batch, "sample" one for each sequence.
        state_dtype: "float32" keeps the fast weights in fp32 and casts them for the matmuls,
            "compute" keeps them in the dtype of the layers.
        inner_checkpoint: "none" stores the activations of an inner step, "layer" recomputes them
            layer by layer, "auto" recomputes where they would not fit in the memory that is free
            when a batch of that shape comes first.
        prefix_reuse: "prompt_kv" runs the layers below the fast weights, in states noisier than the
            anchor, on the response alone; the prompt's keys, values and activations are those of
            the anchor's pass. Exact in block diffusion, where the prompt does not see the response,
            unless the prefix has dropout; an approximation elsewhere. On the demo's
            model after 300 training steps, with K = 2 and prompts of 50, 80, 90, 95 %
            of 256 tokens: cosine to the exact fast weights' change 0.999998, 0.999995,
            0.999997, 0.999985; relative change of the outer loss 3.6e-07, 1.2e-06,
            8.8e-07, 3.1e-06 and of the outer gradient 4.3e-05, 5.9e-05, 5.6e-05,
            1.2e-04; time of forward and backward 0.88, 0.87, 0.87, 0.85 of the exact on
            a CPU (`python -m bench.prompt_kv`).
        meta_gradient: "first_order" takes the written fast weights for constants of the outer loss.
            "exact" differentiates through the K updates, their clip included: backward recomputes
            one step after the other, whole passes of the model among them. "exact_suffix" leaves
            out what reaches the outer parameters through the layers below the fast weights in
            states noisier than the anchor.
        inner_graph: launch the reset and all inner steps as one CUDA graph. The rows of a batch's
            states are padded to that of 256, 512, 768, 1024, 1536, 2048, 3072 and so on which fits
            the largest state; a batch of other shapes is recorded anew (24 recordings are kept), so
            pad sequences to few lengths. `inner_graph_captures` in the log counts them.
        prompt_ratio: share of a prompt's tokens that the anchor state masks when a memory is
            written from a prompt (inference), in (0, 1].

    Raises:
        ValueError: an option outside its range.
    """

    inner_steps: int = 2
    inner_epochs: int = 1
    strategy: Literal["anchor_consistent", "anchor_only", "pre_anchor_only", "progressive"] = (
        "anchor_consistent"
    )
    pre_anchor_scale: float = 1.5
    inner_targets: Literal["all_masked", "newly_revealed"] = "all_masked"
    inner_loss: Literal["cross_entropy", "kl", "reverse_kl", "hidden_mse", "hidden_cosine"] = (
        "cross_entropy"
    )
    inner_temperature: float = 1.0
    inner_lr: float = 0.1
    inner_max_norm: float = 1.0
    inner_clip: Literal["tensor", "global", "none"] = "tensor"
    adapter: Literal["lora", "full"] = "lora"
    rank: int = 32
    lora_alpha: float = 64.0
    target: Literal["ffn", "ffn+attention"] = "ffn"
    layer_fraction: float = 0.1
    scope: Literal["batch", "sample"] = "batch"
    state_dtype: Literal["float32", "compute"] = "float32"
    inner_checkpoint: Literal["none", "layer", "auto"] = "auto"
    prefix_reuse: Literal["none", "prompt_kv"] = "none"
    meta_gradient: Literal["first_order", "exact", "exact_suffix"] = "first_order"
    inner_graph: bool = False
    prompt_ratio: float = 0.2

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("inner_steps", "inner_epochs", "rank"):
            value = getattr(self, name)
            at_least_one = _is_integer(value) and value >= 1
            _check_number(self, name, "a whole number, at least 1", at_least_one)
        for name in ("inner_lr", "inner_max_norm", "lora_alpha", "inner_temperature"):
            value = getattr(self, name)
            _check_number(self, name, "a number above 0", _is_finite(value) and value > 0)
        scale = self.pre_anchor_scale
        _check_number(self, "pre_anchor_scale", "at least 1", _is_finite(scale) and scale >= 1)
        for name in ("layer_fraction", "prompt_ratio"):
            share = getattr(self, name)
            _check_number(self, name, "in (0, 1]", _is_finite(share) and 0 < share <= 1)
        if self.meta_gradient != "first_order":
            _check_number(
                self,
                "inner_graph",
                f"False with meta_gradient {self.meta_gradient!r}",
                not self.inner_graph,
            )
        if self.meta_gradient == "exact":
            _check_number(
                self,
                "prefix_reuse",
                "'none' with meta_gradient 'exact', which differentiates every prefix",
                self.prefix_reuse == "none",
            )


def from_options(kind: type[Any], options: dict[str, Any]) -> Any:
    """Build `kind` (a config dataclass) from those of `options` that it has, removing them.

    Args:
        kind: a dataclass of this module.
        options: name to value; the names that `kind` has are popped, the others stay.

    Returns:
        An instance of `kind`.

    Raises:
        ValueError: a value outside its range.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: options.pop(name) for name in names if name in options})
