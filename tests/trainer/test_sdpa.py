"""Which attention backend runs, wherever a model's layers do."""

import dataclasses
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm import backbone as backbone_module
from memdlm import sdpa
from memdlm.backbone import Backbone
from memdlm.cli import main
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.inference import load_checkpoint, token_logits
from memdlm.objective import MDLMObjective, MemDLMObjective
from memdlm.sdpa import check_sdpa_backend, set_sdpa_backend
from tests.families import make_family_model
from tests.tiny import EVEN, gradients, make_batch, make_features, make_model
from tests.trainer.memory_case import PROMPTS, make_memory
from tests.trainer.trainer_case import tiny_model, tiny_tokenizer

DIFFUSION = DiffusionConfig()
MEMORY = MemoryConfig(rank=4, layer_fraction=0.5, target="ffn+attention", inner_steps=3)
CPU = torch.device("cpu")


class Attentions(TorchDispatchMode):
    """Counts what attention runs as on a CPU: "flash" or "math", forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = {"flash": 0, "flash backward": 0, "math": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "flash_attention_for_cpu" in name:
            self.seen["flash backward" if "backward" in name else "flash"] += 1
        elif "_safe_softmax." in name:
            self.seen["math"] += 1
        return function(*args, **(kwargs or {}))


def steps(choice, *, checkpointing=False, memory=MEMORY, features=None):
    model = make_model()
    set_sdpa_backend(model, choice)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = MemDLMObjective(model, DIFFUSION, memory)
    with Attentions() as attentions:
        output = objective(make_batch(DIFFUSION, memory, features))
        output.loss.backward()
    return output, gradients(model), attentions.seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reuse", ["none", "prompt_kv"])
def test_every_attention_of_a_training_step_is_the_one_that_was_chosen(reuse, checkpointing):
    memory = dataclasses.replace(
        MEMORY, prefix_reuse=reuse, inner_checkpoint="layer" if checkpointing else "none"
    )
    flash, flash_gradients, with_flash = steps("flash", memory=memory, checkpointing=checkpointing)
    math, math_gradients, with_math = steps("math", memory=memory, checkpointing=checkpointing)
    assert with_flash["math"] == with_math["flash"] == with_math["flash backward"] == 0
    assert with_math["math"] == with_flash["flash"] > 0
    assert with_flash["flash backward"] > 0
    torch.testing.assert_close(math.loss, flash.loss, rtol=1e-9, atol=0)
    for name, gradient in flash_gradients.items():
        torch.testing.assert_close(math_gradients[name], gradient, rtol=1e-7, atol=1e-10)


def test_backward_recomputes_under_the_order_of_forward():
    _, _, plain = steps("math")
    _, _, recomputed = steps("math", checkpointing=True)
    assert recomputed["math"] > plain["math"]
    assert recomputed["flash"] == 0


def test_the_default_leaves_torch_as_it_is(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no order was asked for")

    monkeypatch.setattr(sdpa, "sdpa_kernel", refuse)
    _, _, seen = steps("auto")
    assert seen["flash"] > 0
    MDLMObjective(make_model(), DIFFUSION)(make_batch(DIFFUSION, None))  # nobody set one


def test_an_order_is_entered_once_a_pass_not_once_a_layer(monkeypatch):
    entered = []
    real = backbone_module.in_order
    monkeypatch.setattr(
        backbone_module, "in_order", lambda choice: entered.append(choice) or real(choice)
    )
    steps("math")
    layers = 4
    # The anchor's prefix, that of the noisier states, three inner suffixes and the outer one.
    assert entered == ["math"] * 6
    assert len(entered) < 6 * layers / 2


def test_what_a_backend_cannot_take_goes_to_the_next():
    """Dropout of the attention is beyond a CPU's flash attention: math takes it."""
    model = make_model(attention_dropout=0.1)
    set_sdpa_backend(model, "flash")
    with Attentions() as attentions:
        MDLMObjective(model, DIFFUSION)(make_batch(DIFFUSION, None)).loss.backward()
    assert attentions.seen["math"] > 0
    assert attentions.seen["flash"] == 0


@pytest.mark.parametrize("choice", ["cudnn", "flash", "efficient", "math"])
def test_every_order_takes_masks_and_shared_heads(choice):
    """Padded sequences and even ones; two heads of keys serve four."""
    for features in (None, make_features(EVEN)):
        expected, _, _ = steps("auto", features=features)
        own, _, _ = steps(choice, features=features)
        torch.testing.assert_close(own.loss, expected.loss, rtol=1e-9, atol=0)


def orders(monkeypatch):
    """Replace torch's context by one that keeps what it was asked for."""
    asked = []

    def keep(order, *, set_priority):
        asked.append(([backend.name for backend in order], set_priority))
        return sdpa_kernel(order, set_priority=set_priority)

    monkeypatch.setattr(sdpa, "sdpa_kernel", keep)
    return asked


