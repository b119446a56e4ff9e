"""What tenants can do to each other through their deltas: vLLM's engine in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Deltas
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.utils import AutoWeightsLoader

from deltamix_hf import DeltaMixError
from deltamix_hf.checkpoint.delta_repo import StoredDelta, find_delta
from deltamix_hf.storage.headers import fingerprints, read_headers
from deltamix_hf.vllm.beside import build
from deltamix_hf.vllm.loader import BaseRepo
from deltamix_hf.vllm.manager import VllmDeltaManager

NORM = "model.norm.weight"
EMPTY: Any = SimpleNamespace(changes=lambda delta: list(delta.overlay.items()))


class Engine:
    """A base with room for two deltas on its device, and a prefix cache."""

    def __init__(self, base: Path):
        options: dict[str, Any] = {"max_model_len": 128, "block_size": 32, "max_num_seqs": 8}
        options |= {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2}
        options |= {"skip_tokenizer_init": True, "enable_prefix_caching": True}
        self.llm = LLM(
            str(base), quantization="deltamix", enforce_eager=True, dtype="float32", **options
        )
        executor: Any = self.llm.llm_engine.model_executor
        self.runner = executor.driver_worker.worker.model_runner
        self.manager: VllmDeltaManager = self.runner.lora_manager

    def add(self, name: str, number: int, path: Path, inplace: bool = False) -> LoRARequest:
        request = LoRARequest(name, number, str(path), load_inplace=inplace)
        assert self.manager.add_adapter(request)
        return request

    def answer(self, request: LoRARequest | None, prompts: list[list[int]]) -> list[list[int]]:
        """Sixteen greedy tokens after each prompt."""
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self.llm.generate(
            asked, SamplingParams(detokenize=False, **options), lora_request=request, use_tqdm=False
        )
        return [list(each.outputs[0].token_ids) for each in found]


@pytest.fixture(scope="module")
def started(deltas: Deltas) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield Engine(deltas.root / "base")


@pytest.fixture
def engine(started: Engine) -> Iterator[Engine]:
    yield started
    started.manager.remove_all_adapters()
    started.manager._contents.clear()
    started.llm.reset_prefix_cache()


def edited(repo: Path, folder: Path, changes: dict[str, Tensor]) -> Path:
    """A copy of a delta repo with other whole tensors, and sound otherwise."""
    shutil.copytree(repo, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    assert changes.keys() <= tensors.keys()
    save_file(tensors | changes, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    recorded = fingerprints(read_headers([str(file)]))
    config["quantization_config"]["tensor_fingerprints"] = recorded
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def first(deltas: Deltas, name: str) -> list[list[int]]:
    return [tokens[:16] for tokens in deltas.continued(name)]


# What is put beside a model


class Odd(nn.Module):
    """A model with parts that cannot differ by row, which vLLM's loader fills."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.factor = nn.Parameter(torch.ones(()), requires_grad=False)
        self.table = nn.Parameter(torch.ones(3, 4), requires_grad=False)
        self.table.weight_loader = lambda own, row: own.data[1].copy_(row)  # type: ignore[attr-defined]
        self.norm = nn.LayerNorm(4, bias=False, dtype=torch.bfloat16)

    def load_weights(self, weights: Any) -> set[str]:
        return AutoWeightsLoader(self, ignore_unexpected_prefixes=["gone"]).load_weights(weights)


def built(name: str, value: Tensor) -> tuple[Odd, dict[str, Tensor], Any]:
    model = Odd()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        found: Any = build(model, EMPTY, StoredDelta({}, {name: value}, {}, "x"), 0, "")
    except DeltaMixError as error:
        found = str(error)
    return model, before, found


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("scale", torch.full((1,), 0.5), "changes scale of a Odd, which cannot differ"),
        ("factor", torch.tensor(0.5), "changes factor of a Odd, which cannot differ"),
        ("table", torch.full((4,), 0.5), "changes table of a Odd, which cannot differ"),
        ("gone", torch.ones(4), "gone of 'x' has no place in vLLM's Odd"),
        ("norm.weight", torch.full((4,), 3.4028234e38), "norm.weight of the delta repo holds NaN"),
    ],
)
def test_what_cannot_lie_beside_a_base_is_refused_and_leaves_it(name, value, refusal):
    model, before, found = built(name, value)
    assert refusal in found
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_what_can_leaves_it_too():
    model, before, found = built("norm.weight", torch.full((4,), 2.0))
    assert [value.tolist() for _, _, value in found.norms] == [[2.0] * 4]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_whole_tensors_are_finite_in_the_dtype_that_is_served(deltas, tmp_path):
    value = torch.full((64,), 3.4028234e38)
    repo = edited(deltas.root / "a", tmp_path / "x", {NORM: value})
    files, settings, _ = find_delta(str(repo), {})
    base = deltas.root / "base"
    for dtype, refused in ((torch.float32, False), (torch.bfloat16, True)):
        config = SimpleNamespace(dtype=dtype, hf_config=AutoConfig.from_pretrained(base))
        reader = BaseRepo([str(base / "model.safetensors")], config, str(base))
        if refused:
            with pytest.raises(DeltaMixError, match=r"infinite in the model's torch\.bfloat16"):
                reader.read(str(repo), files, settings)
        else:
            reader.read(str(repo), files, settings)


# One tenant and the others


