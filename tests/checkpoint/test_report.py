"""Reports against independent counts of the files, pictures against what they must show."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pairs import weight_bytes
from typer.testing import CliRunner

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.report import inspect_repo, rank_sizes, type_and_depth
from deltamix_hf.cli import app
from deltamix_hf.hub.plots import (
    allocation_figure,
    bytes_figure,
    error_figure,
    save_figures,
    spectrum_figure,
)
from deltamix_hf.nn.layers import delta_modules

METHODS = ["deltamix-kl", "deltamix", "delta-come"]
FILE = "model.safetensors"


@pytest.mark.parametrize("method", METHODS)
def test_report_is_what_the_files_hold(delta, method):
    repo = delta("llama_tied", method)
    report = inspect_repo(repo.folder)
    assert report.size.total == weight_bytes(repo.folder)
    tensors = load_file(repo.folder / FILE)
    assert len(report.matrices) == repo.pair.family.packed
    modules = delta_modules(repo.pair.load(repo.folder))
    for name, matrix in report.matrices.items():
        stored = {part: tensors.get(f"{name}.dm_{part}") for part in ("v", "u", "ranks", "zeros")}
        whole = sum(t.numel() * t.element_size() for t in stored.values() if t is not None)
        assert matrix.bytes == whole and matrix.payload == len(stored["v"].view(-1)) + len(
            stored["u"].view(-1)
        )
        assert int(matrix.v_bits.sum()) == stored["v"].shape[0]  # a byte row for each bit
        assert int(matrix.u_bits.sum()) == stored["u"].shape[0]
        assert sum(matrix.widths.values()) == matrix.rank == len(stored["ranks"])
        assert matrix.shape == tuple(modules[name].weight.shape)
        assert matrix.error == pytest.approx(repo.errors[name])
        factors = modules[name].packed()
        ranks = zip(factors.left(), factors.right(), strict=True)
        sizes = torch.stack([torch.linalg.norm(torch.outer(u, v)) for u, v in ranks])
        assert torch.allclose(rank_sizes(report, name), sizes, rtol=1e-4)
    packed = sum(matrix.bytes for matrix in report.matrices.values())
    overlay = sum(count for _, _, count in report.overlay.values())
    assert overlay == report.size.overlay
    assert packed < report.size.total - overlay  # the rest: headers and guards


def test_matrices_come_as_the_model_has_them(delta):
    names = list(inspect_repo(delta("llama").folder).matrices)
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head"
    assert names.index("model.layers.0.mlp.down_proj") < names.index("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("family", ["bert_from_headless", "t5", "gpt2"])
def test_other_architectures(delta, family):
    repo = delta(family)
    report = inspect_repo(repo.folder)
    assert len(report.matrices) == repo.pair.family.packed
    assert report.size.total == weight_bytes(repo.folder)
    assert sum(len(group) for group in report.by_type.values()) == len(report.matrices)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("bert_from_headless", ["0", "1"]),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    ],
)
def test_pictures_tell_layers_apart(delta, family, layers):
    report = inspect_repo(delta(family).folder)
    rows = [label.get_text() for label in error_figure(report).axes[0].get_yticklabels()]
    assert len({*rows}) == len(rows) == len(report.by_type)
    bars = [label.get_text() for label in bytes_figure(report).axes[0].get_xticklabels()]
    assert [bar for bar in bars if bar[-1].isdigit()] == layers
    titles = [axes.get_title() for axes in spectrum_figure(report).axes if axes.get_title()]
    numbered = [title for title in titles if type_and_depth(f".{title}")[1] is not None]
    embeddings = {name for name in report.matrices if type_and_depth(name)[1] is None}
    assert {*titles} - {*numbered} <= embeddings


def test_pictures_of_thousands_of_matrices(delta):
    """As of experts that are modules of their own: the height is bounded, so are the names."""
    report = inspect_repo(delta("llama_tied").folder)
    one = report.matrices["model.layers.0.mlp.up_proj"]
    names = [f"model.layers.{i}.experts.{j}.up_proj" for i in range(8) for j in range(2000)]
    figure = error_figure(replace(report, matrices=dict.fromkeys(names, one)))
    assert figure.axes[0].images[0].get_array().shape == (2000, 8)
    assert len(figure.axes[0].get_yticks()) <= 60 and figure.get_figheight() < 25


def test_a_matrix_that_kept_no_rank_is_listed(delta, copied):
    repo = delta("llama_tied", "deltamix-kl")
    folder = copied(repo.folder)
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / FILE)
    kept = {k: t for k, t in tensors.items() if not k.startswith(name)}
    save_file(kept, folder / FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    settings["dropped"], _ = [name], settings["errors"].pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    whole, report = inspect_repo(repo.folder), inspect_repo(folder)
    matrix = report.matrices[name]
    assert matrix.rank == matrix.bytes == 0 and matrix.shape == (128, 64) and matrix.error is None
    assert report.size.reference == whole.size.reference
    assert len(rank_sizes(report, name)) == 0
    save_figures(report, folder / "plots")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj", ("model.layers.*.mlp.up_proj", 12)),
        ("model.layers.3.experts.7.w1", ("model.layers.*.experts.7.w1", 3)),
        ("lm_head", ("lm_head", None)),
        ("encoder.block.0", ("encoder.block.*", 0)),
    ],
)
def test_type_and_depth(name, expected):
    assert type_and_depth(name) == expected


def test_what_is_no_delta_repo(pair, delta, tmp_path, copied):
    with pytest.raises(DeltaMixError, match="not a delta repo"):
        inspect_repo(pair("llama").tuned)
    with pytest.raises(DeltaMixError, match="cannot find the model"):
        inspect_repo(tmp_path)
    folder = copied(delta("llama").folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForNothing"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaMixError, match="LlamaForNothing"):
        inspect_repo(folder)


def test_damage_is_no_report(delta, copied):
    """What the files hold and the model has not would be missing from the table."""
    folder = copied(delta("llama_tied").folder)
    whole = json.loads((folder / "config.json").read_text())

    def change(settings=None, **values):
        changed = whole | values
        changed["quantization_config"] = whole["quantization_config"] | (settings or {})
        (folder / "config.json").write_text(json.dumps(changed))

    change(num_hidden_layers=1)
    with pytest.raises(DeltaMixError, match=r"the model has no model.layers.1"):
        inspect_repo(folder)
    for name in ("model.nothing", "model.norm"):
        change({"dropped": [name]})
        with pytest.raises(DeltaMixError, match=f"no matrix {name}"):
            inspect_repo(folder)
    change({"errors": dict.fromkeys(whole["quantization_config"]["errors"], float("nan"))})
    report = inspect_repo(folder)
    assert {matrix.error for matrix in report.matrices.values()} == {None}
    error_figure(report)


def test_command_prints_every_layer_and_json(delta, tmp_path):
    repo = delta("llama_tied", "deltamix-kl", calibrated=True)
    report = inspect_repo(repo.folder)
    plain = CliRunner().invoke(app, ["inspect", str(repo.folder)], env={"COLUMNS": "60"})
    assert plain.exit_code == 0
    for name, matrix in report.matrices.items():
        (line,) = (text for text in plain.output.splitlines() if text.split()[:1] == [name])
        assert f"{matrix.rank} of {min(matrix.shape)}" in line and f"{matrix.error:.1e}" in line
        assert all(f" {count}×{v}/{u}" in line for (v, u), count in matrix.widths.items())
    assert f"{report.size.ratio:.5f}" in plain.output and "token ids [8, 32]" in plain.output
    assert f"{report.config.measured['kl']:.2g} nats" in plain.output
    ordered = CliRunner().invoke(app, ["inspect", str(repo.folder), "--sort", "bytes"])
    assert ordered.exit_code == 0
    command = ["inspect", str(repo.folder), "--json", "--plot", str(tmp_path / "plots")]
    found = json.loads(CliRunner().invoke(app, command).output)
    assert found["bytes"]["total"] == weight_bytes(repo.folder)
    widths = found["matrices"]["model.embed_tokens"]["widths"]
    assert sum(count for _, _, count in widths) == report.matrices["model.embed_tokens"].rank
    names = {"allocation.png", "bytes.png", "error.png", "spectrum.png"}
    assert {p.name for p in (tmp_path / "plots").iterdir()} == names


@pytest.mark.untraced
@pytest.mark.parametrize("method", ["deltamix-kl", "delta-come"])
def test_pictures_show_all_of_it(delta, tmp_path, method):
    report = inspect_repo(delta("llama_tied", method).folder)
    for path in save_figures(report, tmp_path / "deep" / "plots"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    heat, bars, _ = allocation_figure(report).axes
    grid = heat.images[0].get_array()
    assert grid.count() == len(report.matrices)  # a cell each, the others are empty
    assert grid.max() == pytest.approx(max(m.bits_per_weight for m in report.matrices.values()))
    assert len(bars.patches) == len(report.by_type) == len(heat.get_yticks())
    drawn = sum(patch.get_height() for patch in bytes_figure(report).axes[0].patches)
    assert drawn == pytest.approx(report.size.total / 1e6)
    errors = error_figure(report).axes[0].images[0].get_array()
    assert errors.max() == pytest.approx(max(report.config.errors.values()))
    panels = [axes for axes in spectrum_figure(report).axes if axes.collections]
    titles = {axes.get_title() for axes in panels}
    assert len(titles) >= 8 and "model.embed_tokens" in titles
    for axes in panels[:8]:
        (points,) = axes.collections
        heights = points.get_offsets()[:, 1]
        assert (heights[:-1] >= heights[1:]).all() and axes.get_yscale() == "log"


def test_pictures_of_a_delta_without_matrices(delta, copied):
    folder = copied(delta("llama_tied").folder)
    tensors = load_file(folder / FILE)
    kept = {k: t for k, t in tensors.items() if ".dm_" not in k}
    save_file(kept, folder / FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["errors"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(save_figures(inspect_repo(Path(folder)), folder / "plots")) == 4


def test_a_whole_model_is_refused_before_its_weights_are_fetched(pair, tmp_path):
    shutil.copy(pair("llama").tuned / "config.json", tmp_path)
    with pytest.raises(DeltaMixError, match="is not a delta repo: it holds a whole model"):
        inspect_repo(tmp_path)
