"""Power cuts at any file operation: the old delta or the new one, or a refusal, and a resume."""

from __future__ import annotations

import os
import random
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from power_cut import run_until_cut
from tiny_pairs import Pair, make_tokenizer, snapshot

from deltamix_hf import DeltaMixError
from deltamix_hf.integration.compress_repo import compress_streaming
from deltamix_hf.storage import durable


def content(folder: Path) -> dict[str, bytes]:
    """What counts: no weights beside those that are read."""
    found = snapshot(folder) if folder.exists() else {}
    whole = "model.safetensors" in found
    return {
        name: data
        for name, data in found.items()
        if not (whole and name.startswith("model") and name != "model.safetensors")
        and not name.endswith(".probe")
    }


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a delta", "a delta in shards"])
def test_a_power_cut_while_saving(pair, delta, tmp_path, before):
    source, root = pair("llama_tied"), tmp_path / "disk"
    made = shutil.copytree(delta("llama_tied", "deltamix-kl").folder, tmp_path / "made")
    make_tokenizer().save_pretrained(made)
    model, output = source.load(made), root / "folder" / "out"
    earlier = tmp_path / "earlier"
    if "delta" in before:
        shards = {"max_shard_size": "30KB"} if "shards" in before else {}
        source.load(delta("llama_tied").folder).save_pretrained(earlier, **shards)
        make_tokenizer().save_pretrained(earlier)
        name = earlier / "tokenizer.json"
        name.write_text(name.read_text().replace('"w9"', '"old"'))

    def begin(cut: int | None, share: float | None = None) -> int:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if earlier.exists():
            shutil.copytree(earlier, output)
        elif before == "an empty folder":
            output.mkdir(parents=True)
        save = partial(model.save_pretrained, output)
        return run_until_cut(root, save, cut, cut or 0, share).operations

    operations, old = begin(None), content(earlier)
    expected = content(output)
    assert expected["tokenizer.json"] != old.get("tokenizer.json")
    first = operations * 2 // 3  # files are renamed from here on
    late = product(range(first, operations), (None, 1.0))
    for cut, share in [(0, None), (first // 2, None), *late, (operations, 0.0)]:
        begin(cut, share)
        left = content(output)
        if cut == operations:
            assert left == expected  # the call had returned
        elif left not in (old, expected):
            with pytest.raises((DeltaMixError, OSError)):
                source.load(output)
        model.save_pretrained(output)
        assert content(output) == expected, cut


def compress(pair: Pair, root: Path, kind: str) -> None:
    place = {"checkpoint_dir": root / "new" / "work", "method": "deltamix-kl"}
    options = {**place, "num_samples": 2, "tune_steps": 2}
    output = root / "new" / "out"
    if kind == "streaming":
        compress_streaming(pair.tuned, output, pair.config(**options))
    else:
        pair.compress(**options).save_pretrained(output)


CUTS = [(0.3, 0), (0.7, 1), (0.88, 2), (0.95, 3)]


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        ("streaming", len(CUTS)),
        pytest.param("streaming", 50, marks=pytest.mark.slow),
        pytest.param("in memory", 50, marks=pytest.mark.slow),
    ],
)
def test_a_power_cut_while_compressing(pair, tmp_path, kind, cuts):
    root, output = tmp_path / "disk", tmp_path / "disk" / "new" / "out"
    source, numbers = pair("llama_tied"), random.Random(cuts)
    root.mkdir()
    operations = run_until_cut(root, lambda: compress(source, root, kind), None).operations
    expected = snapshot(output)
    more = [(numbers.random(), i) for i in range(len(CUTS), cuts)]
    for share, seed in [*CUTS, *more]:
        shutil.rmtree(root)
        root.mkdir()
        cut = round(share * operations)
        run_until_cut(root, lambda: compress(source, root, kind), cut, seed)
        assert not output.exists() or snapshot(output) == expected
        compress(source, root, kind)
        assert snapshot(output) == expected, cut
        assert not (root / "new" / "work").exists()


def test_a_new_folder_is_synced_with_those_above_it(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync", synced.append)
    durable.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    durable.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2 and os.listdir(tmp_path / "a") == ["b"]


def test_a_link_that_leads_nowhere_is_refused_at_once(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(DeltaMixError, match="a link that leads nowhere"):
        durable.check_output(tmp_path / "out")
