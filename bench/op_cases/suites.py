"""Which cases of the ops make up a suite."""

import torch

from bench.op_cases import cross_entropy, experts, fast_weights, ffn, lora
from bench.op_cases.case import Case

_F32, _BF16 = torch.float32, torch.bfloat16
_GRADIENTS = lora.GRADIENTS
_INNER, _OUTER = ("A", "B"), ("x", "base")
_GATED_INNER, _GATED_OUTER = ("x", "gate", "up", "A", "B"), ("x", "gate", "up")


def op_cases(suite: str) -> list[Case]:
    """The cases of a suite.

    Args:
        suite: "tiny" (every op in a moment, for tests), "quick" and "cpu" (a CPU), or "gpu" (the
            sizes of real models, with bounds).

    Returns:
        Cases, all different in op, name and dtype.

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in _SUITES:
        raise ValueError(f"suite must be one of {', '.join(_SUITES)}, got {suite!r}")
    return _SUITES[suite]()


def _tiny() -> list[Case]:
    sizes = (48, 20)
    return [
        case
        for dtype in (_F32, _BF16)
        for case in (
            cross_entropy.linear_case(24, 7, 16, 50, dtype, chunks_mib=(1,), bounds=True),
            cross_entropy.linear_case(24, 7, 16, 50, dtype, head_trains=True),
            cross_entropy.logits_case(24, 7, 50, dtype, bounds=True),
            cross_entropy.kl_case(7, 16, 50, dtype, bounds=True),
            *(lora.lora_case(1, 12, 16, 24, dtype, wanted, rank=8) for wanted in _GRADIENTS),
            lora.lora_case(2, 12, 16, 24, dtype, _INNER, rank=8, bounds=True),
            lora.lora_case(1, 12, 16, 24, dtype, ("B",), rank=8, B_is_zero=True),
            experts.linear_case(40, 3, 16, 24, dtype, ()),
            experts.linear_case(40, 3, 16, 24, dtype, ("x",), bounds=True),
            experts.lora_case(1, 3, 40, 16, 32, 2, dtype, ("x", "base", *_INNER), rank=8),
            experts.lora_case(2, 3, 40, 16, 32, 1, dtype, _INNER, rank=8, bounds=True),
            experts.combine_case(20, 16, 2, dtype, bounds=True),
            experts.spread_case(20, 16, 2, dtype, bounds=True),
            experts.layer_case(20, 16, 8, 4, 2, dtype, rank=8),
            ffn.activation_case(12, 24, dtype, bounds=True),
            ffn.dense_case(12, 16, 24, dtype, _GATED_INNER, rank=8, bounds=True),
            ffn.experts_case(40, 3, 16, 24, dtype, ("x", "gate", *_INNER), rank=8, bounds=True),
            ffn.ffn_case(40, 3, 16, 24, dtype, backward=False, rank=8),
            ffn.ffn_case(40, 3, 16, 24, dtype, backward=True, rank=8),
            fast_weights.sgd_case(2, sizes, dtype, bounds=True),
            fast_weights.sgd_case(1, sizes, _BF16, cast=True) if dtype == _BF16 else None,
            fast_weights.function_case(2, sizes, dtype, bounds=True),
            fast_weights.reset_case(2, 4 * sizes, dtype, bounds=True),
            fast_weights.reset_case(1, sizes, _BF16, cast=True) if dtype == _BF16 else None,
        )
        if case is not None
    ]


def _quick() -> list[Case]:
    return [
        cross_entropy.linear_case(1_024, 128, 512, 8_192, _F32),
        cross_entropy.linear_case(1_024, 128, 512, 8_192, _F32, head_trains=True),
        # Large buffers may come fresh from the kernel each time: what is timed is that, or not.
        cross_entropy.logits_case(512, 64, 4_096, _F32),
        cross_entropy.kl_case(128, 512, 8_192, _F32),
        *(lora.lora_case(1, 1_024, 384, 1_024, _F32, wanted) for wanted in _GRADIENTS),
        lora.lora_case(1, 1_024, 384, 1_024, _F32, ("B",), B_is_zero=True),
        experts.linear_case(4_096, 32, 256, 256, _F32, ("x",)),
        *(
            experts.lora_case(1, 32, 4_096, 256, 256, 2, _F32, wanted)
            for wanted in (_INNER, _OUTER, ())
        ),
        experts.combine_case(1_024, 256, 8, _F32),
        experts.spread_case(1_024, 256, 8, _F32),
        experts.layer_case(1_024, 256, 128, 64, 8, _F32),
        ffn.dense_case(1_024, 384, 1_024, _F32, _GATED_INNER),
        ffn.activation_case(1_024, 1_024, _F32),
        fast_weights.sgd_case(1, (22_528,) * 24, _F32),
        fast_weights.sgd_case(1, (2_048,) * 200, _F32),
        fast_weights.function_case(1, (22_528,) * 24, _F32),
        fast_weights.reset_case(1, (22_528,) * 24, _F32),
    ]


def _cpu() -> list[Case]:
    layers = ((1, 1_024, 1_024, 384), (1, 2_048, 1_024, 4_096), (8, 256, 384, 1_024))
    # The last has the groups of a large model: 1,024 rows.
    groups = (
        (1, 64, 8_192, 256, 256, 1),
        (8, 64, 8_192, 256, 256, 2),
        (1, 2, 2_048, 2_048, 2_048, 2),
    )
    more = [
        cross_entropy.linear_case(2_048, 205, 512, 32_000, _F32),
        cross_entropy.linear_case(2_048, 205, 512, 32_000, _F32, head_trains=True),
        cross_entropy.linear_case(2_048, 1_024, 512, 32_000, _F32),
        cross_entropy.logits_case(2_048, 205, 32_000, _F32),
        cross_entropy.kl_case(205, 512, 32_000, _F32),
        *(lora.lora_case(*layer, _F32, wanted) for layer in layers for wanted in (_INNER, _OUTER)),
        *(
            experts.lora_case(*group, _F32, wanted)
            for group in groups
            for wanted in (_INNER, _OUTER)
        ),
        experts.lora_case(1, 64, 8_192, 256, 256, 2, _F32, ("x", "base", *_INNER)),
        *(experts.linear_case(8_192, 64, 256, 256, _F32, wanted) for wanted in ((), ("x",))),
        *(
            experts.lora_case(1, 64, 8_192, 256, 256, 2, _F32, wanted)
            for wanted in (_INNER, _OUTER, ())
        ),
        ffn.dense_case(1_024, 384, 1_024, _F32, _GATED_OUTER),
        ffn.experts_case(8_192, 64, 256, 128, _F32, ("x", "gate", *_INNER)),
        fast_weights.sgd_case(8, (22_528,) * 24, _F32),
        fast_weights.sgd_case(1, (200_000,) * 200, _F32),
        fast_weights.reset_case(8, (22_528,) * 24, _F32),
        fast_weights.reset_case(1, (200_000,) * 20, _F32),
    ]
    narrow = [
        cross_entropy.linear_case(2_048, 205, 512, 32_000, _BF16),
        cross_entropy.linear_case(2_048, 205, 512, 32_000, _BF16, head_trains=True),
        cross_entropy.logits_case(2_048, 205, 32_000, _BF16),
        cross_entropy.kl_case(205, 512, 32_000, _BF16),
        *(lora.lora_case(1, 1_024, 384, 1_024, _BF16, wanted) for wanted in _GRADIENTS),
        experts.linear_case(8_192, 64, 256, 256, _BF16, ("x",)),
        *(
            experts.lora_case(1, 64, 8_192, 256, 256, 2, _BF16, wanted)
            for wanted in (_INNER, _OUTER, ())
        ),
        experts.combine_case(1_024, 2_048, 8, _BF16),
        experts.spread_case(1_024, 2_048, 8, _BF16),
        # A quarter of a layer of LLaDA-MoE.
        experts.layer_case(1_024, 2_048, 1_024, 16, 4, _BF16),
        ffn.dense_case(1_024, 384, 1_024, _BF16, _GATED_INNER),
        ffn.activation_case(1_024, 1_024, _BF16),
        fast_weights.sgd_case(1, (200_000,) * 200, _BF16, cast=True),
        fast_weights.function_case(1, (200_000,) * 20, _BF16),
        fast_weights.reset_case(1, (200_000,) * 20, _BF16, cast=True),
    ]
    return _quick() + more + narrow


def _gpu() -> list[Case]:
    """LLaDA-MoE's and LLaDA2.x-mini's sizes: 8,192 tokens times 8 experts each.

    What waits for the build, and so has run least, comes first: a run may be cut off.
    """
    hidden, vocabulary = 2_048, 157_184
    rows, count, inner = 65_536, 64, 1_024
    return [
        fast_weights.sgd_case(1, fast_weights.LLADA2_MINI, _F32, bounds=True),
        fast_weights.sgd_case(1, fast_weights.LLADA2_MINI, _BF16, cast=True, bounds=True),
        fast_weights.function_case(1, fast_weights.LLADA2_MINI, _F32, bounds=True),
        fast_weights.function_case(1, fast_weights.LLADA2_MINI, _BF16, bounds=True),
        fast_weights.reset_case(1, fast_weights.LLADA2_MINI, _BF16, cast=True, bounds=True),
        *(
            cross_entropy.linear_case(
                masked, masked, hidden, vocabulary, _BF16, chunks_mib=(16, 64, 256), bounds=True
            )
            for masked in (1_024, 4_096)
        ),
        cross_entropy.linear_case(1_024, 1_024, hidden, vocabulary, _BF16, head_trains=True),
        cross_entropy.logits_case(4_096, 410, vocabulary, _BF16, bounds=True),
        cross_entropy.kl_case(1_024, hidden, vocabulary, _BF16, bounds=True),
        *(
            lora.lora_case(1, 8_192, 4_096, 12_288, _BF16, wanted, bounds=True)
            for wanted in _GRADIENTS
        ),
        experts.linear_case(rows, count, hidden, 2 * inner, _BF16, ("x",), bounds=True),
        *(
            experts.lora_case(1, count, rows, hidden, 2 * inner, 2, _BF16, wanted, bounds=True)
            for wanted in (_INNER, _OUTER, ())
        ),
        experts.combine_case(8_192, hidden, 8, _BF16, bounds=True),
        experts.spread_case(8_192, hidden, 8, _BF16, bounds=True),
        experts.layer_case(2_048, hidden, inner, count, 8, _BF16),
        ffn.experts_case(rows, count, hidden, inner, _BF16, ("x", "gate", *_INNER), bounds=True),
        ffn.dense_case(8_192, 4_096, 12_288, _BF16, _GATED_INNER, bounds=True),
        ffn.activation_case(8_192, 12_288, _BF16, bounds=True),
        ffn.ffn_case(rows, count, hidden, inner, _BF16, backward=False),
        ffn.ffn_case(rows, count, hidden, inner, _BF16, backward=True),
    ]


def _smoke() -> list[Case]:
    """Of `_gpu`, each op once with all of its gradients: what tells most in a minute."""
    hidden, vocabulary = 2_048, 157_184
    rows, count, inner = 65_536, 64, 1_024
    everything = ("x", "base", *_INNER)
    return [
        cross_entropy.linear_case(1_024, 410, hidden, vocabulary, _BF16),
        cross_entropy.linear_case(410, 410, hidden, vocabulary, _BF16, head_trains=True),
        cross_entropy.logits_case(1_024, 410, vocabulary, _BF16),
        cross_entropy.kl_case(410, hidden, vocabulary, _BF16),
        lora.lora_case(1, 8_192, 4_096, 12_288, _BF16, everything),
        experts.linear_case(rows, count, hidden, 2 * inner, _BF16, ("x",)),
        experts.lora_case(1, count, rows, hidden, 2 * inner, 2, _BF16, everything),
        experts.combine_case(8_192, hidden, 8, _BF16),
        experts.spread_case(8_192, hidden, 8, _BF16),
        ffn.experts_case(rows, count, hidden, inner, _BF16, ("x", "gate", *_INNER)),
        ffn.dense_case(8_192, 4_096, 12_288, _BF16, _GATED_INNER),
        fast_weights.sgd_case(1, fast_weights.LLADA2_MINI, _F32),
        fast_weights.function_case(1, fast_weights.LLADA2_MINI, _F32),
        fast_weights.reset_case(1, fast_weights.LLADA2_MINI, _BF16, cast=True),
    ]


_SUITES = {"smoke": _smoke, "tiny": _tiny, "quick": _quick, "cpu": _cpu, "gpu": _gpu}
SUITE_NAMES = tuple(_SUITES)
