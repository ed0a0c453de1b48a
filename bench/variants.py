"""The training steps that `bench.step` measures, all on the same batches.

- `mdlm_all_rows` is what trainers do today: logits and loss at every position, experts in a Python
  loop as published models run them, PEFT's own forward.
- `mdlm` is ours: masked rows only.
- `memdlm_naive` is the method written plainly, on the published model.
- `memdlm` is ours, and computes the same.
- `memdlm_prompt_kv` is ours with `prefix_reuse="prompt_kv"`, which computes something near it.
- `memdlm_exact` is ours with `meta_gradient="exact"`: the gradient through the inner steps too.
- `memdlm_graph` is ours with `inner_graph=True`: the inner loop as one CUDA graph.
- `mdlm_cudnn`, `memdlm_cudnn` and so on are ours with that `sdpa_backend` first; the others leave
  the order to PyTorch.

A step is forward, backward and AdamW; the batches are made beforehand. Its parts are marked for
`bench.breakdown`.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from bench.cases import OUTER_LORA_RANK, StepCase
from bench.looped_experts import with_looped_experts
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator, noise
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.oracle import draw_fast_weights, training_step

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_FFN = ["gate_proj", "up_proj", "down_proj"]
_STACKED = ["experts.gate_up_proj", "experts.down_proj"]

Take = Callable[[int], Tensor]


@dataclass(frozen=True)
class Step:
    """A training step of one variant.

    Attributes:
        take: runs it on the batch of this number and returns its loss.
        held_bytes: what the method keeps, after a step, beyond weights and optimizer state.
        is_extra: whether the other variants are measured where this one cannot run.
    """

    take: Take
    held_bytes: Callable[[], int] = lambda: 0
    is_extra: bool = False

    def __call__(self, number: int) -> Tensor:
        return self.take(number)


def make_steps(
    case: StepCase,
    inner_steps: Sequence[int],
    batches: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    naive: bool = True,
    prompt_kv: bool = True,
    exact: bool = False,
    graph: bool = False,
    sdpa_backends: Sequence[str] = (),
    extra_steps: Sequence[int] | None = None,
) -> dict[str, Step]:
    """A training step of each variant, as a function of the batch's number.

    Args:
        case: the shape.
        inner_steps: the K of `memdlm`.
        batches: how many batches there are.
        device, dtype: of the model.
        naive: whether `memdlm_naive` is among the variants.
        prompt_kv: whether `memdlm_prompt_kv` is; with K = 1 it never is: there is no noisier state,
            whose prefix could be reused.
        exact: whether `memdlm_exact` is.
        graph: whether `memdlm_graph` is; on a CPU it never is, which stderr says.
        sdpa_backends: for which `mdlm` and `memdlm` are made once more.
        extra_steps: those of `inner_steps` that variants beside `memdlm` are made for, None for
            all.

    Returns:
        Variant (with " K=..." where it has one) to a step that returns its loss.

    Raises:
        ValueError: `memdlm_naive` with gradient checkpointing; an attention backend that the device
            has not.
    """
    for backend in sdpa_backends:
        _check_sdpa_backend(backend, device)
    if graph and device.type != "cuda":
        print(f"memdlm_graph is left out: it needs a GPU, not {device.type}", file=sys.stderr)
        graph = False
    if naive and case.gradient_checkpointing:
        raise ValueError(
            "naive must be False with gradient_checkpointing, got True: its fast weights hang on "
            "the layers as hooks, which are gone when the layers are recomputed"
        )
    torch.manual_seed(0)
    with device:
        bare = AutoModelForCausalLM.from_config(case.config, dtype=dtype)
    # A model of its own: ours lets PEFT's layers run by another function.
    if case.outer != "full":
        bare.requires_grad_(False)
    looped = with_looped_experts(bare, share_weights=case.outer != "full")
    diffusion = DiffusionConfig()
    model, optimised = _trained(bare, case)
    published, optimised_published = _trained(looped, case)

    steps: dict[str, Step] = {}
    plain = make_batches(case, diffusion, None, batches, device)
    steps["mdlm_all_rows"] = optimised_published(lambda n: _all_rows(published, plain[n]))
    objective = MDLMObjective(model, diffusion)
    steps["mdlm"] = optimised(lambda n: _ours(objective, plain[n]))
    for backend in sdpa_backends:
        steps[f"mdlm_{backend}"] = _with_sdpa_backend(model, backend, steps["mdlm"])
    for k in inner_steps:
        extra = extra_steps is None or k in extra_steps
        if naive and extra:
            memory = memory_of("memdlm_naive", k)
            own = make_batches(case, diffusion, memory, batches, device)
            plainly = _naive_step(looped, case, diffusion, memory, own)
            steps[f"memdlm_naive K={k}"] = optimised_published(plainly)
        more = {
            "memdlm_graph": graph,
            "memdlm_prompt_kv": prompt_kv and k > 1,
            "memdlm_exact": exact,
        }
        for variant in ("memdlm", *(name for name, wanted in more.items() if wanted and extra)):
            memory = memory_of(variant, k)
            own = make_batches(case, diffusion, memory, batches, device)
            ours = MemDLMObjective(model, diffusion, memory)
            step = optimised(lambda n, ours=ours, own=own: _ours(ours, own[n]))
            steps[f"{variant} K={k}"] = replace(
                step,
                held_bytes=lambda ours=ours: ours.held_bytes,
                is_extra=variant == "memdlm_graph",
            )
        for backend in sdpa_backends if extra else ():
            steps[f"memdlm_{backend} K={k}"] = _with_sdpa_backend(
                model, backend, steps[f"memdlm K={k}"]
            )
    return steps


def _with_sdpa_backend(model: nn.Module, backend: str, step: Step) -> Step:
    """The step with an attention backend first, on the model of the other variants."""
    from memdlm.sdpa import set_sdpa_backend  # `compare` runs older trees, which lack it

    def take(number: int) -> Tensor:
        set_sdpa_backend(model, backend)
        try:
            return step(number)
        finally:
            set_sdpa_backend(model, "auto")

    return replace(step, take=take, is_extra=True)


def _check_sdpa_backend(backend: str, device: torch.device) -> None:
    from memdlm.sdpa import check_sdpa_backend

    check_sdpa_backend(backend, device)


def memory_of(variant: str, k: int) -> MemoryConfig:
    """The inner loop of a `memdlm` variant with K = `k`."""
    if variant == "memdlm_prompt_kv":
        return MemoryConfig(inner_steps=k, prefix_reuse="prompt_kv")
    if variant == "memdlm_exact":
        return MemoryConfig(inner_steps=k, meta_gradient="exact")
    if variant == "memdlm_graph":
        return MemoryConfig(inner_steps=k, inner_graph=True)
    return MemoryConfig(inner_steps=k)


def check_losses(steps: dict[str, Step], device: torch.device) -> dict[str, Step]:
    """Run the first step of both plain variants, untrained yet: the losses must agree.

    On a GPU the other variants run once too, to see whether they fit in its memory.

    Args:
        steps: from `make_steps`, not run yet.
        device: what they run on.

    Returns:
        The steps that fit, and those extra ones that run at all; what does not is named on stderr.

    Raises:
        ValueError: losses that differ, or not even `mdlm` fits.
    """
    plain_names = ("mdlm_all_rows", "mdlm")
    fitting, losses = {}, {}
    for name, step in tqdm(steps.items(), desc="first steps", leave=False):
        if device.type == "cpu" and name not in plain_names:
            fitting[name] = step
            continue
        # Libraries say by a RuntimeError that they have no kernel for a shape, or no graph.
        expected = RuntimeError if getattr(step, "is_extra", False) else torch.OutOfMemoryError
        try:
            losses[name] = float(step(0))
            fitting[name] = step
        except expected as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    if "mdlm" not in losses:
        raise ValueError("mdlm must fit in the memory of the GPU: take a smaller case")
    plain = {name: losses[name] for name in plain_names if name in losses}
    if max(plain.values()) - min(plain.values()) > 0.01 * abs(min(plain.values())):
        raise ValueError(f"the variants must compute the same loss, got {plain}")
    return fitting


def make_batches(
    case: StepCase,
    diffusion: DiffusionConfig,
    memory: MemoryConfig | None,
    count: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Batches of random tokens, the same on every machine and for every variant.

    How many rows are masked follows from each sequence's time t, and a few draws of it are far from
    their mean. So t is drawn in strata: sequence i of n has the t nearest to (i + 1/2) / n among
    those of 1,000 examples, and each batch holds small and large ones. Half of the maskable tokens
    are masked on average, whatever the batch size.

    Args:
        case: the shape.
        diffusion, memory: of the collator.
        count: how many batches.
        device: where they are put.

    Returns:
        What `MaskCollator` makes, `count` times.
    """
    collator = _collator(case, diffusion, memory)
    return [send_to_device(collator(features), device) for features in _features(case, count)]


