"""Small models, examples and trainers for the tests of the trainer."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MDLMObjective, MemDLMObjective
from memdlm.trainer import MemDLMTrainer

WORDS = "alpha beta gamma delta one two three four five six is the magic number of : ? .".split()
SPECIAL = ["<pad>", "<mask>", "<eos>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
PAD, MASK, END = 0, 1, 2


def tiny_tokenizer(**special):
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chosen = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **chosen)


def tiny_model(dtype=torch.float32, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=dropout,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_peft_model(dropout=0.0):
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=targets)
    return get_peft_model(tiny_model(dropout=dropout), config)


def tiny_examples(count=8, seed=0, prompt=3):
    """Ragged examples: a visible prompt, then tokens that may be masked."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(prompt + 1, 14, (count,), generator=generator).tolist()
    examples = []
    for length in lengths:
        ids = torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


class RecordingTrainer(MemDLMTrainer):
    """Keeps what each training step was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []
        self.normalizers = []

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        self.batches.append(inputs)
        self.normalizers.append(num_items_in_batch)
        return super().compute_loss(
            model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs
        )


def tiny_trainer(
    folder,
    *,
    model=None,
    memory=MemoryConfig(rank=2, layer_fraction=0.5),  # noqa: B008 (frozen)
    diffusion=DiffusionConfig(),  # noqa: B008 (frozen)
    examples=None,
    evaluation=None,
    memory_gap_steps=0,
    callbacks=None,
    tokenizer=None,
    **arguments,
):
    """A trainer of a tiny model; `memory` None is plain MDLM."""
    model = tiny_model() if model is None else model
    chosen = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 7,
    }
    if memory is None:
        objective = MDLMObjective(model, diffusion)
    else:
        objective = MemDLMObjective(model, diffusion, memory)
    return RecordingTrainer(
        objective,
        TrainingArguments(**(chosen | arguments)),
        MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory, seed=7),
        tiny_examples() if examples is None else examples,
        evaluation,
        memory_gap_steps=memory_gap_steps,
        callbacks=callbacks,
        processing_class=tokenizer,
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
