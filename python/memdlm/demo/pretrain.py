"""Pre-train the demo's base: plain MDLM on text in which facts repeat, so that copying is learned.

    python -m memdlm.demo.pretrain --out FOLDER --minutes 45

Every token is maskable. The times of a batch are spread evenly over (0.001, 1] with one random
shift, which leaves the expected loss as it is and lowers its variance (Kingma et al., Variational
Diffusion Models, arXiv 2107.00630).
"""

import argparse
import math
import pathlib
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from memdlm.demo.examples import BASE_FOLDER, DemoText, build_examples, load_tokenizer, random_value
from memdlm.demo.initialise import initialise_for_copying
from memdlm.demo.needles import KEYS, answer, question, statement
from memdlm.demo.recall import recall
from memdlm.demo.tokenizer import train_tokenizer

TIME_EPSILON = 1e-3
TOKENS_PER_BATCH = 2048
LEARNING_RATE = 1.5e-3
# Of the attention that starts with a structure: at the full rate, learning which words are frequent
# destroys it (recall fell from 0.69 to 0.12).
STRUCTURED_SHARE = 0.1
WARMUP_STEPS = 30
MAX_GRAD_NORM = 1.0
REPORT_EVERY_S = 120
# Tokens of the longest question with its answer.
QUESTION_ROOM = 40
RECALL_LENGTHS = (128, 256, 512)


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: rows grow longer, and facts rarer in them.

    Args:
        until: share of the whole time at which it ends.
        length: tokens of a row.
        pairs, spans: shares of rows that are dense pairs and repeated spans; the rest are text with
            facts.
    """

    until: float
    length: int
    pairs: float
    spans: float


CURRICULUM = (
    Stage(until=0.1, length=64, pairs=1.0, spans=0.0),
    Stage(until=0.6, length=128, pairs=0.15, spans=0.1),
    Stage(until=1.0, length=256, pairs=0.05, spans=0.05),
)


def base_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape of the base: a Llama of 2.6 million parameters.

    Args:
        tokenizer: gives the vocabulary and the special tokens.

    Returns:
        LlamaConfig. Attention has biases, which the initial weights need.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def pairs_row(text: DemoText, rng: random.Random, length: int) -> list[int]:
    """Nothing but short facts, each several times, and a few random tokens: the densest copying.

    Args:
        text: DemoText.
        rng: random.Random.
        length: number of tokens.

    Returns:
        list of token ids.
    """
    keys = rng.sample(KEYS, rng.randint(2, 3 + length // 128))
    facts = [text.encode(f" {key} is {random_value(rng)}.") for key in keys]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(facts)
        if rng.random() < 0.3:
            tokens += text.random_tokens(rng, rng.randint(1, 3))
    return tokens[:length]


def span_row(text: DemoText, rng: random.Random, length: int) -> list[int]:
    """A span, of random tokens or of text, again and again with text of any length between.

    Args:
        text: DemoText.
        rng: random.Random.
        length: number of tokens.

    Returns:
        list of token ids.
    """
    span_length = rng.randint(6, length // 3)
    draw = text.random_tokens if rng.random() < 0.5 else text.window
    span = draw(rng, span_length)
    tokens: list[int] = []
    while len(tokens) < 2 * length:
        tokens += span + text.window(rng, rng.randint(0, 8))
    start = rng.randrange(len(tokens) - length)
    return tokens[start : start + length]


def facts_row(text: DemoText, rng: random.Random, length: int) -> list[int]:
    """Text in which facts stand several times, and, in half of the rows, a question and its answer.

    Args:
        text: DemoText.
        rng: random.Random.
        length: number of tokens.

    Returns:
        list of token ids.
    """
    size = len(text.encode(statement(KEYS[0], "1000")))
    room = int((length - QUESTION_ROOM) * rng.uniform(0.2, 1.0))
    needles: list[tuple[str, str]] = []
    for key in rng.sample(KEYS, len(KEYS)):
        values = [random_value(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        fact = [(key, value) for value in values] * rng.randint(1, 3)
        room -= size * len(fact)
        if room < 0:
            break
        needles += fact
    rng.shuffle(needles)
    asked: list[int] = []
    if needles and rng.random() < 0.5:
        key = rng.choice(needles)[0]
        # In the order of the text, each value once.
        values = list(dict.fromkeys(value for name, value in needles if name == key))
        asked = [*text.encode(question(key, len(values) > 1)), *text.encode(answer(values))]
        asked.append(text.tokenizer.eos_token_id)
    statements = [text.encode(statement(*needle)) for needle in needles]
    return text.haystack(rng, statements, length - len(asked)) + asked


def masked_rows_loss(model: LlamaForCausalLM, tokens: torch.Tensor, mask_id: int) -> torch.Tensor:
    """The loss of plain MDLM with a linear schedule, every token maskable.

    Args:
        model: the base.
        tokens: [B, L] int64.
        mask_id: id of the mask token.

    Returns:
        0-d float32: sum over masked tokens of NLL / t, divided by B·L.
    """
    rows = len(tokens)
    times = (torch.arange(rows) + torch.rand(1)) / rows * (1 - TIME_EPSILON) + TIME_EPSILON
    masked = torch.rand(tokens.shape) < times[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        noisy = tokens.masked_fill(masked, mask_id)
        hidden = model.model(noisy, is_causal=False, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[masked])
    nll = F.cross_entropy(logits.float(), tokens[masked], reduction="none")
    return (nll / times[:, None].expand_as(tokens)[masked]).sum() / tokens.numel()


def sample_rows(text: DemoText, rng: random.Random, stage: Stage) -> torch.Tensor:
    """A batch of the stage's mixture.

    Args:
        text: DemoText.
        rng: random.Random.
        stage: Stage.

    Returns:
        [B, L] int64, about 2,048 tokens.
    """
    makers = (pairs_row, span_row, facts_row)
    shares = (stage.pairs, stage.spans, 1 - stage.pairs - stage.spans)
    count = TOKENS_PER_BATCH // stage.length
    chosen = rng.choices(makers, shares, k=count)
    return torch.tensor([make(text, rng, stage.length) for make in chosen])


def report(model: LlamaForCausalLM, mask_id: int, n: int) -> str:
    """Recall on held-out text, one value and several, all values masked at once.

    Args:
        model: the base.
        mask_id: id of the mask token.
        n: examples for each figure.

    Returns:
        str, one figure for each length and kind.
    """
    figures = []
    for length in RECALL_LENGTHS:
        for several in (0.0, 1.0):
            examples = build_examples(
                "validation", n, length, 0, recall_share=1.0, several_share=several
            )
            share = recall(model, examples, mask_id)
            figures.append(f"{length}{'+' if several else ''}: {share:.2f}")
    return "  ".join(figures)


def parameter_groups(model: LlamaForCausalLM) -> list[dict[str, Any]]:
    """The parameters, with the share of the learning rate at which they learn.

    Args:
        model: an initialised base.

    Returns:
        list of dict for an optimizer, each with a key `share`.
    """
    structured = [p for layer in model.model.layers[:2] for p in layer.self_attn.parameters()]
    chosen = set(structured)
    others = [p for p in model.parameters() if p not in chosen]
    return [
        {"params": structured, "share": STRUCTURED_SHARE},
        {"params": others, "share": 1.0},
    ]


def pretrain(
    model: LlamaForCausalLM, text: DemoText, minutes: float, seed: int, folder: pathlib.Path
) -> None:
    """Train in place through the curriculum, and save now and then.

    Args:
        model: an initialised base.
        text: DemoText.
        minutes: time to train for; stages and learning rate are functions of its share.
        seed: of rows and masks.
        folder: where the weights are saved, in bfloat16.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    mask_id = text.tokenizer.mask_token_id
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.98), weight_decay=0.01)
    start = last_report = time.monotonic()
    seconds = minutes * 60
    losses: list[float] = []
    with tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while (share := (time.monotonic() - start) / seconds) < 1:
            stage = next(stage for stage in CURRICULUM if share < stage.until)
            warm = min(1.0, (len(losses) + 1) / WARMUP_STEPS)
            rate = LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            loss = masked_rows_loss(model, sample_rows(text, rng, stage), mask_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.update(share - bar.n)
            if time.monotonic() - last_report > REPORT_EVERY_S:
                recent = losses[-50:]
                mean = sum(recent) / len(recent)
                bar.write(
                    f"{share:4.0%} step {len(losses)} length {stage.length} loss {mean:.3f} "
                    f"recall {report(model, mask_id, n=32)}"
                )
                save(model, folder)
                last_report = time.monotonic()


def save(model: LlamaForCausalLM, folder: pathlib.Path) -> None:
    """Write config and weights, in bfloat16, to be read by `from_pretrained`.

    Args:
        model: stays as it is.
        folder: where to.
    """
    half = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    # The head is the embedding; copies of both would be saved twice.
    del half["lm_head.weight"]
    model.save_pretrained(folder, state_dict=half)


def main() -> None:
    """Train the tokenizer where the package has none, then the base, and print its recall."""
    parser = argparse.ArgumentParser(description="Pre-train the base of the MemDLM demo.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the base")
    parser.add_argument("--minutes", type=float, default=45.0, help="time to train for")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (BASE_FOLDER / "tokenizer.json").exists():
        train_tokenizer().save_pretrained(BASE_FOLDER)
    tokenizer = load_tokenizer()
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(base_config(tokenizer))
    initialise_for_copying(model)
    print(f"{model.num_parameters():,} parameters")
    print("recall before:", report(model, tokenizer.mask_token_id, n=32), flush=True)
    text = DemoText("train", tokenizer)
    pretrain(model, text, arguments.minutes, arguments.seed, arguments.out)
    save(model, arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print("recall after:", report(model, tokenizer.mask_token_id, n=128), flush=True)


if __name__ == "__main__":
    main()
