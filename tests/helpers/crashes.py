"""Crash a job at a chosen part."""

from __future__ import annotations

import pytest

from deltamix_hf.jobs.resume_store import ResumeStore


class Crash(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def crash_at(patch: pytest.MonkeyPatch, part: int) -> list[str]:
    """Crash instead of keeping part number `part`; returns the names kept before, as they come."""
    kept: list[str] = []
    write = ResumeStore.write

    def writes(self: ResumeStore, name, tensors, facts=None) -> None:
        if len(kept) == part:
            raise Crash
        kept.append(name)
        write(self, name, tensors, facts)

    patch.setattr(ResumeStore, "write", writes)
    return kept