def test_a_refusal_changes_nothing(deltas, engine, monkeypatch):
    a = engine.add("a", 1, deltas.root / "a")
    engine.add("b", 2, deltas.root / "b")
    plain = engine.manager.base.changes

    def odd(delta: StoredDelta) -> Any:  # as if the last of its tensors had no place
        return [*plain(delta), ("model.layers.0.mlp.odd", torch.ones(4))]

    monkeypatch.setattr(engine.manager.base, "changes", odd)
    for number, name in ((3, "c"), (1, "a")):
        with pytest.raises(DeltaMixError, match=r"odd of .* has no place in vLLM's Llama"):
            engine.add(name, number, deltas.root / "b", inplace=True)
        assert list(engine.manager.names) == [1, 2]
    monkeypatch.undo()
    engine.add("c", 3, deltas.root / "b")  # nor is it remembered
    assert engine.answer(a, PROMPTS) == first(deltas, "a")


def test_what_was_accepted_outlives_its_folder(deltas, engine, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "x")
    x = engine.add("x", 1, repo)
    for number, name in ((2, "a"), (3, "b")):
        engine.add(name, number, deltas.root / name)
    assert list(engine.manager.names) == [2, 3]
    (repo / "config.json").write_text("{}")
    assert engine.answer(x, PROMPTS) == first(deltas, "a")
    shutil.rmtree(repo)
    engine.manager.pin_adapter(2)
    engine.manager.pin_adapter(3)  # even then there is room for what a request names
    assert engine.answer(x, PROMPTS) == first(deltas, "a")
    assert engine.add("x", 1, repo)


def test_host_memory_is_bounded_and_the_same_contents_are_held_once(deltas, engine, monkeypatch):
    a = engine.add("a", 1, deltas.root / "a")
    held = engine.manager.accepted[1].beside.nbytes
    monkeypatch.setattr(engine.manager, "room", held)
    with pytest.raises(DeltaMixError, match="host memory would take"):
        engine.add("b", 2, deltas.root / "b")
    again = engine.add("again", 3, deltas.root / "a")
    assert engine.answer(again, PROMPTS) == engine.answer(a, PROMPTS) == first(deltas, "a")
    assert engine.manager.remove_adapter(1) and engine.manager.remove_adapter(3)
    monkeypatch.setattr(engine.manager, "room", 10 * held)
    b = engine.add("b", 2, deltas.root / "b")
    assert engine.answer(b, PROMPTS) == first(deltas, "b")


@pytest.mark.parametrize(
    ("name", "value"), [("input_layernorm", 1e30), ("post_attention_layernorm", 3e38)]
)
def test_no_overflow_stays_in_the_kv_cache(deltas, engine, tmp_path, name, value):
    norm = {f"model.layers.0.{name}.weight": torch.full((64,), value)}
    repo = edited(deltas.root / "a", tmp_path / "loud", norm)
    engine.answer(engine.add("loud", 1, repo), PROMPTS)
    assert all(torch.isfinite(kept).all() for kept in engine.runner.kv_caches)
    assert engine.answer(None, PROMPTS) == first(deltas, "base")
    assert engine.answer(engine.add("b", 2, deltas.root / "b"), PROMPTS) == first(deltas, "b")


def test_a_number_in_use_keeps_its_name_and_path(deltas, engine):
    a = engine.add("a", 1, deltas.root / "a")
    for name, path in (("b", "b"), ("b", "a"), ("a", "b")):
        with pytest.raises(DeltaMixError, match=r"delta 1 is 'a' from .*give each its own number"):
            engine.add(name, 1, deltas.root / path)
        with pytest.raises(DeltaMixError, match="delta 1 is 'a' from"):
            engine.manager.set_active_adapters({LoRARequest(name, 1, str(path))}, None)
    assert engine.answer(a, PROMPTS) == first(deltas, "a")


def test_other_contents_in_place_while_the_prefix_cache_is_on(deltas, engine, tmp_path):
    repo = shutil.copytree(deltas.root / "a", tmp_path / "x")
    a = engine.add("a", 1, repo)
    with pytest.raises(DeltaMixError, match="is not what delta 1 was"):
        engine.add("a", 1, deltas.root / "b", inplace=True)
    moved = engine.add("a", 1, deltas.root / "a", inplace=True)  # the same from elsewhere
    for request in (a, moved):  # a request may be running
        assert engine.answer(request, PROMPTS) == first(deltas, "a")
    engine.manager.remove_adapter(1)
    with pytest.raises(DeltaMixError, match="is not what delta 1 was"):
        engine.add("b", 1, deltas.root / "b")


def test_numbers_of_a_batch_are_loaded_or_refused(deltas, engine):
    requests = [LoRARequest("a", number, str(deltas.root / "a")) for number in (1, 2)]
    for request in requests:
        engine.manager.add_adapter(request)
    engine.add("b", 3, deltas.root / "b")
    assert list(engine.manager.names) == [2, 3]
    mapping = SimpleNamespace(index_mapping=(1, 1, 2), prompt_mapping=(1, 2))
    engine.manager.set_active_adapters({*requests}, mapping)  # a set: equal by name
    assert set(engine.manager.names) == {1, 2}
    for numbers in (((1, 77), (1,)), ((1, 1), (77,))):
        mapping = SimpleNamespace(index_mapping=numbers[0], prompt_mapping=numbers[1])
        with pytest.raises(DeltaMixError, match="names delta 77, which is not loaded"):
            engine.manager.set_active_adapters({requests[0]}, mapping)


def test_a_dummy_run_forgets_no_delta(deltas, engine):
    engine.add("a", 1, deltas.root / "a")
    engine.manager.add_dummy_lora(LoRARequest("warmup_2", 2, "/not/a/real/path"), 8)
    engine.manager.remove_all_adapters()
    assert engine.manager.list_adapters() == {1}


def test_prompts_of_embeddings_are_refused():
    mode = SimpleNamespace(name="NONE")
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode, cudagraph_mode=mode),
        model_config=SimpleNamespace(enable_prompt_embeds=True),
    )
    with pytest.raises(DeltaMixError, match="leave out --enable-prompt-embeds"):
        VllmDeltaManager(config, torch.device("cpu"))
