"""Exposure bias along a training run: what is logged, and that training goes on as it would."""

import json

import pytest
import torch

from memdlm.cli import main
from memdlm.config import MemoryConfig
from memdlm.evaluation.callback import RATIOS, ExposureBiasCallback
from memdlm.evaluation.exposure_bias import exposure_bias
from tests.trainer.trainer_case import (
    logged,
    tiny_examples,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)

NAMES = [f"eval_exposure_bias_{ratio}" for ratio in RATIOS]
# Prompts so long that some of their tokens are masked.
EVALUATION = tiny_examples(5, seed=1, prompt=9)


def run(folder, *, measured, memory):
    trainer = tiny_trainer(
        folder,
        memory=memory,
        evaluation=EVALUATION,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
    )
    if measured:
        trainer.add_callback(ExposureBiasCallback(trainer, trainer.collator, EVALUATION, 2))
    trainer.train()
    return trainer


@pytest.mark.parametrize("memory", [None, MemoryConfig(rank=2, layer_fraction=0.5)])
def test_each_evaluation_logs_the_ratio_and_training_is_not_moved(memory, tmp_path):
    plain = run(tmp_path / "plain", measured=False, memory=memory)
    trainer = run(tmp_path / "measured", measured=True, memory=memory)
    assert logged(trainer) == logged(plain)
    for name in NAMES:
        assert len(logged(trainer, name)) == 2
        with_memory = logged(trainer, f"{name}_with_memory")
        assert len(with_memory) == (0 if memory is None else 2)
        if memory is not None:
            assert with_memory[-1] != logged(trainer, name)[-1]
    # The last evaluation is of the model as it is now.
    collator = trainer.collator
    trainer.model.eval()
    curve = exposure_bias(
        trainer.model.model,
        EVALUATION,
        mask_token_id=collator.mask_token_id,
        pad_token_id=collator.pad_token_id,
    )
    own = [logged(trainer, name)[-1] for name in NAMES]
    # Two sums of the NLLs of a model in float32.
    ratios = curve.ratio()[0][list(RATIOS.values())].float()
    torch.testing.assert_close(torch.tensor(own), ratios)


def test_the_key_of_memdlm_train(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in tiny_examples(6)))
    words = f"train --model {tmp_path / 'model'} --dataset {data} --output_dir {tmp_path / 'out'}"
    words += " --rank 2 --layer_fraction 0.5 --max_steps 2 --use_cpu true --disable_tqdm true"
    words += " --report_to none --exposure_bias_examples 2"
    assert main(words.split()) == 2
    assert "exposure_bias_examples would not be read" in capsys.readouterr().err
    assert main([*words.split(), "--eval_fraction", "0.5", "--eval_strategy", "epoch"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the magic number"}\n' * 4)
    words = words.replace(str(data), str(texts)).replace(
        str(tmp_path / "out"), str(tmp_path / "other")
    )
    assert main([*words.split(), "--eval_fraction", "0.5", "--eval_strategy", "epoch"]) == 2
    assert "must each have a prompt" in capsys.readouterr().err
    assert not (tmp_path / "other" / "trainer_state.json").exists()
    assert all(any(name in entry for entry in state["log_history"]) for name in NAMES)
