"""Block diffusion: who sees whom, and that the split model computes what the whole one does."""

import contextlib

import pytest
import torch

from memdlm.backbone import Backbone
from memdlm.block_mask import Blocks
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MDLMObjective, MemDLMObjective
from memdlm.prompt_memory import PromptMemory
from tests.kernels.truth import assert_as_accurate
from tests.tiny import MASK, PAD, VOCABULARY, make_features, make_model

LENGTH, BLOCK = 12, 4


def sees(query, key):
    """The rule, in words of the paper: positions below LENGTH are noisy, the others clean."""
    query_block, key_block = query % LENGTH // BLOCK, key % LENGTH // BLOCK
    if query < LENGTH and key < LENGTH:
        return query_block == key_block
    if query < LENGTH:
        return key_block < query_block
    return key >= LENGTH and key_block <= query_block


def dense_mask(visible=None):
    return Blocks(LENGTH, BLOCK).mask("sdpa", visible, torch.empty(0))


def test_the_mask_is_the_rule():
    expected = torch.tensor([[sees(q, k) for k in range(2 * LENGTH)] for q in range(2 * LENGTH)])
    assert torch.equal(dense_mask(), expected[None, None])
    bias = Blocks(LENGTH, BLOCK).mask("eager", None, torch.empty(0))
    assert torch.equal(bias == 0, expected[None, None])
    assert bias.min() == torch.finfo(torch.float32).min


def test_padding_is_seen_by_itself_alone():
    visible = torch.ones(2, 2 * LENGTH, dtype=torch.bool)
    visible[1, [LENGTH - 1, 2 * LENGTH - 1]] = False
    mask = dense_mask(visible)
    assert torch.equal(mask[0], dense_mask()[0])
    for pad in (LENGTH - 1, 2 * LENGTH - 1):
        assert mask[1, 0, :, pad].nonzero().flatten().tolist() == [pad]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_flex_attention_gives_what_a_mask_gives(padded):
    # Two of flex attention's own blocks, so that it has something to skip.
    length, block = 128, 32
    generator = torch.Generator().manual_seed(0)
    noisy, clean = torch.randint(0, PAD, (2, 2, length), generator=generator)
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[1, -5:] = False
    rows = torch.tensor([[0, 5, 100], [3, 2, 90]])
    hidden = {}
    for attention in ("sdpa", "flex_attention"):
        model = make_model(layers=2, dtype=torch.float32, attn_implementation=attention).eval()
        backbone = Backbone(model, 1, block)
        context = backbone.context(noisy, visible if padded else None, rows)
        start = backbone.prefix(noisy, context, clean)
        memory = contextlib.nullcontext()
        hidden[attention] = backbone.suffix(start, torch.arange(6), context, memory)
    torch.testing.assert_close(hidden["flex_attention"], hidden["sdpa"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("boundary", [0, 3, 4, 7, 8])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_split_model_is_the_whole_model_under_the_mask(boundary, attention, padded):
    model = make_model(attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    noisy, clean = torch.randint(0, PAD, (2, 2, LENGTH), generator=generator)
    visible = torch.ones(2, LENGTH, dtype=torch.bool)
    if padded:
        visible[1, -3:] = False
    rows = torch.tensor([[0, 5, 8], [3, 2, 7]])

    backbone = Backbone(model, boundary, BLOCK)
    context = backbone.context(noisy, visible if padded else None, rows)
    start = backbone.prefix(noisy, context, clean)
    hidden = backbone.suffix(start, torch.arange(6), context, contextlib.nullcontext())
    logits = hidden @ backbone.head()[0].T

    def whole():
        logits = model(
            torch.cat((noisy, clean), dim=1),
            position_ids=torch.arange(LENGTH).repeat(2)[None],
            attention_mask=bias(visible),
            is_causal=False,
            use_cache=False,
        ).logits
        return logits.gather(1, rows[..., None].expand(-1, -1, VOCABULARY)).flatten(0, 1)

    expected = whole()
    model.set_attn_implementation("sdpa")
    truth = whole()
    if attention == "sdpa":  # float64 throughout
        assert (logits - truth).abs().max() <= 1e-9 * truth.abs().max()
    else:  # Hugging Face's eager attention rounds its softmax to float32
        assert_as_accurate("logits", logits, truth, expected, torch.float32)


def bias(visible):
    """[B, 1, 2L, 2L] 0 where a real token is seen; what padding sees is never read."""
    rule = torch.tensor([[sees(q, k) for k in range(2 * LENGTH)] for q in range(2 * LENGTH)])
    seen = rule & visible.repeat(1, 2)[:, None, None]
    least = torch.finfo(torch.float64).min
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, least)


def batch_of(diffusion, memory, shapes=((LENGTH, 4), (LENGTH - 3, 0))):
    collator = MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory, pad_to_multiple_of=BLOCK)
    return collator(make_features(shapes))


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_a_step_trains_every_parameter(scope):
    diffusion, memory = DiffusionConfig(block_size=BLOCK), MemoryConfig(rank=2, scope=scope)
    model = make_model()
    output = MemDLMObjective(model, diffusion, memory)(batch_of(diffusion, memory))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not output.inner.skipped.any()


def test_a_noisy_token_is_blind_to_its_own_clean_block():
    model, diffusion = make_model(), DiffusionConfig(block_size=BLOCK)
    batch = batch_of(diffusion, None)
    first = batch["anchor"]["rows"].clone()
    objective = MDLMObjective(model, diffusion)
    loss = objective(batch).loss
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, -BLOCK:] = (changed["input_ids"][:, -BLOCK:] + 1) % PAD
    assert torch.equal(objective(changed).loss, loss)  # no block follows the last
    changed["input_ids"][:, :BLOCK] = (changed["input_ids"][:, :BLOCK] + 1) % PAD
    assert (first >= BLOCK).any()
    assert not torch.equal(objective(changed).loss, loss)


def test_a_block_size_that_does_not_divide_is_refused():
    diffusion = DiffusionConfig(block_size=5)
    with pytest.raises(ValueError, match=r"block_size must divide .* got block_size 5 and 12"):
        MDLMObjective(make_model(), diffusion)(batch_of(diffusion, None))


def test_right_shifted_logits_are_refused():
    model = make_model()
    model.config.right_shift_logits = True
    with pytest.raises(ValueError, match=r"block_size must be None .* got 4"):
        MDLMObjective(model, DiffusionConfig(block_size=4))


@torch.no_grad()
def test_prompts_of_any_length_are_written():
    model = make_model().eval()
    memory = PromptMemory(
        model,
        DiffusionConfig(block_size=BLOCK),
        MemoryConfig(rank=2),
        mask_token_id=MASK,
        pad_token_id=PAD,
        vocab_size=VOCABULARY,
    )
    with memory.adapt([[1, 2, 3, 4, 5, 6], [7, 8, 9]]):
        assert memory._objective.fast_weights.param.any(dim=1).all()


def test_an_attention_without_such_a_mask_is_refused():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    diffusion = DiffusionConfig(block_size=BLOCK)
    with pytest.raises(ValueError, match="attn_implementation must be 'flex_attention'"):
        MDLMObjective(model, diffusion)(batch_of(diffusion, None))
