"""Three real fine-tunes of SmolLM2-135M on one base: any mix of rows is right.

python examples/multi_tenant.py
pytest -m slow tests/multi_delta/test_real_models.py    # 20 minutes
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from multi_tenant import PAIRS
from pairs.pair import Pair, cache_root

pytestmark = pytest.mark.slow
# Logits are up to 33 in size; measured, other orders of additions move them by 7e-5 at most.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


@pytest.fixture(scope="module")
def repos() -> dict[str, Path]:
    found = {n: cache_root() / "deltas" / p / "1of16" / "deltamix-kl" for n, p in PAIRS.items()}
    if not all((repo / "config.json").exists() for repo in found.values()):
        pytest.skip("python examples/multi_tenant.py makes the fine-tunes and their deltas")
    return found


@pytest.fixture(scope="module")
def models(repos):
    """The tenants, and every delta's own model; None: the base's."""
    base = cache_root() / "smollm2-base"
    deltas = AutoModelForCausalLM.from_pretrained(base)
    for name, repo in repos.items():
        deltas.load_delta(repo, name)
    folders = {None: base, **repos}
    return deltas, {n: AutoModelForCausalLM.from_pretrained(f) for n, f in folders.items()}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of held-out questions of all three tasks."""
    root = cache_root()
    tokenizer = AutoTokenizer.from_pretrained(root / "smollm2-base")
    found = []
    for pair in PAIRS.values():
        folder = root / pair
        found += Pair(pair, root / "smollm2-base", folder / "finetuned").questions(20)[0]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in found]


def batch_of(prompts, numbers, longest):
    """Prompts cut to `longest` tokens, padded on the left: ids and attention mask."""
    rows = [prompts[number][-longest:] for number in numbers]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


calls = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.sampled_from([None, *PAIRS]), st.integers(0, 59)), min_size=1, max_size=4
        ),
        st.integers(1, 40),  # longest
        st.sampled_from([1, 1, 2, 3]),  # beams
        st.sampled_from(["stay", "delete", "load"]),
        st.sampled_from(list(PAIRS)),
    ),
    min_size=1,
    max_size=2,
)


@given(calls)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
def test_two_hundred_mixes(repos, models, prompts, mix):
    deltas, alone = models
    for rows, longest, beams, action, which in mix:
        if action == "delete" and which in deltas.list_deltas():
            deltas.delete_delta(which)
        if action == "load" and which not in deltas.list_deltas():
            deltas.load_delta(repos[which], which)
        names = [name if name in deltas.list_deltas() else None for name, _ in rows]
        batch = batch_of(prompts, [number for _, number in rows], longest)
        with torch.no_grad():
            found = deltas(**batch, delta_names=names).logits
            plain = alone[None](**batch).logits
        options = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False}
        written = deltas.generate(**batch, delta_names=names, **options)
        for row, name in enumerate(names):
            seen = batch["attention_mask"][row].bool()
            one = {key: value[row : row + 1] for key, value in batch.items()}
            if name is None:
                assert torch.equal(found[row], plain[row])  # bit for bit
            else:
                with torch.no_grad():
                    expected = alone[name](**one).logits[0]
                torch.testing.assert_close(found[row][seen], expected[seen], **CLOSE)
            mine = alone[name].generate(**one, **options)[0]
            size = min(len(mine), written.shape[1])  # rows that end early are padded
            assert torch.equal(written[row, :size], mine[:size])
