"""What `backend=` can be, as it is told."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import memdlm_kernels
from memdlm_kernels import _backends, list_backends
from memdlm_kernels._library import _on_its_device
from tests.kernels.devices import HAS_GPU

OPS = set(memdlm_kernels.__all__) - {"build_info", "list_backends", "reference_ops"}


def test_every_op_tells_its_backends():
    listed = list_backends("cpu")
    assert set(listed) == OPS
    for op, reasons in listed.items():
        assert list(reasons)[-1] == "reference", op
        assert reasons["reference"] is None, op


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_why_one_is_refused(monkeypatch):
    reasons = list_backends("cpu")["lora_linear"]
    assert reasons["cpu"] is None
    assert reasons["triton"] is None  # the tests set TRITON_INTERPRET
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "the tensors are on cpu" in list_backends("cpu")["lora_linear"]["triton"]
    assert "the tensors are on cpu" in list_backends("cpu")["fast_weight_sgd_"]["cuda"]
    monkeypatch.setattr(_backends, "library_missing", "not built")
    assert list_backends("cpu")["lora_linear"]["cpu"] == "not built"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_on_a_gpu_no_op_falls_to_its_reference():
    for op, reasons in list_backends(torch.device("cuda")).items():
        chosen = next(name for name, reason in reasons.items() if reason is None)
        assert chosen != "reference", (op, reasons)


def test_an_op_runs_on_the_device_of_its_tensors(monkeypatch):
    entered = []

    class DeviceOf(contextlib.AbstractContextManager):
        def __init__(self, tensor):
            self._tensor = tensor

        def __enter__(self):
            entered.append(self._tensor)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    first, second = torch.randn(3), torch.randn(4)
    kernel = _on_its_device(lambda *args: args)
    assert kernel(None, first, second) == (None, first, second)
    assert entered == [first]
    listed = torch._C._dispatch_get_all_op_names()
    names = [name for name in listed if name.startswith("memdlm::")]
    assert len(names) >= len(OPS)
    for name in names:  # each has a kernel of its own on a GPU, the one that is so wrapped
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


def test_references_are_preferred_where_no_backend_is_asked_for():
    x, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (2, 4), (5, 2)))
    base = torch.zeros(3, 5, dtype=torch.float64)
    leaf = A.requires_grad_()

    def curvature(backend=None):
        out = memdlm_kernels.lora_linear(x, base, leaf, B, 0.5, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return grad.requires_grad and torch.autograd.grad(grad.sum(), leaf)[0]

    with memdlm_kernels.reference_ops():
        assert torch.equal(curvature(), curvature("reference"))
        with pytest.raises(RuntimeError):
            curvature("cpu")  # what is asked for runs
    with pytest.raises(RuntimeError):
        curvature()


def test_the_choice_of_a_backend_can_be_traced():
    x, A, B = (torch.randn(*shape) for shape in ((3, 4), (2, 4), (5, 2)))
    base = torch.zeros(3, 5)

    def call(x):
        return memdlm_kernels.lora_linear(x, base, A, B, 0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), call(x))
    leaf = x.clone().requires_grad_()
    with memdlm_kernels.reference_ops():  # traced anew: another backend runs
        reference = torch.compile(call, fullgraph=True, backend="eager")(leaf)
    (grad,) = torch.autograd.grad(reference.square().sum(), leaf, create_graph=True)
    assert grad.requires_grad
    assert torch.autograd.grad(grad.sum(), leaf)[0].isfinite().all()
    (grad,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaf)


def test_a_build_without_the_cpu_ops_says_so(monkeypatch):
    monkeypatch.setattr(_backends, "_has_cpu_ops", False)
    for op in ("lora_linear", "masked_linear_cross_entropy", "fast_weight_sgd_"):
        assert "MEMDLM_CPU_OPS=OFF" in list_backends("cpu")[op]["cpu"]


def test_an_instruction_set_that_is_none_is_refused():
    code = "import memdlm_kernels"
    environment = {**os.environ, "MEMDLM_CPU_CAPABILITY": "avx3"}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert finished.returncode != 0
    assert "MEMDLM_CPU_CAPABILITY must be one of default, avx2, avx512" in finished.stderr
