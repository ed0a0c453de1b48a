"""Which prompts are written together, and which are cut, so that a writing fits a memory budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from memdlm.backbone import Backbone
from memdlm.config import MemoryConfig
from memdlm.inner_loss import has_teacher


@dataclass(frozen=True)
class Writing:
    """Prompts that are written as one batch: several whole ones, or one, chunk after chunk.

    Attributes:
        prompts: their numbers, rising.
        chunks: what of a prompt each run of the inner loop sees.
    """

    prompts: tuple[int, ...]
    chunks: tuple[slice, ...] = (slice(None),)


def row_bytes(backbone: Backbone, memory: MemoryConfig) -> int:
    """Roughly what the inner loop holds at once for each token of its batch, in bytes.

    Args:
        backbone: the split model; `activation_width` is its values per row and layer.
        memory: K states, whose prefixes run as one batch, and whether the suffix is recomputed.

    Returns:
        Bytes; activations alone, without weights, fast weights and logits. Between 1.0 and 3.0
        times the growth of a process's peak memory in four measured cases (CPU, float32, 8 layers).
    """
    layers = (backbone.half_count - backbone.boundary + 1) // 2
    hidden = backbone.config.hidden_size
    width = backbone.activation_width
    # "auto" may store: it asks for the free memory, not for the budget.
    recomputes = memory.inner_checkpoint == "layer"
    stored = 1 if recomputes else layers
    # Measured: a layer stores up to half as much again, and its backward takes one more.
    suffix = 3 * (stored + 1) * width // 2 + (layers * hidden if recomputes else 0)
    # The noisier states' prefix has run by then. It keeps no graph: one layer of every state.
    prefix = (memory.inner_steps - 1) * width
    # A teacher starts at a boundary of its own.
    boundaries = 2 * memory.inner_steps * hidden * (2 if has_teacher(memory) else 1)
    # Block diffusion runs the clean tokens beside the noisy ones.
    copies = 1 if backbone.block_size is None else 2
    itemsize = backbone.head()[0].element_size()
    return copies * (max(suffix, prefix) + boundaries) * itemsize


def plan(lengths: Sequence[int], most_tokens: int | None, unit: int) -> list[Writing]:
    """Group prompts, and cut those that do not fit alone.

    Args:
        lengths: tokens of each prompt, at least 1.
        most_tokens: padded tokens of a batch, at least `unit`; None for no limit.
        unit: a batch's length is padded to a multiple of this, and chunks end at one.

    Returns:
        Writings; every prompt is in one of them.
    """
    if most_tokens is None:
        return [Writing(tuple(range(len(lengths))))]
    writings = []
    group: list[int] = []
    # Rising lengths: little padding, and the next one is the longest of its group.
    for prompt in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        padded = -(-lengths[prompt] // unit) * unit
        if padded > most_tokens:
            writings.append(Writing((prompt,), _chunks(lengths[prompt], most_tokens, unit)))
            continue
        if (len(group) + 1) * padded > most_tokens:
            writings.append(Writing(tuple(sorted(group))))
            group = []
        group.append(prompt)
    return writings + ([Writing(tuple(sorted(group)))] if group else [])


def _chunks(length: int, most_tokens: int, unit: int) -> tuple[slice, ...]:
    """The fewest consecutive chunks that fit, their sizes equal to within one unit."""
    units = -(-length // unit)
    count = -(-units // (most_tokens // unit))
    ends = [min(length, units * number // count * unit) for number in range(count + 1)]
    return tuple(slice(*ends[number : number + 2]) for number in range(count))
