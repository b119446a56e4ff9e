"""Deltas beside a base that another library holds in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pairs import DECODER, Family, Pair, fine_tune, generated, logits, quick, relative
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_bitsandbytes_available

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.layers import weight_of


def build() -> LlamaForCausalLM:
    """No matrix is so small that it is stored whole."""
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, "num_key_value_heads": 4}))


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> tuple[Pair, Any, Tensor]:
    """The pair, the folder of its delta, and what the delta repo computes by itself."""
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder / "base")
    fine_tune(model, size=0.3)
    model.save_pretrained(folder / "tuned")
    family = Family(build, AutoModelForCausalLM, {"ratio": 0.3}, 2 * 7 + 2)
    pair = Pair("llama", family, folder / "base", folder / "tuned", logits(model))
    packed = pair.compress(**quick("deltamix-kl"))
    packed.save_pretrained(folder / "delta")
    return pair, folder / "delta", logits(packed)


class Rounded(nn.Linear):
    """As quantizing libraries do it: a subclass whose weight is codes, and a forward of its own."""

    def __init__(self, linear: nn.Linear, packed: bool):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        codes = (linear.weight / scale).round().to(torch.int8)
        codes = codes.view(torch.uint8).reshape(-1, 1) if packed else codes
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def dense(self) -> Tensor:
        codes = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().T


def rounded(model: nn.Module, packed: bool, but: tuple[str, ...] = ()) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head" and not name.endswith(but or "-"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Rounded(module, packed))
    return model


@pytest.mark.parametrize("packed", [False, True], ids=["matrix", "flat"])
def test_the_base_is_multiplied_in_its_own_way(repo, packed):
    """As if the base's weights were the rounded ones: the delta is added to that."""
    pair, folder, _ = repo
    model = rounded(pair.load(pair.base), packed)
    plain = logits(model)
    model.load_delta(folder, "one")
    dense = pair.load(pair.base)
    dense.load_delta(folder, "one")  # before the edit, or it is refused
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Rounded):
                weight_of(dense.get_submodule(name)).copy_(module.dense())
    assert relative(logits(model), logits(dense)) < 1e-6
    assert relative(logits(model), plain) > 0.1
    with model.disable_deltas():
        assert torch.equal(logits(model), plain)
    mixed = logits(model, delta_names=["one", None])
    assert relative(mixed[:1], logits(model)[:1]) < 1e-6 and torch.equal(mixed[1], plain[1])


def test_a_whole_weight_cannot_replace_codes(delta):
    """The pair's k_proj and v_proj are so small that they are stored whole."""
    repo = delta("llama")
    model = rounded(repo.pair.load(repo.pair.base), False)
    with pytest.raises(DeltaMixError, match="stored whole, which cannot take the place of"):
        model.load_delta(repo.folder, "one")
    model = rounded(repo.pair.load(repo.pair.base), False, ("k_proj", "v_proj"))
    model.load_delta(repo.folder, "one")
    assert relative(logits(model), repo.logits) < 0.02


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes(**options: Any) -> Any:
    if not is_bitsandbytes_available():
        pytest.skip("bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


LIBRARIES = {
    "torchao int8": torchao_int8,
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_with_the_libraries_themselves(repo, library):
    """What rounding the base costs is no more with the delta than without."""
    pair, folder, expected = repo
    model = pair.load(pair.base, quantization_config=LIBRARIES[library]())
    plain, dense = logits(model), logits(pair.load(pair.base))
    assert 1e-4 < relative(plain, dense) < 0.2
    model.load_delta(folder, "one")
    assert relative(logits(model), expected) < 1.5 * relative(plain, dense)
    with model.disable_deltas():
        base = logits(model)
    # bitsandbytes lays 4-bit weights out anew on a CPU, whenever state_dict() undid that
    assert torch.equal(base, plain) or ("nf4" in library and relative(base, plain) < 0.1)
    mixed = logits(model, delta_names=["one", None])
    assert relative(mixed[1], base[1]) < 0.01  # where activations are rounded, by batch
    assert generated(model, delta_names=["one", None]).shape == (2, 18)
