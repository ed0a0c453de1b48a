"""Exposure bias along a training run."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memdlm.data.collator import MaskCollator
from memdlm.evaluation.exposure_bias import check_canvas, exposure_bias
from memdlm.evaluation.held_out import Adapt, check_prompts, no_memory
from memdlm.objective import MDLMObjective
from memdlm.prompt_memory import PromptMemory

# Steps of the trajectory whose R is logged, by the mask ratio that they have come to.
RATIOS = {0.8: 2, 0.5: 5, 0.2: 8}


class ExposureBiasCallback(TrainerCallback):
    """At each evaluation logs R = L_seq / L_static, memory off and, where there is one, on.

    `eval_exposure_bias_0.5` is R with half of the response masked;
    `eval_exposure_bias_0.5_with_memory` the same with a memory of each prompt.

    Args:
        trainer: a `MemDLMTrainer`; what is measured goes to its log.
        collator: the run's.
        examples: with `input_ids` and `labels`; their responses are predicted.
        batch_size: examples of a batch.

    Raises:
        ValueError: block diffusion, or with a memory an example without a prompt.
    """

    def __init__(
        self,
        trainer: Any,
        collator: MaskCollator,
        examples: Sequence[dict[str, Any]],
        batch_size: int,
    ) -> None:
        check_canvas(collator.diffusion.block_size)
        if collator.memory is not None:
            check_prompts(examples)
        self._trainer = trainer
        self._collator = collator
        self._examples = examples
        self._batch_size = batch_size

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Measure, and log."""
        objective: MDLMObjective = self._trainer.accelerator.unwrap_model(self._trainer.model)
        modes = [(module, module.training) for module in objective.modules()]
        objective.eval()
        try:
            self._trainer.log(self._measure(objective))
        finally:
            for module, training in modes:
                module.training = training

    def _measure(self, objective: MDLMObjective) -> dict[str, float]:
        found = self._ratios(objective, no_memory, "")
        collator = self._collator
        if collator.memory is None:
            return found
        memory = PromptMemory(
            objective.model,
            collator.diffusion,
            collator.memory,
            mask_token_id=collator.mask_token_id,
            pad_token_id=collator.pad_token_id,
            vocab_size=collator.vocab_size,
            seed=collator.seed,
        )
        try:
            return found | self._ratios(objective, memory.adapt, "_with_memory")
        finally:
            memory.detach()

    def _ratios(self, objective: MDLMObjective, adapt: Adapt, suffix: str) -> dict[str, float]:
        R, _, _ = exposure_bias(
            objective.model,
            self._examples,
            mask_token_id=self._collator.mask_token_id,
            pad_token_id=self._collator.pad_token_id,
            adapt=adapt,
            batch_size=self._batch_size,
        ).ratio()
        return {f"eval_exposure_bias_{at}{suffix}": R[step].item() for at, step in RATIOS.items()}
