"""Shared fixtures: pairs and delta repos are made once per session and must not be written to.

A test that damages files copies the repo first (`copied`).
"""

from __future__ import annotations

import gc
import os
import tempfile

# Before transformers and datasets are imported. Nothing here may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would spin
# Triton decides when kernels are defined: without a GPU they run in its interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Else torch.compile starts processes that import torch, for a kernel or two.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "deltamix_datasets"))

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from hypothesis import HealthCheck, settings
from quick_interpreter import quicken
from tiny_pairs import Pair, calibration_ids, logits, make_pair, quick, token_ids

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)
if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
# Child processes of tests find the helpers too.
HELPERS = os.path.join(os.path.dirname(__file__), "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HELPERS, os.environ.get("PYTHONPATH")]))
settings.register_profile(
    "deltamix", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deltamix")


def pytest_collection_finish() -> None:
    """Have garbage collections leave out what was imported: it took half of some tests' time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton's bindings list all of it as leaks


@dataclass(frozen=True)
class Delta:
    """A saved delta repo, with what the freshly compressed model computed and promised."""

    pair: Pair
    folder: Path
    logits: torch.Tensor
    more_logits: torch.Tensor
    budget: int
    errors: dict[str, float]


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Callable[[str], Pair]:
    """`pair(name)`: the base and fine-tune of a family, see `architectures.ARCHITECTURES`."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = make_pair(name, tmp_path_factory.mktemp(name), ARCHITECTURES.get(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def delta(pair, tmp_path_factory) -> Callable[..., Delta]:
    """`delta(name, method, calibrated, **options)`: the pair compressed and saved.

    The default method is the fastest, on the min-max grid; "deltamix-kl" has the Gaussian codebook.
    """
    made: dict[tuple, Delta] = {}

    def get(
        name: str, method: str = "delta-come", calibrated: bool = False, **options: Any
    ) -> Delta:
        key = (name, method, calibrated, *sorted(options.items()))
        if key not in made:
            source = pair(name)
            options |= {"calibration": calibration_ids()} if calibrated else {}
            model = source.compress(method=method, **{**quick(method), **options})
            folder = tmp_path_factory.mktemp("delta") / "repo"
            model.save_pretrained(folder)
            config = model.config.quantization_config
            budget = config.budget(_reference_bytes(source))
            more = logits(model, token_ids(3, 31, seed=2))
            made[key] = Delta(source, folder, logits(model), more, budget, dict(config.errors))
        return made[key]

    return get


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """Copy a folder to where the test may damage it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy_of_{folder.name}"))

    return copy


def _reference_bytes(source: Pair) -> int:
    """bf16 bytes of every tensor of the fine-tune: all of them differ from the base."""
    model = source.load(source.tuned)
    return 2 * sum(parameter.numel() for parameter in model.parameters())
