"""What a compression with one block in memory is said to take."""

from __future__ import annotations

import pytest

from deltamix_hf.compression.memory_estimate import Block, estimate_memory

ATTENTION, UP, DOWN, HEAD = (4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)
INSIDE = [ATTENTION] * 4 + [UP] * 2 + [DOWN]
BLOCK = Block(405_000_000, INSIDE)
LLAMA_7B = {"q": ATTENTION, "up": UP, "down": DOWN, "head": HEAD}
GIVEN = {"blocks": [BLOCK] * 32, "batches": [2048] * 2, "logits": (32000, 4096), "itemsize": 2}
GIVEN |= {"chained": True, "result": 840_000_000}


@pytest.mark.parametrize(
    ("measured", "shapes", "given"),
    [
        (2.84e9, {"head": HEAD}, {"blocks": [], "batches": [1]}),
        (2.56e9, {"down": DOWN}, {"blocks": [], "batches": [1]}),
        (2.44e9, {}, {"chained": False}),
        (2.44e9, {}, {"blocks": [], "logits": (128256, 2048)}),
    ],
    ids=["compressing the head", "compressing down", "calibrating a block", "predicting"],
)
def test_what_was_measured(measured, shapes, given):
    """Peaks of the process (docs/results)."""
    said = estimate_memory(shapes, **GIVEN | given).memory
    assert measured * 0.97 < said < measured * 1.15


def test_what_it_depends_on():
    whole = estimate_memory(LLAMA_7B, **GIVEN)
    free = estimate_memory(LLAMA_7B, **GIVEN | {"batches": []})
    assert free.memory < whole.memory and free.disk == 2 * GIVEN["result"]
    more = estimate_memory(LLAMA_7B, **GIVEN | {"batches": [2048] * 4})
    assert more.memory == whole.memory
    states = 2 * 2048 * 4096 * 2
    assert more.disk - whole.disk == states * (32 + 16)
    longer = estimate_memory(LLAMA_7B, **GIVEN | {"batches": [4096]})
    assert longer.memory > whole.memory and longer.disk == whole.disk
    deeper = estimate_memory(LLAMA_7B, **GIVEN | {"blocks": [BLOCK] * 320})
    assert deeper.memory > whole.memory  # a step of tuning runs all of them
    assert str(whole).endswith("GB of disk") and "GB of memory" in str(whole)
