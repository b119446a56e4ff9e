"""Deltas through the Hub: push, load in a fresh process, pinned base, offline, gated, gone.

The Hub is `local_hub.LocalHub`, a real HTTP server; the client is huggingface_hub as installed.
It reads HF_ENDPOINT when imported, so everything happens in three child processes that run this
file as a script (`author`, `reader`, `offline`) and write down what they saw; the tests below
look at that and at what the server holds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import TOKEN, LocalHub
from tiny_models import TEMPLATE, fine_tune, tiny_llama, tiny_tokenizer

PROMPT = "a delta is small"
RATIO = 1 / 4
WEIGHTS = "model.safetensors"
SHARDS = "200KB"  # the base in several files, as real ones are


# In the child processes


def author(folder: Path) -> dict[str, Any]:
    """Pushes a base and a fine-tune, compresses, pushes deltas in both ways."""
    import torch
    from huggingface_hub import HfApi
    from tiny_pairs import make_config
    from transformers import AutoModelForCausalLM

    from deltamix_hf import DeltaMixConfig

    api = HfApi(token=TOKEN)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, 2).to(torch.bfloat16)
    model.push_to_hub("me/base", token=TOKEN, max_shard_size=SHARDS)
    release = api.model_info("me/base").sha
    api.create_branch("me/base", branch="release")

    fine_tune(model)
    tuned = folder / "tuned"
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    (tuned / "1_Pooling").mkdir()
    (tuned / "1_Pooling" / "config.json").write_text("{}")
    first = api.create_repo("me/tuned") and api.upload_folder(repo_id="me/tuned", folder_path=tuned)
    # The next version of the fine-tune has another chat template: the delta is not made from it.
    api.upload_file(
        repo_id="me/tuned", path_in_repo="chat_template.jinja", path_or_fileobj=b"another"
    )

    # A fine-tune and a base on the Hub, the fine-tune at a revision of its own.
    brief = {"num_samples": 8, "tune_steps": 3}
    settings = make_config("me/base", ratio=RATIO, **brief)
    model = AutoModelForCausalLM.from_pretrained(
        "me/tuned", revision=first.oid, quantization_config=settings
    )
    model.push_to_hub("me/delta", token=TOKEN, commit_message="The delta alone")
    torch.save(logits(model), folder / "logits.pt")

    # A local fine-tune, the base given by branch, saved and pushed in one call; zero points too.
    settings = DeltaMixConfig(
        base_model="me/base", base_revision="release", ratio=RATIO, method="delta-come"
    )
    local = AutoModelForCausalLM.from_pretrained(tuned, quantization_config=settings)
    local.save_pretrained(folder / "saved", push_to_hub=True, repo_id="me/saved", token=TOKEN)

    # The source of the tokenizer has gone by the time of saving; pushed to a branch.
    torch.save(logits(local), folder / "saved.pt")
    shutil.move(tuned, folder / "moved")
    local.save_pretrained(
        folder / "late", push_to_hub=True, repo_id="me/saved", revision="late", token=TOKEN
    )
    return {
        "pushes": pushes(folder, api),
        "release": release,
        "reference_bytes": changed_bytes(folder / "moved", model),
        "generated": generate(model),
    }


def pushes(folder: Path, api: Any) -> dict[str, Any]:
    """Pushes of what was made from local copies: refused, named again, over an earlier repo."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from deltamix_hf import DeltaMixConfig
    from deltamix_hf.hub.push import push_folder

    fetched = Path(snapshot_of("me/base"))
    settings = DeltaMixConfig(base_model=str(fetched), ratio=RATIO, method="delta-come")
    local = AutoModelForCausalLM.from_pretrained(folder / "moved", quantization_config=settings)
    local.save_pretrained(folder / "local")
    seen = {
        "local base": refusal(local.push_to_hub, repo_id="me/local", token=TOKEN),
        "other base": refusal(
            push_folder, folder=folder / "local", repo_id="me/local", base="me/tuned", token=TOKEN
        ),
        "folder as base": refusal(
            push_folder,
            folder=folder / "local",
            repo_id="me/local",
            base=str(fetched),
            token=TOKEN,
        ),
        "no delta": refusal(push_folder, folder=folder / "moved", repo_id="me/local", token=TOKEN),
        "no token": refusal(
            push_folder, folder=folder / "saved", repo_id="me/local", token="hf_wrong"
        ),
        "bad name": refusal(push_folder, folder=folder / "saved", repo_id="a/b/c", token=TOKEN),
    }
    # A repo that holds shards, a card and somebody's file already.
    api.create_repo("me/local")
    for name, content in {
        "README.md": b"---\nlicense: mit\ntags: [poems]\n---\n\nMine, above.\n",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "notes.txt": b"kept",
    }.items():
        api.upload_file(repo_id="me/local", path_in_repo=name, path_or_fileobj=content)
    seen["address"] = push_folder(
        folder / "local", "me/local", base="me/base", token=TOKEN, tags=["sums"]
    )
    card = folder / "card.md"
    card.write_bytes(Path(api.hf_hub_download("me/local", "README.md")).read_bytes() + b"\nBelow.")
    api.upload_file(repo_id="me/local", path_in_repo="README.md", path_or_fileobj=card)
    push_folder(folder / "local", "me/local", base="me/base", token=TOKEN)
    # An adapter on top of a delta goes alone.
    local.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    local.push_to_hub("me/adapter", token=TOKEN)
    return seen


