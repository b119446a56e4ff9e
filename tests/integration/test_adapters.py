"""LoRA on top of a delta, through peft: only the adapter trains, only the adapter is saved."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_pairs import logits, relative, snapshot, token_ids

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.layers import delta_modules

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def train(model, steps=1) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    ids, losses = token_ids(), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_training_an_adapter_changes_nothing_else(delta, method):
    repo = delta("llama", method)
    model = repo.pair.load(repo.folder)
    model.add_adapter(LoraConfig(**LORA))
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if "lora_" not in k}
    losses = train(model, steps=6)
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name
    model.disable_adapters()
    assert torch.equal(logits(model), repo.logits)


@pytest.mark.parametrize("inside", [False, True], ids=["own folder", "delta folder"])
def test_adapter_is_saved_alone_and_reloads(delta, tmp_path, copied, inside):
    repo = delta("llama")
    folder = copied(repo.folder)
    model = repo.pair.load(folder)
    model.add_adapter(LoraConfig(**LORA))
    train(model)
    target = folder if inside else tmp_path / "adapter"
    before = snapshot(folder)
    model.save_pretrained(target)
    written = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert written - {"generation_config.json"} <= {file.name for file in target.iterdir()}
    if inside:  # the delta itself must still be there
        after = snapshot(folder)
        assert all(after[name] == before[name] for name in before)
        again = repo.pair.load(folder)
    else:
        assert {file.name for file in target.iterdir()} <= written
        again = repo.pair.load(folder)
        again.load_adapter(target)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), repo.logits)


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_peft_model_round_trip(delta, tmp_path, method):
    repo = delta("llama", method)
    model = get_peft_model(repo.pair.load(repo.folder), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(repo.pair.load(repo.folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["delta-come", "deltamix-kl"])
def test_merged_adapter_is_refused_until_dense(delta, tmp_path, method):
    """Merging writes into the base weight, which a delta repo cannot hold."""
    repo = delta("llama", method)
    model = get_peft_model(repo.pair.load(repo.folder), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert delta_modules(merged)
    assert relative(logits(merged), expected) < 1e-5
    with pytest.raises(DeltaMixError, match="was edited"):
        merged.save_pretrained(tmp_path / "delta")
    assert not list(tmp_path.iterdir())
    merged.dequantize()
    merged.save_pretrained(tmp_path / "dense")
    assert relative(logits(repo.pair.load(tmp_path / "dense")), expected) < 1e-5
