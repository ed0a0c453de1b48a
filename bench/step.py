"""What one training step costs: `python -m bench.step --preset dense_small --k 1 2 3 4`.

Four kinds of step on the same batches, interleaved in one process: `mdlm_all_rows` is what trainers
do today (logits and loss at every position), `mdlm` reads masked rows only, `memdlm_naive` is the
method written plainly, `memdlm` is ours. A step is forward, backward, and AdamW.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count
from transformers import AutoModelForCausalLM

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from bench.cases import StepCase, step_case
from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator, noise
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.oracle import draw_fast_weights, training_step

_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# The counter knows the GPU's attention kernels only.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _cpu_attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    # Five matrix products where the forward has two: the scores again, and four gradients.
    return sdpa_flop_count(query, key, value) * 5 // 2


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("tiny", "dense_small"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="inner steps")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--batches", type=int, default=3, help="batches in one round")
    parser.add_argument("--json", help="append one JSON line per variant to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    case = step_case(options.preset)
    steps = make_steps(case, options.k, options.batches, device, _DTYPES[options.dtype])

    rounds = {name: _run_all(step, options.batches) for name, step in steps.items()}
    times = interleaved_ms(rounds, options.repeats, device)
    facts = machine(device)
    rows = []
    for name, run in rounds.items():
        variant, _, k = name.partition(" K=")
        with FlopCounterMode(display=False) as counter:
            run()
        rows.append(
            {
                "bench": "step",
                "preset": options.preset,
                "dtype": options.dtype,
                "variant": variant,
                "k": int(k) if k else None,
                **percentiles([time_ms / options.batches for time_ms in times[name]]),
                "peak_mib": round(peak_mib(run, device), 1),
                "flops": counter.get_total_flops() // options.batches,
                **facts,
            }
        )
    write_rows(options.json, rows)
    _print_table(rows)


def make_steps(
    case: StepCase, inner_steps: list[int], batches: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[int], None]]:
    """A training step of each variant, as a function of the batch's number.

    Args:
        case: the shape.
        inner_steps: the K of `memdlm`, and the first of `memdlm_naive`.
        batches: how many batches there are.
        device, dtype: of the model.

    Returns:
        Variant (with " K=..." where it has one) to step.
    """
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(case.config).to(device, dtype)
    model: nn.Module = bare
    if case.outer_lora_rank is not None:
        rank = case.outer_lora_rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LORA_TARGETS)
        model = get_peft_model(bare, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    diffusion = DiffusionConfig()

    def optimised(loss_and_backward: Callable[[int], None]) -> Callable[[int], None]:
        def step(number: int) -> None:
            optimizer.zero_grad()
            loss_and_backward(number)
            optimizer.step()

        return step

    steps: dict[str, Callable[[int], None]] = {}
    plain = _batches(case, diffusion, None, batches, device)
    steps["mdlm_all_rows"] = optimised(lambda number: _all_rows(model, plain[number]))
    objective = MDLMObjective(model, diffusion)
    steps["mdlm"] = optimised(lambda number: objective(plain[number]).loss.backward())
    for k in inner_steps:
        memory = MemoryConfig(inner_steps=k)
        own = _batches(case, diffusion, memory, batches, device)
        naive = _naive_step(bare, case, diffusion, memory, own)
        steps[f"memdlm_naive K={k}"] = optimised(naive)
        ours = MemDLMObjective(model, diffusion, memory)
        steps[f"memdlm K={k}"] = optimised(
            lambda number, ours=ours, own=own: ours(own[number]).loss.backward()
        )
    return steps


def _run_all(step: Callable[[int], None], batches: int) -> Callable[[], None]:
    def run() -> None:
        for number in range(batches):
            step(number)

    return run


def _batches(
    case: StepCase,
    diffusion: DiffusionConfig,
    memory: MemoryConfig | None,
    count: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    vocab_size = case.config.vocab_size
    collator = MaskCollator(vocab_size - 1, 0, vocab_size, diffusion, memory)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        ids = torch.randint(1, vocab_size - 1, (case.batch_size, case.length), generator=generator)
        labels = ids.clone()
        labels[:, : int(case.prompt_share * case.length)] = -100
        features = [
            {
                "input_ids": ids[b],
                "labels": labels[b],
                "example": number * case.batch_size + b,
                "epoch": 0,
            }
            for b in range(case.batch_size)
        ]
        batches.append(send_to_device(collator(features), device))
    return batches


def _all_rows(model: nn.Module, batch: dict[str, Any]) -> None:
    """The step that masked diffusion trainers run today."""
    noisy, clean = batch["anchor"]["input_ids"], batch["input_ids"]
    logits = model(input_ids=noisy, is_causal=False, use_cache=False).logits  # [B, L, V]
    nll = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")  # [B, L]
    weight = (1 / batch["time"]).to(nll.dtype)[:, None] * (noisy != clean)
    loss = (nll * weight).sum() / batch["normalizer"]
    loss.backward()


def _naive_step(
    model: nn.Module,
    case: StepCase,
    diffusion: DiffusionConfig,
    memory: MemoryConfig,
    batches: list[dict[str, Any]],
) -> Callable[[int], None]:
    mask_id = case.config.vocab_size - 1
    fast_weights = draw_fast_weights(model, memory, 1)
    epsilon = diffusion.time_epsilon
    priority = [
        torch.stack(
            [
                torch.from_numpy(noise(0, 0, number * case.batch_size + b, case.length, epsilon)[1])
                for b in range(case.batch_size)
            ]
        )
        for number in range(len(batches))
    ]

    def step(number: int) -> None:
        batch = batches[number]
        training_step(
            model,
            batch["input_ids"],
            batch["labels"],
            None,
            batch["time"],
            priority[number],
            diffusion,
            mask_id,
            memory,
            fast_weights,
        )

    return step


def _print_table(rows: list[dict[str, Any]]) -> None:
    base = next(row for row in rows if row["variant"] == "mdlm_all_rows")
    ours = next(row for row in rows if row["variant"] == "mdlm")
    print(
        f"{'variant':<14}{'K':>3}{'p50 ms':>10}{'/all rows':>11}{'/mdlm':>8}"
        f"{'FLOPs/mdlm':>12}{'GFLOP':>9}{'peak MiB':>10}"
    )
    for row in rows:
        print(
            f"{row['variant']:<14}{row['k'] or '':>3}{row['p50_ms']:>10.1f}"
            f"{row['p50_ms'] / base['p50_ms']:>11.3f}{row['p50_ms'] / ours['p50_ms']:>8.3f}"
            f"{row['flops'] / ours['flops']:>12.3f}{row['flops'] / 1e9:>9.1f}"
            f"{row['peak_mib']:>10.1f}"
        )


if __name__ == "__main__":
    main()
