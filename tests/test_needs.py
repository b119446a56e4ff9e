"""What a compression with one block in memory is said to take."""

from __future__ import annotations

import pytest

from deltamix_hf.needs import needs

LLAMA_7B = {"q": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008), "head": (32000, 4096)}
GIVEN = {"block": 405_000_000, "blocks": 32, "tokens": 4096, "hidden": 4096, "itemsize": 2}
GIVEN |= {"chained": True, "result": 840_000_000}


def test_what_was_measured():
    """Peaks of single matrices with their metrics (docs/results)."""
    assert needs({"head": (32000, 4096)}, **GIVEN).memory == pytest.approx(3.0e9, rel=0.1)
    assert needs({"down": (4096, 11008)}, **GIVEN).memory == pytest.approx(2.9e9, rel=0.1)


def test_what_it_depends_on():
    whole = needs(LLAMA_7B, **GIVEN)
    free = needs(LLAMA_7B, **GIVEN | {"tokens": 0})
    assert free.memory < whole.memory and free.disk == 2 * GIVEN["result"]
    more = needs(LLAMA_7B, **GIVEN | {"tokens": 8192})
    assert more.memory == whole.memory
    states = 4096 * 4096 * 2
    assert more.disk - whole.disk == states * (32 + 16)
    assert str(whole).endswith("GB of disk") and "GB of memory" in str(whole)
