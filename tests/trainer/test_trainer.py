"""The trainer: normaliser, pairing, resuming, evaluation, logs and checkpoints."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.loss import outer_normalizer
from tests.tiny import make_model
from tests.trainer.trainer_case import (
    logged,
    tiny_examples,
    tiny_model,
    tiny_peft_model,
    tiny_tokenizer,
    tiny_trainer,
)

SAMPLE = MemoryConfig(rank=2, layer_fraction=0.5, scope="sample")


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimiser is about to use."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def same_batches(first, second):
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["time"], theirs["time"])
        assert torch.equal(ours["anchor"]["input_ids"], theirs["anchor"]["input_ids"])
        assert torch.equal(ours["anchor"]["weight"], theirs["anchor"]["weight"])


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (3, 3)])
def test_accumulated_batches_equal_one_large_batch(tmp_path, norm, batch_size, accumulation):
    results = []
    for size, steps in ((8, 1), (batch_size, accumulation)):
        gradients = Gradients()
        trainer = tiny_trainer(
            tmp_path,
            model=make_model(layers=2),
            memory=SAMPLE,
            diffusion=DiffusionConfig(loss_norm=norm),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            callbacks=[gradients],
        )
        trainer.train()
        results.append((logged(trainer)[0], gradients.steps[0]))
    (loss, expected), (accumulated, found) = results
    assert accumulated == pytest.approx(loss, rel=1e-6)  # the Trainer adds up in float32
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_the_normaliser_counts_the_accumulated_batch_and_the_last_one_is_short(tmp_path, norm):
    examples = tiny_examples(5)
    trainer = tiny_trainer(
        tmp_path,
        diffusion=DiffusionConfig(loss_norm=norm),
        examples=examples,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=2,
    )
    trainer.train()
    counts = [batch["maskable_count"] for batch in trainer.batches]
    assert len(counts) == 5
    first = outer_normalizer(norm, torch.cat(counts[:3]))
    second = outer_normalizer(norm, torch.cat(counts[3:]))
    assert trainer.normalizers == [first] * 3 + [second] * 2


def test_an_example_that_cannot_be_masked_adds_nothing_to_the_normaliser(tmp_path):
    examples = tiny_examples(2)
    examples[1]["labels"] = [-100] * len(examples[1]["labels"])
    trainer = tiny_trainer(
        tmp_path,
        examples=examples,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trainer.train()
    maskable = sum(label != -100 for label in examples[0]["labels"])
    assert trainer.normalizers == [maskable, maskable]


def test_batches_without_a_masked_token_give_loss_and_gradients_of_zero(tmp_path):
    gradients = Gradients()
    examples = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    trainer = tiny_trainer(tmp_path, examples=examples, max_steps=1, callbacks=[gradients])
    trainer.train()
    assert logged(trainer) == [0.0]
    assert all(not gradient.any() for gradient in gradients.steps[0].values())


def test_memdlm_and_its_baseline_see_the_same_times_masks_and_batches(tmp_path):
    ours = tiny_trainer(tmp_path / "memdlm", max_steps=9)
    baseline = tiny_trainer(tmp_path / "mdlm", memory=None, max_steps=9)
    ours.train()
    baseline.train()
    same_batches(ours.batches, baseline.batches)
    # Another epoch: another order, other masks of the same example.
    epochs = [ours.batches[:4], ours.batches[4:8]]
    seen = [torch.cat([batch["time"] for batch in epoch]) for epoch in epochs]
    assert not set(seen[0].tolist()) & set(seen[1].tolist())


@pytest.mark.parametrize(("peft", "workers"), [(False, 0), (True, 0), (False, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, peft, workers):
    def trainer(folder):
        # Dropout: the random generators must come back too. 9 steps: the third epoch.
        model = tiny_peft_model(0.2) if peft else tiny_model(dropout=0.2)
        return tiny_trainer(
            folder,
            model=model,
            max_steps=9,
            save_strategy="steps",
            save_steps=5,
            dataloader_num_workers=workers,
        )

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(resumed) == logged(whole)
    same_batches(resumed.batches, whole.batches[5:])
    for (name, ours), theirs in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_evaluation_is_exact_over_the_whole_set_and_repeats(tmp_path):
    evaluation = tiny_examples(7, seed=3)
    losses = []
    for batch_size in (1, 3, 7):
        trainer = tiny_trainer(
            tmp_path,
            model=make_model(layers=2),
            memory=SAMPLE,
            evaluation=evaluation,
            per_device_eval_batch_size=batch_size,
        )
        metrics = trainer.evaluate()
        again = trainer.evaluate()
        names = ("eval_loss", "eval_loss_with_memory")
        assert [metrics[name] for name in names] == [again[name] for name in names]
        losses.append([metrics[name] for name in names])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[2] == pytest.approx(losses[0], rel=1e-12)
    assert losses[0][0] != losses[0][1]


def test_several_evaluation_sets_and_one_given_later(tmp_path):
    sets = {"near": tiny_examples(3, seed=1), "far": tiny_examples(3, seed=2)}
    trainer = tiny_trainer(tmp_path, evaluation=sets)
    metrics = trainer.evaluate()
    alone = trainer.evaluate(sets["far"])
    assert metrics["eval_far_loss"] == alone["eval_loss"]
    assert metrics["eval_far_loss_with_memory"] == alone["eval_loss_with_memory"]
    assert metrics["eval_near_loss"] != metrics["eval_far_loss"]


def test_evaluating_and_measuring_the_gap_change_nothing_in_training(tmp_path):
    def losses(**options):
        trainer = tiny_trainer(tmp_path, model=tiny_model(dropout=0.3), max_steps=5, **options)
        trainer.train()
        return logged(trainer)

    plain = losses()
    assert losses(memory_gap_steps=2) == plain
    assert losses(evaluation=tiny_examples(3), eval_strategy="steps", eval_steps=2) == plain


def test_training_logs_what_the_inner_loop_did(tmp_path):
    trainer = tiny_trainer(tmp_path, memory_gap_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    for name in ("inner_loss/stage_1", "inner_loss/stage_2", "inner_grad_norm"):
        values = logged(trainer, name)
        assert len(values) == 4
        assert all(math.isfinite(value) and value > 0 for value in values)
    assert all(0 <= value <= 1 for value in logged(trainer, "inner_clipped_fraction"))
    assert logged(trainer, "inner_skipped") == [0] * 4
    # Of the same batches: the loss with memory is the one that was trained on.
    assert logged(trainer, "loss_with_memory") == pytest.approx(logged(trainer)[1::2], rel=1e-6)
    assert logged(trainer, "loss_without_memory") != logged(trainer, "loss_with_memory")


def test_a_baseline_logs_nothing_of_a_memory(tmp_path):
    trainer = tiny_trainer(tmp_path, memory=None, evaluation=tiny_examples(2), memory_gap_steps=1)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert not [name for name in names if "inner" in name or "memory" in name]
    assert "eval_loss_with_memory" not in trainer.evaluate()


@pytest.mark.parametrize("peft", [False, True])
def test_gradient_checkpointing_reaches_the_model_and_changes_no_number(tmp_path, peft):
    def run(flag):
        model = tiny_peft_model() if peft else tiny_model()
        trainer = tiny_trainer(tmp_path, model=model, gradient_checkpointing=flag)
        trainer.train()
        assert trainer.model.backbone.decoder.gradient_checkpointing is flag
        return logged(trainer)

    assert run(True) == run(False)


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_bfloat16_is_near_float32(tmp_path, mode):
    exact = tiny_trainer(tmp_path)
    exact.train()
    dtype = torch.bfloat16 if mode == "weights" else torch.float32
    narrow = tiny_trainer(tmp_path, model=tiny_model(dtype), bf16=mode == "autocast")
    narrow.train()
    assert logged(narrow) == pytest.approx(logged(exact), rel=0.05)
    assert logged(narrow, "inner_skipped") == [0] * 4


@pytest.mark.parametrize("peft", [False, True])
def test_a_checkpoint_loads_elsewhere_and_says_how_it_was_trained(tmp_path, peft):
    model = tiny_peft_model() if peft else tiny_model()
    trainer = tiny_trainer(tmp_path, model=model, tokenizer=tiny_tokenizer())
    trainer.train()
    trainer.save_model()
    method = json.loads((tmp_path / "memdlm.json").read_text())
    assert method["objective"] == "memdlm"
    assert method["memory"]["rank"] == 2
    assert method["diffusion"]["schedule"] == "linear"
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "<mask>"
    if peft:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.model.model.eval()(ids).logits
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("peft", [False, True])
def test_the_best_model_comes_back_at_the_end(tmp_path, peft):
    model = tiny_peft_model() if peft else tiny_model()
    trainer = tiny_trainer(
        tmp_path,
        model=model,
        evaluation=tiny_examples(4, seed=9),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_steps=6,
        learning_rate=0.5,  # so high that an early model is the best
        load_best_model_at_end=True,
    )
    trainer.train()
    best = min(logged(trainer, "eval_loss"))
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
    ],
)
def test_arguments_that_would_not_be_honoured_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **arguments)


def test_a_collator_of_another_objective_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.collator.memory = SAMPLE
    with pytest.raises(ValueError, match=r"data_collator\.memory must be the objective's"):
        type(trainer)(trainer.model, trainer.args, trainer.collator)
