"""What `prefix_reuse: prompt_kv` changes, and what it saves: `python -m bench.prompt_kv`.

The demo's model is trained with the memory, exactly, as `memdlm demo` does. Then, on held-out text
by share of prompt, the memory is written twice from the same batch and the same initial fast
weights, exactly and with the anchor's prompt, and the two are compared: how far the fast weights
moved, the outer loss, the outer gradient. The same two numbers between a memory and none at all
tell what a small change is.
"""

import argparse
import copy
import datetime
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import memdlm.demo.run as demo
from bench.ratios import over_base
from bench.timing import interleaved_ms, machine, percentiles, write_rows
from memdlm.config import MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.demo.examples import BASE_FOLDER, load_text, load_tokenizer
from memdlm.demo.options import DemoOptions
from memdlm.objective import MemDLMObjective

PROMPT_SHARES = (0.5, 0.8, 0.9, 0.95)
INNER_STEPS = (2, 4)
_CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, and print one line for each prompt share and K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_steps", type=int, default=300, help="as many as the demo's")
    parser.add_argument("--batches", type=int, default=16, help="held-out batches of 8 x 256")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds over four batches")
    parser.add_argument("--json", type=Path, help="append one JSON line per case to this file")
    options = parser.parse_args(arguments)
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = machine(_CPU)
    model = trained_model(options.train_steps)
    print(f"{'prompt':>6} {'K':>2}  {'cosine':>8} {'loss':>9} {'gradient':>9} {'time':>6}")
    for share, k in itertools.product(PROMPT_SHARES, INNER_STEPS):
        batches = list(held_out_batches(share, k, options.batches))
        row = {
            "bench": "prompt_kv",
            "suite": None,
            "run": run,
            "model": "tiny",
            "train_steps": options.train_steps,
            "batch_size": demo.BATCH_SIZE,
            "length": demo.LENGTH,
            "prompt_share": share,
            "k": k,
            "batches": options.batches,
            **quality(model, batches, k),
            **times(model, batches[:4], k, options.repeats),
            **facts,
        }
        write_rows(options.json, [row])
        print(
            f"{share:>6.0%} {k:>2}  {row['fast_weight_cosine']:>8.6f} {row['loss_change']:>9.2e} "
            f"{row['gradient_change']:>9.2e} {over_base(row):>6.2f}"
        )


def trained_model(steps: int) -> nn.Module:
    """The demo's base after `steps` training steps with the exact memory."""
    options = DemoOptions(steps=steps)
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    arm = demo._make_arms(model, tokenizer, options.seed)["MemDLM"]
    batches = tqdm(demo._batches(options), total=steps, desc="training")
    for number, features in enumerate(batches):
        loss = demo._train_step(arm, features, demo._learning_rate(number, steps))
        batches.set_postfix(loss=f"{loss:.2f}")
    trained = arm.objective.model
    arm.objective.fast_weights.detach()
    return trained


def held_out_batches(share: float, k: int, count: int) -> Iterator[dict[str, Any]]:
    """Batches of held-out text; the first `share` of each sequence is prompt.

    Args:
        share: of the tokens, in [0, 1).
        k: inner steps.
        count: how many batches; the same text and noise for every share and K.
    """
    tokenizer, text, rng = load_tokenizer(), load_text("validation"), random.Random(0)
    collator = MaskCollator(
        tokenizer.mask_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
        demo.DIFFUSION,
        MemoryConfig(inner_steps=k, prefix_reuse="prompt_kv"),
    )
    prompt = round(share * demo.LENGTH)
    for number in range(count):
        features = []
        for row in range(demo.BATCH_SIZE):
            ids = text.window(rng, demo.LENGTH)
            labels = [-100] * prompt + ids[prompt:]
            example = number * demo.BATCH_SIZE + row
            features.append({"input_ids": ids, "labels": labels, "example": example, "epoch": 0})
        yield collator(features)


def quality(model: nn.Module, batches: list[dict[str, Any]], k: int) -> dict[str, float]:
    """Means over batches of what differs between an exact memory and an approximate one.

    Args:
        model: the trained model.
        batches: from `held_out_batches` with the same K.
        k: inner steps.

    Returns:
        `fast_weight_cosine`, between what the two inner loops added to the initial fast weights,
        and its minimum; `loss_change` |a - e| / e of the outer loss; `gradient_change`
        ||a - e|| / ||e|| and `gradient_cosine` of the outer gradient; and `memory_loss_change` and
        `memory_gradient_change`, the same with no memory at all for a.
    """
    sums: dict[str, float] = {}
    least = 1.0
    for batch in tqdm(batches, desc="comparing", leave=False):
        moved, loss, gradient = _outer(model, batch, MemoryConfig(inner_steps=k))
        other = MemoryConfig(inner_steps=k, prefix_reuse="prompt_kv")
        near_moved, near_loss, near_gradient = _outer(model, batch, other)
        _, off_loss, off_gradient = _outer(model, batch, None)
        cosine = _cosine(moved, near_moved)
        least = min(least, cosine)
        own = {
            "fast_weight_cosine": cosine,
            "loss_change": abs(near_loss - loss) / loss,
            "gradient_cosine": _cosine(gradient, near_gradient),
            "gradient_change": _distance(near_gradient, gradient),
            "memory_loss_change": abs(off_loss - loss) / loss,
            "memory_gradient_change": _distance(off_gradient, gradient),
        }
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + value / len(batches)
    means = {name: float(f"{value:.6g}") for name, value in sums.items()}
    return means | {"fast_weight_cosine_min": round(least, 6)}


def _outer(
    model: nn.Module, batch: dict[str, Any], memory: MemoryConfig | None
) -> tuple[Tensor, float, Tensor]:
    """What the inner loop added to the fast weights, the outer loss and its gradient, flat."""
    objective = MemDLMObjective(model, demo.DIFFUSION, memory or MemoryConfig())
    model.zero_grad()
    fast_weights = objective.fast_weights
    fast_weights.reset(batch["memory_seed"])
    start = fast_weights.param.clone()
    output = objective(batch, memory_enabled=memory is not None)
    output.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    fast_weights.detach()
    return fast_weights.param - start, output.loss.item(), torch.cat(gradients).clone()


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def times(model: nn.Module, batches: list[dict[str, Any]], k: int, repeats: int) -> dict[str, Any]:
    """Times of a forward and backward, in alternation, for one batch.

    Args:
        model: the trained model.
        batches: what one round runs through.
        k: inner steps.
        repeats: rounds.

    Returns:
        `times_ms` of the approximate step with their percentiles, and `base_times_ms`: those of the
        exact one in the same rounds.
    """
    runs = {}
    for reuse in ("none", "prompt_kv"):
        memory = MemoryConfig(inner_steps=k, prefix_reuse=reuse)
        objective = MemDLMObjective(copy.deepcopy(model), demo.DIFFUSION, memory)

        def run(objective: MemDLMObjective = objective) -> None:
            for batch in batches:
                objective.zero_grad()
                objective(batch).loss.backward()

        runs[reuse] = run
    per_batch = {
        reuse: [round(ms / len(batches), 3) for ms in own]
        for reuse, own in interleaved_ms(runs, repeats, _CPU).items()
    }
    return {
        "times_ms": per_batch["prompt_kv"],
        **percentiles(per_batch["prompt_kv"]),
        "base_times_ms": per_batch["none"],
    }


if __name__ == "__main__":
    main()
