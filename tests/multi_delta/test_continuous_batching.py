"""Continuous batching: each request's tokens are those its delta alone would give."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from many_deltas import CLOSE, NAMES, Family, loaded
from tiny_pairs import token_ids
from torch import nn
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta import continuous_batching as continuous
from deltamix_hf.multi_delta.layers import make_routed
from deltamix_hf.multi_delta.routing import PackedRoute, Router
from deltamix_hf.multi_delta.row_layout import EACH

NEW = 6  # tokens a request writes
BLOCK = 4  # tokens of a block of the cache


@pytest.fixture(scope="module")
def family(make_family) -> Family:
    return make_family("llama")


@pytest.fixture
def model(family):
    return loaded(family)


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    """Of 3, 10, 17, 5, ... tokens."""
    ids = token_ids(count, 18, seed).tolist()
    return [row[: 3 + 7 * i % 16] for i, row in enumerate(ids)]


def options(sequences: int = 1, **more: Any) -> dict[str, Any]:
    """Few tokens a step and small blocks; no text ends early."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    config.num_return_sequences = sequences  # refused with greedy decoding, which is exact
    page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    sizes = {page: BLOCK, "num_blocks": 64, "max_batch_tokens": 16, "return_logprobs": True}
    return {
        "generation_config": config,
        "continuous_batching_config": ContinuousBatchingConfig(**{**sizes, **more}),
    }


