"""What a run would cost, and what would make it cheaper: `memdlm plan`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.cost.counts import BatchCounts, expected_counts
from memdlm.cost.flops import all_rows_flops, mdlm_flops, memdlm_flops
from memdlm.cost.memory import Rehearsal, StepMemory
from memdlm.cost.options import PlanOptions, load_config
from memdlm.cost.shape import DecoderShape
from memdlm.data.collator import IGNORE_INDEX, MaskCollator

ALL_ROWS, MASKED_ROWS, MEMDLM, PROMPT_KV = "all rows", "masked rows", "MemDLM", "+ prompt_kv"

_DIFFUSION = DiffusionConfig()


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        flops: part to FLOPs, their mean over batches.
        memory: at the peak of the largest batch, whose every maskable token is masked.
    """

    flops: dict[str, float]
    memory: StepMemory

    @property
    def total_flops(self) -> float:
        """Of all parts."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Lever:
    """One change of a run, and the MemDLM step that it makes.

    Attributes:
        name: the key to set, and its value.
        price: what one pays for it.
        flops_ratio: FLOPs of a token, relative to those without the change.
        all_rows_ratio: FLOPs of a step, relative to all-rows MDLM with the same change.
        total_bytes: memory at the peak.
    """

    name: str
    price: str
    flops_ratio: float
    all_rows_ratio: float
    total_bytes: float


@dataclass(frozen=True)
class Plan:
    """What `memdlm plan` found.

    Attributes:
        options: as given.
        costs: variant to cost: both standards, MemDLM, and MemDLM with `prefix_reuse` where there
            is a prefix that could reuse something.
        base: the variant that the levers start from.
        levers: those that the run does not have yet, the largest saving first.
    """

    options: PlanOptions
    costs: dict[str, Cost]
    base: str
    levers: list[Lever]


def make_plan(options: PlanOptions) -> Plan:
    """Estimate a run's cost, from shapes alone.

    Args:
        options: the run.

    Returns:
        The plan.

    Raises:
        ValueError: a model that is not there or cannot be split.
    """
    estimator = _Estimator(load_config(options.model))
    plain = dataclasses.replace(options, prefix_reuse="none")
    jobs = {ALL_ROWS: plain, MASKED_ROWS: plain, MEMDLM: plain}
    if options.k > 1:
        jobs[PROMPT_KV] = dataclasses.replace(options, prefix_reuse="prompt_kv")
    base = PROMPT_KV if options.prefix_reuse == "prompt_kv" else MEMDLM
    changes = _changes(options)

    with tqdm(total=len(jobs) + len(changes), desc="rehearsals", leave=False) as progress:
        costs = {}
        for variant, own in jobs.items():
            costs[variant] = estimator.cost(variant, own)
            progress.update()
        levers = []
        for name, price, changed, strategy in changes:
            cost = estimator.cost(MEMDLM, changed, strategy)
            standard = sum(estimator.flops(ALL_ROWS, changed).values())
            tokens = changed.batch_size / options.batch_size
            ratio = cost.total_flops / tokens / costs[base].total_flops
            total = cost.memory.total
            levers.append(Lever(name, price, ratio, cost.total_flops / standard, total))
            progress.update()
    if options.outer != "full":
        levers.append(_four_bit(estimator, options, costs, base))
    now = costs[base].memory.total
    levers.sort(key=lambda lever: min(lever.flops_ratio, lever.total_bytes / now))
    return Plan(options, costs, base, levers)


def _changes(options: PlanOptions) -> list[tuple[str, str, PlanOptions, str]]:
    """Name, price, options and strategy of every change that the run does not have yet."""
    changes: list[tuple[str, str, dict[str, Any], str]] = []
    usual = "anchor_consistent"
    if options.k > 1:
        states = "the memory sees no noisier state than the anchor"
        changes.append(("inner_steps 1", states, {"k": 1, "prefix_reuse": "none"}, usual))
        changes.append(("strategy anchor_only", states, {}, "anchor_only"))
        if options.prefix_reuse == "none":
            near = "the noisier states' boundary is approximate"
            changes.append(("prefix_reuse prompt_kv", near, {"prefix_reuse": "prompt_kv"}, usual))
    if not options.gradient_checkpointing:
        again = "each layer's forward once more"
        name = "gradient_checkpointing true"
        changes.append((name, again, {"gradient_checkpointing": True}, usual))
    if options.outer == "full":
        fewer = {"outer": "lora"}
        changes.append(("outer lora", "fewer weights train", fewer, usual))
    if options.outer != "lora_attention":
        fewest: dict[str, Any] = {"outer": "lora_attention"}
        changes.append(("outer lora_attention", "fewer weights train", fewest, usual))
    if options.batch_size > 1:
        half = options.batch_size // 2
        steps = "more steps, or accumulation"
        changes.append((f"batch_size {half}", steps, {"batch_size": half}, usual))
    return [
        (name, price, dataclasses.replace(options, **fields), strategy)
        for name, price, fields, strategy in changes
    ]


def _four_bit(
    estimator: "_Estimator", options: PlanOptions, costs: dict[str, Cost], base: str
) -> Lever:
    flops, memory = costs[base].total_flops, costs[base].memory
    saved = estimator.rehearsal(options).saved_by_four_bit()
    price = "weights are rounded"
    if options.outer == "lora" and estimator.is_sparse:
        price += "; experts get no LoRA"
    ratio = flops / costs[ALL_ROWS].total_flops
    return Lever("load_in_4bit true", price, 1.0, ratio, memory.total - saved)


class _Estimator:
    """Costs of steps of one model; what several of them need is made once."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._shape = DecoderShape.of(config)
        self.is_sparse = any(ffn.experts for ffn in self._shape.layers)
        self._rehearsals: dict[Any, Rehearsal] = {}

    def cost(self, variant: str, options: PlanOptions, strategy: str = "anchor_consistent") -> Cost:
        """FLOPs and memory of a step of `options`."""
        flops = self.flops(variant, options, strategy)
        rehearsal = self.rehearsal(options)
        if variant == ALL_ROWS:
            return Cost(flops, rehearsal.all_rows(self._largest_batch(options, None)))
        if variant == MASKED_ROWS:
            batch = self._largest_batch(options, None)
            return Cost(flops, rehearsal.mdlm(batch, _DIFFUSION))
        # "auto" would ask for this machine's free memory.
        memory = MemoryConfig(
            inner_steps=options.k,
            strategy=strategy,  # type: ignore[arg-type]
            prefix_reuse=options.prefix_reuse,
            inner_checkpoint="none",
        )
        batch = self._largest_batch(options, memory)
        return Cost(flops, rehearsal.memdlm(batch, _DIFFUSION, memory))

    def flops(
        self, variant: str, options: PlanOptions, strategy: str = "anchor_consistent"
    ) -> dict[str, float]:
        """FLOPs of the parts of a step of `options`."""
        counts = self._counts(options, strategy)
        if variant == ALL_ROWS:
            return all_rows_flops(self._shape, counts, options.training)
        if variant == MASKED_ROWS:
            return mdlm_flops(self._shape, counts, options.training)
        return memdlm_flops(self._shape, counts, options.training)

    def rehearsal(self, options: PlanOptions) -> Rehearsal:
        """The model that `options` train."""
        key = (options.training, options.dtype)
        if key not in self._rehearsals:
            dtype = getattr(torch, options.dtype)
            self._rehearsals[key] = Rehearsal(self._config, options.training, dtype)
        return self._rehearsals[key]

    def _counts(self, options: PlanOptions, strategy: str) -> BatchCounts:
        changed = None
        if options.prefix_reuse == "prompt_kv":
            # The row of a token's loss is one before it, where logits are shifted.
            changed = min(options.length, options.maskable + self._shape.right_shift_logits)
        return expected_counts(
            options.batch_size,
            options.length,
            options.maskable,
            options.k,
            strategy=strategy,
            changed=changed,
        )

    def _largest_batch(self, options: PlanOptions, memory: MemoryConfig | None) -> dict[str, Any]:
        collator = MaskCollator(
            0,
            0,
            self._shape.vocabulary,
            _DIFFUSION,
            memory,
            anchor_ratio=1.0,
            right_shift_logits=self._shape.right_shift_logits,
        )
        ids = torch.zeros(options.length, dtype=torch.int64)
        labels = ids.clone()
        labels[: options.length - options.maskable] = IGNORE_INDEX
        example = {"input_ids": ids, "labels": labels, "epoch": 0}
        return collator([example | {"example": b} for b in range(options.batch_size)])
