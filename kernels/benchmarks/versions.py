"""Print the device, its driver and the versions of everything that a figure depends on, as JSON."""

import argparse
import datetime
import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "safetensors", "highspy", "peft", "vllm",
    "gemlite",
)  # fmt: skip


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"]
    try:
        found = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="without a GPU")
    tiny = parser.parse_args().tiny
    row = {"date": str(datetime.date.today()), "cores": os.cpu_count()}
    row |= {name: installed(name) for name in PACKAGES}
    if not tiny:
        device = torch.cuda.get_device_properties(0)
        row |= {"device": device.name, "memory": device.total_memory, "driver": driver()}
        row |= {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
        row["multiprocessors"] = device.multi_processor_count
        row["L2 bytes"] = device.L2_cache_size
        row["/dev/nvidiactl"] = Path("/dev/nvidiactl").exists()  # tests/conftest.py looks for it
    print(json.dumps(row), flush=True)
    try:
        import deltamix_kernels

        import deltamix_hf
    except Exception as error:
        print(json.dumps({"ok": False, "error": f"{type(error).__name__}: {error}"[-600:]}))
        raise SystemExit(1) from error
    found = [str(Path(m.__file__).parent) for m in (deltamix_hf, deltamix_kernels)]
    print(json.dumps({"ok": True, "imported": found}), flush=True)


if __name__ == "__main__":
    main()
