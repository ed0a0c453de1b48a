"""What `memdlm env` prints: for a bug report, and to see why an op is as slow as it is."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from memdlm_kernels import build_info, list_backends

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "flash-attn",
    "lm-eval",
)


def describe_environment() -> str:
    """Versions, devices, the build, and for each device the backends of each op.

    Returns:
        Lines of text. `>` marks what `backend=None` takes for a layer in bfloat16; a backend that
        is refused stands with the reason.
    """
    lines = [f"python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in ("memdlm-kernels", *_PACKAGES)]
    lines += ["", "build"]
    lines += [f"  {name}: {value}" for name, value in build_info().items()]
    for device in _devices():
        lines += ["", _name(device)]
        for op, reasons in list_backends(device).items():
            lines.append(f"  {op}")
            chosen = next(name for name, reason in reasons.items() if reason is None)
            for name, reason in reasons.items():
                mark = ">" if name == chosen else " "
                lines.append(f"  {mark} {name:<11} {'ok' if reason is None else reason}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{device} ({properties.name}, {capability}, {properties.total_memory >> 30} GiB)"
