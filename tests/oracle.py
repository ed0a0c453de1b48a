"""One training step of MemDLM, written down plainly: the naive twin of the fast paths.

It follows the paper's equations 5 to 10 in their order (noise, anchor, trajectory, inner steps,
outer loss) and shares no code with the package. Every step is a whole forward pass of the ordinary
Hugging Face model with logits at every position. All bookkeeping is Python numbers and lists.

A set of masked positions is a list, one entry for each sequence, of lists of positions.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class Step:
    """What one training step computed; the outer gradients are in the parameters' `.grad`."""

    outer_loss: torch.Tensor
    inner_losses: list[list[float]]  # [set of fast weights][inner step]
    inner_norms: list[list[list[float]]]  # [set][inner step][tensor], before the clip
    skipped: list[list[bool]]  # [set][inner step]
    fast_weights: list[dict[str, tuple[torch.Tensor, ...]]]  # after the last inner step


def mask_probability(schedule, time):
    """1 - alpha(t)."""
    return time if schedule == "linear" else math.cos(math.pi / 2 * (1 - time))


def time_at(schedule, mask_share):
    """The t with 1 - alpha(t) = mask_share."""
    return mask_share if schedule == "linear" else 1 - math.acos(mask_share) * 2 / math.pi


def schedule_weight(schedule, time):
    """w(t) = -alpha'(t) / (1 - alpha(t) + 1e-6)."""
    slope = 1.0 if schedule == "linear" else math.pi / 2 * math.sin(math.pi / 2 * (1 - time))
    return slope / (mask_probability(schedule, time) + 1e-6)


def token_weight(diffusion, time):
    return schedule_weight(diffusion.schedule, time) if diffusion.loss_weight == "schedule" else 1.0


def masked_counts(memory, anchor, maskable):
    """How many of the `maskable` tokens of one sequence each state masks; x_t masks `anchor`."""
    steps = memory.inner_steps
    # Decimal arithmetic: 1.1 * 10 is 11 tokens.
    grown = math.floor(Fraction(str(memory.pre_anchor_scale)) * anchor)
    noisiest = max(anchor, min(grown, maskable))
    if memory.strategy == "anchor_only":
        return [anchor] * steps
    if memory.strategy == "pre_anchor_only":
        return [noisiest] * steps
    if memory.strategy == "progressive":
        # 0.8, ..., 0.2 in equal parts; a single state takes the last.
        tenths = [
            2 + Fraction(6 * (steps - 1 - k), steps - 1) if steps > 1 else 2 for k in range(steps)
        ]
        return [math.floor(tenth * maskable / 10) for tenth in tenths]
    if steps == 1:
        return [anchor]
    counts = [noisiest]
    for k in range(1, steps):
        reveals_left = steps - k
        counts.append(counts[-1] - math.ceil(Fraction(counts[-1] - anchor, reveals_left)))
    return counts


def simulate(memory, diffusion, labels, time, priority):
    """The anchor x_t and the trajectory of each sequence, as sets of masked positions.

    Returns:
        maskable: [B][*], anchor: [B][*], states: [K][B][*].
    """
    maskable, anchor, states = [], [], [[] for _ in range(memory.inner_steps if memory else 0)]
    for row_labels, row_time, row_priority in zip(labels, time, priority, strict=True):
        positions = [i for i, label in enumerate(row_labels) if label != -100]
        probability = mask_probability(diffusion.schedule, row_time)
        row_anchor = [i for i in positions if row_priority[i] < probability]
        maskable.append(positions)
        anchor.append(row_anchor)
        if memory:
            first_to_mask = sorted(positions, key=lambda i: row_priority[i])
            counts = masked_counts(memory, len(row_anchor), len(positions))
            for state, count in zip(states, counts, strict=True):
                state.append(sorted(first_to_mask[:count]))
    return maskable, anchor, states


def inner_targets(memory, states, anchor, step):
    """The positions whose loss inner step `step` takes: all masked, or those revealed next."""
    following = states[step + 1] if step + 1 < len(states) else None
    if memory.strategy == "pre_anchor_only":
        following = anchor
    if memory.inner_targets == "all_masked" or memory.strategy == "anchor_only":
        return states[step]
    if following is None:
        return states[step]
    pairs = zip(states[step], following, strict=True)
    return [[i for i in masked if i not in still] for masked, still in pairs]


