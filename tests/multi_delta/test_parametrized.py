"""Weights that torch computes of others (`torch.nn.utils.parametrize`), beside a base, by row."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_pairs import fine_tune, make_config

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta.layers import make_routed
from deltamix_hf.multi_delta.routing import Route, Router

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@pytest.fixture(scope="module", params=["Wav2Vec2", "Hubert"])
def made(request, tmp_path_factory):
    """The class, the base's folder, and those of two delta repos by name."""
    folder = tmp_path_factory.mktemp("parametrized")
    cls = getattr(transformers, f"{request.param}ForCTC")
    torch.manual_seed(0)
    cls(getattr(transformers, f"{request.param}Config")(**SIZES)).save_pretrained(folder / "base")
    for seed, name in enumerate(["one", "two"], 2):
        model = cls.from_pretrained(folder / "base")
        fine_tune(model, seed=seed)
        if name == "two":  # nothing of it but what a weight is computed of
            base = cls.from_pretrained(folder / "base").state_dict()
            state = model.state_dict()
            kept = {k: state[k] if "parametrizations" in k else base[k] for k in state}
            kept["lm_head.weight"] = state["lm_head.weight"]
            model.load_state_dict(kept)
        model.save_pretrained(folder / f"{name}-tuned")
        config = make_config(folder / "base", "delta-come", budget_bytes=300_000)
        packed = cls.from_pretrained(folder / f"{name}-tuned", quantization_config=config)
        packed.save_pretrained(folder / name)
    return cls, folder


@torch.no_grad()
def outputs(model, sound, **names):
    return model(sound, **names).logits


def test_rows_are_what_each_delta_gives_alone(made):
    cls, folder = made
    sound = torch.randn(4, 400, generator=torch.Generator().manual_seed(1))
    model = cls.from_pretrained(folder / "base")
    alone = {None: outputs(model, sound)}
    for name in ("one", "two"):
        alone[name] = outputs(cls.from_pretrained(folder / name), sound)
        model.load_delta(folder / name, name)
        torch.testing.assert_close(
            outputs(model, sound, delta_names=name), alone[name], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(alone["two"], alone[None], rtol=1e-2, atol=1e-2)
    for names in (["one", None, "two", "one"], [None, "two", None, None], ["two", "one"] * 2):
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        found = outputs(model, sound, delta_names=names)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    conv = model.base_model.encoder.pos_conv_embed.conv
    with model.use_deltas(["one", None]), pytest.raises(DeltaMixError, match="differ by row"):
        conv.weight  # noqa: B018
    model.delete_delta("one")
    assert torch.equal(outputs(model, sound, delta_names="__base__"), alone[None])
    with model.disable_deltas():
        assert torch.equal(outputs(model, sound), alone[None])
    assert torch.equal(outputs(copy.deepcopy(model), sound), outputs(model, sound))


def test_a_parametrized_linear_layer():
    """Weight norm on a base's own layers: a delta to what they are computed of, by row."""

    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    x, expected = torch.randn(2, 4), layer(torch.ones(2, 4))
    router = Router()
    made_of = make_routed(layer.parametrizations.weight, router)
    doubled = layer.parametrizations.weight.original0.detach() * 2
    made_of.dm_row_deltas.overlay["one"] = {"original0": doubled}
    make_routed(layer, router).dm_row_deltas.overlay["one"] = {"parametrizations": doubled}
    plain = layer(x) - layer.bias
    with router.using(Route([None, "one"])):
        found = layer(x) - layer.bias
    torch.testing.assert_close(found, torch.stack([plain[0], 2 * plain[1]]))
    assert torch.equal(layer(torch.ones(2, 4)), expected)
