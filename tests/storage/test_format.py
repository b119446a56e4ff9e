"""The file format: headers (hostile ones too), fingerprints, names, sizes."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import quantizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pairs import FAMILIES, weight_bytes
from transformers import AutoModel, AutoModelForCausalLM

from deltamix_hf import DeltaMixError
from deltamix_hf.nn.experts import compressed_shapes
from deltamix_hf.storage.headers import (
    check_base,
    fingerprint,
    fingerprints,
    read_header,
    read_headers,
)
from deltamix_hf.storage.names import is_guard, packed_names
from deltamix_hf.storage.sizes import SizeReport, header_bytes, size_report, weight_files

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int16, torch.int64]
tensors = st.dictionaries(
    st.text('abc._:0"\\', min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
    max_size=8,
)


def write(path, header: object, data: bytes = b"") -> None:
    """A file with a header of our own making; `header` is JSON-encoded unless it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start=0, end=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@given(tensors)
def test_header_is_what_safetensors_reads(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("header") / "m.safetensors"
    stored = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in made.items()}
    save_file(stored, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert infos.keys() == stored.keys()
    content = path.read_bytes()
    with safe_open(path, framework="pt") as handle:
        for name, info in infos.items():
            tensor = stored[name]
            assert info.shape == tuple(tensor.shape)
            assert info.dtype == handle.get_slice(name).get_dtype()
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert content[info.start : info.end] == raw


@given(tensors)
def test_header_bytes_is_a_close_upper_bound(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("header") / "m.safetensors"
    stored = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in made.items()}
    save_file(stored, path, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    true = path.stat().st_size - total
    bound = header_bytes({k: (t.dtype, tuple(t.shape)) for k, t in stored.items()}, total)
    # each offset is charged as many digits as the last one has, and the end is padded to 8
    assert true <= bound <= true + len(stored) * 2 * (len(str(total)) - 1) + 8


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("hostile") / "m.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except DeltaMixError as error:
        assert str(path) in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
hostile_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F3"]) | json_values,
        "shape": st.lists(st.integers(-2, 2**70), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-9, 99), max_size=3) | json_values,
    },
)


@given(st.dictionaries(st.text(max_size=4), hostile_entries | json_values, max_size=3), st.binary())
def test_hostile_headers_are_refused_or_sound(tmp_path_factory, header, data):
    path = tmp_path_factory.mktemp("hostile") / "m.safetensors"
    write(path, header, data)
    try:
        infos = read_header(path)
    except DeltaMixError:
        return
    size = path.stat().st_size
    for info in infos.values():
        assert isinstance(info.dtype, str)
        assert all(type(extent) is int and extent >= 0 for extent in info.shape)
        assert 0 <= info.start <= info.end <= size


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], b""),
        ("text", b""),
        ({"w": []}, b""),
        ({"w": None}, b""),
        ({"w": {"dtype": "F32", "shape": [1]}}, b"1234"),
        ({"w": entry(0, 8)}, b"1234"),
        ({"w": entry(-4, 0)}, b"1234"),
        ({"w": entry(4, 0)}, b"1234"),
        ({"w": entry(0, 4, shape=[-1])}, b"1234"),
        ({"w": entry(0, 4, shape=["1"])}, b"1234"),
        ({"w": entry(0, 4, shape=[1.0])}, b"1234"),
        ({"w": entry(0, 4, shape=[2])}, b"1234"),
        ({"w": entry(0, 4, dtype="F64")}, b"1234"),
        ({"w": entry(0, 4, dtype=3)}, b"1234"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}', b"1234"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}', b"1234"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}', b"1234"),
        (b"[" * 100_000, b""),
        (b"\xff\xfe", b""),
        (b"", b""),
    ],
)
def test_unsound_headers_are_refused(tmp_path, header, data):
    write(tmp_path / "m.safetensors", header, data)
    with pytest.raises(DeltaMixError, match=r"m\.safetensors is not a sound safetensors file"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2**63), struct.pack("<Q", 9)])
def test_headers_longer_than_the_file(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(DeltaMixError, match="not a sound safetensors file"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_no_such_file(tmp_path, make):
    make(tmp_path / "m.safetensors")
    with pytest.raises(DeltaMixError, match=r"m\.safetensors"):
        read_header(tmp_path / "m.safetensors")


def test_fingerprint_as_documented(tmp_path):
    """docs/format.md, written out."""
    stored = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "s": torch.tensor(1.5)}
    save_file(stored, tmp_path / "m.safetensors")
    found = fingerprints(read_header(tmp_path / "m.safetensors"))
    raw = stored["a"].view(torch.uint8).numpy().tobytes()
    assert found["a"] == hashlib.sha256(b"BF16[2, 3]" + raw).hexdigest()[:32]
    assert found["s"] == hashlib.sha256(b"F32[]" + struct.pack("<f", 1.5)).hexdigest()[:32]


def test_fingerprint_of_a_long_tensor_reads_all_of_it(tmp_path):
    """Longer than one read; the last byte counts."""
    values = torch.zeros(5 << 20, dtype=torch.uint8)
    save_file({"w": values}, tmp_path / "a.safetensors")
    values[-1] = 1
    save_file({"w": values}, tmp_path / "b.safetensors")
    one, two = (read_header(tmp_path / f"{f}.safetensors")["w"] for f in "ab")
    assert fingerprint(one) != fingerprint(two)
    expected = hashlib.sha256(b"U8[5242880]" + values.numpy().tobytes()).hexdigest()[:32]
    assert fingerprint(two) == expected


def test_fingerprint_depends_on_dtype_and_shape(tmp_path):
    stored = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2), "c": torch.zeros(6)}
    stored["d"] = torch.zeros(2, 3, dtype=torch.int32)
    save_file(stored, tmp_path / "m.safetensors")
    assert len(set(fingerprints(read_header(tmp_path / "m.safetensors")).values())) == 4


