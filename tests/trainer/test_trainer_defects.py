"""Defects of the published trainer, each with the test that would find it in this one."""

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.trainer.trainer_case import (
    logged,
    tiny_examples,
    tiny_model,
    tiny_peft_model,
    tiny_trainer,
)


def test_the_eval_loss_is_not_measured_after_adapting_on_its_labels(tmp_path):
    evaluation = tiny_examples(5, seed=4)
    ours = tiny_trainer(tmp_path, evaluation=evaluation).evaluate()
    plain = tiny_trainer(tmp_path, memory=None, evaluation=evaluation).evaluate()
    assert ours["eval_loss"] == plain["eval_loss"]
    assert ours["eval_loss_with_memory"] != ours["eval_loss"]


def test_with_memory_off_a_batch_gives_plain_mdlm_bit_for_bit(tmp_path):
    results = []
    for memory_off in (True, False):
        trainer = tiny_trainer(tmp_path, **({} if memory_off else {"memory": None}))
        batch = trainer.data_collator([trainer.train_dataset[0, i] for i in range(3)])
        switch = {"memory_enabled": False} if memory_off else {}
        loss = trainer.model(batch, 17, **switch).loss
        loss.backward()
        results.append((loss, [p.grad for p in trainer.model.parameters()]))
    (ours, our_gradients), (plain, plain_gradients) = results
    assert torch.equal(ours, plain)
    assert all(map(torch.equal, our_gradients, plain_gradients))


def test_no_fast_weights_stay_in_the_model_after_training_or_evaluation(tmp_path):
    trainer = tiny_trainer(tmp_path, evaluation=tiny_examples(2))
    trainer.train()
    trainer.evaluate()
    assert trainer.model.fast_weights.param.any()  # there was a memory
    inside = trainer.model.model.eval()
    untouched = tiny_model().eval()
    untouched.load_state_dict(inside.state_dict())
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(inside(ids).logits, untouched(ids).logits)


def test_a_checkpoint_of_full_fine_tuning_has_the_models_own_tensors_only(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(tiny_model().state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, tensor in trainer.model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_checkpoint_of_a_lora_has_its_own_tensors_only(tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_peft_model())
    trainer.train()
    trainer.save_model()
    own = sum(p.requires_grad for p in tiny_peft_model().parameters())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        names = list(saved.keys())
    assert len(names) == own
    assert all("lora_A" in name or "lora_B" in name for name in names)


class GradientNorm(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        squares = [p.grad.double().square().sum() for p in model.parameters()]
        self.norms.append(torch.stack(squares).sum().sqrt().item())


def test_inner_gradients_do_not_leak_into_the_outer_clip_norm(tmp_path):
    measured = GradientNorm()
    trainer = tiny_trainer(tmp_path, max_grad_norm=1e9, callbacks=[measured])
    trainer.train()
    torch.testing.assert_close(logged(trainer, "grad_norm"), measured.norms, rtol=1e-5, atol=0)
    optimised = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == set(trainer.model.model.parameters())
    assert all(leaf.grad is None for leaf in trainer.model.fast_weights.leaves)


def test_the_memorys_random_draws_do_not_shift_the_outer_noise(tmp_path):
    states = []
    for memory in ({}, {"memory": None}):
        trainer = tiny_trainer(tmp_path, model=tiny_model(dropout=0.3), **memory)
        trainer.train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_adapting_at_evaluation_is_without_dropout(tmp_path):
    evaluation = tiny_examples(3)
    with_dropout = tiny_trainer(tmp_path, model=tiny_model(dropout=0.5), evaluation=evaluation)
    with_dropout.model.train()
    without = tiny_trainer(tmp_path, evaluation=evaluation)
    name = "eval_loss_with_memory"
    assert with_dropout.evaluate()[name] == without.evaluate()[name]
