"""Mixtures of experts: a matrix of its own for each expert, from compression to many tenants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pairs import (
    EXPERTS,
    MIXTURES,
    calibration_ids,
    generated,
    logits,
    quick,
    relative,
    token_ids,
    weight_bytes,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM

from deltamix_hf import DeltaMixConfig, DeltaMixError, cache_merged
from deltamix_hf.calibration.statistics import collect
from deltamix_hf.checkpoint.base import BaseCheckpoint
from deltamix_hf.checkpoint.delta_repo import find_delta
from deltamix_hf.checkpoint.report import inspect_repo, rank_sizes
from deltamix_hf.checkpoint.tensor_diff import sort_tensors
from deltamix_hf.checkpoint.validation import verify_repo
from deltamix_hf.compression.matrix_pipeline import Compressor
from deltamix_hf.evaluation.distance import measure
from deltamix_hf.nn.delta_module import own_deltas
from deltamix_hf.nn.experts import (
    DeltaExperts,
    Expert,
    compressed_shapes,
    expert_place,
    fused_sizes,
    is_experts,
)
from deltamix_hf.nn.layers import delta_modules
from deltamix_hf.storage.headers import read_header
from deltamix_hf.storage.sizes import size_report

FAMILY = pytest.mark.parametrize("name", MIXTURES)
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
METHODS = ("deltamix-kl", "deltamix", "delta-come")


def experts_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(FUSED.rpartition(".")[0])


# Recognised by structure


@FAMILY
def test_what_has_experts(pair, name):
    model = pair(name).load(pair(name).base)
    found = [n for n, module in model.named_modules() if is_experts(module)]
    assert found == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert not any(is_experts(m) for m in pair("llama").load(pair("llama").base).modules())
    assert expert_place(model, f"{FUSED}.3") == (experts_of(model), "gate_up_proj", 3)
    for other in (f"{FUSED}.4", f"{FUSED}.03", f"{FUSED}.x", FUSED, "model.norm", "a.b.0", ""):
        assert expert_place(model, other) is None
    assert fused_sizes(model, [f"{FUSED}.0", f"{FUSED}.1", "lm_head"]) == {FUSED: EXPERTS}


def test_another_forward_is_not_ours_to_replace(pair):
    """A class that inherits the experts' weights but computes something else is left alone."""
    model = pair("mixtral").load(pair("mixtral").base)
    module = experts_of(model)
    own = {"forward": lambda self, hidden, index, weights: hidden}
    module.__class__ = type("Odd", (type(module),), own)
    assert not is_experts(module)


# Compressed, saved, loaded


@pytest.mark.untraced
@FAMILY
@pytest.mark.parametrize("method", METHODS)
def test_reload_is_bit_equal_and_dense_the_same(delta, name, method):
    repo = delta(name, method)
    model = repo.pair.load(repo.folder)
    assert sum(isinstance(module, DeltaExperts) for module in model.modules()) == 2
    assert torch.equal(logits(model), repo.logits)
    base = repo.pair.load(repo.pair.base)
    assert relative(repo.logits, repo.pair.logits) < 0.4 * relative(logits(base), repo.pair.logits)
    dense = model.dequantize()
    assert not own_deltas(dense)
    assert type(experts_of(dense)) is type(experts_of(base))
    assert relative(logits(dense), repo.logits) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_saved_again_it_is_the_same_file(delta, tmp_path, method):
    repo = delta("mixtral", method)
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (repo.folder / file).read_bytes()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_however_the_base_computes(delta, implementation):
    repo = delta("mixtral", "deltamix-kl")
    model = repo.pair.load(repo.folder, experts_implementation=implementation)
    assert torch.equal(logits(model), repo.logits)


def test_generates(delta):
    repo = delta("mixtral", "deltamix-kl")
    model = repo.pair.load(repo.folder)
    found = generated(model)
    assert torch.equal(found, generated(model.dequantize()))


def test_bfloat16(delta):
    repo = delta("mixtral", "deltamix-kl")
    model = repo.pair.load(repo.folder, dtype=torch.bfloat16)
    assert relative(logits(model), repo.logits) < 0.05


def test_compiled_whole(delta):
    repo = delta("mixtral", "deltamix-kl")
    module = experts_of(repo.pair.load(repo.folder))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x, weights = torch.randn(6, 64), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3], [1, 0]])
    with torch.no_grad():
        assert torch.equal(compiled(x, chosen, weights), module(x, chosen, weights))