def snapshot_of(repo: str) -> str:
    """A plain folder with the repo's files: not the cache, from whose paths a commit is known."""
    import tempfile

    from huggingface_hub import snapshot_download

    return snapshot_download(repo, local_dir=tempfile.mkdtemp(), token=TOKEN)


def reader(folder: Path) -> dict[str, Any]:
    """Loads from an empty cache, before and after the base moves, is gated and is deleted."""
    import torch
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    api = HfApi(token=TOKEN)
    expected = torch.load(folder / "logits.pt")
    seen: dict[str, Any] = {}

    def same(**kwargs: Any) -> bool:
        return torch.equal(logits(load_delta(**kwargs)), expected)

    seen["empty cache"] = same()
    saved = logits(load_delta(repo="me/saved"))
    seen["saved"] = torch.equal(saved, torch.load(folder / "saved.pt"))
    seen["template"] = AutoTokenizer.from_pretrained("me/delta").chat_template
    generator = pipeline("text-generation", model="me/delta")
    output = generator(PROMPT, max_new_tokens=8, do_sample=False, return_tensors=True)
    seen["pipeline"] = output[0]["generated_token_ids"]

    next_base = AutoModelForCausalLM.from_pretrained(folder / "moved")
    next_base.push_to_hub("me/base", token=TOKEN, max_shard_size=SHARDS)
    seen["base moved"] = same(cache=folder / "cache-moved")
    seen["main instead of the pin"] = refusal(
        load_delta, cache=folder / "cache-moved", base_model="me/base", base_revision="main"
    )

    api.update_repo_settings("me/base", gated="auto")
    seen["gated"] = refusal(load_delta, cache=folder / "cache-gated")
    seen["gated, token"] = same(cache=folder / "cache-gated", token=TOKEN)

    api.delete_repo("me/base")
    seen["base deleted"] = refusal(load_delta, cache=folder / "cache-gone")
    seen["base deleted, cached"] = same()
    return seen


def offline(folder: Path) -> dict[str, Any]:
    """HF_HUB_OFFLINE=1 with the reader's cache."""
    import torch
    from transformers import AutoTokenizer

    model = load_delta()
    model.save_pretrained(folder / "resaved")
    return {
        "logits": torch.equal(logits(model), torch.load(folder / "logits.pt")),
        "template": AutoTokenizer.from_pretrained("me/delta").chat_template,
        "base not cached": refusal(load_delta, base_model="me/elsewhere"),
    }


def changed_bytes(tuned: Path, delta: Any) -> int:
    """bf16 bytes of every tensor of the fine-tune that differs from the base."""
    from safetensors.torch import load_file

    base = {k: v for file in delta.hf_quantizer.base_files for k, v in load_file(file).items()}
    pairs = [(tensor, base[name]) for name, tensor in load_file(tuned / WEIGHTS).items()]
    return sum(2 * tensor.numel() for tensor, before in pairs if not tensor.equal(before))


def load_delta(
    repo: str = "me/delta",
    cache: Path | None = None,
    token: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> Any:
    """A delta of the Hub; with `cache`, delta and base are both fetched into that folder."""
    from transformers import AutoModelForCausalLM

    from deltamix_hf import DeltaMixConfig

    fetch = {"cache_dir": str(cache), "token": token} if cache else {}
    settings = DeltaMixConfig(base_model, base_revision=base_revision, base_kwargs=fetch)
    given = {"quantization_config": settings} if fetch or base_model else {}
    return AutoModelForCausalLM.from_pretrained(repo, cache_dir=cache, **given)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(40)[None] * 6).logits


def generate(model: Any) -> list[int]:
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt")
    return model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()


