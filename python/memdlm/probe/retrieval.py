"""In-weight retrieval: is a value recalled that stands in the memory and not in the context?"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdlm.backbone import Backbone
from memdlm.config import MemoryConfig
from memdlm.evaluation.held_out import Adapt, no_memory
from memdlm.inference import Checkpoint, token_logits
from memdlm.probe.questions import OTHER_VALUE, VALUE, Question, in_values
from memdlm.probe.token_loss import masked_counts
from memdlm.prompt_memory import PromptMemory

WITH, WITHOUT = "with the needle", "without it"
OFF, UNRELATED = "off", "unrelated text"
AS_TRAINED = "as trained"
# What a memory is written from, and the contexts that it is read in.
_READINGS = {WITH: (WITH, WITHOUT), WITHOUT: (WITHOUT,), UNRELATED: (WITHOUT,)}
_MORE_EPOCHS, _MORE_LR, _MORE_MASKED = 8, 10.0, 0.6


@dataclass(frozen=True)
class Answers:
    """What n questions are answered, all value tokens filled in at once.

    Attributes:
        nll: [n] float64, of the value's tokens, mean, nats.
        others: [n, o] float64, of the values that are not asked for, in the same places.
        rank: [n] float64, of the value's tokens among all tokens, mean, 1 is the first.
        right: [n] bool, whether every value token is the first.
    """

    nll: Tensor
    others: Tensor
    rank: Tensor
    right: Tensor


def settings(memory: MemoryConfig) -> dict[str, MemoryConfig]:
    """A memory as it was trained, and written in ways that could store more.

    Args:
        memory: the checkpoint's.

    Returns:
        Name to options: more passes over the trajectory, a higher learning rate, both, and both
        with more tokens masked.
    """
    epochs = {"inner_epochs": _MORE_EPOCHS * memory.inner_epochs}
    lr = {"inner_lr": _MORE_LR * memory.inner_lr}
    masked = {"prompt_ratio": max(_MORE_MASKED, memory.prompt_ratio)}
    changes: dict[str, dict[str, Any]] = {
        AS_TRAINED: {},
        f"epochs x {_MORE_EPOCHS}": epochs,
        f"lr x {_MORE_LR:g}": lr,
        f"epochs x {_MORE_EPOCHS}, lr x {_MORE_LR:g}": epochs | lr,
        f"both, ratio {masked['prompt_ratio']:g}": epochs | lr | masked,
    }
    return {name: dataclasses.replace(memory, **own) for name, own in changes.items()}


@torch.no_grad()
def answer(
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    contexts: Sequence[Sequence[Sequence[int]]],
    sources: Sequence[Sequence[int]],
    adapt: Adapt,
    batch_size: int,
) -> list[Answers]:
    """Fill in the masked response behind other contexts than the memory was written from.

    Args:
        checkpoint: the model.
        questions: whose response is masked, and whose value is looked for.
        contexts: c times n lists of token ids, of one length, that the model sees.
        sources: n lists of token ids that the memory is written from.
        adapt: `no_memory`, or `PromptMemory.adapt`.
        batch_size: questions of a forward.

    Returns:
        c answers.
    """
    backbone = Backbone(checkpoint.model)
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in contexts]
    for first in range(0, len(questions), batch_size):
        batch = slice(first, first + batch_size)
        with adapt(sources[batch]):
            for own, context in zip(parts, contexts, strict=True):
                own.append(_fill_in(checkpoint, backbone, questions[batch], context[batch]))
    backbone.release()
    return [Answers(*(torch.cat(each) for each in zip(*own, strict=True))) for own in parts]


def _fill_in(
    checkpoint: Checkpoint,
    backbone: Backbone,
    questions: Sequence[Question],
    contexts: Sequence[Sequence[int]],
) -> tuple[Tensor, ...]:
    """What `Answers` has."""
    device, mask = checkpoint.device, checkpoint.mask_token_id
    canvas = [
        [*context, *[mask] * len(question.response)]
        for context, question in zip(contexts, questions, strict=True)
    ]
    known = [[question.value, *question.other_values] for question in questions]
    values = torch.tensor(known, device=device)  # [B, 1 + o, 2]
    start = len(contexts[0])
    places = torch.arange(start, start + values.shape[-1], device=device)
    logits = token_logits(
        backbone,
        torch.tensor(canvas, device=device),
        places.expand(len(questions), -1),
        canvas_block=checkpoint.diffusion.block_size,
    ).double()  # [B, 2, V]
    logits[..., mask] = -torch.inf
    own = logits.gather(-1, values.mT)  # [B, 2, 1 + o]
    nll = (logits.logsumexp(-1, keepdim=True) - own).mean(1).cpu()
    wanted = own[..., :1]
    # Not >: a tie is no answer, nor is nan.
    rank = (~(logits < wanted)).sum(-1)
    return nll[:, 0], nll[:, 1:], rank.double().mean(1).cpu(), (rank == 1).all(1).cpu()


def retrieval_rows(
    name: str,
    checkpoint: Checkpoint,
    memory: MemoryConfig,
    questions: Sequence[Question],
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """JSON rows: a model's answers, memory off, and under each setting and source of a memory.

    Args:
        name: the model's.
        checkpoint: the model.
        memory: its own.
        questions: n, with prompts of one length.
        batch_size: questions of a forward.
        seed: of the memory's masks and of its initial values: the same for every source.

    Returns:
        Rows with the lists of all questions. `masked` is how many of a value's tokens the memory of
        the prompt was written to predict, `others_masked` the same of the other values.
    """
    texts = {
        WITH: [question.prompt for question in questions],
        WITHOUT: [question.without for question in questions],
        UNRELATED: [question.unrelated for question in questions],
    }

    def ask(
        setting: str, source: str, contexts: Sequence[str], adapt: Adapt
    ) -> list[dict[str, Any]]:
        seen = [texts[context] for context in contexts]
        sources = texts[WITH if source == OFF else source]
        answers = answer(checkpoint, questions, seen, sources, adapt, batch_size)
        return [
            {
                "measure": "retrieval",
                "model": name,
                "setting": setting,
                "context": context,
                "memory": source,
                "nll": [round(value, 4) for value in own.nll.tolist()],
                "others": [[round(value, 4) for value in each] for each in own.others.tolist()],
                "rank": own.rank.tolist(),
                "right": [int(value) for value in own.right],
            }
            for context, own in zip(contexts, answers, strict=True)
        ]

    rows = ask(AS_TRAINED, OFF, (WITH, WITHOUT), no_memory)
    for setting, config in settings(memory).items():
        writer = PromptMemory.of(dataclasses.replace(checkpoint, memory=config), seed=seed)
        try:
            counts = masked_counts(writer, texts[WITH], checkpoint.mask_token_id)
            masked = {
                "masked": [sum(own) for (own,) in _predicted(questions, counts, VALUE)],
                "others_masked": [
                    [sum(own) for own in each]
                    for each in _predicted(questions, counts, OTHER_VALUE)
                ],
            }
            for source, contexts in _READINGS.items():
                own_rows = ask(setting, source, contexts, writer.adapt)
                rows += [row | masked for row in own_rows]
        finally:
            writer.detach()
    return rows


def _predicted(
    questions: Sequence[Question], counts: Sequence[Tensor], kind: str
) -> list[list[list[int]]]:
    """Of each question's values of a kind: of each token 1 if it was masked in writing, or 0."""
    found = []
    for question, own in zip(questions, counts, strict=True):
        known = zip(own.tolist(), question.kinds, strict=True)
        found.append(in_values([int(count > 0) for count, each in known if each == kind]))
    return found