def adapted_modules(model, memory):
    """Names of the linear layers that get fast weights, in the order of the model."""
    kinds = FFN + (ATTENTION if memory.target == "ffn+attention" else ())
    inside = r"(?:self_attn|mlp|mlp\.experts\.\d+|mlp\.shared_experts)"
    pattern = re.compile(rf"\blayers\.(\d+)\.{inside}\.(" + "|".join(kinds) + ")$")
    layers = model.config.num_hidden_layers
    first = math.floor(layers * (1 - Fraction(str(memory.layer_fraction))))
    found = ((name, pattern.search(name)) for name, _ in model.named_modules())
    return [name for name, match in found if match and int(match[1]) >= first]


def draw_fast_weights(model, memory, sets, generator=None):
    """Initial fast weights: A uniform in +-1/sqrt(in), B zero; or a zero matrix."""
    drawn = []
    for _ in range(sets):
        tensors = {}
        for name in adapted_modules(model, memory):
            weight = model.get_submodule(name).weight
            fan_out, fan_in = weight.shape
            compute = memory.state_dtype == "compute"
            dtype = weight.dtype if compute else torch.promote_types(weight.dtype, torch.float32)
            options = {"device": weight.device, "dtype": dtype}
            if memory.adapter == "full":
                tensors[name] = (torch.zeros(fan_out, fan_in, **options),)
                continue
            a = torch.empty(memory.rank, fan_in, **options)
            a.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            tensors[name] = (a, torch.zeros(fan_out, memory.rank, **options))
        drawn.append(tensors)
    return drawn


def plus_fast_weights(tensors, scale):
    """A hook that makes a layer's output W x + scale * B A x, or W x + D x."""

    def hook(module, args, output):
        x = args[0]
        if len(tensors) == 1:
            return output + x @ tensors[0].to(x.dtype).T
        a, b = (tensor.to(x.dtype) for tensor in tensors)
        return output + scale * (x @ a.T @ b.T)

    return hook