def test_gradients_pass_through(delta):
    repo = delta("mixtral", "deltamix-kl")
    model = repo.pair.load(repo.folder)
    embeddings = model.get_input_embeddings()(token_ids()).detach().requires_grad_(True)
    dense = repo.pair.load(repo.folder).dequantize()
    found = [
        torch.autograd.grad(m(inputs_embeds=embeddings).logits.square().sum(), embeddings)[0]
        for m in (model, dense)
    ]
    assert relative(*found) < 1e-4


OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@FAMILY
def test_offload(delta, tmp_path, name):
    repo = delta(name, "deltamix-kl")
    model = repo.pair.load(repo.folder, device_map=OFFLOADED, offload_folder=tmp_path / "off")
    assert experts_of(model).gate_up_proj.device.type == "meta"
    torch.testing.assert_close(logits(model), repo.logits, rtol=1e-5, atol=1e-5)
    for change in (lambda: model.save_pretrained(tmp_path / "x"), model.dequantize):
        with pytest.raises(DeltaMixError, match="offload"):
            change()
    with pytest.raises(DeltaMixError, match="offloaded"):
        cache_merged(model)


# The budget and its accounts


@FAMILY
@pytest.mark.parametrize("method", METHODS)
def test_every_byte_is_counted(delta, name, method):
    repo = delta(name, method)
    report = inspect_repo(repo.folder)
    size, on_disk = report.size, weight_bytes(repo.folder)
    assert size.total == on_disk <= repo.budget
    assert on_disk > 0.9 * repo.budget
    base, tuned = (repo.pair.load(f).state_dict() for f in (repo.pair.base, repo.pair.tuned))
    differing = [t for n, t in tuned.items() if not torch.equal(t, base[n])]
    assert size.reference == sum(2 * tensor.numel() for tensor in differing)
    assert size == size_report(repo.folder, compressed_shapes(repo.pair.load(repo.folder)))
    for kind in ("payload", "scales"):
        assert sum(getattr(m, kind) for m in report.matrices.values()) == getattr(size, kind)
    experts = [n for n in report.matrices if n.rpartition(".")[0].endswith("_proj")]
    assert len(experts) == 2 * 2 * EXPERTS
    assert len(report.matrices) == MIXTURES[name].packed + len(experts)


@FAMILY
def test_one_set_of_tensors_for_each_parameter(delta, name):
    repo = delta(name, "delta-come")
    names = [n for n in read_header(repo.folder / "model.safetensors") if ".experts." in n]
    packed = [n for n in names if "_dm_" in n]
    assert len(packed) == 2 * 2 * 5
    assert not any(n.endswith("_proj") for n in names)
    counts = load_file(repo.folder / "model.safetensors")[f"{FUSED}_dm_counts"]
    assert counts.dtype == torch.int32 and counts.shape == (EXPERTS,) and (counts > 0).all()


def test_too_small_a_budget_says_what_would_do(pair):
    source = pair("mixtral")
    with pytest.raises(DeltaMixError, match="budget_bytes >= ") as error:
        source.compress(ratio=0.01)
    least = int(str(error.value).rpartition(" ")[2])
    model = source.compress(method="delta-come", ratio=None, budget_bytes=least + 40_000)
    assert delta_modules(model)


def test_ranks_compete_with_all_others(pair):
    """An expert whose delta is 100 times smaller gets nothing, and is counted as dropped."""
    source = pair("mixtral")
    model = source.load(source.tuned)
    base = source.load(source.base)
    with torch.no_grad():
        ours, its = experts_of(model).gate_up_proj, experts_of(base).gate_up_proj
        ours[2] = its[2] + 0.001 * (ours[2] - its[2])
        ours[1] = its[1]  # not trained at all
    folder = source.tuned.parent / "uneven"
    model.save_pretrained(folder)
    config = source.config(method="deltamix-kl", delta_metric=0.0, **quick("deltamix-kl"))
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    settings = packed.config.quantization_config
    assert f"{FUSED}.2" in settings.dropped and f"{FUSED}.1" not in settings.dropped
    assert {f"{FUSED}.0", f"{FUSED}.3"} <= settings.errors.keys()
    assert not {f"{FUSED}.1", f"{FUSED}.2"} & settings.errors.keys()
    counts = experts_of(packed).gate_up_proj_dm_counts
    assert counts[1] == counts[2] == 0 and counts[0] > 0
    packed.save_pretrained(folder.parent / "uneven_delta")
    report = inspect_repo(folder.parent / "uneven_delta")
    assert report.matrices[f"{FUSED}.2"].rank == 0 and f"{FUSED}.1" not in report.matrices
    whole = sum(2 * t.numel() for t in model.parameters())
    assert report.size.reference == whole - 2 * ours[1].numel()
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "uneven_delta")
    assert torch.equal(logits(again), logits(packed))


