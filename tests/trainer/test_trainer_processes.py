"""Two processes train and evaluate as one does with twice the accumulation, resumed too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memdlm.config import MemoryConfig
from tests.trainer.trainer_case import logged, tiny_examples, tiny_trainer

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = MemoryConfig(rank=2, layer_fraction=0.5, scope="sample")

SCRIPT = """
import sys
from tests.trainer.test_trainer_processes import run
run(sys.argv[1], processes=2)
"""


def run(folder, processes):
    """Train, then resume in the middle of the second epoch; what was logged and measured."""
    results = []
    for resume in (None, str(Path(folder) / "checkpoint-3")):
        trainer = tiny_trainer(
            folder,
            memory=SAMPLE,
            examples=tiny_examples(8),
            # All of them fit in the first process's share: the second has nothing to count.
            evaluation=tiny_examples(3, seed=5),
            per_device_eval_batch_size=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4 // processes,
            max_steps=5,
            save_strategy="steps",
            save_steps=3,
            ddp_backend="gloo" if processes > 1 else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        metrics = trainer.evaluate()
        names = ("eval_loss", "eval_loss_with_memory")
        results.append([logged(trainer), [metrics[name] for name in names]])
    if trainer.is_world_process_zero():
        (Path(folder) / "results.json").write_text(json.dumps(results))
    return results


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "two")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, resumed = json.loads((tmp_path / "two" / "results.json").read_text())
    one, _ = run(tmp_path / "one", processes=1)
    for found in (whole, resumed):
        assert found[0] == pytest.approx(one[0], rel=1e-4)
        assert found[1] == pytest.approx(one[1], rel=1e-4)
