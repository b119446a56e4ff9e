"""A mutation fuzzer: whatever is done to the files of a delta repo, it loads or is refused.

Real repos, whole and in shards, on both codebooks, are changed a little: bits and blocks of any
file, entries of headers, values of config.json and of the index, words of packed tensors. The real
readers then either raise `DeltaMixError` or give factors that decode to finite numbers of the right
shape. Anything else, a run of seconds or an allocation of gigabytes included, is a finding.

    python tests/attacks/test_fuzz.py --count 100000 --seed 0

Every run is known by its number: `--start N --count 1` repeats one and shows its error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before transformers is imported: a base may be named by any Hub id.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hostile import edit_settings
from limits import little_room
from mutations import mutated
from tiny_pairs import Pair, make_pair, quick, token_ids

from deltamix_hf import DeltaMixError, DeltaMixHfQuantizer
from deltamix_hf.checkpoint.base import BaseCheckpoint, KeyMap, resolve_base
from deltamix_hf.checkpoint.delta_repo import check_finite, find_delta, read_delta
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.storage.headers import TensorInfo, check_base, fingerprints
from deltamix_hf.storage.sizes import size_report

REPOS = [("llama", "delta-come", None), ("llama_tied", "deltamix-kl", "40KB")]  # and shard size
LONGEST = 5.0  # seconds of one run; a sound one takes 0.02
ROOM = 2 << 30  # bytes of address space beyond what the process has
CI_COUNT, CI_LOADS = 1000, 200

# The readers


@dataclass(frozen=True)
class Target:
    """A delta repo in memory and what reading it needs: the names of its model, its base."""

    pair: Pair
    folder: Path
    files: dict[str, bytes]
    keys: KeyMap
    base: dict[str, TensorInfo]
    hashes: dict[str, str]
    sound: dict[str, PackedDelta]

    @contextmanager
    def holding(self, name: str, content: bytes) -> Iterator[None]:
        """Within, the repo's folder has this file with another content."""
        path = self.folder / name
        path.write_bytes(content)
        try:
            yield
        finally:
            path.write_bytes(self.files[name])


def make_target(pair: Pair, folder: Path, work: Path) -> Target:
    """`folder`: a sound delta repo, copied to `work`."""
    shutil.copytree(folder, work)
    if pair.name == REPOS[0][0]:  # else most changes of weights are refused by their SHA-256 alone
        edit_settings(work, tensor_fingerprints=None)
    model = pair.load(pair.base)
    base_files, _ = resolve_base(str(pair.base), None, {})
    base = BaseCheckpoint(base_files, model).infos
    kept = {"config.json", "model.safetensors.index.json"}
    files = {
        path.name: path.read_bytes()
        for path in sorted(work.iterdir())
        if path.name in kept or path.suffix == ".safetensors"
    }
    target = Target(pair, work, files, KeyMap(model), base, fingerprints(base), {})
    stored, _ = read_everything(target)
    target.sound.update(stored.packed)
    return target


def read_everything(target: Target) -> tuple[Any, Any]:
    """Every reader in turn, as `load_delta`, `inspect` and `verify` use them, and decoding."""
    files, config, _ = find_delta(str(target.folder), {})
    report = size_report(target.folder, {n: (p.m, p.n) for n, p in target.sound.items()})
    check_base(
        config.base_fingerprints,
        target.base,
        "it",
        lambda infos: {k: target.hashes[k] for k in infos},
    )
    stored = read_delta("it", files, config, target.keys)
    for name, packed in stored.packed.items():
        if unchanged(packed, target.sound.get(name)):
            continue
        m, n = target.keys.state[f"{name}.weight"].shape
        left, right = packed.left(), packed.right()
        assert left.shape == (packed.rank, m) and right.shape == (packed.rank, n), name
        assert bool(torch.isfinite(left.T @ right).all()), name
    for name, value in stored.overlay.items():
        assert value.shape == target.keys.state[name].shape, name
        check_finite(name, value)
    assert report.total > 0
    json.dumps(config.to_dict())
    repr(config)
    return stored, config


def unchanged(packed: PackedDelta, sound: PackedDelta | None) -> bool:
    """Whether it is known to decode already: most runs change one matrix at most."""
    if sound is None or packed.tensors.keys() != sound.tensors.keys():
        return False
    layout, known = ((p.m, p.n, p.runs, p.group_sizes) for p in (packed, sound))
    return layout == known and all(
        torch.equal(tensor, sound.tensors[part]) for part, tensor in packed.tensors.items()
    )


def load_whole(target: Target) -> None:
    """All of `from_pretrained`, a forward pass included."""
    model = target.pair.load(target.folder)
    with torch.no_grad():
        found = model(token_ids(1, 4)).logits
    assert found.shape == (1, 4, model.config.vocab_size)


# Running


@dataclass
class Outcome:
    """What became of many runs; `crashes`: where -> first run's number and error."""

    count: int = 0
    seconds: float = 0.0
    loaded: int = 0
    refused: int = 0
    slowest: float = 0.0
    crashes: dict[str, tuple[int, str]] = field(default_factory=dict)
    crashed: Counter[str] = field(default_factory=Counter)
    before_us: Counter[str] = field(default_factory=Counter)  # by type, in transformers alone

    def __str__(self) -> str:
        lines = [
            f"{self.count:,} runs in {self.seconds:.0f} s: {self.refused:,} refused, "
            f"{self.loaded:,} loaded and decoded, {sum(self.before_us.values()):,} refused by "
            f"transformers before it asked us {dict(self.before_us)}, "
            f"{sum(self.crashed.values())} crashes in {len(self.crashes)} places; the slowest "
            f"took {self.slowest:.2f} s"
        ]
        for where, (number, error) in self.crashes.items():
            lines.append(f"\nrun {number}, {self.crashed[where]} times:\n{error}")
        return "\n".join(lines)


