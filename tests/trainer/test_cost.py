"""`memdlm plan`: its products and its memory against what a step really does, and its text."""

import dataclasses
import re
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig

import bench.step  # noqa: F401 - the FLOP formulas of the CPU's attention
from bench.cases import MODELS, SMALL, StepCase
from bench.operator_counts import OperatorCounts
from bench.timing import peak_mib
from bench.variants import make_batches, make_steps
from memdlm.cli import main
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.cost.counts import BatchCounts, StateCounts, expected_counts
from memdlm.cost.flops import (
    HEAD,
    INNER_BACKWARD,
    NOISIER_PREFIX,
    Training,
    all_rows_flops,
    mdlm_flops,
    memdlm_flops,
)
from memdlm.cost.memory import Rehearsal
from memdlm.cost.options import PlanOptions, load_config
from memdlm.cost.plan import ALL_ROWS, MEMDLM, PROMPT_KV, make_plan
from memdlm.cost.shape import DecoderShape
from memdlm.models import LLaDAConfig
from memdlm.models.published import PUBLISHED
from tests.families import FAMILIES, make_config
from tests.trainer.trainer_case import tiny_model

DIFFUSION = DiffusionConfig()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TinyCase(StepCase):
    """A case of a model of `tests.families`."""

    @property
    def config(self):
        return make_config(self.model, num_key_value_heads=4 if self.model == "olmoe" else 2)


@pytest.fixture(scope="module", autouse=True)
def tiny_families():
    """Their names must not be unknown to what makes a case."""
    assert not set(FAMILIES) & set(MODELS)


def training(case):
    return Training(case.outer, 32, case.gradient_checkpointing)


def rehearsal(case):
    return Rehearsal(case.config, training(case), torch.float32)


def memory_config(k, **options):
    return MemoryConfig(inner_steps=k, inner_checkpoint="none", **options)


def batch_of(case, memory=None):
    return make_batches(case, DIFFUSION, memory, 1, CPU)[0]


def counted_and_expected(case, variant, k=None, prefix_reuse="none", own=None):
    """FLOPs of a step that runs on tensors without values, and those of the formulas."""
    own = own or rehearsal(case)
    memory = None if k is None else memory_config(k, prefix_reuse=prefix_reuse)
    batch = batch_of(case, memory)
    with FlopCounterMode(display=False) as counter:
        if variant == "mdlm_all_rows":
            own.all_rows(batch)
        elif variant == "mdlm":
            own.mdlm(batch, DIFFUSION)
        else:
            own.memdlm(batch, DIFFUSION, memory)
    formula = {"mdlm_all_rows": all_rows_flops, "mdlm": mdlm_flops, "memdlm": memdlm_flops}[variant]
    shape = DecoderShape.of(case.config)
    parts = formula(shape, BatchCounts.of(batch), training(case))
    return counter.get_total_flops(), sum(parts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_of_every_family(family):
    counted, expected = counted_and_expected(TinyCase(family, 2, 32, 0.5), "memdlm", 2)
    assert expected == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("outer", ["full", "lora", "lora_attention"])
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_the_products_of_every_way_to_train(family, outer, gradient_checkpointing):
    case = TinyCase(family, 2, 32, 0.5, outer, gradient_checkpointing)
    own = rehearsal(case)
    for variant, k in (("mdlm", None), ("memdlm", 2)):
        counted, expected = counted_and_expected(case, variant, k, own=own)
        assert expected == pytest.approx(counted, rel=1e-6)
    if (family, outer) != ("llada_moe", "lora"):  # whose LoRA is that of stacked experts
        counted, expected = counted_and_expected(case, "mdlm_all_rows", own=own)
        assert expected == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("family", ["dream", "llada2"])
def test_the_products_with_reused_keys(family):
    case = TinyCase(family, 3, 32, 0.5)
    counted, expected = counted_and_expected(case, "memdlm", 3, "prompt_kv")
    assert expected == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "inner_steps"),
    [
        ("tiny", (1, 2, 3, 4)),
        *((name, (2,)) for name in SMALL if name != "tiny"),
        *(pytest.param(name, (1, 3, 4), marks=pytest.mark.slow) for name in SMALL),
    ],
)
def test_the_products_of_the_small_cases(name, inner_steps):
    case = SMALL[name]
    own = rehearsal(case)
    for variant, k in (("mdlm", None), *(("memdlm", k) for k in inner_steps)):
        counted, expected = counted_and_expected(case, variant, k, own=own)
        assert expected == pytest.approx(counted, rel=0.02)


def slow_but(*names):
    """Every small case; those not named take long."""
    return [
        SMALL[name] if name in names else pytest.param(SMALL[name], marks=pytest.mark.slow)
        for name in SMALL
    ]


