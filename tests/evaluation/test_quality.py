"""`evaluation.quality` against independent arithmetic, on random models of two layers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from deltamix_hf.errors import DeltaMixError
from deltamix_hf.evaluation.quality import (
    IGNORED,
    compare,
    gain_kept,
    reference_logits,
)

VOCABULARY = 259


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # large, so that two models really disagree
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


A, B = llama(0), llama(1)


def rows(seed: int = 0, lengths: tuple[int, ...] = (9, 5, 12, 7)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(texts: list[torch.Tensor], unscored: int = 3) -> dict[str, torch.Tensor]:
    """Right-padded batch whose first `unscored` tokens of each row are a prompt."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
        labels[i, unscored : len(text)] = text[unscored:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def by_hand(text: torch.Tensor, unscored: int = 3) -> tuple[list[float], list[float], list[bool]]:
    """(nll under B, KL(A‖B), same first choice) of every scored token of one unpadded text."""
    a, b = (m(input_ids=text[None]).logits[0].double() for m in (A, B))
    at = range(unscored - 1, len(text) - 1)
    p, q = ([Categorical(logits=x[t]) for t in at] for x in (a, b))
    return (
        [-q[i].log_prob(text[t + 1]).item() for i, t in enumerate(at)],
        [kl_divergence(x, y).item() for x, y in zip(p, q, strict=True)],
        [bool(a[t].argmax() == b[t].argmax()) for t in at],
    )


def test_compare_matches_arithmetic_by_hand():
    texts = rows()
    per_text = [by_hand(text) for text in texts]
    nll, kl, same = ([x for row in column for x in row] for column in zip(*per_text, strict=True))
    found = compare(A, B, [padded(texts)])
    assert found.tokens == len(nll) == sum(map(len, texts)) - 3 * len(texts)
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.agreement == pytest.approx(sum(same) / len(same))
    with torch.no_grad():
        right = [B(input_ids=t[None]).logits[0, 2:-1].argmax(-1) == t[3:] for t in texts]
    assert found.accuracy == pytest.approx(torch.cat(right).float().mean().item())
    assert found.kl > 0.1  # else this test could not tell KL(A‖B) from zero


def test_kl_is_taken_from_the_reference_to_the_model():
    batch = [padded(rows())]
    assert abs(compare(A, B, batch).kl - compare(B, A, batch).kl) > 0.01


def test_a_model_agrees_with_itself():
    found = compare(A, A, [padded(rows())])
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, 3)), seed=st.integers(0, 3))
def test_batching_and_padding_do_not_change_the_means(cuts, seed):
    texts = rows(seed)
    edges = [0, *sorted(cuts), len(texts)]
    whole = compare(A, B, [padded(texts)])
    split = compare(A, B, [padded(texts[i:j]) for i, j in pairwise(edges)])
    assert split.tokens == whole.tokens
    assert split.nll == pytest.approx(whole.nll, rel=1e-4)
    assert split.kl == pytest.approx(whole.kl, rel=1e-4)


def test_without_labels_every_real_token_but_the_first_is_scored():
    batch = padded(rows(), unscored=1)
    del batch["labels"]
    assert compare(A, B, [batch]) == compare(A, B, [padded(rows(), unscored=1)])


def test_more_tokens_than_fit_one_chunk():
    texts = [text.repeat(50)[:400] for text in rows()]  # 1588 scored tokens, chunks of 256
    nll = [x for text in texts for x in by_hand(text)[0]]
    assert compare(A, B, [padded(texts)]).nll == pytest.approx(sum(nll) / len(nll), rel=1e-4)


def test_stored_logits_stand_in_for_the_reference_model():
    batches = [padded(rows(0)), padded(rows(1))]
    assert compare(reference_logits(A, batches), B, batches) == compare(A, B, batches)


def test_a_classifier_counts_rows():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=5,
        initializer_range=0.5,
    )
    first, second = (BertForSequenceClassification(config).eval() for _ in range(2))
    ids = torch.randint(0, 50, (6, 8))
    with torch.no_grad():
        p, q = (Categorical(logits=m(input_ids=ids).logits) for m in (first, second))
    found = compare(first, second, [{"input_ids": ids}])
    assert found.tokens == 6
    assert found.kl == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-4)
    assert math.isnan(found.nll) and math.isnan(found.perplexity) and math.isnan(found.accuracy)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    labelled = compare(first, second, [{"input_ids": ids, "labels": labels}])
    assert labelled.nll == pytest.approx(-q.log_prob(labels).mean().item(), rel=1e-4)
    share = (q.logits.argmax(-1) == labels).float().mean().item()
    assert labelled.accuracy == pytest.approx(share)
    best = {"input_ids": ids, "labels": q.logits.argmax(-1)}
    assert compare(first, second, [best]).accuracy == 1


finite = st.floats(-100, 100)


@given(base=finite, finetuned=finite, share=st.floats(-2, 2))
def test_gain_kept_inverts_interpolation(base, finetuned, share):
    if abs(finetuned - base) < 1e-3:
        return
    model = base + share * (finetuned - base)
    assert gain_kept(base, finetuned, model) == pytest.approx(share, abs=1e-6)
    # the same figure turned upside down (score or loss) is the same share
    assert gain_kept(-base, -finetuned, -model) == gain_kept(base, finetuned, model)


def test_errors_name_what_was_wrong():
    batches = [padded(rows())]
    with pytest.raises(DeltaMixError, match="no gain to keep"):
        gain_kept(0.5, 0.5, 0.5)
    with pytest.raises(DeltaMixError, match="0 reference logits for 1 batches"):
        compare([], A, batches)
    with pytest.raises(DeltaMixError, match=r"batch 0: .*same vocabulary"):
        compare([torch.zeros(2, VOCABULARY)], A, batches)
    with pytest.raises(DeltaMixError, match="no token is scored"):
        compare(A, A, [padded(rows(), unscored=99)])
    try:
        A.train()
        with pytest.raises(DeltaMixError, match=r"model\.eval\(\)"):
            compare(A, B, batches)
    finally:
        A.eval()
