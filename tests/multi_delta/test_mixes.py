"""Random mixes of rows in models that see and models that translate, while deltas come and go.

`DELTAMIX_MIXES=200 pytest tests/multi_delta/test_mixes.py` tries as many of each.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny_pairs
import torch
from architectures import ARCHITECTURES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from many_deltas import CLOSE, NAMES, Family, loaded
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

IMAGE, LENGTH = 255, 14
GRIDS = ((1, 4, 4), (1, 2, 6), (1, 4, 2))  # of pictures for Qwen2-VL: a token for 2 x 2 patches
TOKENS = (4, 3, 2)

mixes = settings(
    max_examples=int(os.environ.get("DELTAMIX_MIXES", "4")),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # shrinking would run on while the threads stop
)
names = st.sampled_from([None, *NAMES])
pictures = st.lists(st.integers(0, 2), max_size=2)
seeds = st.integers(0, 99)


@contextmanager
def coming_and_going(family: Family, model: PreTrainedModel) -> Iterator[None]:
    """Context manager: two threads load and delete deltas meanwhile."""
    stop, failures = threading.Event(), []

    def go(mine: str) -> None:
        try:
            while not stop.is_set():
                model.load_delta(family.repos[mine], f"also {mine}")
                model.delete_delta(f"also {mine}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=go, args=(name,)) for name in NAMES[:2]]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def alone_models(family: Family) -> dict[str | None, PreTrainedModel]:
    return {n: family.pair.load(family.repos.get(n, family.pair.base)) for n in (None, *NAMES)}


def seen(kind: str, rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """The call for rows of (pictures, seed)."""
    ids, patches = [], []
    for chosen, seed in rows:
        random = torch.Generator().manual_seed(seed)
        row = torch.randint(3, 200, (LENGTH,), generator=random)
        at = 1
        for picture in chosen:
            count = 4 if kind == "llava" else TOKENS[picture]
            row[at : at + count], at = IMAGE, at + count + 1
            size = (1, 3, 16, 16)
            if kind == "qwen2_vl":
                size = (int(torch.tensor(GRIDS[picture]).prod()), 3 * 2 * 8 * 8)
            patches.append(torch.randn(size, generator=random))
        ids.append(row)
    call = {"input_ids": torch.stack(ids)}
    if kind == "qwen2_vl":
        call["mm_token_type_ids"] = (call["input_ids"] == IMAGE).int()
    if patches:
        call["pixel_values"] = torch.cat(patches)
        if kind == "qwen2_vl":
            grids = [GRIDS[picture] for chosen, _ in rows for picture in chosen]
            call["image_grid_thw"] = torch.tensor(grids)
    return call


@pytest.mark.untraced
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_unequal_pictures(make_family, kind):
    family = make_family(kind)
    model, alone = loaded(family), alone_models(family)

    @mixes
    @given(st.lists(st.tuples(names, pictures, seeds), min_size=1, max_size=4))
    @torch.no_grad()
    def any_mix(rows):
        call = seen(kind, [row[1:] for row in rows])
        found = model(**call, delta_names=[row[0] for row in rows]).logits
        for i, (name, *row) in enumerate(rows):
            expected = alone[name](**seen(kind, [row])).logits
            torch.testing.assert_close(found[i : i + 1], expected, **CLOSE)

    with coming_and_going(family, model):
        any_mix()


def bart() -> PreTrainedModel:
    feed = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 64, "vocab_size": 256}
    return BartForConditionalGeneration(BartConfig(**layers, **heads, **feed)).eval()


@pytest.mark.untraced
def test_translations(make_family, monkeypatch):
    kind = tiny_pairs.Family(bart, BartForConditionalGeneration, {"ratio": 0.5})
    monkeypatch.setitem(ARCHITECTURES, "bart of two layers", kind)
    family = make_family("bart of two layers")
    model, alone = loaded(family), alone_models(family)
    options = {"max_new_tokens": 5, "do_sample": False}

    @mixes
    @given(st.lists(st.tuples(names, seeds), min_size=1, max_size=4), st.integers(1, 3))
    @torch.no_grad()
    def any_mix(rows, beams):
        ids = torch.cat([seen("", [([], seed)])["input_ids"] for _, seed in rows])
        chosen = [name for name, _ in rows]
        found = model.generate(ids, delta_names=chosen, num_beams=beams, **options)
        for row, name, text in zip(ids, chosen, found, strict=True):
            expected = alone[name].generate(row[None], num_beams=beams, **options)[0]
            assert torch.equal(text[: len(expected)], expected)

    with coming_and_going(family, model):
        any_mix()
