"""Models and batches small enough to compare in float64, and the same batch for the naive twin."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from memdlm.config import DiffusionConfig
from memdlm.data.collator import MaskCollator, noise
from memdlm.objective import MemDLMObjective
from tests import oracle

VOCABULARY, MASK, PAD = 61, 60, 59
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
# (length, prompt length) of five examples: a prompt and a response, all response, no response, a
# single response token, all response.
RAGGED = ((12, 4), (9, 0), (7, 7), (5, 4), (11, 0))
EVEN = ((10, 3), (10, 0), (10, 9))


def make_model(family="llama", layers=4, tied=False, dtype=torch.float64, **options):
    """A causal LM as Hugging Face makes it, with weights (norms too) far from their start.

    In float64 its norms compute in float64 as well (`norms_in_float64`): Hugging Face's round to
    float32 inside, where a difference of 1e-16 may become one of 1e-8.
    """
    config = CONFIGS[family](
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if dtype == torch.float64:
        norms_in_float64(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name:
                parameter.add_(1)
    return model.train()


def norms_in_float64(model):
    """Replace the norms of Hugging Face."""
    norms = [name for name, module in model.named_modules() if "RMSNorm" in repr(type(module))]
    for name in norms:
        old = model.get_submodule(name)
        new = torch.nn.RMSNorm(old.weight.shape, old.variance_epsilon, dtype=torch.float64)
        model.set_submodule(name, new)


def make_features(shapes=RAGGED, epoch=0, seed=0):
    """Examples for the collator. The one-token response of `RAGGED` is left unmasked."""
    generator = np.random.default_rng(seed)
    features = []
    for number, (length, prompt) in enumerate(shapes):
        ids = generator.integers(0, PAD, length)
        labels = np.where(np.arange(length) < prompt, -100, ids)
        example = number
        while length - prompt == 1 and _is_masked(example, epoch, length):
            example += len(shapes)
        features.append(
            {"input_ids": ids.tolist(), "labels": labels.tolist(), "example": example}
            | {"epoch": epoch}
        )
    return features


def _is_masked(example, epoch, length):
    time, priority, _ = noise(0, epoch, example, length, DiffusionConfig().time_epsilon)
    return priority[-1] < time


def make_collator(diffusion, memory=None):
    return MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory)


def make_batch(diffusion, memory=None, features=None):
    return make_collator(diffusion, memory)(make_features() if features is None else features)


def priorities(features, width, diffusion):
    """[B, L] the draws u of the examples, as the collator has them."""
    u = torch.zeros(len(features), width, dtype=torch.float64)
    for row, feature in zip(u, features, strict=True):
        length = len(feature["input_ids"])
        _, own, _ = noise(0, feature["epoch"], feature["example"], length, diffusion.time_epsilon)
        row[:length] = torch.from_numpy(own)
    return u


def initial_fast_weights(objective, model, batch):
    """The draw of this batch, as the naive twin takes it: a dict for each set, names of `model`."""
    objective.fast_weights.reset(batch["memory_seed"])
    named = objective.fast_weights.named()
    names = {}
    for name in oracle.adapted_modules(model, objective.memory):
        names[name.split("layers.")[-1]] = name
    assert set(named) == set(names)
    per_sample = objective.memory.scope == "sample"
    return [
        {
            names[ours]: tuple((t[s] if per_sample else t).detach().clone() for t in tensors)
            for ours, tensors in named.items()
        }
        for s in range(len(batch["input_ids"]) if per_sample else 1)
    ]


def naive_step(model, batch, features, diffusion, memory=None, fast_weights=(), normalizer=None):
    """The naive twin's training step on a batch of the collator."""
    ids = batch["input_ids"]
    return oracle.training_step(
        model,
        ids,
        batch["labels"],
        batch.get("attention_mask"),
        batch["time"],
        priorities(features, ids.shape[1], diffusion),
        diffusion,
        MASK,
        memory,
        fast_weights,
        normalizer,
    )


def gradients(model):
    """Name to gradient of every trainable parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def run(model, diffusion, memory, features, **options):
    """One step of ours: the objective and its output; the gradients are in the model."""
    objective = MemDLMObjective(model, diffusion, memory)
    output = objective(make_batch(diffusion, memory, features), **options)
    output.loss.backward()
    return objective, output
