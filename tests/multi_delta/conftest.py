"""A base with three deltas, made once a session: their files must not be written to."""

from dataclasses import replace

import pytest
import tiny_pairs
from kernel_cases import FEW_BITS
from many_deltas import Family, family_of
from tiny_pairs import FAMILIES
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="session")
def make_family(pair, tmp_path_factory):
    made: dict[tuple, Family] = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = family_of(pair(name), tmp_path_factory.mktemp("tenants"), **options)
        return made[key]

    return get


def _build():
    """One block with norms of its heads; k_proj and v_proj are large enough to be packed."""
    sizes = {**tiny_pairs.DECODER, "num_key_value_heads": 4, "num_hidden_layers": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))


@pytest.fixture(scope="session")
def one_block(make_family) -> Family:
    """Of few widths, for Triton's interpreter."""
    small = replace(FAMILIES["qwen3"], build=_build, budget={"ratio": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "one block", small)
        return make_family("one block", bits=FEW_BITS)
