"""Imports and first uses within another default dtype and device change nothing."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, torch
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
import deltamix_hf, deltamix_kernels
for found in pkgutil.walk_packages(deltamix_hf.__path__, "deltamix_hf."):
    if not any(part in found.name for part in (".vllm", "__main__")):
        importlib.import_module(found.name)
from deltamix_hf.ops import lookup
from deltamix_hf.quantization import gaussian
early = lookup._table(4), lookup._table(2), gaussian._TABLE, gaussian._EDGES, lookup._ALPHA
torch.set_default_dtype(torch.float32)
torch.set_default_device("cpu")
lookup._table.cache_clear()
importlib.reload(gaussian)
late = lookup._table(4), lookup._table(2), gaussian._TABLE, gaussian._EDGES
late += (torch.tensor(gaussian.CUBIC[7][0]),)
assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in early)
assert all(map(torch.equal, early, late))
"""


def test_tables_do_not_depend_on_the_defaults_where_they_are_made():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