class Alone:
    """What each delta's own model would write."""

    def __init__(self, family: Family):
        folders = {None: family.pair.base, **family.repos}
        self.models = {name: family.pair.load(folder) for name, folder in folders.items()}

    def check(self, results: Any, inputs: Sequence[list[int]], names: Sequence[str | None]) -> None:
        """Tokens and their log-probabilities of every request."""
        assert len(results) == len(inputs) == len(names)
        for result, ids, name in zip(results, inputs, names, strict=True):
            assert result.error is None
            self.check_one(result, ids, self.models[name])

    @torch.no_grad()
    def check_one(self, result: Any, ids: list[int], model: PreTrainedModel) -> None:
        row, config = torch.tensor([ids]), options()["generation_config"]
        written = model.generate(row, attention_mask=torch.ones_like(row), generation_config=config)
        assert written[0, len(ids) :].tolist() == result.generated_tokens
        every = model(written).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = every.gather(1, written[0, len(ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, **CLOSE)


@pytest.fixture(scope="module")
def alone(family) -> Alone:
    return Alone(family)


@pytest.fixture
def matched(monkeypatch) -> list[int]:
    """Tokens that each request found in the cache, as requests are looked up."""
    found: list[int] = []
    plain = PagedAttentionCache.search_prefix_match

    def watched(self: Any, request_id: str, ids: list[int]) -> int:
        found.append(plain(self, request_id, ids))
        return found[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", watched)
    return found


def assert_nothing_held(model: PreTrainedModel) -> None:
    deadline = time.time() + 10
    while any(e.users for e in model.dm_deltas.pool.entries.values()) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(entry.users for entry in model.dm_deltas.pool.entries.values())


@pytest.mark.untraced
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_every_request_is_what_its_delta_gives_alone(name, make_family):
    """More requests and tokens than fit in a step, so prompts are split and steps are mixed."""
    family = make_family(name)
    model, alone, inputs = loaded(family), Alone(family), prompts(11)
    names = ["one", None, "three", "two", "one", "two", None, "two", "three", "three", "__base__"]
    for scheduler in ("fifo", "prefill_first"):
        found = model.generate_batch(
            inputs, delta_names=names, **options(scheduler_type=scheduler, max_requests_per_batch=5)
        )
        wanted = [None if name == "__base__" else name for name in names]
        alone.check(found.values(), inputs, wanted)
    assert_nothing_held(model)


def test_one_name_for_all_or_none(family, model, alone):
    inputs = prompts(3)
    found = model.generate_batch(inputs, delta_names="two", **options())
    alone.check(found.values(), inputs, ["two"] * 3)
    model.set_delta("three")
    alone.check(model.generate_batch(inputs, **options()).values(), inputs, ["three"] * 3)
    with model.disable_deltas():
        alone.check(model.generate_batch(inputs, **options()).values(), inputs, [None] * 3)
    with model.use_deltas(["two", None, "one"]):
        found = model.generate_batch(inputs, **options())
    alone.check(found.values(), inputs, ["two", None, "one"])
    for names in (None, "one", []):
        assert model.generate_batch([], delta_names=names, **options()) == {}


def test_requests_of_a_manager(model, alone):
    inputs = prompts(4)
    with model.continuous_batching_context_manager(**options()) as manager:
        model.set_delta("three")
        ids = [manager.add_request(inputs[0], delta_name="one"), manager.add_request(inputs[1])]
        model.set_delta("two")  # is for requests to come
        manager.logit_processor.clear()  # as those do who want none of the generation config's
        ids += [manager.add_request(inputs[2]), manager.add_request(inputs[3], delta_name=None)]
        found = {result.request_id: result for result in map(manager.get_result, [None] * 4)}
        more = manager.add_requests(inputs, delta_names=["one", "two", None, "two"])
        found |= {result.request_id: result for result in map(manager.get_result, [None] * 4)}
        with pytest.raises(DeltaMixError, match="no delta called 'four'"):
            manager.add_request(inputs[0], delta_name="four")
        with pytest.raises(DeltaMixError, match="2 names for a batch of 4 rows"):
            manager.add_requests(inputs, delta_names=["one", "two"])
    alone.check([found[i] for i in ids], inputs, ["one", "three", "two", None])
    alone.check([found[i] for i in more], inputs, ["one", "two", None, "two"])
    assert len(found) == 8
    assert_nothing_held(model)


def test_blocks_are_shared_under_one_delta_only(model, alone, matched):
    ids = prompts(3)[2]
    names = ["one", None, "two", "one", None, "two"]
    with model.continuous_batching_context_manager(**options()) as manager:
        found = []
        for name in names:  # one after the other, so that each could find the blocks of all before
            manager.add_request(ids, delta_name=name)
            found.append(manager.get_result())
    alone.check(found, [ids] * 6, names)
    whole = (len(ids) - 1) // BLOCK * BLOCK
    assert whole > 0 and matched == [0, 0, 0, whole, whole, whole]
    assert len({round(result.logprobs[0], 2) for result in found}) == 3  # far from each other


def test_a_delta_loaded_anew_finds_no_blocks(family, model, alone, matched):
    ids = prompts(3)[2]
    for name in ("one", "two"):
        found = model.generate_batch([ids], delta_names="one", persistent_manager=True, **options())
        alone.check(found.values(), [ids], [name])
        model.delete_delta("one")
        model.load_delta(family.repos["two"], "one")
    found = model.generate_batch([ids], delta_names="one", persistent_manager=True, **options())
    model.destroy_cached_continuous_batching_manager()
    alone.check(found.values(), [ids], ["two"])
    assert matched == [0, 0, 0]


def test_forks_keep_the_delta(model, alone):
    inputs, names = prompts(3), ["two", None, "one"]
    with model.continuous_batching_context_manager(**options(sequences=3)) as manager:
        ids = manager.add_requests(inputs, delta_names=names)
        found = [manager.get_result() for _ in range(9)]
    of = [ids.index(result.request_id.split("__child#")[0]) for result in found]
    assert sorted(of) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    alone.check(found, [inputs[i] for i in of], [names[i] for i in of])


def test_requests_that_made_room_in_the_cache_keep_the_delta(model, alone, monkeypatch):
    begun = []
    plain = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: begun.append(state) or plain(state),
    )
    inputs, names = [ids[:8] for ids in token_ids(4, 8).tolist()], ["one", None, "three", "two"]
    found = model.generate_batch(
        inputs, delta_names=names, **options(num_blocks=10, scheduler_type="prefill_first")
    )
    assert begun
    alone.check(found.values(), inputs, names)


@pytest.mark.untraced
def test_eviction(family, model, alone):
    sizes = model.list_deltas()
    model.set_delta(None)
    model.set_delta_memory(sum(sorted(sizes.values())[-2:]))
    inputs = prompts(6)
    with pytest.raises(DeltaMixError, match="cannot hold"):
        model.generate_batch(inputs[:3], delta_names=list(NAMES), **options())
    for names in (["one", "two"], ["two", None], ["three", "one"]):
        found = model.generate_batch(inputs[:2], delta_names=names, **options())
        alone.check(found.values(), inputs[:2], names)
    names = [*NAMES, *NAMES]
    with model.continuous_batching_context_manager(**options()) as manager:
        for ids, name in zip(inputs, names, strict=True):  # waits for the first ones to end
            manager.add_request(ids, delta_name=name)
            assert model.delta_memory().total <= model.delta_memory().budget
        found = {result.request_id: result for result in map(manager.get_result, [None] * 6)}
    alone.check([found[f"req_{i}"] for i in range(6)], inputs, names)
    manager = model.init_continuous_batching(**options())  # where nothing will end, do not wait
    for name in ("one", "two", "one"):
        manager.add_request(inputs[0], delta_name=name)
    with pytest.raises(DeltaMixError, match="cannot hold"):
        manager.add_request(inputs[0], delta_name="three")
    with pytest.raises(DeltaMixError, match="cannot hold"):
        manager.add_requests(inputs[:1], delta_names=["three"])
    manager.start()
    manager.stop()
    assert_nothing_held(model)


def test_whatever_ends_a_request_lets_its_delta_go(model, monkeypatch):
    ids = prompts(1)[0]
    with model.continuous_batching_context_manager(**options()) as manager:
        request = manager.add_request(ids, delta_name="one", max_new_tokens=100)
        assert model.dm_deltas.pool.entries["one"].users == 1
        manager.cancel_request(request)
        assert_nothing_held(model)
        manager.add_request(ids, delta_name="one", temperature="none")  # refused by transformers
        assert manager.get_result().error
        assert_nothing_held(model)
        monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
        manager.add_request(ids, delta_name="one")
        assert manager.get_result().error
        assert_nothing_held(model)
        assert manager.add_request(ids, delta_name="one") is None  # it has stopped
        assert_nothing_held(model)


def test_what_is_refused(model, monkeypatch):
    inputs = prompts(3)
    for names, message in (
        (["one", "four", None], "no delta called 'four' is loaded"),
        (["one", "two"], "2 names for a batch of 3 rows"),
        ("four", "no delta called 'four' is loaded"),
        ([], "0 names for a batch of 3 rows"),
    ):
        with pytest.raises(DeltaMixError, match=message):
            model.generate_batch(inputs, delta_names=names, **options())
    with pytest.raises(DeltaMixError, match="CUDA graphs"):
        model.generate_batch(inputs, delta_names="one", **options(use_cuda_graph=True))
    with pytest.raises(DeltaMixError, match=r"torch\.compile"):
        model.generate_batch(
            inputs, delta_names="one", **options(varlen_compile_config=CompileConfig())
        )
    monkeypatch.setitem(continuous.HOOKS, PagedAttentionCache, ("gone",))
    with pytest.raises(DeltaMixError, match=r"has no PagedAttentionCache\.gone"):
        model.generate_batch(inputs, delta_names="one", **options())
    assert_nothing_held(model)


@pytest.mark.parametrize("heads", [4, 5, 6])
def test_packed_tokens_are_told_from_heads(heads):
    """A norm of queries may see [1, heads, tokens, size], with as many heads as tokens or not."""
    router, tokens = Router(), 5
    rows = [None, "a", "b"]
    plain = nn.LayerNorm(3)
    norm = make_routed(copy.deepcopy(plain), router, EACH)
    norm.dm_row_deltas.overlay = {
        "a": {"weight": torch.full((3,), 2.0)},
        "b": {"bias": torch.ones(3)},
    }
    x = torch.randn(1, tokens, heads, 3)
    expected = plain(x)
    expected[:, 1:3] *= 2
    expected[:, 3:] += 1
    with router.using(PackedRoute(rows, [1, 2, 2])):
        torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(norm(x.transpose(1, 2)).transpose(1, 2), expected)
        torch.testing.assert_close(norm(x[0]), expected[0])
        with pytest.raises(DeltaMixError, match="does not see the 5 tokens"):
            norm(x[:, :3, :3])


def test_an_embedding_that_scales_does_so_once():
    """As Gemma's; its own forward calls ours."""

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3

    router, ids = Router(), torch.arange(5)[None]
    table = make_routed(Scaled(5, 2), router, EACH)
    table.dm_row_deltas.overlay = {"a": {"weight": torch.ones(5, 2)}}
    with router.using(PackedRoute([None, "a"], [3, 2])):
        found = table(ids)
    assert torch.equal(found[0, :3], table.weight[:3] * 3) and (found[0, 3:] == 3).all()


def test_the_route_of_a_step():
    """Only requests that get a token have logits, in a tensor as long as there are requests."""

    def request(name: str, length: int, new: bool) -> SimpleNamespace:
        request_delta = SimpleNamespace(delta=name)
        state = SimpleNamespace(logit_processor_kwargs={continuous.KEY: request_delta})
        return SimpleNamespace(state=state, query_length=length, has_new_token=new)

    head = nn.Linear(2, 2)
    batch = [request("a", 2, False), request("b", 1, True), request("c", 1, True)]
    io = SimpleNamespace(requests_in_batch=batch)
    pairs = [SimpleNamespace(host_io=None), SimpleNamespace(host_io=io)]
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    for slices, ios in (
        (True, io),
        (False, io),
        (True, SimpleNamespace(io_pairs=pairs, current_pair=1)),
    ):
        runner = SimpleNamespace(supports_logits_to_keep=lambda model, slices=slices: slices)
        processor: Any = SimpleNamespace(inputs_and_outputs=ios, model_runner=runner)
        route = continuous.RoutedBatchProcessor._route(processor, model)
        tokens = ("a", "a", "b", "c")
        assert route.rows == route.tokens.rows == tokens
        found = route.head, route.kept.rows
        assert found == ((head, ("b", "c", "a")) if slices else (None, ()))
