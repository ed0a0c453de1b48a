"""The Hugging Face Trainer for MDLM and MemDLM: hooks only, the step itself is `objective.py`."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from memdlm.checkpoint import write_method
from memdlm.data.collator import MaskCollator
from memdlm.data.numbered import EvaluationOrder, Examples, NumberedDataset, TrainOrder
from memdlm.inner_log import InnerLog
from memdlm.inner_loop import untouched_generators
from memdlm.loss import outer_normalizer
from memdlm.objective import MDLMObjective, MemDLMObjective

# TrainingArguments that a Trainer of language models reads and this one does not.
UNSUPPORTED_ARGUMENTS = {
    "label_smoothing_factor": "the loss of masked diffusion has no smoothed form",
    "neftune_noise_alpha": "noise on the embeddings would differ between the inner and outer pass",
    "use_liger_kernel": "the loss is fused already",
    "fp16": "inner gradients would underflow, use bf16",
    "fp16_full_eval": "inner gradients would underflow, use bf16",
    "deepspeed": "not supported yet",
    "fsdp": "not supported yet",
    "auto_find_batch_size": "a batch size that changes breaks pairing and resuming",
}


class MemDLMTrainer(Trainer):
    """Trains an objective; checkpoints hold the Hugging Face model or PEFT adapter inside it.

    The loss of an accumulated batch is divided by the normaliser of all its micro-batches. Every
    random number of the method is a function of (seed, epoch, example), so two runs with one seed
    see the same times, masks and batches, and a resumed run sees what it would have seen.
    `eval_loss` is measured with memory off; with memory on it is `eval_loss_with_memory`. Both are
    one weighted sum over the evaluation set, divided by its normaliser.

    Args:
        model: an `MDLMObjective` or `MemDLMObjective`.
        args: `remove_unused_columns` must be False.
        data_collator: with the objective's own `diffusion` and `memory`.
        train_dataset: examples with `input_ids` and `labels`, without padding; see `MaskCollator`.
        eval_dataset: the same, or a dict of several.
        memory_gap_steps: every so many steps, log `loss_without_memory` beside `loss_with_memory`
            of the same batch; 0 for never.
        options: as for `transformers.Trainer`.

    Raises:
        ValueError: an argument that this trainer does not support, or a collator that makes batches
            for another objective.
    """

    def __init__(
        self,
        model: MDLMObjective,
        args: TrainingArguments,
        data_collator: MaskCollator,
        train_dataset: Examples | None = None,
        eval_dataset: Examples | Mapping[str, Examples] | None = None,
        *,
        memory_gap_steps: int = 0,
        **options: Any,
    ) -> None:
        _check(model, args, data_collator)
        if args.n_gpu > 1:
            # nn.DataParallel would cut the batch's row indices apart. Several GPUs: torchrun.
            args._n_gpu = 1
        args.label_names = ["labels"]
        super().__init__(
            model=model,
            args=args,
            data_collator=_HostCounts(data_collator),
            train_dataset=_numbered(train_dataset),
            eval_dataset=_numbered(eval_dataset),
            **options,
        )
        # The loss arrives divided by the whole accumulated batch's normaliser.
        self.model_accepts_loss_kwargs = True
        self.collator = data_collator
        self.memory_gap_steps = memory_gap_steps
        self._inner_log = InnerLog(model.memory) if isinstance(model, MemDLMObjective) else None
        self._gap: list[tuple[int, Tensor]] = []
        self._measured: list[tuple[list[int], list[Tensor]]] = []

    # The order of the examples

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        order = TrainOrder(len(examples), seed)
        # Accelerate tells the epoch too, but not to a resumed run of several processes.
        self.pop_callback(_TellEpoch)
        self.add_callback(_TellEpoch(order))
        return order

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[tuple[int, int]]:
        processes = self.args.world_size
        multiple = self.args.eval_batch_size * processes if processes > 1 else 1
        return EvaluationOrder(len(eval_dataset), multiple)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in Trainer; `eval_dataset` may be plain examples."""
        if not isinstance(eval_dataset, str | NumberedDataset):
            eval_dataset = _numbered(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    # The loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> int:
        """The outer normaliser of the accumulated batch, over all processes if they average."""
        own = self._count([batch["host_counts"] for batch in batch_samples])
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            own = int(self.accelerator.reduce(torch.tensor(own, device=device), "sum"))
        return max(1, own)

    def _count(self, counts: Sequence[Sequence[int]]) -> int:
        """The normaliser of these rows; 0 for none, so that shares of it can be added."""
        norm = self.collator.diffusion.loss_norm
        flat = torch.tensor([count for batch in counts for count in batch])
        empty = not flat.any() if norm == "token" else not len(flat)
        return 0 if empty else outer_normalizer(norm, flat)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch, already divided by the accumulated batch's normaliser."""
        average = self.args.average_tokens_across_devices
        processes = self.accelerator.num_processes if average else 1
        measures_gap = self._measures_gap()
        if measures_gap:
            # Before the training pass, with the generators set back: both see one dropout mask.
            with torch.no_grad(), untouched_generators(self.args.device):
                objective = self.accelerator.unwrap_model(model)
                without = objective(inputs, num_items_in_batch, memory_enabled=False).loss
        output = model(inputs, num_items_in_batch)
        loss = output.loss * processes
        if output.inner is not None and self._inner_log is not None:
            self._inner_log.add(output.inner)
        if measures_gap:
            pair = torch.stack([loss.detach(), without * processes])
            self._gap.append((self.state.global_step, pair))
        return (loss, output) if return_outputs else loss

    def _measures_gap(self) -> bool:
        if self._inner_log is None or not self.memory_gap_steps:
            return False
        return (self.state.global_step + 1) % self.memory_gap_steps == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; a training log also tells what the inner loop did."""
        if "loss" in logs and self._inner_log is not None:
            logs.update(self._inner_log.read(lambda total: self.accelerator.reduce(total, "sum")))
            if self._gap:
                steps = len({step for step, _ in self._gap})
                mean = torch.stack([pair for _, pair in self._gap]).sum(0) / steps
                pair = self.accelerator.reduce(mean, "mean").tolist()
                logs["loss_with_memory"], logs["loss_without_memory"] = pair
                self._gap = []
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, with the losses over the whole set; training's draws are not moved."""
        self._measured = []
        with untouched_generators(self.args.device):
            output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        sums = torch.stack([torch.stack(losses) for _, losses in self._measured]).double().sum(0)
        counts = [count for count, _ in self._measured]
        total = torch.cat([sums, sums.new_tensor([self._count(counts)])])
        *losses, normalizer = self.accelerator.reduce(total, "sum").tolist()
        names = (f"{prefix}_loss", f"{prefix}_loss_with_memory")
        for name, loss in zip(names, losses, strict=False):
            output.metrics[name] = loss / max(1, normalizer)
        self._measured = []
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Weighted sums of one batch, memory off and on; the fast weights go with the batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._inner_log is None:
                losses = [model(inputs, 1.0).loss]
            else:
                off = model(inputs, 1.0, memory_enabled=False).loss
                losses = [off, model(inputs, 1.0).loss]
        self._measured.append((inputs["host_counts"], losses))
        return losses[0], None, None

    # Checkpoints

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Meanwhile the trainer's model is the one inside the objective."""
        objective: Any = self.model
        self.model = objective.model
        try:
            yield
        finally:
            self.model = objective

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with self._inside():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_method(output_dir or str(self.args.output_dir), self.collator)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with self._inside():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._inside():
            super()._load_best_model()


def _numbered(examples: Any) -> Any:
    if isinstance(examples, Mapping):
        return {name: NumberedDataset(part) for name, part in examples.items()}
    return None if examples is None else NumberedDataset(examples)


@dataclass
class _HostCounts:
    """A collator that keeps the counts as numbers too: a loader moves tensors to the device."""

    collator: MaskCollator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(features)
        rows = zip(batch["maskable_count"].tolist(), features, strict=True)
        batch["host_counts"] = [count for count, feature in rows if "filler" not in feature]
        return batch


class _TellEpoch(TrainerCallback):
    def __init__(self, order: TrainOrder) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._order.set_epoch(int(state.epoch or 0))


def _check(model: MDLMObjective, args: TrainingArguments, collator: MaskCollator) -> None:
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if getattr(args, name):
            raise ValueError(f"{name} is not supported: {reason}, got {getattr(args, name)!r}")
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns must be False: the collator reads every column")
    for name in ("diffusion", "memory"):
        ours, theirs = getattr(model, name, None), getattr(collator, name)
        if ours != theirs:
            raise ValueError(f"data_collator.{name} must be the objective's {ours}, got {theirs}")
