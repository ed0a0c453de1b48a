"""Models whose logits are those of the next token (Dream, converted causal decoders)."""

import pytest
import torch

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import make_state
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.tiny import MASK, make_batch, make_collator, make_features, make_model


def test_the_loss_reads_the_row_before_and_the_first_token_its_own():
    clean = torch.arange(10, 20).view(2, 5)
    in_loss = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    weight = torch.ones(2, dtype=torch.float64)
    straight = make_state(clean, in_loss, in_loss, weight, MASK)
    shifted = make_state(clean, in_loss, in_loss, weight, MASK, right_shift_logits=True)
    assert straight["rows"].flatten()[straight["valid"]].tolist() == [0, 1, 4, 2]
    assert shifted["rows"].flatten()[shifted["valid"]].tolist() == [0, 0, 3, 1]
    for key in ("input_ids", "target", "weight", "sample", "valid"):
        assert torch.equal(shifted[key], straight[key])


@pytest.mark.parametrize("model_shifts", [False, True])
def test_a_collator_that_disagrees_with_the_model_is_refused(model_shifts):
    model = make_model()
    model.config.right_shift_logits = model_shifts
    diffusion = DiffusionConfig()
    collator = make_collator(diffusion)
    collator.right_shift_logits = not model_shifts
    batch = collator(make_features())
    with pytest.raises(ValueError, match=f"right_shift_logits .* {model_shifts}, got"):
        MDLMObjective(model, diffusion)(batch)


def test_the_step_differs_from_that_of_the_same_model_without_a_shift():
    memory, diffusion = MemoryConfig(rank=2), DiffusionConfig()
    model = make_model()
    straight = MemDLMObjective(model, diffusion, memory)(make_batch(diffusion, memory)).loss
    model.config.right_shift_logits = True
    collator = make_collator(diffusion, memory)
    collator.right_shift_logits = True
    shifted = MemDLMObjective(model, diffusion, memory)(collator(make_features())).loss
    assert shifted != straight
