"""One of the processes of test_tensor_parallel.py: `python tensor_parallel_ranks.py <folder>`.

<folder>/cases.json names folders with a dense model in `tuned` and its delta in `delta`, and the
class and plan to load them with. What they do then goes to <folder>/rank<i>.pt.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import inputs_of, logits
from transformers.distributed import DistributedConfig

from deltamix_hf import DeltaMixConfig, DeltaMixError, cache_merged
from deltamix_hf.nn.layers import delta_modules
from deltamix_hf.nn.tensor_parallel import own

ROOT = Path(sys.argv[1])


def load(cls: Any, folder: Path, plan: Any = "auto", **options: Any) -> Any:
    how = {"distributed_config": DistributedConfig(tp_plan=plan, tp_size=2)}
    return cls.from_pretrained(folder, **{**how, **options})


def run(folder: Path, name: str, plan: Any) -> dict[str, Any]:
    cls = getattr(transformers, name)
    try:
        dense = logits(load(cls, folder / "tuned", plan))
    except Exception as error:  # transformers cannot: its own words are the reason to skip
        return {"cannot": f"{type(error).__name__}: {error}", "refused": refusal(cls, folder)}
    model = load(cls, folder / "delta", plan)
    found = {"dense": dense, "logits": logits(model)}
    found["logits_with_grad"] = model(**inputs_of(model)).logits.detach()
    if model.can_generate() and model.main_input_name == "input_ids":
        found["generated"] = model.generate(**inputs_of(model), max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder / "again")
    # every process may read what was saved as soon as it returns
    found["saved"] = sorted(path.name for path in (folder / "again").iterdir())
    found["sizes"] = {
        name: (*own(module.weight).shape, module.dm_v.numel(), module.dm_u.numel())
        for name, module in delta_modules(model).items()
    }
    return found


def refusal(cls: Any, folder: Path) -> str:
    try:
        load(cls, folder / "delta")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(folder: Path, name: str) -> dict[str, str]:
    """What each of these says instead of being done wrongly."""
    cls = getattr(transformers, name)
    model = load(cls, folder / "delta")
    config = DeltaMixConfig(folder / "base", ratio=0.5)
    own_plan = {"model.embed_tokens": "embedding_rowwise"}
    attempts = {
        "resized": lambda: load(cls, ROOT / "more_tokens" / "delta", own_plan),
        "compress": lambda: load(cls, folder / "tuned", quantization_config=config),
        "dequantize on load": lambda: load(
            cls, folder / "delta", quantization_config=DeltaMixConfig(dequantize=True)
        ),
        "fsdp": lambda: load(
            cls, folder / "delta", distributed_config=DistributedConfig(fsdp_size=2)
        ),
        "dequantize": lambda: model.dequantize(),
        "cache_merged": lambda: cache_merged(model),
        "load_delta": lambda: load(cls, folder / "base").load_delta(folder / "delta", "one"),
        "push": lambda: model.push_to_hub("me/none"),
        "save and push": lambda: model.save_pretrained(folder / "pushed", push_to_hub=True),
    }
    said = {}
    for what, attempt in attempts.items():
        try:
            attempt()
            said[what] = "nothing"
        except DeltaMixError as error:
            said[what] = str(error)
    return said


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = json.loads((ROOT / "cases.json").read_text())
    found: dict[str, Any] = {case: run(ROOT / case, *how) for case, how in cases.items()}
    found["refusals"] = refusals(ROOT / "llama", cases["llama"][0])
    torch.save(found, ROOT / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