@pytest.mark.parametrize("case", [TinyCase("llada_moe", 2, 32, 0.5), *slow_but("tiny")], ids=str)
def test_the_products_of_all_rows(case):
    """With experts in a loop and PEFT's own forward."""
    step = make_steps(case, [], 1, CPU, torch.float32, naive=False)["mdlm_all_rows"]
    with OperatorCounts(CPU) as counted:  # in a loop over experts, far faster than torch's counter
        step(0)
    counts = BatchCounts.of(batch_of(case))
    parts = all_rows_flops(DecoderShape.of(case.config), counts, training(case))
    assert sum(parts.values()) == pytest.approx(counted.flops, rel=0.02)


@pytest.mark.parametrize("case", slow_but("tiny"), ids=str)
def test_the_memory_of_the_small_cases(case):
    steps = make_steps(
        case, [2], 1, CPU, torch.float32, naive=False, prompt_kv=case.model == "tiny"
    )
    own = rehearsal(case)
    for variant in ("mdlm_all_rows", "mdlm"):
        steps[variant](0)  # makes the state of AdamW: there are two models, each with its own
    for variant, step in steps.items():
        measured_mib = peak_mib(lambda step=step: step(0), CPU)
        _, _, k = variant.partition(" K=")
        reuse = "prompt_kv" if "prompt_kv" in variant else "none"
        memory = memory_config(int(k), prefix_reuse=reuse) if k else None
        batch = batch_of(case, memory)
        if memory is not None:
            expected = own.memdlm(batch, DIFFUSION, memory)
        else:
            expected = own.mdlm(batch, DIFFUSION) if variant == "mdlm" else own.all_rows(batch)
        during = expected.gradients + expected.activations
        assert during / 2**20 == pytest.approx(measured_mib, rel=0.15), variant


def test_memory_that_is_there_before_a_step():
    case = TinyCase("llada", 2, 32, 0.5)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(case.config)
    count = sum(parameter.numel() for parameter in model.parameters())
    full = dataclasses.replace(case, outer="full")
    found = rehearsal(full).memdlm(batch_of(full, memory_config(1)), DIFFUSION, memory_config(1))
    assert (found.weights, found.optimizer) == (4 * count, 8 * count)
    # One adapted layer: A and B of gate, up and down, in float32, with their gradients.
    per_layer = 32 * 3 * (32 + 48) * 4
    assert per_layer * 2 <= found.fast_weights < per_layer * 2 + 4_096
    assert found.total == sum(getattr(found, field.name) for field in dataclasses.fields(found))


def test_a_rehearsal_leaves_the_model_as_it_was():
    case = TinyCase("llada_moe", 2, 32, 0.5)
    own, batch = rehearsal(case), batch_of(case)
    before = own.mdlm(batch, DIFFUSION)
    own.memdlm(batch_of(case, memory_config(2)), DIFFUSION, memory_config(2))
    assert own.mdlm(batch, DIFFUSION) == before


def test_expected_counts_are_the_mean_of_many_batches():
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(200_000, 3, generator=generator)
    noisiest = (1.5 * share).clamp_max(1)
    counts = expected_counts(3, 100, 20, 3)
    assert counts.anchor.rows == pytest.approx(20 * share.sum(1).mean().item(), rel=5e-3)
    assert counts.anchor.width == pytest.approx(20 * share.amax(1).mean().item(), rel=5e-3)
    between = (share + noisiest) / 2
    for state, own in zip(counts.noisier, (noisiest, between), strict=True):
        assert state.rows == pytest.approx(20 * own.sum(1).mean().item(), rel=5e-3)
        assert state.width == pytest.approx(20 * noisiest.amax(1).mean().item(), rel=5e-3)
    assert counts.anchor_visits == 1
    only = expected_counts(3, 100, 20, 3, strategy="anchor_only")
    assert (only.anchor, only.noisier, only.anchor_visits) == (counts.anchor, (), 3)


def test_the_first_inner_step_is_cheaper_than_the_others():
    shape = DecoderShape.of(make_config("llada"))
    state = StateCounts(20, 10)
    one, two = (
        memdlm_flops(shape, BatchCounts(2, 32, state, (), visits), Training("lora"))
        for visits in (1, 2)
    )
    assert two[INNER_BACKWARD] > 2 * one[INNER_BACKWARD] > 0
    assert one[NOISIER_PREFIX] == 0
    assert two[HEAD] / one[HEAD] == pytest.approx(3 / 2)  # inner steps and the outer pass


