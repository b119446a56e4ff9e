"""Reading a delta repo apart from any model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.base import KeyMap
from deltamix_hf.checkpoint.delta_repo import find_delta, read_delta
from deltamix_hf.nn.layers import packed_shapes
from deltamix_hf.storage.sizes import weight_files


@pytest.fixture
def repo(delta):
    return delta("llama", "deltamix-kl")


def read(repo, folder):
    files, config, _ = find_delta(str(folder), {})
    config.verify_tensors = False  # what it says is not what the structure says
    return read_delta("it", files, config, KeyMap(repo.pair.load(repo.pair.base)))


def test_it_holds_what_the_model_holds(repo):
    model, found = repo.pair.load(repo.folder), read(repo, repo.folder)
    assert set(found.packed) == set(packed_shapes(model))
    for name, packed in found.packed.items():
        assert torch.equal(packed.dense(), model.get_submodule(name).packed().dense())
    state = model.state_dict()
    for name, value in found.overlay.items():
        assert torch.equal(value.to(state[name].dtype), state[name])
    on_disk = sum(file.stat().st_size for file in weight_files(repo.folder))
    assert 0 < on_disk - found.nbytes < 20_000  # headers


def edit(folder, change):
    (file,) = weight_files(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_part_is_named(repo, copied):
    folder = copied(repo.folder)
    edit(folder, lambda t: t.pop(next(n for n in t if n.endswith("dm_u"))))
    with pytest.raises(DeltaMixError, match=r"the delta repo lacks .*dm_u"):
        read(repo, folder)


def test_a_matrix_of_another_shape_is_named(repo, copied):
    folder = copied(repo.folder)
    name = next(n for n in load_file(weight_files(folder)[0]) if n.endswith("dm_v"))
    edit(folder, lambda t: t.update({name: t[name][:, 1:].contiguous()}))
    with pytest.raises(DeltaMixError, match=name.removesuffix(".dm_v") + ": packed tensor dm_v"):
        read(repo, folder)


def test_a_tensor_the_model_has_not_is_named(repo, copied):
    folder = copied(repo.folder)
    edit(folder, lambda t: t.update({"model.other.weight": torch.ones(3)}))
    with pytest.raises(DeltaMixError, match=r"holds model\.other\.weight, which its config\.json"):
        read(repo, folder)


def test_not_a_delta_repo(repo, copied):
    with pytest.raises(DeltaMixError, match="is not a delta repo"):
        find_delta(str(repo.pair.base), {})
    folder = copied(repo.folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaMixError, match="format 99"):
        find_delta(str(folder), {})