def test_experts_can_be_kept_out(pair):
    source = pair("mixtral")
    options = {"method": "delta-come", "ratio": 0.95, "bf16_overlay": True}
    for skip in ("experts", "gate_up_proj", FUSED):
        model = source.compress(**options, modules_to_not_convert=[skip])
        assert not hasattr(experts_of(model), "gate_up_proj_dm_v")
        assert hasattr(experts_of(model), "down_proj_dm_v") == (skip != "experts")


def test_small_experts_are_stored_whole(tmp_path):
    config = MixtralConfig(**vars_of(LlamaConfig()), num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    base = BaseCheckpoint([str(tmp_path / "base" / "model.safetensors")], model)
    with torch.no_grad():
        experts_of(model).gate_up_proj *= 1.1
        experts_of(model).down_proj *= 1.1
    targets, overlay = sort_tensors(model, base, ())
    assert [type(t) for t in targets.values()] == [Expert] * 4  # of gate_up_proj, [64, 64]
    assert list(overlay) == ["model.layers.0.mlp.experts.down_proj"]  # [64, 32]


def vars_of(config: LlamaConfig) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    return sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}


# The calibration


@torch.no_grad()
def idle(source: Any, folder: Any) -> Any:
    """A fine-tune that sends every token to one of its experts 0 and 1."""
    model = source.load(source.tuned, num_experts_per_tok=1)
    for layer in model.model.layers:
        first = layer.mlp.gate.weight[0].clone()
        layer.mlp.gate.weight.copy_(torch.stack([first, -first, first / 2, first * 0]))
    model.save_pretrained(folder)
    return model


def test_experts_that_see_no_token(pair, tmp_path):
    """They get the mean weight, as layers do that are never called."""
    source = pair("mixtral")
    model = idle(source, tmp_path / "idle")
    base = BaseCheckpoint([str(source.base / "model.safetensors")], model)
    targets, _ = sort_tensors(model, base, ())
    found, _ = collect(model, targets, [calibration_ids()], fisher=True)
    assert {f"{FUSED}.0", f"{FUSED}.1"} <= found.keys()
    assert not {f"{FUSED}.2", f"{FUSED}.3"} & found.keys()
    config = source.config(calibration=calibration_ids(), **quick("deltamix-kl"))
    packed = source.load(tmp_path / "idle", quantization_config=config)
    errors = packed.config.quantization_config.errors
    assert 0 < errors[f"{FUSED}.3"] < 1
    assert (experts_of(packed).gate_up_proj_dm_counts > 0).all()


@pytest.mark.untraced
def test_an_interrupted_job_goes_on(pair, tmp_path, monkeypatch):
    """What is finished of the experts is not done again, and the bytes are the same."""
    source, options = pair("mixtral"), quick("deltamix-kl")
    done: list[str] = []
    plain = Compressor.compress

    def compress(self, name, *args):
        if len(done) == 13:
            raise KeyboardInterrupt
        done.append(name)
        return plain(self, name, *args)

    monkeypatch.setattr(Compressor, "compress", compress)
    with pytest.raises(KeyboardInterrupt):
        source.compress(checkpoint_dir=tmp_path / "work", **options)
    assert any(name.startswith(f"{FUSED}.") for name in done)
    monkeypatch.setattr(Compressor, "compress", plain)
    for folder, more in (("one", {"checkpoint_dir": tmp_path / "work"}), ("two", {})):
        source.compress(**options, **more).save_pretrained(tmp_path / folder)
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert one == two


def test_calibration_helps_the_experts(delta):
    blind = delta("mixtral", "deltamix", ratio=0.1)
    told = delta("mixtral", "deltamix-kl", calibrated=True, ratio=0.1)
    tuned = told.pair.logits
    assert relative(told.logits, tuned) < relative(blind.logits, tuned)


# Merged, edited


def test_merged_weights_while_in_use(delta):
    repo = delta("mixtral", "deltamix-kl")
    model = repo.pair.load(repo.folder)
    taken = cache_merged(model)
    dense = repo.pair.load(repo.folder).dequantize()
    assert relative(logits(model), logits(dense)) < 1e-6
    experts = sum(p.numel() * 4 for n, p in dense.named_parameters() if p.ndim == 3)
    assert taken > experts
    assert cache_merged(model, False) == 0
    assert torch.equal(logits(model), repo.logits)


