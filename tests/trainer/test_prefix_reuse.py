"""`prefix_reuse`: exact where the prompt does not see the response, and elsewhere what it says."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import memdlm.objective as objective_module
import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from memdlm.backbone import Backbone
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator, changed_rows
from memdlm.objective import MemDLMObjective, anchor_boundary
from memdlm.prompt_memory import PromptMemory
from memdlm.recorded_keys import RecordedKeys
from tests.families import make_family_model
from tests.tiny import MASK, PAD, RAGGED, VOCABULARY, make_features, make_model

DIFFUSION = DiffusionConfig()
BOUND = 1e-9
STRATEGIES = [
    ("anchor_consistent", 2),
    ("anchor_consistent", 4),
    ("pre_anchor_only", 2),
    ("progressive", 3),
]


def make_batch(memory, diffusion=DIFFUSION, shapes=RAGGED, right_shift=False, pad=1):
    collator = MaskCollator(
        MASK,
        PAD,
        VOCABULARY,
        diffusion,
        memory,
        right_shift_logits=right_shift,
        pad_to_multiple_of=pad,
    )
    return collator(make_features(shapes))


def run(make, memory, diffusion=DIFFUSION, **batch_options):
    """Outer loss, its gradients, the inner losses and the fast weights."""
    model = make()
    objective = MemDLMObjective(model, diffusion, memory)
    batch = make_batch(
        memory, diffusion, right_shift=objective.backbone.right_shift_logits, **batch_options
    )
    output = objective(batch)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output.loss.detach(), output.inner.loss, objective.fast_weights.param, *gradients]


def both(make, memory, **options):
    reusing = dataclasses.replace(memory, prefix_reuse="prompt_kv")
    return run(make, reusing, **options), run(make, memory, **options)


def largest_error(ours, exact):
    assert len(ours) == len(exact)
    pairs = zip(ours, exact, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


@pytest.fixture
def prompt_sees_no_response(monkeypatch):
    """Whatever attends to every token now leaves the prompt's view of the response out."""
    plain = Backbone.context

    def context(self, input_ids, attention_mask, rows):
        made = plain(self, input_ids, attention_mask, rows)
        batch_size, length = input_ids.shape
        prompts = [prompt for _, prompt in RAGGED] * (batch_size // len(RAGGED))
        is_prompt = torch.arange(length) < torch.tensor(prompts)[:, None]  # [B, L]
        seen = ~is_prompt[:, :, None] | is_prompt[:, None, :]  # [B, L, L]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, :]
        return dataclasses.replace(made, mask=seen[:, None])

    monkeypatch.setattr(Backbone, "context", context)


@pytest.mark.usefixtures("prompt_sees_no_response")
@pytest.mark.parametrize(("strategy", "inner_steps"), STRATEGIES)
@pytest.mark.parametrize("scope", ["batch", "sample"])
# The last leaves no attention behind the boundary: the prefix ends with the loss rows alone.
@pytest.mark.parametrize(
    ("target", "layer_fraction"), [("ffn", 0.5), ("ffn+attention", 0.5), ("ffn", 0.25)]
)
def test_exact_where_the_prompt_does_not_see_the_response(
    strategy, inner_steps, scope, target, layer_fraction
):
    memory = MemoryConfig(
        strategy=strategy,
        inner_steps=inner_steps,
        scope=scope,
        target=target,
        layer_fraction=layer_fraction,
        rank=4,
    )
    assert largest_error(*both(make_model, memory)) < BOUND


@pytest.mark.usefixtures("prompt_sees_no_response")
@pytest.mark.parametrize("family", ["llada", "llada_moe", "llada2", "olmoe"])
@pytest.mark.parametrize("layer_fraction", [0.5, 0.25])
def test_exact_for_every_family(family, layer_fraction):
    memory = MemoryConfig(layer_fraction=layer_fraction, rank=4)
    assert largest_error(*both(lambda: make_family_model(family), memory)) < BOUND


@pytest.mark.usefixtures("prompt_sees_no_response")
def test_exact_with_recomputed_layers():
    def make():
        model = make_model()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    assert largest_error(*both(make, MemoryConfig(layer_fraction=0.5, rank=4))) < BOUND


@pytest.mark.parametrize("family", ["llama", "llada2"])
@pytest.mark.parametrize("layer_fraction", [0.5, 0.25])
def test_exact_in_block_diffusion(family, layer_fraction):
    diffusion = DiffusionConfig(block_size=4)
    memory = MemoryConfig(inner_steps=3, layer_fraction=layer_fraction, rank=4)
    make = make_model if family == "llama" else lambda: make_family_model(family)
    assert largest_error(*both(make, memory, diffusion=diffusion, pad=4)) < BOUND


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_exact_under_an_outer_lora(family):
    def make():
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        stacked = ["experts.gate_up_proj", "experts.down_proj"] if "moe" in family else None
        lora = LoraConfig(r=4, target_modules=attention, target_parameters=stacked)
        model = get_peft_model(make_family_model(family), lora, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)
        return model.train()

    diffusion = DiffusionConfig(block_size=4)
    memory = MemoryConfig(layer_fraction=0.5, rank=4)
    assert largest_error(*both(make, memory, diffusion=diffusion, pad=4)) < BOUND


def test_under_autocast_as_near_as_bfloat16_is():
    """Keys, values and activations may have another dtype than the weights."""
    diffusion = DiffusionConfig(block_size=4)
    memory = MemoryConfig(layer_fraction=0.5, rank=4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, exact = both(
            lambda: make_model(dtype=torch.float32), memory, diffusion=diffusion, pad=4
        )
    assert largest_error(ours[:2], exact[:2]) < 2 * torch.finfo(torch.bfloat16).eps


def test_an_anchor_without_its_keys_is_refused():
    memory = MemoryConfig(layer_fraction=0.5, rank=4, prefix_reuse="prompt_kv")
    objective = MemDLMObjective(make_model(), DIFFUSION, memory)
    batch = make_batch(memory)
    anchor = anchor_boundary(objective.backbone, batch)
    with pytest.raises(ValueError, match="recorded must be"):
        objective.write_memory(batch, anchor)


@pytest.mark.parametrize("family", ["llama", "dream"])
def test_exact_where_there_is_no_prompt(family):
    make = make_model if family == "llama" else lambda: make_family_model(family)
    memory = MemoryConfig(layer_fraction=0.5, rank=4)
    shapes = tuple((length, 0) for length, _ in RAGGED)
    assert largest_error(*both(make, memory, shapes=shapes)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llada_moe", "dream"])
@pytest.mark.parametrize(("target", "boundary"), [("ffn+attention", 4), ("ffn", 5)])
def test_elsewhere_the_prompt_is_the_anchors(family, target, boundary):
    """Against a pass over all tokens, in which every half's prompt is put back to the anchor's."""
    model = make_model() if family == "llama" else make_family_model(family)
    memory = MemoryConfig(
        target=target, layer_fraction=0.5, rank=4, inner_steps=3, prefix_reuse="prompt_kv"
    )
    objective = MemDLMObjective(model, DIFFUSION, memory)
    backbone = objective.backbone
    assert backbone.boundary == boundary
    batch = make_batch(memory, right_shift=backbone.right_shift_logits)
    recorded = RecordedKeys()
    anchor = anchor_boundary(backbone, batch, recorded)
    mask = batch["attention_mask"]
    ids = batch["anchor"]["input_ids"]
    of_anchor = halves(backbone, ids, mask, boundary)
    torch.testing.assert_close(anchor.activations.hidden, of_anchor[-1], rtol=BOUND, atol=BOUND)

    changed = torch.zeros_like(ids, dtype=torch.bool).scatter(1, batch["changed"], True)
    approximated = 0.0
    for state in batch["trajectory"][:-1]:
        own = backbone.prefix_of_changes(
            state["input_ids"],
            backbone.context(ids, mask, state["rows"]),
            batch["changed"],
            anchor.activations,
            recorded,
        )
        expected = halves(backbone, state["input_ids"], mask, boundary, of_anchor, changed)[-1]
        torch.testing.assert_close(own.hidden, expected, rtol=BOUND, atol=BOUND)
        exact = halves(backbone, state["input_ids"], mask, boundary)[-1]
        approximated = max(approximated, float((own.hidden - exact)[~changed & mask].abs().max()))
    assert approximated > 1e-3


def halves(backbone, ids, mask, count, put_back=None, changed=None):
    """The hidden state before each of the first `count` halves and behind them, in plain words."""
    context = backbone.context(ids, mask, ids[:, :1])
    states = [backbone.decoder.embed_tokens(ids)]
    for half in range(count):
        layer, hidden = backbone.layers[half // 2], states[-1]
        if put_back is not None:
            hidden = torch.where(changed[..., None], hidden, put_back[half])
        if half % 2 == 0:
            normed = layer.input_layernorm(hidden)
            part, _ = layer.self_attn(
                normed, position_embeddings=context.rotary, attention_mask=mask[:, None, None, :]
            )
        else:
            part = layer.mlp(layer.post_attention_layernorm(hidden))
        states.append(hidden + part)
    if put_back is not None:
        states[-1] = torch.where(changed[..., None], states[-1], put_back[count])
    return states


def test_the_keys_are_forgotten_after_the_inner_loop(monkeypatch):
    kept = []

    def recorder():
        kept.append(RecordedKeys())
        return kept[-1]

    monkeypatch.setattr(objective_module, "RecordedKeys", recorder)
    memory = MemoryConfig(layer_fraction=0.5, rank=4, prefix_reuse="prompt_kv")
    objective = MemDLMObjective(make_model(), DIFFUSION, memory)
    objective(make_batch(memory)).loss.backward()
    (recorded,) = kept
    with pytest.raises(KeyError):
        recorded[0]


def test_nothing_is_recorded_without_a_noisier_state():
    for strategy, inner_steps in (("anchor_only", 2), ("anchor_consistent", 1)):
        memory = MemoryConfig(strategy=strategy, inner_steps=inner_steps, prefix_reuse="prompt_kv")
        objective = MemDLMObjective(make_model(), DIFFUSION, memory)
        assert not objective._reuses(make_batch(memory))


def test_a_prompt_memory_is_the_same():
    model = make_model().eval()
    written = []
    for reuse in ("none", "prompt_kv"):
        memory = PromptMemory(
            model,
            DIFFUSION,
            MemoryConfig(layer_fraction=0.5, rank=4, prefix_reuse=reuse),
            mask_token_id=MASK,
            pad_token_id=PAD,
            vocab_size=VOCABULARY,
        )
        with memory.adapt([[1, 2, 3, 4, 5], [6, 7, 8]]):
            written.append(memory._objective.fast_weights.param.clone())
        memory.detach()
    torch.testing.assert_close(*written, rtol=BOUND, atol=BOUND)


def test_the_prefix_of_the_noisier_states_costs_the_responses_share():
    shapes = ((40, 30),) * 4

    def flops(reuse, inner_steps):
        memory = MemoryConfig(
            inner_steps=inner_steps, layer_fraction=0.5, rank=4, prefix_reuse=reuse
        )
        objective = MemDLMObjective(make_model(), DIFFUSION, memory)
        batch = make_batch(memory, shapes=shapes)
        backbone = objective.backbone
        context = backbone.context(batch["input_ids"], None, batch["anchor"]["rows"])
        with torch.no_grad(), FlopCounterMode(display=False) as whole:
            backbone.prefix(batch["input_ids"], context)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            objective.write_memory(batch)
        return counter.get_total_flops(), whole.get_total_flops()

    exact, prefix = flops("none", 2)
    reusing, _ = flops("prompt_kv", 2)
    # A quarter of every sequence is response; its attention still reads all keys.
    assert exact - reusing == pytest.approx(0.75 * prefix, rel=1e-6)


def test_which_positions_are_computed():
    maskable = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1], [0] * 8]).bool()
    assert changed_rows(maskable).tolist() == [[2, 3], [7, 7], [0, 0]]
    shifted = changed_rows(maskable, right_shift_logits=True)
    assert shifted.tolist() == [[1, 2, 3], [6, 7, 7], [0, 0, 0]]
    blocks = changed_rows(maskable, block_size=4)
    assert blocks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 0, 0]]
    assert changed_rows(maskable[:, 1:], block_size=4).tolist()[1] == [4, 5, 6, 6]
