"""One training step of MemDLM, written down plainly: the naive twin of the fast paths.

It follows the paper's equations 5 to 10 in their order (noise, anchor, trajectory, inner steps,
outer loss) and shares no code with the package. Every step is a whole forward pass of the ordinary
Hugging Face model with logits at every position. All bookkeeping is Python numbers and lists.

A set of masked positions is a list, one entry for each sequence, of lists of positions.
"""

import math
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def teacher_state(memory, states, anchor, step):
    """The state that inner step `step` learns from: the next one, or the clean tokens."""
    if memory.strategy == "pre_anchor_only":
        return anchor
    if memory.strategy == "anchor_only" or step + 1 == len(states):
        return [[] for _ in anchor]
    return states[step + 1]


def visits_anchor(memory, step):
    """Whether inner step `step` is on the anchor itself, not only on a state like it."""
    last = step == memory.inner_steps - 1
    return memory.strategy == "anchor_only" or (memory.strategy == "anchor_consistent" and last)


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


def detached(output):
    """A module's output, a tensor or a tuple that may hold None, without its graph."""
    if isinstance(output, tuple):
        return tuple(map(detached, output))
    return output if output is None else output.detach()


@contextmanager
def constant_below(model, memory):
    """Inside this context no gradient passes from the first adapted modules to what runs before.

    What runs before is the layers below; and where FFNs alone are adapted, that layer's attention,
    the norm behind it and the router.
    """
    first = adapted_modules(model, memory)[0]
    layer = model.get_submodule(re.search(r"^.*\blayers\.\d+", first)[0])
    handles = [layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))]
    if memory.target == "ffn":
        before = [layer.self_attn, layer.post_attention_layernorm]
        before += [layer.mlp.gate] if hasattr(layer.mlp, "gate") else []
        handles += [
            module.register_forward_hook(lambda module, args, output: detached(output))
            for module in before
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_bias(attention_mask, length, block_size, device, dtype):
    """What is added to the scores [B or 1, 1, N, N]: 0 where a token is seen, else the least value.

    N is the length: every token sees every real token of its sequence. With blocks it is twice as
    much, the noisy tokens before the clean ones: a noisy token sees the noisy ones of its block and
    the clean ones of the blocks before, a clean token the clean ones of the blocks up to its own.

    Returns:
        The bias; None where every token sees every other.
    """
    visible = None
    if attention_mask is not None and not attention_mask.all():
        visible = attention_mask.bool()
    if block_size is None:
        if visible is None:
            return None
        seen = visible[:, None, None, :].expand(-1, 1, length, -1)
    else:
        place = torch.arange(2 * length, device=device)
        block, clean = place % length // block_size, place >= length
        own, key = block[:, None], block[None, :]
        of_clean = torch.where(clean[:, None], key <= own, key < own)
        of_noisy = ~clean[:, None] & (key == own)
        seen = torch.where(clean[None, :], of_clean, of_noisy)[None, None]
        if visible is not None:
            seen = seen & visible.repeat(1, 2)[:, None, None, :]
    bias = torch.zeros(seen.shape, dtype=dtype, device=device)
    return bias.masked_fill(~seen, torch.finfo(dtype).min)


def read(model, input_ids, attention_mask, masked, mask_id, block_size=None):
    """The head's input [B, L, D] and the logits [B, L, V] of each token in a state.

    The state is `input_ids` with `masked` replaced.
    """
    state = input_ids.clone()
    for row, positions in enumerate(masked):
        state[row, positions] = mask_id
    length = state.shape[1]
    bias = attention_bias(attention_mask, length, block_size, state.device, model.dtype)
    options = {"attention_mask": bias}
    if block_size is not None:
        state = torch.cat((state, input_ids), dim=1)
        options["position_ids"] = torch.arange(length, device=state.device).repeat(2)[None]
    inputs = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        logits = model(input_ids=state, is_causal=False, use_cache=False, **options).logits
    finally:
        handle.remove()
    read_out = (inputs[0][:, :length], logits[:, :length])
    if getattr(model.config, "right_shift_logits", False):
        # Those of a position are the next token's; the first token has none but its own.
        return tuple(torch.cat((part[:, :1], part[:, :-1]), dim=1) for part in read_out)
    return read_out


def nll_of(logits, input_ids):
    """[B, L] -log p(x0_i)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none")


def token_nll(model, input_ids, attention_mask, masked, mask_id, block_size=None):
    """[B, L] -log p(x0_i | state), where `state` is `input_ids` with `masked` replaced."""
    _, logits = read(model, input_ids, attention_mask, masked, mask_id, block_size)
    return nll_of(logits, input_ids)


def kl(p_logits, q_logits):
    """[B, L] sum_v p log(p / q)."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distillation(memory, student, teacher):
    """[B, L] how far what the head reads and gives for a token is from a teacher's."""
    (hidden, logits), (wanted_hidden, wanted_logits) = student, teacher
    if memory.inner_loss == "hidden_mse":
        return (hidden - wanted_hidden).square().mean(-1)
    if memory.inner_loss == "hidden_cosine":
        lengths = hidden.norm(dim=-1) * wanted_hidden.norm(dim=-1)
        return 1 - (hidden * wanted_hidden).sum(-1) / lengths
    logits, wanted_logits = (part / memory.inner_temperature for part in (logits, wanted_logits))
    if memory.inner_loss == "kl":
        return kl(wanted_logits, logits)
    return kl(logits, wanted_logits)


def inner_token_loss(
    model, input_ids, attention_mask, states, anchor, step, mask_id, memory, block_size
):
    """[B, L] the inner loss of each token of the state of inner step `step`."""
    inputs = (model, input_ids, attention_mask)
    student = read(*inputs, states[step], mask_id, block_size)
    if memory.inner_loss == "cross_entropy":
        return nll_of(student[1], input_ids)
    with torch.no_grad():
        wanted = teacher_state(memory, states, anchor, step)
        teacher = read(*inputs, wanted, mask_id, block_size)
    return distillation(memory, student, teacher)


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
        norms = [sum(norm**2 for norm in norms) ** 0.5] * len(norms)
    limit = memory.inner_max_norm
    factors = [limit / norm if norm > limit else 1.0 for norm in norms]
    return [gradient * factor for gradient, factor in zip(gradients, factors, strict=True)]


def sgd_step(loss, fast_weights, memory):
    """One update. Returns the new fast weights, the gradient norms, and whether it was skipped.

    First order the new fast weights are leaves; else they are functions of all that made them.
    """
    first_order = memory.meta_gradient == "first_order"
    tensors = [tensor for pair in fast_weights.values() for tensor in pair]
    gradients = torch.autograd.grad(loss, tensors, create_graph=not first_order)
    own_norms = [gradient.double().norm() for gradient in gradients]
    norms = [norm.item() for norm in own_norms]
    if not math.isfinite(loss.item()) or not all(math.isfinite(norm) for norm in norms):
        return fast_weights, norms, True
    steps = iter(clipped(gradients, norms if first_order else own_norms, memory))

    def moved(tensor):
        new = tensor - memory.inner_lr * next(steps)
        return new.detach().requires_grad_() if first_order else new

    return {name: tuple(map(moved, pair)) for name, pair in fast_weights.items()}, norms, False


def attention(memory):
    """What the forward passes run in: torch's other attentions have no second derivative."""
    first_order = memory is None or memory.meta_gradient == "first_order"
    return nullcontext() if first_order else sdpa_kernel(SDPBackend.MATH)


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
        diffusion: an object with the attributes of `DiffusionConfig`; `block_size` also of a model
            that takes `position_ids`.
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
                constant = memory.meta_gradient == "exact_suffix" and not visits_anchor(memory, k)
                below = constant_below(model, memory) if constant else nullcontext()
                with attention(memory), adapted(model, fast, scale), below:
                    per_token = inner_token_loss(
                        model, ids, real, states, anchor, k, mask_id, memory, diffusion.block_size
                    )
                loss = weighted_sum(per_token, targets, weights) / divisor
                fast, step_norms, step_skipped = sgd_step(loss, fast, memory)
                losses.append(loss.item())
                norms.append(step_norms)
                skipped.append(step_skipped)
            step.inner_losses.append(losses)
            step.inner_norms.append(norms)
            step.skipped.append(skipped)

        constant = {name: tuple(t.detach() for t in pair) for name, pair in fast.items()}
        # First order: the outer loss sees the adapted fast weights as constants.
        first_order = memory is None or memory.meta_gradient == "first_order"
        with attention(memory), adapted(model, constant if first_order else fast, scale):
            nll = token_nll(model, ids, real, anchor, mask_id, diffusion.block_size)
            weights = [outer_weights[b] for b in group]
            loss = weighted_sum(nll, anchor, weights) / (normalizer or own_normalizer)
            loss.backward()
        step.outer_loss = step.outer_loss + loss.detach()
        step.fast_weights.append(constant)
    return step
