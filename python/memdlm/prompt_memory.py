"""A memory of the prompt: the inner loop run over prompts, one set of fast weights for each."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from accelerate.utils import send_to_device
from torch import nn

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MemDLMObjective

# The share of a prompt's tokens that the anchor state masks, as published.
ANCHOR_RATIO = 0.2


class PromptMemory:
    """Writes fast weights from prompts, for a model that then reads them.

    Every prompt token is maskable, the anchor masks a fifth of them, all weigh the same; the K
    steps are those of training. Put the model in evaluation mode first.

    Args:
        model: as for `MDLMObjective`.
        diffusion: the schedule that the model was trained with.
        memory: the inner loop; each prompt gets fast weights of its own, whatever its scope.
        mask_token_id, pad_token_id, vocab_size: as for `MaskCollator`.
        seed: of the masks and of the fast weights' initial values.

    Raises:
        ValueError: as `MemDLMObjective` and `MaskCollator`.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: DiffusionConfig,
        memory: MemoryConfig,
        *,
        mask_token_id: int,
        pad_token_id: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        uniform = dataclasses.replace(diffusion, loss_weight="uniform")
        own = dataclasses.replace(memory, scope="sample")
        self._objective = MemDLMObjective(model, uniform, own)
        self._collator = MaskCollator(
            mask_token_id,
            pad_token_id,
            vocab_size,
            uniform,
            own,
            seed=seed,
            pad_to_multiple_of=diffusion.block_size or 1,
            anchor_ratio=ANCHOR_RATIO,
            right_shift_logits=self._objective.backbone.right_shift_logits,
        )

    def write(self, prompts: Sequence[Sequence[int]]) -> contextlib.AbstractContextManager[None]:
        """Run the inner loop on prompts.

        Args:
            prompts: S lists of token ids, of any lengths.

        Returns:
            A context under which the model reads the memory, with prompt s in row s of its batch:
            good until the next write.
        """
        # One example number for all: a prompt's memory does not depend on its place in the batch.
        features: list[dict[str, Any]] = [
            {"input_ids": prompt, "labels": prompt, "example": 0, "epoch": 0} for prompt in prompts
        ]
        batch = self._collator(features)
        device = self._objective.backbone.head()[0].device
        self._objective.write_memory(send_to_device(batch, device))
        return self._objective.fast_weights.reading()

    def detach(self) -> None:
        """Take the fast weights' hooks off the model."""
        self._objective.fast_weights.detach()
