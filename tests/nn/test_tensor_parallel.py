"""Delta repos under tensor parallelism: two processes, over gloo, share one model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, inputs_of, logits
from tiny_pairs import DECODER, FAMILIES, fine_tune, make_config, quick, relative
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SCRIPT = Path(__file__).parents[1] / "helpers" / "tensor_parallel_ranks.py"
RANKS = 2


def uneven() -> PreTrainedModel:
    """Sizes that neither two processes nor bytes of eight codes divide."""
    sizes = {"vocab_size": 251, "intermediate_size": 101, "hidden_size": 72, "head_dim": 18}
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, **sizes}))


# name -> how to build the base, options of compression, tokens of the fine-tune if others
CASES: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    **{
        name: (a.build, a.budget, None)
        for name, a in ARCHITECTURES.items()
        if name not in ("bert", "bert_from_headless", "t5", "whisper")  # no plan, as gpt2
    },
    "min_max": (FAMILIES["llama"].build, {"method": "deltamix", "ratio": 0.3}, None),
    "min_max_tied": (FAMILIES["llama_tied"].build, {"method": "delta-come", "ratio": 0.3}, None),
    "own_plan": (ARCHITECTURES["gpt_neox"].build, {"ratio": 0.3}, None),
    "by_columns": (FAMILIES["llama"].build, {"ratio": 0.3}, None),
    "uneven": (uneven, {"ratio": 0.3}, None),
    "uneven_min_max": (uneven, {"method": "delta-come", "ratio": 0.3}, None),
    "more_tokens": (FAMILIES["llama"].build, {"ratio": 0.35}, 261),
    "fewer_tokens": (FAMILIES["llama_tied"].build, {"ratio": 0.35}, 200),
}
PLANS = {  # beside or in place of the model's own rules
    "own_plan": {"gpt_neox.embed_in": "embedding_rowwise"},
    "by_columns": {"model.embed_tokens": "embedding_colwise"},
}


def make(folder: Path, build: Any, options: dict[str, Any], tokens: int | None) -> str:
    """Base, fine-tune and delta in `folder`; the name of their class."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder / "base")
    if tokens is not None:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    fine_tune(model)
    model.save_pretrained(folder / "tuned")
    options = {**quick(options.get("method", "deltamix-kl")), **options}
    config = make_config(folder / "base", **options)
    type(model).from_pretrained(folder / "tuned", quantization_config=config).save_pretrained(
        folder / "delta"
    )
    return type(model).__name__


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict[str, str], list[dict[str, Any]]]:
    """The folder of all cases, their classes, and what each process found."""
    root = tmp_path_factory.mktemp("ranks")
    classes = {name: make(root / name, *case) for name, case in CASES.items()}
    cases = {name: (classes[name], PLANS.get(name, "auto")) for name in CASES}
    (root / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [open(root / f"rank{rank}.txt", "w+") for rank in range(RANKS)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(root)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=logs[rank],
        )
        for rank in range(RANKS)
    ]
    end = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                break  # the others would wait for it for ever
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.seek(0)
    assert [process.returncode for process in processes] == [0, 0], "".join(
        log.read()[-3000:] for log in logs
    )
    return root, classes, [torch.load(root / f"rank{rank}.pt") for rank in range(RANKS)]


def alone(ran, name: str) -> PreTrainedModel:
    """The delta repo in a single process."""
    import transformers

    root, classes, _ = ran
    return getattr(transformers, classes[name]).from_pretrained(root / name / "delta")


@pytest.fixture(params=CASES)
def case(request, ran) -> tuple[str, list[dict[str, Any]]]:
    found = [results[request.param] for results in ran[2]]
    if "cannot" in found[0]:
        pytest.skip(f"transformers cannot shard the dense model: {found[0]['cannot']}")
    return request.param, found


def test_logits_are_those_of_one_process(ran, case):
    name, found = case
    expected = logits(alone(ran, name))
    for result in found:
        assert relative(result["logits"], expected) < 1e-5
        assert relative(result["logits_with_grad"], expected) < 1e-5
        assert relative(result["dense"], expected) > 1e-3  # which is the fine-tune's


def test_generated_tokens_are_those_of_one_process(ran, case):
    name, found = case
    if "generated" not in found[0]:
        pytest.skip("generates from sound, which is not tried")
    model = alone(ran, name)
    expected = model.generate(**inputs_of(model), max_new_tokens=4, do_sample=False)
    for result in found:
        assert torch.equal(result["generated"], expected)


def test_what_is_saved_is_the_same_repo(ran, case):
    name, found = case
    root = ran[0]
    for file in ("config.json", "model.safetensors"):
        expected = (root / name / "delta" / file).read_bytes()
        assert (root / name / "again" / file).read_bytes() == expected
    assert all(result["saved"] == found[0]["saved"] for result in found)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "min_max", *PLANS])
def test_each_process_holds_a_part(ran, name):
    """Half of U where it holds half the weight's rows, half of V where half its columns."""
    modules = dict(alone(ran, name).named_modules())
    if "cannot" in ran[2][0][name]:
        pytest.skip(f"transformers cannot shard the dense model: {ran[2][0][name]['cannot']}")
    for results in ran[2]:
        for module, (rows, columns, v, u) in results[name]["sizes"].items():
            m, n = modules[module].weight.shape
            whole_v, whole_u = modules[module].dm_v.numel(), modules[module].dm_u.numel()
            assert (2 * rows == m) == (2 * u == whole_u), module
            assert (2 * columns == n) == (2 * v == whole_v), module
            by_columns = name == "by_columns" and module == "model.embed_tokens"
            if module.endswith(("o_proj", "down_proj")) or by_columns:
                assert 2 * columns == n and rows == m
            elif module.endswith(("q_proj", "up_proj", "lm_head", "embed_in")):
                assert 2 * rows == m and columns == n


def test_without_a_plan_transformers_says_so(ran):
    """GPT-2 and others have none: the delta repo gets the words that the dense model gets."""
    without = [r for r in ran[2][0].values() if "cannot" in r and "no `tp_plan`" in r["cannot"]]
    if not without:
        pytest.skip("this transformers loads models without a plan whole in every process")
    for result in without:
        assert result["refused"] == result["cannot"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("compress", "compressing needs the whole fine-tune in one process"),
        ("resized", "model.embed_tokens has other rows than the base's"),
        ("dequantize on load", "merge it in one process"),
        ("fsdp", "cannot be loaded with fsdp_size above 1"),
        ("dequantize", "cannot be merged with the delta"),
        ("cache_merged", "cannot be merged with the delta"),
        ("load_delta", "cannot take several deltas in"),
        ("push", "'deltamix push folder'"),
        ("save and push", "'deltamix push folder'"),
    ],
)
def test_what_cannot_be_done_is_refused(ran, what, message):
    for results in ran[2]:
        assert message in results["refusals"][what]