def test_the_table_of_the_design():
    """TFLOP of LLaDA-MoE-7B-A1B, B 2, L 4096, 90 % prompt, LoRA, within 2 %."""
    shape = DecoderShape.of(PUBLISHED["LLaDA-MoE-7B-A1B"]())
    maskable = 4096 - int(0.9 * 4096)
    counts = expected_counts(2, 4096, maskable, 2)
    reusing = dataclasses.replace(counts, changed=maskable)
    lora = Training("lora")
    found = [
        sum(parts.values()) / 1e12
        for parts in (
            all_rows_flops(shape, counts, lora),
            mdlm_flops(shape, counts, lora),
            memdlm_flops(shape, counts, lora),
            memdlm_flops(shape, reusing, lora),
        )
    ]
    assert found == pytest.approx([63.5, 50.6, 75.2, 56.3], rel=0.02)


def test_a_plan_and_its_levers(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    options = PlanOptions(str(tmp_path), batch_size=2, length=256, prompt=0.5, lora_rank=2)
    plan = make_plan(options)
    assert set(plan.costs) == {"all rows", "masked rows", MEMDLM, PROMPT_KV}
    levers = {lever.name: lever for lever in plan.levers}
    now = plan.costs[MEMDLM].memory.total
    assert levers["inner_steps 1"].flops_ratio < levers["prefix_reuse prompt_kv"].flops_ratio < 1
    reused = plan.costs[PROMPT_KV].total_flops / plan.costs[MEMDLM].total_flops
    assert levers["prefix_reuse prompt_kv"].flops_ratio == pytest.approx(reused)
    checkpointed = levers["gradient_checkpointing true"]
    assert checkpointed.flops_ratio > 1
    assert checkpointed.total_bytes < now
    assert levers["batch_size 1"].total_bytes < now
    assert levers["outer lora_attention"].flops_ratio < 1
    assert levers["load_in_4bit true"].total_bytes < now
    saved = [min(lever.flops_ratio, lever.total_bytes / now) for lever in plan.levers]
    assert saved == sorted(saved)
    ratio = plan.costs[MEMDLM].total_flops / plan.costs[ALL_ROWS].total_flops
    assert levers["load_in_4bit true"].all_rows_ratio == pytest.approx(ratio)


def test_the_text(tmp_path, capsys):
    tiny_model().config.save_pretrained(tmp_path)
    words = f"plan --model {tmp_path} --batch 2 --length 64 --prompt 0.5 --k 1 --memory_gib 1"
    assert main([*words.split(), "--outer", "full", "--gradient_checkpointing"]) == 0
    text = capsys.readouterr().out
    assert "2 x 64 tokens, 50% prompt, K = 1, outer full, checkpointed, bfloat16" in text
    for line in ("outer backward", "/ all rows", "/ masked rows", "AdamW state", "activations"):
        assert re.search(rf"^  {re.escape(line)}( +[\d.]+){{3}}$", text, re.MULTILINE), line
    assert re.search(r"fits in 1 GiB( +yes){3}$", text, re.MULTILINE)
    assert "a ratio of FLOPs, not of times" in text
    assert "outer lora_attention" in text
    # What the run has, or cannot have, is no lever.
    for absent in ("prompt_kv", "inner_steps 1", "gradient_checkpointing true", "load_in_4bit"):
        assert absent not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nobody", "model must be one of LLaDA-8B, LLaDA-MoE-7B-A1B, .* got 'nobody'"),
        ("", "model must be given"),
        ("--model Dream-7B --batch 0", "batch_size must be at least 1, got 0"),
        ("--model Dream-7B --length 1", "length must be at least 2, got 1"),
        ("--model Dream-7B --k 0", "k must be at least 1, got 0"),
        ("--model Dream-7B --prompt 1.0", r"prompt must be in \[0, 1\), got 1.0"),
        ("--model Dream-7B --memory_gib 0", "memory_gib must be above 0, got 0.0"),
        ("--model Dream-7B --outer head", "outer must be one of lora, lora_attention, full"),
        ("--model Dream-7B --lora_rank 0", "lora_rank must be at least 1, got 0"),
        ("--model Dream-7B --outer full --lora_rank 8", "lora_rank would not be read"),
        ("--model Dream-7B --k 1 --prefix_reuse prompt_kv", "prefix_reuse would not be read"),
        ("--model Dream-7B --promt 0.5", "unknown key 'promt'; did you mean prompt"),
    ],
)
def test_bad_options(words, message, capsys):
    assert main(["plan", *words.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_model_of_another_family(tmp_path, capsys):
    BertConfig().save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "got model_type 'bert'" in capsys.readouterr().err


def test_names_of_models():
    assert isinstance(load_config("llada-8b"), LLaDAConfig)


def test_help_tells_every_key(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(PlanOptions):
        assert f"--{field.name}: " in text
    for name in PUBLISHED:
        assert name in text
