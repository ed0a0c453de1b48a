"""A layer of stacked experts under an outer LoRA: `python -m bench.experts`.

Forward and backward of `ours` (PEFT's factors through grouped_lora_linear), of `peft` (PEFT's own
forward, which adds B A to every expert's weights), and of the frozen layer alone.
"""

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm.experts import IMPLEMENTATION, run_experts

_TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
# The layer of the preset llada_moe_small, and a quarter of a layer of LLaDA-MoE.
_CASES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 256, "width": 128, "experts": 64, "top_k": 8, "dtype": torch.float32},
    "llada_moe_quarter": {
        "hidden": 2_048,
        "width": 1_024,
        "experts": 16,
        "top_k": 4,
        "dtype": torch.bfloat16,
    },
}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1_024, help="tokens")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--json", help="append one JSON line per measurement to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = machine(device)
    for name, case in _CASES.items():
        variants = _variants(case, options.rows, options.rank, device)
        times = interleaved_ms(variants, options.repeats, device)
        rows = [
            {
                "bench": "experts",
                "case": name,
                "variant": variant,
                "rows": options.rows,
                "rank": options.rank,
                "dtype": str(case["dtype"]).removeprefix("torch."),
                **percentiles(times[variant]),
                "peak_mib": round(peak_mib(run, device), 1),
                **facts,
            }
            for variant, run in variants.items()
        ]
        write_rows(options.json, rows)
        for row in rows:
            print(
                f"{name:<20}{row['variant']:<8}{row['p50_ms']:>10.1f} ms{row['peak_mib']:>9.1f} MiB"
            )


def _variants(case: dict[str, Any], count: int, rank: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=case["hidden"],
        intermediate_size=case["width"],
        num_experts=case["experts"],
        num_experts_per_tok=case["top_k"],
    )
    config._experts_implementation = IMPLEMENTATION
    stacked = OlmoeExperts(config).to(device, case["dtype"])
    for parameter in stacked.parameters():
        nn.init.normal_(parameter, std=0.02)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=_TARGETS)
    model = get_peft_model(nn.ModuleDict({"experts": stacked}), lora, autocast_adapter_dtype=False)
    wrapped = model.base_model.model["experts"]

    options = {"device": device, "dtype": case["dtype"]}
    rows = torch.randn(count, case["hidden"], **options).requires_grad_()
    grad = torch.randn(count, case["hidden"], **options)
    scores = torch.randn(count, case["experts"], device=device).softmax(-1)
    weight, index = scores.topk(case["top_k"])
    weight = weight.to(case["dtype"])
    leaves = [rows, *(p for p in model.parameters() if p.requires_grad)]
    return {
        "ours": lambda: torch.autograd.grad(
            run_experts(wrapped, rows, weight, index), leaves, grad
        ),
        "peft": lambda: torch.autograd.grad(wrapped(rows, index, weight), leaves, grad),
        "frozen": lambda: torch.autograd.grad(stacked(rows, index, weight), rows, grad),
    }


if __name__ == "__main__":
    main()
