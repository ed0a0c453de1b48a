"""What the tests of the prompt memory share: prompts, a memory, and all that a model holds."""

import torch

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.prompt_memory import PromptMemory
from tests.tiny import MASK, PAD, VOCABULARY

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3])
EIGHT = tuple([(7 * row + 3 * place) % PAD for place in range(4 + 3 * row)] for row in range(8))


def make_memory(model, *, diffusion=None, seed=0, budget_gib=None, **options):
    return PromptMemory(
        model,
        diffusion or DiffusionConfig(),
        MemoryConfig(**{"rank": 4} | options),
        mask_token_id=MASK,
        pad_token_id=PAD,
        vocab_size=VOCABULARY,
        seed=seed,
        budget_gib=budget_gib,
    )


@torch.no_grad()
def logits(model, ids):
    """Of tokens [B, L], or of one row."""
    ids = torch.tensor(ids)
    return model(input_ids=ids.view(-1, ids.shape[-1]), is_causal=False, use_cache=False).logits


def fast_weights(memory):
    """[S, T], a copy."""
    return memory._objective.fast_weights.param.clone()


def snapshot(model):
    """Everything that a memory must leave as it was, tensors as their bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {name: tensor.detach().contiguous().clone() for name, tensor in tensors},
        "addresses": {name: tensor.data_ptr() for name, tensor in tensors},
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor.view(torch.uint8), after["tensors"][name].view(torch.uint8)), name
    assert torch.equal(before.pop("random"), after["random"])
    for key, value in before.items():
        assert value == after[key], key