def fuzz(
    targets: list[Target],
    count: int,
    seed: int = 0,
    start: int = 0,
    action: Callable[[Target], Any] = read_everything,
    shown: Callable[[Any], Any] = iter,
    found: Callable[[Outcome], object] = bool,
) -> Outcome:
    """`count` runs from number `start`; each depends on its number and the seed alone.

    `shown` wraps the numbers in a progress bar; `found` is told of every crash.
    """
    outcome = Outcome()
    began = time.perf_counter()
    for number in shown(range(start, start + count)):
        outcome.seconds = time.perf_counter() - began
        rng = random.Random(f"{seed} {number}")
        target = rng.choice(targets)
        name, content = mutated(target.files, rng, ours=action is load_whole)
        at, error = time.perf_counter(), None
        with target.holding(name, content), little_room(ROOM), entered() as ours:
            try:
                action(target)
                outcome.loaded += 1
            except DeltaMixError as refusal:
                message = str(refusal)
                outcome.refused += 1
                if not message.isprintable() or len(message) > 2000:
                    error = f"a message that is not one readable line: {message[:200]!r}"
            except Exception as other:
                frames = traceback.extract_tb(other.__traceback__)
                through = "registration.py"  # every `from_pretrained` does
                ours_too = (f for f in frames if not f.filename.endswith(through))
                inside = any("deltamix_hf" in frame.filename for frame in ours_too)
                if ours or inside or action is read_everything:
                    error = "".join(traceback.format_exception(other))[-3000:]
                else:
                    outcome.before_us[type(other).__name__] += 1
        took = time.perf_counter() - at
        outcome.slowest = max(outcome.slowest, took)
        if took > LONGEST:
            error = f"{took:.1f} s for {name}"
        if error is not None:
            where = error.strip().splitlines()[-1][:60] + "".join(error.splitlines()[-3:-1])[:120]
            outcome.crashed[where] += 1
            outcome.crashes.setdefault(where, (number, f"{target.pair.name} {name}\n{error}"))
            found(outcome)
        outcome.count += 1
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextmanager
def entered() -> Iterator[list[str]]:
    """A list that is filled once transformers has handed over to our quantizer."""
    seen: list[str] = []
    plain = DeltaMixHfQuantizer._process_model_before_weight_loading

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append("before")
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaMixHfQuantizer, "_process_model_before_weight_loading", hook)
        yield seen


@pytest.fixture(scope="module")
def targets(delta, tmp_path_factory) -> list[Target]:
    made = []
    for name, method, shards in REPOS:
        repo = delta(name, method)
        folder = repo.folder
        if shards:
            folder = tmp_path_factory.mktemp("shards") / "repo"
            repo.pair.load(repo.folder).save_pretrained(folder, max_shard_size=shards)
        made.append(make_target(repo.pair, folder, tmp_path_factory.mktemp("fuzz") / "repo"))
    return made


def test_what_the_fuzzer_starts_from_is_sound(targets):
    for target in targets:
        stored, _ = read_everything(target)
        assert stored.packed and stored.overlay
        load_whole(target)
    assert len(targets[1].files) == 4  # config.json, index and two shards


def test_the_fuzzer_sees_a_crash(targets, monkeypatch):
    """A reader that trips over everything: it must not look like a refusal."""

    def trip(target: Target) -> None:
        raise KeyError("weight_map")

    assert sum(fuzz(targets, 5, action=trip).crashed.values()) == 0  # not ours: transformers'
    monkeypatch.setattr(sys.modules[__name__], "read_everything", trip)
    assert sum(fuzz(targets, 5, action=trip).crashed.values()) == 5


@pytest.mark.untraced
def test_files_changed_at_random(targets):
    outcome = fuzz(targets, CI_COUNT)
    assert not outcome.crashes, str(outcome)
    assert outcome.refused > CI_COUNT // 3 and outcome.loaded > CI_COUNT // 50


@pytest.mark.untraced
def test_files_changed_at_random_and_loaded_whole(targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = fuzz(targets, CI_LOADS, seed=1, action=load_whole)
    assert not outcome.crashes, str(outcome)
    assert outcome.refused > CI_LOADS // 4


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument(
        "--whole", action="store_true", help="all of from_pretrained: 20 times as slow"
    )
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        root = Path(place)
        targets = []
        for name, method, shards in REPOS:
            pair = make_pair(name, root / name)
            folder = root / f"{name}-delta"
            options = {"max_shard_size": shards} if shards else {}
            pair.compress(method=method, **quick(method)).save_pretrained(folder, **options)
            targets.append(make_target(pair, folder, root / f"{name}-fuzz"))
        outcome = fuzz(
            targets,
            arguments.count,
            arguments.seed,
            arguments.start,
            load_whole if arguments.whole else read_everything,
            lambda numbers: tqdm(numbers, unit="run", mininterval=2),
            lambda outcome: tqdm.write(str(outcome), sys.stderr),
        )
    print(outcome)
    sys.exit(bool(outcome.crashes))


if __name__ == "__main__":
    main()
