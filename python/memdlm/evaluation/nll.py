"""NLL of held-out responses, memory off or on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.data.collator import IGNORE_INDEX
from memdlm.evaluation.held_out import Adapt, no_memory, prompt_of
from memdlm.evaluation.likelihood import response_log_likelihood


def held_out_nll(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    *,
    mask_token_id: int,
    pad_token_id: int,
    block_size: int | None = None,
    adapt: Adapt = no_memory,
    draws: int = 16,
    batch_size: int = 8,
    seed: int = 0,
) -> Tensor:
    """Masked diffusion's bound on the NLL, whatever noise and weights a model was trained with.

    With a memory it is written from the prompt alone: nothing of the response is seen.

    Args:
        model: as for `Backbone`, in evaluation mode.
        examples: with `input_ids` and `labels`, -100 on the prompt and nowhere behind it.
        mask_token_id, pad_token_id, block_size, draws, batch_size, seed: as for
            `response_log_likelihood`.
        adapt: `no_memory`, or `PromptMemory.adapt`.

    Returns:
        [n] float64, nats per response token of each example.

    Raises:
        ValueError: an example without a response or with an unlabelled token in it, and as
            `response_log_likelihood`.
    """
    prompts = [prompt_of(example) for example in examples]
    responses = []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        if IGNORE_INDEX in list(example["labels"])[len(prompt) :]:
            raise ValueError(
                f"labels must have no {IGNORE_INDEX} in a response, got example {number}"
            )
        responses.append(list(example["input_ids"])[len(prompt) :])
    found = response_log_likelihood(
        model,
        prompts,
        responses,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        block_size=block_size,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        adapt=adapt,
        title="held-out NLL",
    )
    return -found.mean / torch.tensor([len(response) for response in responses])
