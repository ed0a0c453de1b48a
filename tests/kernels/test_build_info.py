import sys

import memdlm_kernels
from memdlm_kernels import _build

FACTS = {"version", "torch_version", "torch_abi", "compiler", "cpu", "cuda", "cuda_architectures"}


def test_built():
    info = memdlm_kernels.build_info()
    assert set(info) == FACTS | {"built", "missing"}
    assert info["built"] is True
    assert info["missing"] is None
    assert info["cuda"] is bool(info["cuda_architectures"])
    assert all(architecture >= 80 for architecture in info["cuda_architectures"])
    assert info["torch_abi"] == "2.11"


def test_not_built(monkeypatch):
    reason = "the compiled extension is not built"
    monkeypatch.setattr(_build, "library_missing", reason)
    monkeypatch.setitem(sys.modules, "memdlm_kernels._build_info", None)
    info = memdlm_kernels.build_info()
    assert info == {"built": False, "missing": reason, **dict.fromkeys(FACTS)}
