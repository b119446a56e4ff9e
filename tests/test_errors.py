"""Bad input: one clear error that names the culprit, and nothing written or half-loaded.

What a config refuses is in test_config.py, hostile headers are in test_format.py.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pairs import calibration_ids, logits, quick, snapshot, weight_bytes
from transformers import AutoConfig, BertForMaskedLM, LlamaForCausalLM

from deltamix_hf import DeltaMixConfig, DeltaMixError

WEIGHTS = "model.safetensors"


def edit_weights(folder: Path, change) -> None:
    """Apply `change(tensors)` to the weight file of a copied repo."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    """Change keys of `quantization_config`; None removes."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config["quantization_config"].pop(key, None)
        if value is not None:
            config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


def refusal(action, *parts: str, kind: type[Exception] = DeltaMixError) -> str:
    """The message of the error that `action` must raise; it must hold all `parts`, in one line."""
    with pytest.raises(kind) as error:
        action()
    message = str(error.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


METHODS = ["delta-come", "deltamix-kl"]  # with zero points and without
PARTS = [
    *(("delta-come", part) for part in ("dm_v", "dm_u", "dm_ranks", "dm_zeros")),
    *(("deltamix-kl", part) for part in ("dm_v", "dm_u", "dm_ranks")),
]
each_method = pytest.mark.parametrize("broken", METHODS, indirect=True)
each_part = pytest.mark.parametrize(("broken", "part"), PARTS, indirect=["broken"])


@pytest.fixture
def broken(request, delta, copied):
    """A copy of a llama delta repo, to be damaged, and how to load it."""
    repo = delta("llama", getattr(request, "param", "delta-come"))
    folder = copied(repo.folder)
    return folder, lambda: repo.pair.load(folder)


# The base


def test_no_base_when_compressing(pair):
    source = pair("llama")
    refusal(
        lambda: source.load(source.tuned, quantization_config=DeltaMixConfig()),
        "no base model given",
        "base_model=",
    )


@pytest.mark.parametrize("where", ["/nowhere/at/all", "someone/no-such-model"])
def test_base_not_found_when_compressing(pair, where):
    source = pair("llama")
    config = DeltaMixConfig(base_model=where)
    refusal(lambda: source.load(source.tuned, quantization_config=config), where)


def test_base_not_named_in_the_repo(broken):
    folder, load = broken
    edit_config(folder, base_model=None)
    refusal(load, "no base model given")


def test_base_not_found_when_loading(broken):
    folder, load = broken
    edit_config(folder, base_model="/nowhere/at/all")
    refusal(load, "/nowhere/at/all", "base_model=")


def test_base_of_another_kind_when_compressing(pair):
    source, other = pair("llama"), pair("bert").base
    for budget in ({"ratio": 0.2}, {"budget_bytes": 10**7}):
        config = DeltaMixConfig(base_model=other, **budget)
        refusal(
            lambda config=config: source.load(source.tuned, quantization_config=config),
            str(other),
            "another kind of model",
        )


def test_base_of_other_shapes(pair, tmp_path):
    """Rows that are no tokens' (those of other vocabularies are in test_resized)."""
    source = pair("llama")
    model = source.load(source.base)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    model.save_pretrained(tmp_path / "base")
    config = DeltaMixConfig(tmp_path / "base", ratio=0.2)
    refusal(
        lambda: source.load(source.tuned, quantization_config=config),
        "model.layers.1.mlp.up_proj.weight",
        "[128, 64]",
        "[96, 64]",
    )


@pytest.mark.parametrize("element", [0, 777, -1])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_base_changed_since(delta, copied, tensor, element):
    """One bit of one element of the base, wherever it is."""
    repo = delta("llama")
    base = copied(repo.pair.base)

    def flip(tensors):
        bits = tensors[tensor].view(torch.int32).view(-1)
        bits[element % len(bits)] ^= 1

    edit_weights(base, flip)
    moved = DeltaMixConfig(base_model=base)
    refusal(
        lambda: repo.pair.load(repo.folder, quantization_config=moved),
        "wrong base",
        tensor,
        str(base),
    )


def test_base_lost_a_tensor(delta, copied):
    repo = delta("llama")
    base, name = copied(repo.pair.base), "model.layers.0.mlp.gate_proj.weight"
    edit_weights(base, lambda tensors: tensors.pop(name))
    moved = DeltaMixConfig(base_model=base)
    refusal(lambda: repo.pair.load(repo.folder, quantization_config=moved), "wrong base", name)


def test_base_of_another_kind(delta, pair):
    repo = delta("llama")
    moved = DeltaMixConfig(base_model=pair("bert").base)
    refusal(lambda: repo.pair.load(repo.folder, quantization_config=moved), "wrong base")


def test_base_in_another_dtype(delta, tmp_path):
    """Equal after rounding is not equal: the delta was made against other bytes."""
    repo = delta("llama")
    repo.pair.load(repo.pair.base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    moved = DeltaMixConfig(base_model=tmp_path / "base")
    refusal(lambda: repo.pair.load(repo.folder, quantization_config=moved), "wrong base")


def test_quantized_base(pair, copied):
    source = pair("llama")
    base = copied(source.base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    options = DeltaMixConfig(base_model=base)
    refusal(
        lambda: source.load(source.tuned, quantization_config=options), "itself quantized", "gptq"
    )


def test_delta_as_a_base(delta, pair):
    source = pair("llama")
    options = DeltaMixConfig(base_model=delta("llama").folder)
    refusal(lambda: source.load(source.tuned, quantization_config=options), "itself quantized")


# The fine-tune


def test_already_quantized_fine_tune(pair, copied):
    source = pair("llama")
    tuned = copied(source.tuned)
    config = json.loads((tuned / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tuned / "config.json").write_text(json.dumps(config))
    refusal(
        lambda: source.load(tuned, quantization_config=source.config()),
        "BitsAndBytesConfig",
        "DeltaMixConfig",
        kind=ValueError,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_fine_tune_that_diverged(pair, copied, tensor, value):
    source = pair("llama")
    tuned = copied(source.tuned)
    edit_weights(tuned, lambda tensors: tensors[tensor].view(-1)[5].fill_(value))
    refusal(
        lambda: source.load(tuned, quantization_config=source.config()), tensor, "NaN or infinite"
    )


def test_base_that_diverged(pair, copied):
    source = pair("llama")
    base, name = copied(source.base), "model.layers.1.mlp.up_proj"
    edit_weights(base, lambda tensors: tensors[f"{name}.weight"].view(-1)[5].fill_(float("nan")))
    config = DeltaMixConfig(base, ratio=0.2)
    refusal(lambda: source.load(source.tuned, quantization_config=config), name, "NaN or infini")


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "delta-come") for name in ("llama_tied", "bert")),
        ("gpt2", "deltamix"),
        *((name, "deltamix-kl") for name in ("llama", "llama_tied", "t5")),
    ],
)
def test_budget_too_small_names_one_that_works(pair, tmp_path, name, method):
    source = pair(name)
    tiny = {"ratio": None, "bits_per_weight": None, "budget_bytes": 1000, "method": method}
    tiny |= quick(method)
    message = refusal(lambda: source.compress(**tiny), "too small", "1,000 bytes")
    enough = int(re.search(r"budget_bytes >= (\d+)", message)[1])
    choices = [{"budget_bytes": enough}]
    if ratio := re.search(r"ratio >= ([\d.]+)", message):
        choices.append({"budget_bytes": None, "ratio": float(ratio[1])})
    for i, choice in enumerate(choices):
        folder = tmp_path / str(i)
        model = source.compress(**{**tiny, **choice})
        model.save_pretrained(folder)
        budget = model.config.quantization_config.budget(1)
        assert weight_bytes(folder) <= (budget if i == 0 else enough + 64)
        assert torch.equal(logits(source.load(folder)), logits(model))
        assert model.config.quantization_config.errors  # at least one rank is kept
    assert len(choices) == 2 or name == "gpt2"


@pytest.mark.parametrize("method", ["deltamix", "deltamix-kl"])
def test_calibration_on_which_the_fine_tune_gives_nan(pair, copied, method):
    """Finite weights whose activations overflow."""
    source = pair("llama")
    tuned = copied(source.tuned)

    name = "model.layers.1.input_layernorm.weight"
    edit_weights(tuned, lambda tensors: tensors[name].fill_(3e38))
    config = source.config(method=method, calibration=calibration_ids())
    load = partial(source.load, tuned, quantization_config=config)
    refusal(load, "model.layers.1.self_attn.q_proj", "NaN or infinite")


# The delta repo


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_file(broken, keep):
    folder, load = broken
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(Exception) as error:
        load()
    assert isinstance(error.value, DeltaMixError), repr(error.value)
    assert WEIGHTS in str(error.value)


def test_missing_shard(delta, tmp_path):
    repo = delta("llama")
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "repo", max_shard_size="20KB")
    shard = sorted((tmp_path / "repo").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises((DeltaMixError, OSError), match=shard.name):
        repo.pair.load(tmp_path / "repo")


MODULE = "model.layers.0.self_attn.o_proj"


@each_part
def test_missing_packed_tensor(broken, part):
    folder, load = broken
    edit_weights(folder, lambda tensors: tensors.pop(f"{MODULE}.{part}"))
    refusal(load, f"{MODULE}.{part}")


@each_method
def test_missing_packed_matrix(broken):
    """Without it the base weight alone would answer, a little wrong and unnoticed."""
    folder, load = broken

    def drop(tensors):
        for name in [name for name in tensors if name.startswith(f"{MODULE}.dm_")]:
            del tensors[name]

    edit_weights(folder, drop)
    refusal(load, MODULE)


def test_missing_overlay_tensor_of_a_head(delta, copied):
    """The head is not in the base: without it the model would get a random one."""
    repo = delta("bert_from_headless")
    folder, name = copied(repo.folder), "cls.predictions.transform.LayerNorm.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    refusal(lambda: repo.pair.load(folder), name)


@each_part
@pytest.mark.parametrize(
    "damage",
    [lambda t: t[:-1], lambda t: t[:, 1:], lambda t: t.to(torch.int32), lambda t: t[0]],
    ids=["rows", "columns", "dtype", "dimensions"],
)
def test_packed_tensor_that_does_not_fit(broken, part, damage):
    folder, load = broken
    name = f"{MODULE}.{part}"
    edit_weights(folder, lambda tensors: tensors.update({name: damage(tensors[name]).clone()}))
    refusal(load, MODULE)


@each_method
@pytest.mark.parametrize("width", [0, 9, 7 + 16 * 7, 2 + 16 * 3, -1, 2**14])
def test_tampered_width(broken, width):
    folder, load = broken
    edit_weights(folder, lambda tensors: tensors[f"{MODULE}.dm_ranks"][0, 0].fill_(width))
    refusal(load, MODULE)


def test_packed_tensors_of_a_module_the_model_has_not(broken):
    """As when a file was edited: the matrix that config.json lists is gone."""
    folder, load = broken

    def rename(tensors):
        for name in [name for name in tensors if name.startswith(MODULE)]:
            tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)

    edit_weights(folder, rename)
    refusal(load, MODULE)


