"""The same promises for every architecture: compress, save, reload, run, offload, turn dense.

A promise is a test, a row of `CASES` an architecture and how it is compressed. What only some
models do, or do only once, is in `test_quantizer.py`.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import cycle

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from tiny_pairs import (
    FAMILIES,
    generated,
    inputs_of,
    logits,
    make_pair,
    packed_tensors,
    parts_on_disk,
    relative,
    token_ids,
    weight_bytes,
)
from transformers import AutoModel

from deltamix_hf import DeltaMixConfig
from deltamix_hf.checkpoint.base import BaseCheckpoint, resolve_base
from deltamix_hf.checkpoint.report import inspect_repo
from deltamix_hf.nn.layers import delta_modules
from deltamix_hf.storage.names import is_guard

pytestmark = pytest.mark.untraced  # the same code for all, which other tests run too

# Dense and packed differ by one rounding of base + delta in float32, through a few layers.
DENSE_TOLERANCE = 1e-5
# Layers that are not all in memory do not look their codes up together: other orders of additions.
APART = 1e-6

GAUSSIAN = [(name, "deltamix-kl") for name in ARCHITECTURES]
MIN_MAX = [(name, "delta-come") for name in FAMILIES]
CASES = [  # architecture, method, whether with calibration text
    *((*case, False) for case in GAUSSIAN + MIN_MAX),
    ("llama", "delta-come", True),
    *((name, "deltamix", False) for name in ("llama", "bert")),
    *((name, "deltamix", True) for name in ("llama", "llama_tied", "bert", "t5")),
    *((name, "deltamix-kl", True) for name in ("bert", "t5", "gpt2")),
]
each_case = pytest.mark.parametrize(("name", "method", "calibrated"), CASES)
each_gaussian = pytest.mark.parametrize(("name", "method"), GAUSSIAN)
each_repo = pytest.mark.parametrize(("name", "method"), GAUSSIAN + MIN_MAX)
# every family with zero points, and both kinds of ties with the Gaussian codebook
each_family = pytest.mark.parametrize(("name", "method"), GAUSSIAN[:2] + MIN_MAX)


@each_case
def test_reload_gives_bit_equal_logits(delta, name, method, calibrated):
    repo = delta(name, method, calibrated)
    again = repo.pair.load(repo.folder)
    assert torch.equal(logits(again), repo.logits)
    assert torch.equal(logits(again, token_ids(3, 31, seed=2)), repo.more_logits)
    packed = delta_modules(again).values()
    found, count = len(repo.errors), repo.pair.family.packed
    if count is None:
        assert found >= 6
    else:  # a global allocation may leave a matrix out
        assert found == count or (method == "deltamix-kl" and 0 < found < count)
        assert len({id(m.dm_v) for m in packed}) == found
        assert all(hasattr(m, "dm_zeros") == (method != "deltamix-kl") for m in packed)


@pytest.fixture(scope="module")
def base_logits(pair):
    """`base_logits(name)`: what the base of a pair says."""
    return cache(lambda name: logits(pair(name).load(pair(name).base)))


@each_case
def test_delta_is_close_to_the_fine_tune(delta, base_logits, name, method, calibrated):
    repo = delta(name, method, calibrated)
    lost = relative(repo.logits, repo.pair.logits)
    assert 0 < lost < 0.15 or name not in FAMILIES
    if name != "bert_from_headless":  # its base has a random head
        assert lost < 0.5 * relative(base_logits(name), repo.pair.logits)


@each_case
def test_bytes_on_disk_are_the_promised_ones(delta, name, method, calibrated):
    repo = delta(name, method, calibrated)
    report, size = inspect_repo(repo.folder), weight_bytes(repo.folder)
    assert report.size.total == size <= repo.budget
    assert report.size.ratio <= repo.pair.family.budget["ratio"]
    if name in FAMILIES:
        left_out = repo.pair.family.packed - len(repo.errors)
        assert size >= 0.97 * repo.budget - 450 * left_out  # what their headers would have taken


@each_family
def test_nothing_of_the_base_is_stored(delta, name, method):
    repo = delta(name, method)
    stored = load_file(repo.folder / "model.safetensors")
    base = load_file(repo.pair.base / "model.safetensors")

    def content(tensor):
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tuple(tensor.shape), raw

    by_content = {content(tensor) for tensor in base.values()}
    model = repo.pair.load(repo.pair.base)
    reader = BaseCheckpoint(resolve_base(str(repo.pair.base), None, {})[0], model)
    for key, tensor in stored.items():
        if is_guard(key):
            continue
        assert content(tensor) not in by_content
        assert key not in reader or not torch.equal(tensor.float(), reader.read(key).float())
    files = {file.name for file in repo.folder.iterdir()}
    assert files <= {"config.json", "generation_config.json", "model.safetensors"}


@each_family
def test_saving_again_gives_identical_files(delta, tmp_path, name, method):
    repo = delta(name, method)
    repo.pair.load(repo.folder).save_pretrained(tmp_path / "again")
    for file in repo.folder.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    one, two = (
        json.loads((f / "config.json").read_text()) for f in (repo.folder, tmp_path / "again")
    )
    assert one == two


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].generates])
def test_generate_is_equal_after_reload(delta, name):
    repo = delta(name)
    expected = generated(repo.pair.compress(method="delta-come"))
    assert torch.equal(generated(repo.pair.load(repo.folder)), expected)
    assert expected.shape[1] > 2


@each_repo
def test_dense_again(delta, tmp_path, name, method):
    """`dequantize()` and `dequantize=True` give a plain model that saves and loads without us."""
    repo = delta(name, method)
    by_method = repo.pair.load(repo.folder)
    by_method.dequantize()
    by_option = repo.pair.load(repo.folder, quantization_config=DeltaMixConfig(dequantize=True))
    for model in (by_method, by_option):
        assert not delta_modules(model) and not packed_tensors(model)
        assert not hasattr(model.config, "quantization_config")
        assert not hasattr(model, "hf_quantizer")
        assert relative(logits(model), repo.logits) < DENSE_TOLERANCE
    assert torch.equal(logits(by_method), logits(by_option))
    by_method.save_pretrained(tmp_path / "dense")
    plain = repo.pair.load(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(plain), logits(by_method))
    types, ours = ({k: type(m) for k, m in x.named_modules()} for x in (plain, by_method))
    assert ours == types


@each_family
def test_headless_class_gives_the_headless_part(delta, name, method):
    repo = delta(name, method)
    whole = repo.pair.load(repo.folder)
    if name == "t5":  # T5Model is an encoder and a decoder too; compare before the head
        with torch.no_grad():
            states = whole(**inputs_of(whole), output_hidden_states=True).decoder_hidden_states
        expected = states[-1]
    else:
        expected = logits(whole.base_model)
    assert torch.equal(logits(AutoModel.from_pretrained(repo.folder)), expected)


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_the_packed_tensors(delta, name, dtype, method):
    """Loaded in, or cast to, half precision: codes and scales keep every bit."""
    repo = delta(name, method)
    loaded, cast = repo.pair.load(repo.folder, dtype=dtype), repo.pair.load(repo.folder)
    expected = {name: tensor.clone() for name, tensor in packed_tensors(cast).items()}
    cast.to(dtype)
    for model in (loaded, cast):
        found = packed_tensors(model)
        assert found.keys() == expected.keys()
        assert all(
            torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in expected.items()
        )
        assert model.dtype == dtype
        assert relative(logits(model).float(), repo.logits) < 0.05
    if name in ("gpt2", "bert"):  # .to() also casts rotary tables, and wo of T5 stays float32
        assert torch.equal(logits(loaded), logits(cast))


# Where the weights go


@pytest.mark.parametrize(
    ("name", "method", "first"),
    [(*case, first) for case, first in zip(GAUSSIAN + MIN_MAX, cycle(("cpu", "disk")))],
)
def test_parts_on_disk(delta, tmp_path, name, method, first):
    """Every other part of the model, one way and the other; what is tied in one place."""
    repo = delta(name, method)
    folder = repo.folder
    if first == "disk":  # of a repo in shards, which is the same repo
        folder = tmp_path / "shards"
        repo.pair.load(repo.folder).save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        assert torch.equal(logits(repo.pair.load(folder)), repo.logits)
    options = parts_on_disk(repo.pair, first, tmp_path / "off")
    loaded = repo.pair.load(folder, **options, offload_buffers=first == "disk")
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert relative(logits(loaded), repo.logits) < APART


@each_gaussian
def test_less_memory_than_the_model_takes(delta, tmp_path, name, method):
    """accelerate chooses what stays, counting packed tensors too."""
    repo = delta(name, method)
    size = repo.pair.load(repo.folder).get_memory_footprint()
    options = {"device_map": "auto", "max_memory": {"cpu": size // 2}}
    loaded = repo.pair.load(repo.folder, **options, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert relative(logits(loaded), repo.logits) < APART


@each_gaussian
def test_beside_the_base(delta, name, method):
    repo = delta(name, method)
    model = repo.pair.load(repo.pair.base)
    if name == "bert_from_headless":
        pytest.skip("its base has no head that a delta could be beside")
    plain = logits(model)
    model.load_delta(repo.folder, "one")
    assert relative(logits(model), repo.logits) < 1e-5
    with model.disable_deltas():
        assert torch.equal(logits(model), plain)


WITH_HEADS = [name for name in ARCHITECTURES if name != "bert_from_headless"]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama_tied", 5),
        *zip(WITH_HEADS, cycle((5, -40))),
    ],
)
def test_more_and_fewer_tokens(name, tokens, tmp_path):
    pair = make_pair(name, tmp_path, ARCHITECTURES[name], tokens)
    packed = pair.compress(ratio=0.95, method="delta-come", bf16_overlay=True)
    expected = logits(packed, ids := token_ids() % 200)
    packed.save_pretrained(tmp_path / "delta", max_shard_size="5GB" if tokens > 0 else "10KB")
    assert torch.equal(logits(pair.load(tmp_path / "delta"), ids), expected)
    assert expected.shape[-1] == 256 + tokens
    assert relative(expected, pair.logits) < 0.1
