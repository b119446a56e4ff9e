"""All that differs from the base comes back: packed, or whole and bit for bit.

Fine-tunes here change every parameter and every saved buffer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from tiny_pairs import DECODER, fine_tune, make_config, relative, weight_bytes
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from deltamix_hf import DeltaMixConfig, DeltaMixError
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.nn.delta_module import own_deltas
from deltamix_hf.storage.names import ROWS, is_guard, packed_part


def deepseek_v3() -> PreTrainedModel:
    """Its routers have a saved buffer that training changes without gradients."""
    sizes = {"moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 1}
    heads = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 16}
    route = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    sizes |= {"qk_nope_head_dim": 16} | {**DECODER, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **route))


def resnet() -> PreTrainedModel:
    """Batch norms: running statistics, and an integer that counts batches."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 128], "depths": [1, 1], "num_labels": 40}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_channels=3))


BUILDS = {name: a.build for name, a in ARCHITECTURES.items()}
BUILDS |= {"deepseek_v3": deepseek_v3, "resnet": resnet}


@torch.no_grad()
def change_buffers(model: PreTrainedModel) -> None:
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer += 3 if not buffer.is_floating_point() else 0.1 * torch.rand_like(buffer)


@pytest.fixture(scope="module", params=BUILDS)
def made(request, tmp_path_factory) -> Any:
    """Class, folder, and the tensors of the fine-tune by name."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = BUILDS[request.param]().eval()
    model.save_pretrained(folder / "base")
    fine_tune(model)
    change_buffers(model)
    model.save_pretrained(folder / "tuned")
    config = make_config(
        folder / "base", budget_bytes=2_000_000, method="delta-come", bf16_overlay=True
    )
    packed = type(model).from_pretrained(folder / "tuned", quantization_config=config)
    packed.save_pretrained(folder / "delta")
    return type(model), folder, dict(model.state_dict())


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """What a float tensor is after it was stored in bfloat16."""
    return tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor


def stored_whole(stored: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in stored if packed_part(name) is None and not is_guard(name)]


@pytest.mark.untraced
def test_each_tensor_is_packed_or_whole(made):
    """And, since all differ, none is left to the base; tied ones are stored once."""
    cls, folder, tuned = made
    model = cls.from_pretrained(folder / "delta")
    stored = load_file(folder / "delta" / "model.safetensors")
    tied = set(model.all_tied_weights_keys)
    own = own_deltas(model).items()
    packed = {f"{name}.{leaf}" for name, module in own for leaf in module.dm_own} - tied
    whole = set(stored_whole(stored))
    assert not packed & whole
    assert packed | whole == tuned.keys() - tied
    assert not any(name.endswith(ROWS) for name in stored)


def test_whole_tensors_come_back_bit_for_bit(made):
    cls, folder, tuned = made
    found = cls.from_pretrained(folder / "delta").state_dict()
    stored = load_file(folder / "delta" / "model.safetensors")
    whole = stored_whole(stored)
    assert whole
    for name in whole:
        assert torch.equal(found[name], rounded(tuned[name])), name
        assert found[name].dtype == tuned[name].dtype, name


def test_beside_the_base_too(made):
    """Each module holds the very tensors that it runs with instead of the base's."""
    cls, folder, tuned = made
    model = cls.from_pretrained(folder / "base")
    model.load_delta(folder / "delta", "one")
    stored = load_file(folder / "delta" / "model.safetensors")
    for name in stored_whole(stored):
        module, _, leaf = name.rpartition(".")
        held = model.get_submodule(module).dm_row_deltas.overlay["one"][leaf]
        assert torch.equal(held, rounded(tuned[name])), name
    alone = cls.from_pretrained(folder / "delta")
    inputs = {"pixel_values": torch.ones(2, 3, 32, 32)} if "ResNet" in cls.__name__ else None
    if inputs is None:
        from architectures import inputs_of

        inputs = inputs_of(model)
    with torch.no_grad():
        assert relative(model(**inputs).logits, alone(**inputs).logits) < 1e-5


@pytest.mark.untraced
@pytest.mark.parametrize("name", BUILDS)
def test_nothing_changed_is_nothing_stored(name, tmp_path):
    """A fine-tune that is its base: the delta holds the guards alone."""
    torch.manual_seed(0)
    model = BUILDS[name]()
    model.save_pretrained(tmp_path / "base")
    config = DeltaMixConfig(tmp_path / "base", ratio=0.1)
    with pytest.warns(UserWarning, match="identical to its base"):
        packed = type(model).from_pretrained(tmp_path / "base", quantization_config=config)
    packed.save_pretrained(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / "model.safetensors")
    assert all(is_guard(key) for key in stored)
    assert weight_bytes(tmp_path / "delta") < 400
    again = type(model).from_pretrained(tmp_path / "delta").state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def _config(cls: type, **changes: Any) -> Any:
    small = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return cls.config_class(**small, pad_token_id=0, **changes)


OTHER_SHAPES = {
    "labels of llama": (LlamaForSequenceClassification, {"num_labels": 2}, {"num_labels": 5}),
    "labels of bert": (BertForTokenClassification, {"num_labels": 4}, {"num_labels": 3}),
    "positions of gpt2": (GPT2LMHeadModel, {"n_positions": 32}, {"n_positions": 48}),
    "positions of bert": (
        BertForMaskedLM,
        {"max_position_embeddings": 48},
        {"max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize("case", OTHER_SHAPES)
@torch.no_grad()
def test_shapes_that_fine_tuning_may_change(tmp_path, case):
    """More labels, fewer positions: stored whole; beside the base such a delta is refused."""
    cls, before, after = OTHER_SHAPES[case]
    torch.manual_seed(0)
    cls(_config(cls, **before)).save_pretrained(tmp_path / "base")
    tuned = cls.from_pretrained(
        tmp_path / "base", config=_config(cls, **after), ignore_mismatched_sizes=True
    )
    fine_tune(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    config = make_config(tmp_path / "base", method="deltamix", ratio=0.8)
    cls.from_pretrained(tmp_path / "tuned", quantization_config=config).save_pretrained(
        tmp_path / "delta"
    )
    ids = torch.randint(3, 99, (2, 9))
    found, expected = (
        cls.from_pretrained(tmp_path / name)(ids).logits for name in ("delta", "tuned")
    )
    assert found.shape == expected.shape and relative(found, expected) < 0.1
    assert all(check.problem is None for check in verify_repo(str(tmp_path / "delta")))
    with pytest.raises(DeltaMixError, match=r"weights and config\.json do not fit"):
        cls.from_pretrained(tmp_path / "base").load_delta(tmp_path / "delta")