@contextmanager
def adapted(model, fast_weights, scale):
    """Inside this context the forward pass of `model` reads the fast weights."""
    handles = [
        model.get_submodule(name).register_forward_hook(plus_fast_weights(tensors, scale))
        for name, tensors in fast_weights.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_nll(model, input_ids, attention_mask, masked, mask_id):
    """[B, L] -log p(x0_i | state), where `state` is `input_ids` with `masked` replaced."""
    state = input_ids.clone()
    for row, positions in enumerate(masked):
        state[row, positions] = mask_id
    bias = None
    if attention_mask is not None and not attention_mask.all():
        # [B, 1, L, L]: every token sees every real token of its sequence.
        visible = attention_mask.bool()[:, None, None, :].expand(-1, 1, state.shape[1], -1)
        bias = torch.zeros(visible.shape, dtype=model.dtype, device=state.device)
        bias = bias.masked_fill(~visible, torch.finfo(model.dtype).min)
    output = model(input_ids=state, attention_mask=bias, is_causal=False, use_cache=False)
    logits = output.logits  # [B, L, V]
    if getattr(model.config, "right_shift_logits", False):
        # Those of a position are the next token's; the first token has none but its own.
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none")


def weighted_sum(nll, positions, row_weights):
    """sum_b w_b sum_{i in positions_b} nll_bi; 0, still connected to the graph, without any."""
    total = nll[:, :0].sum()
    for row, (row_positions, weight) in enumerate(zip(positions, row_weights, strict=True)):
        total = total + weight * nll[row, row_positions].sum()
    return total


def normalised(norm, row_weights, counts):
    """The weights and the divisor of a loss whose sequences have `counts` tokens to divide by."""
    if norm == "token":
        return row_weights, max(1, sum(counts))
    if norm == "batch":
        return row_weights, len(counts)
    per_row = [weight / max(1, count) for weight, count in zip(row_weights, counts, strict=True)]
    return per_row, len(counts)


def inner_weights(memory, diffusion, time, state, maskable):
    """w(r_b) of each sequence, r_b the share of its maskable tokens that the state masks."""
    if memory.strategy == "anchor_only":
        return [token_weight(diffusion, row_time) for row_time in time]
    shares = [len(m) / max(1, len(all_)) for m, all_ in zip(state, maskable, strict=True)]
    return [token_weight(diffusion, time_at(diffusion.schedule, share)) for share in shares]


def clipped(gradients, norms, memory):
    """g * min(1, c / ||g||), each tensor on its own or all of them together."""
    if memory.inner_clip == "none":
        return gradients
    if memory.inner_clip == "global":
        norms = [math.sqrt(sum(norm**2 for norm in norms))] * len(norms)
    limit = memory.inner_max_norm
    factors = [limit / norm if norm > limit else 1.0 for norm in norms]
    return [gradient * factor for gradient, factor in zip(gradients, factors, strict=True)]


def sgd_step(loss, fast_weights, memory):
    """One update. Returns the new fast weights, the gradient norms, and whether it was skipped."""
    tensors = [tensor for pair in fast_weights.values() for tensor in pair]
    gradients = torch.autograd.grad(loss, tensors)
    norms = [gradient.double().norm().item() for gradient in gradients]
    if not math.isfinite(loss.item()) or not all(math.isfinite(norm) for norm in norms):
        return fast_weights, norms, True
    steps = iter(clipped(gradients, norms, memory))
    updated = {
        name: tuple(
            (tensor.detach() - memory.inner_lr * next(steps)).requires_grad_() for tensor in pair
        )
        for name, pair in fast_weights.items()
    }
    return updated, norms, False


def training_step(
    model,
    input_ids,
    labels,
    attention_mask,
    time,
    priority,
    diffusion,
    mask_id,
    memory=None,
    fast_weights=(),
    normalizer=None,
):
    """One step of MemDLM, or of plain MDLM with `memory=None`: gradients are added to `.grad`.

    Args:
        model: an ordinary causal LM of Hugging Face, with SDPA attention, or one of `tests.plain`;
            experts are separate linear layers.
        input_ids: [B, L] int64, clean and padded on the right.
        labels: [B, L] int64; -100 marks what is never masked.
        attention_mask: [B, L], 0 on padding, or None.
        time: [B], t_b in (0, 1].
        priority: [B, L], u in [0, 1).
        diffusion: an object with the attributes of `DiffusionConfig`.
        mask_id: the mask token.
        memory: an object with the attributes of `MemoryConfig`.
        fast_weights: one dict for the batch, or with scope "sample" one for each sequence: module
            name to (A, B) or (D,).
        normalizer: what the outer loss is divided by, where it is not this batch's own.

    Returns:
        Step.
    """
    sequences = range(len(input_ids))
    # Scope "sample": each sequence is a batch of one. Only the outer loss is the whole batch's.
    alone = memory is not None and memory.scope == "sample"
    groups = [[b] for b in sequences] if alone else [list(sequences)]
    scale = memory.lora_alpha / memory.rank if memory else None

    maskable_counts = (labels != -100).sum(1).tolist()
    schedule_weights = [token_weight(diffusion, t) for t in time.tolist()]
    outer_weights, own_normalizer = normalised(
        diffusion.loss_norm, schedule_weights, maskable_counts
    )
    step = Step(torch.zeros((), device=input_ids.device), [], [], [], [])

    for number, group in enumerate(groups):
        length = input_ids.shape[1]
        real = None
        if attention_mask is not None:
            length = int(attention_mask[group].sum(1).max())
            real = attention_mask[group, :length]
        ids = input_ids[group, :length]
        group_time = time[group].tolist()
        maskable, anchor, states = simulate(
            memory,
            diffusion,
            labels[group, :length].tolist(),
            group_time,
            priority[group, :length].tolist(),
        )

        fast = {}
        if memory:
            fast = {
                name: tuple(tensor.detach().clone().requires_grad_() for tensor in pair)
                for name, pair in fast_weights[number].items()
            }
            losses, norms, skipped = [], [], []
            for k in list(range(memory.inner_steps)) * memory.inner_epochs:
                targets = inner_targets(memory, states, anchor, k)
                weights, divisor = normalised(
                    diffusion.loss_norm,
                    inner_weights(memory, diffusion, group_time, states[k], maskable),
                    [len(positions) for positions in targets],
                )
                with adapted(model, fast, scale):
                    nll = token_nll(model, ids, real, states[k], mask_id)
                loss = weighted_sum(nll, targets, weights) / divisor
                fast, step_norms, step_skipped = sgd_step(loss, fast, memory)
                losses.append(loss.item())
                norms.append(step_norms)
                skipped.append(step_skipped)
            step.inner_losses.append(losses)
            step.inner_norms.append(norms)
            step.skipped.append(skipped)

        # First order: the outer loss sees the adapted fast weights as constants.
        constant = {name: tuple(t.detach() for t in pair) for name, pair in fast.items()}
        with adapted(model, constant, scale):
            nll = token_nll(model, ids, real, anchor, mask_id)
            weights = [outer_weights[b] for b in group]
            loss = weighted_sum(nll, anchor, weights) / (normalizer or own_normalizer)
            loss.backward()
        step.outer_loss = step.outer_loss + loss.detach()
        step.fast_weights.append(constant)
    return step