def test_check_base(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors")
    recorded = fingerprints(infos)
    check_base(recorded, infos, "'here'")
    check_base({"a": recorded["a"]}, infos, "'here'")  # the base may hold more
    with pytest.raises(DeltaMixError, match=r"'here' lacks 1 tensors.*'c'"):
        check_base({**recorded, "c": "0"}, infos, "'here'")
    with pytest.raises(DeltaMixError, match=r"1 of 2 tensors of 'here' differ.*'b'"):
        check_base({**recorded, "b": "0"}, infos, "'here'")
    with pytest.raises(DeltaMixError, match="no base_fingerprints"):
        check_base({}, infos, "'here'")


@pytest.mark.parametrize("gaussian", [False, True], ids=["min-max", "gaussian"])
@pytest.mark.parametrize("experts", [False, True], ids=["layer", "experts"])
def test_packed_names(gaussian, experts):
    kinds = ["v", "u", "ranks"] if gaussian else ["v", "u", "ranks", "zeros"]
    kinds, stem = ([*kinds, "counts"], "a.b_dm_") if experts else (kinds, "a.b.dm_")
    names = [f"{stem}{kind}" for kind in kinds] + ["a.b.weight", "a.dm_other", "norm.weight"]
    expected = ["a.b.0", "a.b.17"] if experts else ["a.b"]
    found = ([], ["a.b"]) if experts else (["a.b"], [])
    assert packed_names(names, quantizer(gaussian), expected) == found
    for kind in kinds:
        with pytest.raises(DeltaMixError, match=rf"lacks {stem}{kind}"):
            packed_names([name for name in names if name != f"{stem}{kind}"], quantizer(gaussian))
    with pytest.raises(DeltaMixError, match=rf"{stem}zeros"):
        packed_names(names, quantizer(not gaussian))  # of the other codebook
    with pytest.raises(DeltaMixError, match=r"lacks the packed matrix a\.c"):
        packed_names(names, quantizer(gaussian), [*expected, "a.c"])


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "delta-come") for name in FAMILIES), ("llama", "deltamix-kl")],
)
def test_size_report_is_the_files(delta, name, method):
    made = delta(name, method, calibrated=method == "deltamix-kl")
    repo, model = made.folder, made.pair.load(made.folder)
    shapes = compressed_shapes(model)
    report = size_report(repo, shapes)
    stored = load_file(repo / "model.safetensors")

    def bytes_of(keep):
        return sum(t.numel() * t.element_size() for k, t in stored.items() if keep(k))

    overlay = bytes_of(lambda k: ".dm_" not in k and not is_guard(k))
    assert report.total == weight_bytes(repo)
    assert report.payload == bytes_of(lambda k: k.endswith((".dm_v", ".dm_u")))
    assert report.overlay == overlay
    ranks = [t for k, t in stored.items() if k.endswith(".dm_ranks")]
    widths = sum(2 * len(t) for t in ranks)
    scales = bytes_of(lambda k: k.endswith((".dm_ranks", ".dm_zeros"))) - widths
    assert report.scales == scales
    tuned = made.pair.load(made.pair.tuned).state_dict()
    tied = set(model.all_tied_weights_keys)
    dropped = {n for n in tuned.keys() - tied if n not in stored and f"{n[:-7]}.dm_v" not in stored}
    assert bool(dropped) == (method == "deltamix-kl")  # a matrix not worth its bytes is left out
    assert {f"{n}.weight" for n in model.config.quantization_config.dropped} == dropped
    reference = 2 * sum(tuned[n].numel() for n in tuned.keys() - tied)
    assert report.reference == reference
    assert report.ratio == report.total / reference


def test_size_report_of_shards(delta, tmp_path):
    repo = delta("llama")
    model = repo.pair.load(repo.folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shapes = compressed_shapes(model)
    assert len(weight_files(tmp_path)) > 2
    whole, parts = size_report(repo.folder, shapes), size_report(tmp_path, shapes)
    assert parts.total == weight_bytes(tmp_path) > whole.total  # one header a shard
    assert (parts.payload, parts.scales, parts.overlay) == (
        whole.payload,
        whole.scales,
        whole.overlay,
    )


def test_empty_size_report():
    assert SizeReport(payload=0, scales=0, metadata=8, overlay=0, reference=0).ratio == 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_guards_are_tiny_and_name_no_tensor_of_any_model(delta, name):
    repo = delta(name)
    guards = {k: i for k, i in read_headers(weight_files(repo.folder)).items() if is_guard(k)}
    assert 1 <= len(guards) <= 3
    assert all(info.end - info.start <= 1 for info in guards.values())
    auto = {AutoModelForCausalLM: AutoModel}.get(repo.pair.family.auto, repo.pair.family.auto)
    for model in (repo.pair.load(repo.pair.tuned), auto.from_pretrained(repo.pair.tuned)):
        assert not guards.keys() & model.state_dict().keys()