def test_overlay_of_another_shape(broken):
    folder, load = broken
    name = "model.norm.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises((DeltaMixError, RuntimeError, ValueError)):
        load()


def test_repo_for_another_architecture(delta, copied):
    repo = delta("llama")
    with pytest.raises((DeltaMixError, ValueError)):
        BertForMaskedLM.from_pretrained(repo.folder)


def test_repo_of_the_other_codebook(broken):
    """Codes read on the wrong grid would give noise."""
    folder, load = broken
    edit_config(folder, method="deltamix", codebook="gaussian", allocation="matrix")
    refusal(load, "dm_zeros", "codebook")


@pytest.mark.parametrize("broken", ["deltamix-kl"], indirect=True)
def test_repo_without_the_zero_points_it_needs(broken):
    folder, load = broken
    edit_config(folder, codebook="min-max")
    refusal(load, "dm_zeros")


@each_method
@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"format_version": 99}, "format 99"),
        ({"format_version": "1"}, "format_version"),
        ({"base_fingerprints": {}}, "base_fingerprints"),
        ({"group_size": 64}, "dm_"),
        ({"group_size": -1}, "group_size"),
        ({"surprise": 1}, "surprise"),
        ({"method": "surprise"}, "surprise"),
        ({"method": ["deltamix"]}, "method"),
        ({"codebook": "surprise"}, "surprise"),
        ({"whiten": "surprise"}, "whiten"),
        ({"base_fingerprints": [1, 2]}, "base_fingerprints"),
        ({"errors": 3}, "errors"),
    ],
)
def test_tampered_config(broken, changes, culprit):
    folder, load = broken
    edit_config(folder, settings_fingerprint=None, **changes)
    refusal(load, culprit)


def test_weights_given_as_a_state_dict(delta):
    repo = delta("llama")
    state = load_file(repo.folder / WEIGHTS)
    config = AutoConfig.from_pretrained(repo.folder)
    refusal(
        lambda: LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state),
        "no state_dict",
    )


def test_a_refused_load_writes_nothing(delta, copied, tmp_path):
    repo = delta("llama")
    folder = copied(repo.folder)
    edit_weights(folder, lambda tensors: tensors.pop(f"{MODULE}.dm_u"))
    before = snapshot(tmp_path)
    refusal(lambda: repo.pair.load(folder), MODULE)
    assert snapshot(tmp_path) == before


def test_a_refused_compression_writes_nothing(pair, tmp_path, monkeypatch):
    source = pair("llama")
    shutil.copytree(source.tuned, tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    config = source.config(ratio=1e-6)
    refusal(lambda: source.load(tmp_path / "tuned", quantization_config=config), "too small")
    assert snapshot(tmp_path) == before
