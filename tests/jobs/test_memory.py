"""Freed memory goes back to the system, where the allocator can be asked."""

from __future__ import annotations

import ctypes

import torch

from deltamix_hf.jobs import instruments


def test_memory_is_given_back(monkeypatch):
    asked = []
    monkeypatch.setattr(instruments, "_trim", lambda: asked.append)
    instruments.trim_heap()
    assert asked == [0]


def test_nothing_happens_where_the_allocator_cannot_be_asked(monkeypatch):
    instruments._trim.cache_clear()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    try:
        instruments.trim_heap()
    finally:
        instruments._trim.cache_clear()


def test_what_is_in_use_stays():
    kept = [torch.full((1 << 18,), float(i)) for i in range(8)]
    del kept[::2]
    instruments.trim_heap()
    assert [float(tensor.mean()) for tensor in kept] == [1, 3, 5, 7]