def collation_ms(case: StepCase, memory: MemoryConfig | None) -> float:
    """Time that the host needs for the masks, states and row indices of one batch.

    It is no part of a step: a data loader makes batches beside it.

    Args:
        case: the shape.
        memory: of the collator.

    Returns:
        Milliseconds, the least of five.
    """
    collator = _collator(case, DiffusionConfig(), memory)
    (features,) = _features(case, 1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        collator(features)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def _collator(
    case: StepCase, diffusion: DiffusionConfig, memory: MemoryConfig | None
) -> MaskCollator:
    vocab_size = case.config.vocab_size
    right_shift = bool(getattr(case.config, "right_shift_logits", False))
    return MaskCollator(
        vocab_size - 1, 0, vocab_size, diffusion, memory, right_shift_logits=right_shift
    )


def _features(case: StepCase, count: int) -> list[list[dict[str, Any]]]:
    """The examples of each batch."""
    vocab_size = case.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    batches = []
    for examples in _examples(case.batch_size, count):
        ids = torch.randint(1, vocab_size - 1, (case.batch_size, case.length), generator=generator)
        labels = ids.clone()
        labels[:, : int(case.prompt_share * case.length)] = -100
        batches.append(
            [
                {"input_ids": row, "labels": row_labels, "example": example, "epoch": 0}
                for row, row_labels, example in zip(ids, labels, examples, strict=True)
            ]
        )
    return batches


def _examples(batch_size: int, count: int) -> list[list[int]]:
    """Numbers of the examples of each batch, whose times are spread evenly over (0, 1)."""
    epsilon = DiffusionConfig().time_epsilon
    times = torch.tensor([noise(0, 0, example, 1, epsilon)[0] for example in range(1_000)])
    middles = (torch.arange(batch_size * count) + 0.5) / (batch_size * count)
    nearest = (times[None] - middles[:, None]).abs().argmin(1)
    return [nearest[number::count].tolist() for number in range(count)]


def _trained(bare: Any, case: StepCase) -> tuple[Any, Callable[[Take], Step]]:
    """The model with its LoRA, and what makes an optimised step of a forward and backward."""
    model = bare
    if case.outer != "full":
        sparse = any(name.endswith(_STACKED[0]) for name, _ in bare.named_parameters())
        everything = case.outer == "lora"
        lora = LoraConfig(
            r=OUTER_LORA_RANK,
            lora_alpha=2 * OUTER_LORA_RANK,
            target_modules=_ATTENTION + (_FFN if everything else []),
            target_parameters=_STACKED if sparse and everything else None,
        )
        # In the model's dtype for every variant: without autocast, PEFT's forward would widen its
        # inputs where ours does not.
        model = get_peft_model(bare, lora, autocast_adapter_dtype=False)
    model.train()
    if case.gradient_checkpointing:
        bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def optimised(loss_and_backward: Take) -> Step:
        def step(number: int) -> Tensor:
            loss = loss_and_backward(number)
            with record_function("bench.optimizer"):
                optimizer.step()
                # Now, not before the next step: its gradients are of a step's own memory.
                optimizer.zero_grad()
            return loss

        return Step(step)

    return model, optimised


def _ours(objective: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = objective(batch).loss
    with record_function("bench.outer_backward"):
        loss.backward()
    return loss.detach()


def _all_rows(model: Any, batch: dict[str, Any]) -> Tensor:
    noisy, clean = batch["anchor"]["input_ids"], batch["input_ids"]
    with record_function("bench.forward"):
        logits = model(input_ids=noisy, is_causal=False, use_cache=False).logits  # [B, L, V]
        if batch["right_shift_logits"]:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
        # [B, V, L], as some trainers pass it, is four times slower on a CPU.
        nll = F.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")  # [B L]
        nll = nll.view_as(clean)
        weight = (1 / batch["time"]).to(nll.dtype)[:, None] * (noisy != clean)
        loss = (nll * weight).sum() / batch["normalizer"]
    with record_function("bench.backward"):
        loss.backward()
    return loss.detach()


@contextlib.contextmanager
def _marked_backward() -> Iterator[None]:
    """Mark the backward passes of code that does not do so itself."""

    def marked(backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function("bench.backward"):
                return backward(*args, **kwargs)

        return run

    with (
        mock.patch.object(torch.autograd, "grad", marked(torch.autograd.grad)),
        mock.patch.object(Tensor, "backward", marked(Tensor.backward)),
    ):
        yield


def _naive_step(
    model: Any,
    case: StepCase,
    diffusion: DiffusionConfig,
    memory: MemoryConfig,
    batches: list[dict[str, Any]],
) -> Take:
    mask_id = case.config.vocab_size - 1
    fast_weights = draw_fast_weights(model, memory, 1)
    epsilon = diffusion.time_epsilon
    priority = [
        torch.stack(
            [
                torch.from_numpy(noise(0, 0, example, case.length, epsilon)[1])
                for example in examples
            ]
        )
        for examples in _examples(case.batch_size, len(batches))
    ]

    def step(number: int) -> Tensor:
        batch = batches[number]
        with record_function("bench.forward"), _marked_backward():
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