def refusal(action: Callable[..., Any], **kwargs: Any) -> str:
    """The message of the DeltaMixError that `action` must raise."""
    from deltamix_hf import DeltaMixError

    try:
        action(**kwargs)
    except DeltaMixError as error:
        return str(error)
    return "nothing was raised"


# In pytest's process


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


def run_child(role: str, hub: LocalHub, folder: Path, **env: str) -> dict[str, Any]:
    """Run one of the roles above in a process of its own; returns what it wrote down."""
    result = subprocess.run(
        [sys.executable, __file__, role, str(folder)],
        env={**hub.environment(folder / "home-reader"), **env},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / f"{role}.json").read_text())


@pytest.fixture(scope="module")
def authored(hub: LocalHub, folder: Path) -> dict[str, Any]:
    return run_child("author", hub, folder, HF_HOME=str(folder / "home-author"))


@pytest.fixture(scope="module")
def config(authored: dict[str, Any], hub: LocalHub) -> dict[str, Any]:
    return json.loads(hub.files("me/delta")["config.json"])["quantization_config"]


@pytest.fixture(scope="module")
def read(authored: dict[str, Any], hub: LocalHub, folder: Path) -> dict[str, Any]:
    return run_child("reader", hub, folder)


def test_only_the_small_delta_is_uploaded(authored: dict[str, Any], hub: LocalHub) -> None:
    files = hub.files("me/delta")
    assert [name for name in files if name.endswith((".safetensors", ".bin"))] == [WEIGHTS]
    assert sum(name.endswith(".safetensors") for name in hub.files("me/base")) > 2
    assert len(files[WEIGHTS]) <= RATIO * authored["reference_bytes"]
    assert authored["reference_bytes"] > 500_000  # the bound above says something


def test_config_pins_the_base(
    authored: dict[str, Any], config: dict[str, Any], hub: LocalHub
) -> None:
    assert config["base_model"] == "me/base"
    assert config["base_revision"] == authored["release"]
    assert config["codebook"] == "gaussian"
    saved = json.loads(hub.files("me/saved")["config.json"])["quantization_config"]
    assert saved["base_revision"] == authored["release"]  # was given as a branch
    assert saved["codebook"] == "min-max"
    # The weights are asked for by commit, not by branch: both from one state of the repo.
    assert not [r for r in hub.requests if "/me/base/resolve/release/model" in r]
    assert "base_kwargs" not in config and TOKEN not in json.dumps([config, saved])


def test_tokenizer_travels(authored: dict[str, Any], hub: LocalHub, folder: Path) -> None:
    for repo in ("me/delta", "me/saved"):
        files = hub.files(repo)
        for name in ("tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"):
            assert files[name] == (folder / "moved" / name).read_bytes(), (repo, name)


def test_tokenizer_is_of_the_revision_that_was_compressed(
    authored: dict[str, Any], hub: LocalHub
) -> None:
    assert hub.files("me/delta")["chat_template.jinja"].decode() == TEMPLATE


def test_save_pretrained_can_push(authored: dict[str, Any], hub: LocalHub, folder: Path) -> None:
    pushed = hub.files("me/saved")
    for path in (file for file in (folder / "saved").rglob("*") if file.is_file()):
        name = path.relative_to(folder / "saved").as_posix()
        assert pushed[name] == path.read_bytes(), name


