"""Where each backend of an op is tested: on a GPU if there is one, without one as far as can be."""

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# "triton" without a GPU is run by Triton's interpreter (tests/conftest.py).
_DEVICES = {
    "cpu": "cpu",
    "reference": "cpu",
    "cuda": "cuda",
    "triton": "cuda" if HAS_GPU else "cpu",
}


def backends(*names: str) -> list:
    """Parameters (backend, device) of a test; those of a GPU carry the marker `gpu`.

    Args:
        names: of backends; "grouped_mm@cuda" names a device of its own.

    Returns:
        A list of pytest.param; "cuda" ones are skipped where there is no GPU.
    """
    params = []
    for name in names:
        backend, _, device = name.partition("@")
        device = device or _DEVICES[backend]
        marks = []
        if device == "cuda":
            marks = [
                pytest.mark.gpu,
                pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"),
            ]
        params.append(pytest.param(backend, device, id=name, marks=marks))
    return params
