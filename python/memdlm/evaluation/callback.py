"""Exposure bias along a training run."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memdlm.data.collator import MaskCollator
from memdlm.evaluation.exposure_bias import exposure_bias
from memdlm.evaluation.held_out import Adapt, no_memory
from memdlm.objective import MDLMObjective
from memdlm.prompt_memory import PromptMemory

RATIOS = (0.75, 0.5, 0.25)


class ExposureBiasCallback(TrainerCallback):
    """At each evaluation logs R = L_seq / L_static, memory off and, where there is one, on.

    `eval_exposure_bias_0.5` is R with half of the response masked;
    `eval_exposure_bias_0.5_with_memory` the same with a memory of each prompt.

    Args:
        trainer: a `MemDLMTrainer`; what is measured goes to its log.
        collator: the run's.
        examples: with `input_ids` and `labels`; their responses are predicted.
        batch_size: examples of a batch.
    """

    def __init__(
        self,
        trainer: Any,
        collator: MaskCollator,
        examples: Sequence[dict[str, Any]],
        batch_size: int,
    ) -> None:
        self._trainer = trainer
        self._collator = collator
        self._examples = examples
        self._batch_size = batch_size

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Measure, and log."""
        objective: MDLMObjective = self._trainer.accelerator.unwrap_model(self._trainer.model)
        training = objective.training
        objective.eval()
        try:
            self._trainer.log(self._measure(objective))
        finally:
            objective.train(training)

    def _measure(self, objective: MDLMObjective) -> dict[str, float]:
        collator = self._collator
        ids: dict[str, Any] = {
            "mask_token_id": collator.mask_token_id,
            "pad_token_id": collator.pad_token_id,
        }
        states: dict[str, Adapt] = {"": no_memory}
        memory = None
        if collator.memory is not None:
            memory = PromptMemory(
                objective.model,
                collator.diffusion,
                collator.memory,
                vocab_size=collator.vocab_size,
                seed=collator.seed,
                **ids,
            )
            states["_with_memory"] = memory.adapt
        found: dict[str, float] = {}
        for name, adapt in states.items():
            curve = exposure_bias(
                objective.model,
                self._examples,
                ratios=RATIOS,
                adapt=adapt,
                canvas_block=collator.diffusion.block_size,
                batch_size=self._batch_size,
                **ids,
            )
            pairs = zip(curve.ratios, curve.ratio()[0].tolist(), strict=True)
            found |= {f"eval_exposure_bias_{r}{name}": R for r, R in pairs if r in RATIOS}
        if memory is not None:
            memory.detach()
        return found
