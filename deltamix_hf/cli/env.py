"""`deltamix env`: what a bug report should begin with."""

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
    import torch

    from ..ops.dispatch import VARIABLE, choose

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    found["CPU"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    found["CUDA of torch"] = torch.version.cuda or "none, a CPU build"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        found["GPU"] = "none that torch can use"
    for i in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        properties = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    found[VARIABLE] = os.environ.get(VARIABLE) or "not set: decided by device"
    for kind in dict.fromkeys((device.type, "cpu")):
        found[f"kernels on {kind}"] = choose(torch.device(kind))
    table = Table(box=None, show_header=False)
    for name, value in found.items():
        table.add_row(name, value)
    out.print(table)