def card_of(hub: LocalHub, repo: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a repo's model card."""
    from huggingface_hub import ModelCard

    card = ModelCard(hub.files(repo)["README.md"].decode())
    return card.data.to_dict(), card.text


def test_model_card_says_what_was_measured(
    authored: dict[str, Any], config: dict[str, Any], hub: LocalHub
) -> None:
    metadata, text = card_of(hub, "me/delta")
    assert metadata["base_model"] == "me/base" and metadata["library_name"] == "transformers"
    assert metadata["base_model_relation"] == "adapter" and "deltamix" in metadata["tags"]
    assert metadata["pipeline_tag"] == "text-generation"
    files = hub.files("me/delta")
    assert f"| all | {len(files[WEIGHTS]) / 1e6:.2f} | 100% |" in text
    ratio = len(files[WEIGHTS]) / authored["reference_bytes"]
    assert f"ratio {ratio:.5f}" in text
    assert f"{config['measured']['kl']:.2g} nats" in text
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == float(f"{config['measured']['kl']:.2g}")
    assert config["calibration_source"] in text and authored["release"] in text
    assert 'AutoModelForCausalLM.from_pretrained("me/delta")' in text
    assert "(allocation.png)" in text and files["allocation.png"].startswith(b"\x89PNG")


def test_pushing_over_a_repo_keeps_what_people_wrote(
    authored: dict[str, Any], hub: LocalHub, folder: Path
) -> None:
    metadata, text = card_of(hub, "me/local")
    assert metadata["license"] == "mit" and {"poems", "sums", "deltamix"} <= set(metadata["tags"])
    assert text.strip().startswith("Mine, above.") and text.strip().endswith("Below.")
    assert text.count("# local") == 1 and text.count("from_pretrained") == 1  # renewed, not added
    files = hub.files("me/local")
    assert "notes.txt" in files  # but no weights that would be read instead of the delta
    assert [f for f in files if f.startswith("model")] == [WEIGHTS]
    assert files[WEIGHTS] == (folder / "local" / WEIGHTS).read_bytes()


def test_base_is_named_and_pinned_when_pushed(
    authored: dict[str, Any], hub: LocalHub, folder: Path
) -> None:
    seen = authored["pushes"]
    assert "local path" in seen["local base"] and "--base" in seen["local base"]
    assert "wrong base" in seen["other base"] and "me/tuned" in seen["other base"]
    assert "is a local folder" in seen["folder as base"]
    pushed = json.loads(hub.files("me/local")["config.json"])["quantization_config"]
    kept = json.loads((folder / "local" / "config.json").read_text())["quantization_config"]
    assert pushed["base_model"] == "me/base" and pushed["base_revision"] == authored["release"]
    assert pushed["base_fingerprints"] == kept["base_fingerprints"]
    assert Path(kept["base_model"]).is_dir()  # the folder itself is as it was
    assert seen["address"].startswith(hub.url) and "me/local" in seen["address"]


def test_refused_pushes_are_one_line_and_make_nothing(authored: dict[str, Any]) -> None:
    seen = authored["pushes"]
    assert "not a delta repo" in seen["no delta"] and "deltamix compress" in seen["no delta"]
    assert "cannot push to 'me/local'" in seen["no token"]
    assert "cannot push to 'a/b/c'" in seen["bad name"]
    assert not any("\n" in seen[name] for name in seen if isinstance(seen[name], str))


def test_an_adapter_on_top_is_pushed_alone(authored: dict[str, Any], hub: LocalHub) -> None:
    files = hub.files("me/adapter")
    assert "adapter_model.safetensors" in files and WEIGHTS not in files


def test_saving_survives_a_lost_tokenizer(
    authored: dict[str, Any], hub: LocalHub, folder: Path
) -> None:
    saved, late = (folder / name / WEIGHTS for name in ("saved", "late"))
    assert late.read_bytes() == saved.read_bytes()
    assert not (folder / "late" / "tokenizer.json").exists()
    assert hub.files("me/saved", "late")[WEIGHTS] == saved.read_bytes()


def test_fresh_process_gives_equal_logits(read: dict[str, Any]) -> None:
    assert read["empty cache"] is True
    assert read["saved"] is True


def test_pipeline_by_hub_id(read: dict[str, Any], authored: dict[str, Any]) -> None:
    assert read["pipeline"] == authored["generated"]
    assert read["template"] == TEMPLATE


def test_base_may_move_on(read: dict[str, Any]) -> None:
    assert read["base moved"] is True
    assert "base" in read["main instead of the pin"]
    assert "\n" not in read["main instead of the pin"]


def test_gated_base_needs_the_token(read: dict[str, Any]) -> None:
    assert "me/base" in read["gated"] and "gated" in read["gated"]
    assert read["gated, token"] is True


def test_missing_base_is_one_clear_error(read: dict[str, Any]) -> None:
    message = read["base deleted"]
    assert "cannot find the base model 'me/base'" in message
    assert "\n" not in message
    assert read["base deleted, cached"] is True


def test_offline_from_the_cache(read: dict[str, Any], hub: LocalHub, folder: Path) -> None:
    before = len(hub.requests)
    seen = run_child("offline", hub, folder, HF_HUB_OFFLINE="1")
    assert seen["logits"] is True and seen["template"] == TEMPLATE
    assert "cannot find the base model 'me/elsewhere'" in seen["base not cached"]
    assert hub.requests[before:] == []
    assert (folder / "resaved" / WEIGHTS).read_bytes() == hub.files("me/delta")[WEIGHTS]
    assert (folder / "resaved" / "tokenizer.json").is_file()


if __name__ == "__main__":
    import deltamix_hf  # noqa: F401  (registers the quantizer)

    role, where = sys.argv[1], Path(sys.argv[2])
    roles = {"author": author, "reader": reader, "offline": offline}
    (where / f"{role}.json").write_text(json.dumps(roles[role](where)))