def test_the_orders(monkeypatch):
    asked = orders(monkeypatch)
    for choice in ("cudnn", "flash", "efficient", "math"):
        with sdpa.in_order(choice):
            pass
    cudnn, flash, efficient = (f"{name}_ATTENTION" for name in ("CUDNN", "FLASH", "EFFICIENT"))
    math = "MATH"
    assert asked == [
        ([cudnn, flash, efficient, math], True),
        ([flash, efficient, math], True),
        ([efficient, flash, math], True),
        ([math], True),
    ]


def test_the_order_before_comes_back():
    def state():
        return torch._C._get_sdp_priority_order(), torch.backends.cuda.cudnn_sdp_enabled()

    before = state()
    with sdpa.in_order("flash"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert state() == before
    with pytest.raises(RuntimeError, match="inside"), sdpa.in_order("flash"):
        raise RuntimeError("inside")
    assert state() == before


def test_a_narrower_choice_outside_wins(monkeypatch):
    asked = orders(monkeypatch)
    with sdpa_kernel(SDPBackend.MATH), sdpa.in_order("flash"):
        pass
    assert asked == [(["MATH"], True)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), sdpa.in_order("math"):
        assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("meta_gradient", ["exact", "exact_suffix"])
def test_the_exact_gradient_is_differentiated_twice_under_any_order(meta_gradient):
    memory = dataclasses.replace(MEMORY, meta_gradient=meta_gradient)
    _, expected, _ = steps("auto", memory=memory)
    _, actual, seen = steps("flash", memory=memory)
    assert seen["flash"] > 0
    assert seen["math"] > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-8, atol=1e-10)


def test_compiled_attention_takes_the_same_step():
    def step(compiled):
        model = make_family_model("llada", num_hidden_layers=2)
        set_sdpa_backend(model, "math")
        memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_checkpoint="layer")
        objective = MemDLMObjective(model, DIFFUSION, memory)
        if compiled:
            for layer in model.get_decoder().layers:
                layer.self_attn.compile(backend="aot_eager", fullgraph=True)
        with torch.autograd.profiler.profile() as profiler:
            output = objective(make_batch(DIFFUSION, memory))
            output.loss.backward()
        names = {event.name for event in profiler.function_events}
        assert not [name for name in names if "flash_attention" in name]
        assert "aten::_safe_softmax" in names
        return output.loss.detach(), gradients(model)

    torch.compiler.reset()
    loss, expected = step(compiled=False)
    own_loss, actual = step(compiled=True)
    torch.testing.assert_close(own_loss, loss, rtol=1e-9, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-8, atol=1e-10)


def test_an_order_inside_compiled_code_breaks_no_graph():
    def attend(x):
        with sdpa_kernel([SDPBackend.MATH], set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x) * 2

    torch.compiler.reset()
    x = torch.randn(1, 2, 8, 4)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), attend(x))


def test_a_prompts_memory_and_the_sampler_share_it():
    model = make_model(dtype=torch.float32).eval()
    memory = make_memory(model)
    for choice, other in (("math", "flash"), ("flash", "math")):
        set_sdpa_backend(model, choice)
        with Attentions() as attentions, memory.adapt(PROMPTS):
            token_logits(Backbone(model), torch.arange(24).view(3, 8), torch.tensor([[3]] * 3))
        assert attentions.seen[choice] > 0
        assert attentions.seen[other] == 0
    memory.detach()


def test_a_cpu_has_two_of_them():
    for choice in ("auto", "flash", "math"):
        check_sdpa_backend(choice, CPU)
        check_sdpa_backend(choice, torch.device("cuda"))
    for choice in ("cudnn", "efficient"):
        message = f"sdpa_backend must be one of 'auto', 'flash', 'math' on cpu, got '{choice}'"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_sdpa_backend(choice, CPU)
        check_sdpa_backend(choice, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"sdpa_backend must be one of 'auto', .*, got 'fa3'"):
        set_sdpa_backend(make_model(), "fa3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdpa")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_loaded_model_has_it_and_does_not_save_it(folder, tmp_path):
    checkpoint = load_checkpoint(str(folder), device="cpu", sdpa_backend="math")
    with Attentions() as attentions:
        token_logits(Backbone(checkpoint.model), torch.arange(8)[None], torch.tensor([[3]]))
    assert attentions.seen["flash"] == 0
    checkpoint.model.save_pretrained(tmp_path)
    assert "sdpa_backend" not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_command_refuses_it_in_one_line_before_any_work(command, folder, tmp_path, capsys):
    words = {
        "train": ["--dataset", tmp_path / "none.jsonl", "--output_dir", tmp_path / "out"],
        "generate": ["--prompt", "a", "--device", "cpu"],
    }[command]
    given = [command, "--model", folder, *words, "--sdpa_backend", "cudnn"]
    if command == "train":
        given += ["--use_cpu", "true"]
    assert main([str(word) for word in given]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "sdpa_backend must be one of 'auto', 'flash', 'math' on cpu, got 'cudnn'" in error[0]
    assert not (tmp_path / "out").exists()
