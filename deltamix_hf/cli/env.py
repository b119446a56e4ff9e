"""`deltamix env`: what a bug report should begin with."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from rich.table import Table

from .console import out

PACKAGES = (
    *("deltamix-hf", "transformers", "torch", "triton", "accelerate"),
    *("safetensors", "huggingface-hub", "highspy", "peft", "vllm"),
)


def env() -> None:
    """Print versions, devices, and which kernels run.

    Example: deltamix env
    """
    table = Table(box=None, show_header=False)
    for name, value in {**_versions(), **_machine(), **_kernels()}.items():
        table.add_row(name, value)
    out.print(table)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, str]:
    import torch

    found = {
        "platform": platform.platform(),
        "CPU": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "CUDA of torch": torch.version.cuda or "none, a CPU build",
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found[f"GPU {i}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    else:
        found["GPU"] = "none that torch can use"
    return found


def _kernels() -> dict[str, str]:
    import torch

    from ..ops.dispatch import VARIABLE, choose

    forced = os.environ.get(VARIABLE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        VARIABLE: forced or "not set: decided by device",
        f"kernels on {device.type}": choose(device),
    }
