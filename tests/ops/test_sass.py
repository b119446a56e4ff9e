"""The machine code of the decode kernels for an H100: instructions a weight, spills, barriers.

ptxas needs no GPU. This runs without Triton's interpreter, so in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.untraced  # apart from coverage: the work is in the child

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
# Lane instructions a weight of the loop of whole steps, in kernels of all four widths.
LIMITS = {
    "shrink": {2: 3.2, 3: 4.6, 4: 5.2, 8: 9.5},
    "expand": {2: 2.6, 3: 4.0, 4: 4.6, 8: 9.0},
    "fused": {2: 2.6, 3: 4.0, 4: 4.6, 8: 9.0},
}
LIMITS |= {
    f"grouped_{kernel}": {bits: 1.25 * most for bits, most in LIMITS[kernel].items()}
    for kernel in ("shrink", "expand")
}
SCRIPT = """
import json, sys
import sass
widths = tuple(map(int, sys.argv[1:]))
for kernel, c in sass.kernel_counts(widths, 1, 90).items():
    loops = sass.decode_loops(kernel, c)
    print(json.dumps({
        "kernel": kernel, "stack": c.stack, "weights": [loop.weight for loop in loops],
        "shared": sum(loop.shared for loop in c.loops), "load": min(loop.load for loop in c.loops),
    }))
"""


def test_the_loops_are_as_short_as_they_were(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compiled here, not remembered
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    widths = [str(bits) for bits in LIMITS["shrink"]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *widths], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {c["kernel"] for c in found} == set(LIMITS)
    for c in found:
        # Of each width a loop of whole steps, then one of the rest; ptxas may change the widths'
        # order, and more bits take more instructions.
        whole = sorted(c["weights"][::2])
        assert len(c["weights"]) == 2 * len(widths), c
        for weight, most in zip(whole, LIMITS[c["kernel"]].values(), strict=True):
            assert weight <= most, c
        assert c["stack"] == 0 and c["shared"] == 0 and c["load"] == 16, c
