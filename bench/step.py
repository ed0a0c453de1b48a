"""What one training step costs: `python -m bench.step --preset dense_small --k 1 2 3 4`.

Four kinds of step on the same batches, interleaved in one process: `mdlm_all_rows` is what trainers
do today (logits and loss at every position), `mdlm` reads masked rows only, `memdlm_naive` is the
method written plainly, `memdlm` is ours. A step is forward, backward, and AdamW. Where the model
has experts, the first and the third loop over them, as published models do.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count
from transformers import AutoModelForCausalLM

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from bench.cases import PRESETS, StepCase, step_case
from bench.looped_experts import with_looped_experts
from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator, noise
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.oracle import draw_fast_weights, training_step

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_FFN = ["gate_proj", "up_proj", "down_proj"]
_STACKED = ["experts.gate_up_proj", "experts.down_proj"]
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


@register_flop_formula(torch.ops.aten._grouped_mm)
def _grouped_flops(rows: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # [N, in] by [E, in, out], or for a weight's gradient [in, N] by [N, out].
    return 2 * rows[0] * rows[1] * weight[-1]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument(
        "--outer_lora",
        choices=("all", "attention"),
        default="all",
        help="what carries the outer LoRA, in a preset that has one",
    )
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="inner steps")
    parser.add_argument("--without_naive", action="store_true", help="leave out memdlm_naive")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--batches", type=int, default=3, help="batches in one round")
    parser.add_argument("--json", help="append one JSON line per variant to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    case = step_case(options.preset)
    steps = make_steps(
        case,
        options.k,
        options.batches,
        device,
        _DTYPES[options.dtype],
        options.outer_lora,
        naive=not options.without_naive,
    )
    check_losses(steps)

    rounds = {name: _run_all(step, options.batches) for name, step in steps.items()}
    times = interleaved_ms(rounds, options.repeats, device)
    facts = machine(device)
    rows = []
    for name, run in rounds.items():
        variant, _, k = name.partition(" K=")
        with FlopCounterMode(display=False) as counter:
            run()
        row = {
            "bench": "step",
            "preset": options.preset,
            "dtype": options.dtype,
            "outer_lora": options.outer_lora if case.outer_lora_rank else None,
            "variant": variant,
            "k": int(k) if k else None,
            **percentiles([time_ms / options.batches for time_ms in times[name]]),
            "peak_mib": round(peak_mib(run, device), 1),
            "flops": counter.get_total_flops() // options.batches,
            **facts,
        }
        # At once: what was measured stays, should a later variant fail.
        write_rows(options.json, [row])
        rows.append(row)
    _print_table(rows)


def make_steps(
    case: StepCase,
    inner_steps: list[int],
    batches: int,
    device: torch.device,
    dtype: torch.dtype,
    outer_lora: str = "all",
    *,
    naive: bool = True,
) -> dict[str, Callable[[int], Tensor]]:
    """A training step of each variant, as a function of the batch's number.

    Args:
        case: the shape.
        inner_steps: the K of `memdlm`, and the first of `memdlm_naive`.
        batches: how many batches there are.
        device, dtype: of the model.
        outer_lora: "all" or "attention", what carries the outer LoRA.
        naive: whether `memdlm_naive` is among the variants.

    Returns:
        Variant (with " K=..." where it has one) to a step that returns its loss.
    """
    torch.manual_seed(0)
    with device:
        bare = AutoModelForCausalLM.from_config(case.config, dtype=dtype)
    # A model of its own: ours lets PEFT's layers run by another function.
    if case.outer_lora_rank is not None:
        bare.requires_grad_(False)
    looped = with_looped_experts(bare, share_weights=case.outer_lora_rank is not None)
    diffusion = DiffusionConfig()
    model, optimised = _trained(bare, case.outer_lora_rank, outer_lora)
    published, optimised_published = _trained(looped, case.outer_lora_rank, outer_lora)

    steps: dict[str, Callable[[int], Tensor]] = {}
    plain = make_batches(case, diffusion, None, batches, device)
    steps["mdlm_all_rows"] = optimised_published(lambda n: _all_rows(published, plain[n]))
    objective = MDLMObjective(model, diffusion)
    steps["mdlm"] = optimised(lambda n: _backward(objective, plain[n]))
    for k in inner_steps:
        memory = MemoryConfig(inner_steps=k)
        own = make_batches(case, diffusion, memory, batches, device)
        if naive:
            plainly = _naive_step(looped, case, diffusion, memory, own)
            steps[f"memdlm_naive K={k}"] = optimised_published(plainly)
        ours = MemDLMObjective(model, diffusion, memory)
        steps[f"memdlm K={k}"] = optimised(lambda n, ours=ours, own=own: _backward(ours, own[n]))
    return steps


def check_losses(steps: dict[str, Callable[[int], Tensor]]) -> None:
    """Run the first step of both plain variants, whose LoRA is still zero: the losses must agree.

    Raises:
        ValueError: they do not.
    """
    losses = {name: float(steps[name](0)) for name in ("mdlm_all_rows", "mdlm")}
    all_rows, masked = losses.values()
    if abs(all_rows - masked) > 0.01 * abs(all_rows):
        raise ValueError(f"the variants must compute the same loss, got {losses}")


def _trained(
    bare: nn.Module, rank: int | None, outer_lora: str
) -> tuple[nn.Module, Callable[[Callable[[int], Tensor]], Callable[[int], Tensor]]]:
    """The model with its LoRA, and what makes an optimised step of a forward and backward."""
    model = bare
    if rank is not None:
        sparse = any(name.endswith(_STACKED[0]) for name, _ in bare.named_parameters())
        everything = outer_lora == "all"
        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=_ATTENTION + (_FFN if everything else []),
            target_parameters=_STACKED if sparse and everything else None,
        )
        model = get_peft_model(bare, lora)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def optimised(loss_and_backward: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        def step(number: int) -> Tensor:
            optimizer.zero_grad()
            loss = loss_and_backward(number)
            optimizer.step()
            return loss

        return step

    return model, optimised


def _backward(objective: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss = objective(batch).loss
    loss.backward()
    return loss.detach()


def _run_all(step: Callable[[int], Tensor], batches: int) -> Callable[[], None]:
    def run() -> None:
        for number in range(batches):
            step(number)

    return run


def make_batches(
    case: StepCase,
    diffusion: DiffusionConfig,
    memory: MemoryConfig | None,
    count: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Batches of random tokens.

    Args:
        case: the shape.
        diffusion, memory: of the collator.
        count: how many batches.
        device: where they are put.

    Returns:
        What `MaskCollator` makes, `count` times.
    """
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


def _all_rows(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The step that masked diffusion trainers run today."""
    noisy, clean = batch["anchor"]["input_ids"], batch["input_ids"]
    logits = model(input_ids=noisy, is_causal=False, use_cache=False).logits  # [B, L, V]
    nll = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")  # [B, L]
    weight = (1 / batch["time"]).to(nll.dtype)[:, None] * (noisy != clean)
    loss = (nll * weight).sum() / batch["normalizer"]
    loss.backward()
    return loss.detach()


def _naive_step(
    model: nn.Module,
    case: StepCase,
    diffusion: DiffusionConfig,
    memory: MemoryConfig,
    batches: list[dict[str, Any]],
) -> Callable[[int], Tensor]:
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

    def step(number: int) -> Tensor:
        batch = batches[number]
        done = training_step(
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
        return done.outer_loss

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