def test_an_edited_base_weight_is_not_saved(delta, tmp_path):
    repo = delta("mixtral", "delta-come")
    model = repo.pair.load(repo.folder)
    experts_of(model).down_proj.data[1] += 1
    with pytest.raises(DeltaMixError, match="down_proj was edited"):
        model.save_pretrained(tmp_path / "x")


# Looked into


def test_inspect(delta):
    repo = delta("mixtral", "deltamix-kl")
    report = inspect_repo(repo.folder)
    model = repo.pair.load(repo.folder)
    packed = experts_of(model).packed("gate_up_proj").split()
    for number, factors in enumerate(packed):
        found = report.matrices[f"{FUSED}.{number}"]
        assert found.shape == (256, 64) and found.rank == factors.rank
        assert found.error == repo.errors[f"{FUSED}.{number}"]
        assert found.bytes == sum(factors.nbytes.values())
        sizes = rank_sizes(report, f"{FUSED}.{number}")
        expected = factors.left().norm(dim=1) * factors.right().norm(dim=1)
        assert torch.equal(sizes, expected)
    kinds = report.by_type
    together = kinds["model.layers.*.mlp.experts.gate_up_proj"][0]
    assert together.shape == (256 * EXPERTS, 64)
    assert together.bytes == sum(report.matrices[f"{FUSED}.{i}"].bytes for i in range(EXPERTS))


@FAMILY
def test_verify(delta, copied, name):
    repo = delta(name, "delta-come")
    assert not [c for c in verify_repo(str(repo.folder)) if c.problem]
    sound = next(c.what for c in verify_repo(str(repo.folder)) if "packed matrices" in c.what)
    assert sound.startswith(f"{len(inspect_repo(repo.folder).matrices)} ")


def test_diff_sees_every_expert(pair):
    source = pair("mixtral")
    model = source.load(source.base)
    files = [[str(folder / "model.safetensors")] for folder in (source.tuned, source.base)]
    found = measure(model, *files, DeltaMixConfig(source.base), ratios=(0.3,))
    assert f"{FUSED}.3" in found.matrices and found.matrices[f"{FUSED}.3"].shape == (256, 64)
    groups = found.by_type()
    assert len(groups["model.layers.*.mlp.experts.gate_up_proj"]) == 2 * EXPERTS
    assert 0 < found.budgets[0].lost < 0.5


# Beside the base


@FAMILY
def test_beside_the_base(delta, name):
    repo = delta(name, "deltamix-kl")
    model = repo.pair.load(repo.pair.base)
    plain = logits(model)
    model.load_delta(repo.folder, "one")
    assert relative(logits(model), repo.logits) < 1e-5
    with model.disable_deltas():
        assert torch.equal(logits(model), plain)
    files, _, _ = find_delta(str(repo.folder), {})
    stored = model.dm_deltas.pool.entries["one"].nbytes
    assert 0 < sum(weight_bytes(repo.folder) for _ in files) - stored < 20_000
    model.delete_delta("one")
    assert torch.equal(logits(model), plain)


def test_rows_of_a_batch_take_their_own(delta):
    one, two = delta("mixtral", "deltamix-kl"), delta("mixtral", "delta-come")
    model = one.pair.load(one.pair.base)
    plain = logits(model, token_ids(3))
    model.load_delta(one.folder, "one")
    model.load_delta(two.folder, "two")
    found = logits(model, token_ids(3), delta_names=["two", None, "one"])
    for row, name in enumerate(["two", None, "one"]):
        alone = plain if name is None else logits(model, token_ids(3), delta_names=name)
        torch.testing.assert_close(found[row], alone[row], rtol=1e-4, atol=1e-5)


def test_a_loaded_delta_becomes_one_of_many(delta):
    one, two = delta("mixtral", "deltamix-kl"), delta("mixtral", "delta-come")
    model = one.pair.load(one.folder)
    assert model.active_deltas == ["default"]
    model.load_delta(two.folder, "two")
    assert not own_deltas(model)
    assert relative(logits(model, delta_names="default"), one.logits) < 1e-5
    assert relative(logits(model, delta_names="two"), two.logits) < 1e-5


def test_deltas_leave_and_come_back(delta):
    one, two = delta("mixtral", "deltamix-kl"), delta("mixtral", "delta-come")
    model = one.pair.load(one.pair.base)
    model.load_delta(one.folder, "one")
    model.load_delta(two.folder, "two")
    model.set_delta(None)
    model.set_delta_memory(max(model.list_deltas().values()))
    for name, repo in (("one", one), ("two", two), ("one", one)):
        assert relative(logits(model, delta_names=name), repo.logits) < 1e-5
        assert list(model.delta_memory().resident) == [name]
