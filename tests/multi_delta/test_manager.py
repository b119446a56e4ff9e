"""Several deltas on one base: each row is what its delta alone would give it."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many_deltas import CLOSE, NAMES, Family, loaded
from peft import LoraConfig, get_peft_model
from tiny_pairs import logits, make_tokenizer, text_of, token_ids
from transformers import pipeline

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta import manager
from deltamix_hf.multi_delta.routing import named_route
from deltamix_hf.quantization.packed_delta import PackedDelta

OTHERS = [pytest.param(name, marks=pytest.mark.untraced) for name in ("qwen3", "gpt2")]


@pytest.fixture(scope="module", params=["llama_tied", "bert", *OTHERS])
def family(request, make_family) -> Family:
    return make_family(request.param)


@pytest.fixture
def model(family):
    return loaded(family)


@pytest.mark.untraced
def test_every_row_is_what_its_delta_gives_alone(family, model):
    ids = token_ids(5, 7)
    names = ["one", None, "three", "two", "one"]
    found = logits(model, ids, delta_names=names)
    for name in {*names}:
        rows = [i for i, other in enumerate(names) if other == name]
        torch.testing.assert_close(found[rows], family.alone(name, ids)[rows], **CLOSE)
    plain = logits(family.pair.load(family.pair.base), ids)
    assert torch.equal(found[1], plain[1])  # bit for bit
    changed = [(found[i] - plain[i]).abs().max() for i in (0, 2, 3, 4)]
    assert min(changed) > 100 * CLOSE["atol"]


def test_choosing_for_all_calls(family, model):
    ids = token_ids(2, 7)
    assert list(model.list_deltas()) == list(NAMES) and model.active_deltas == ["one"]
    for name in NAMES:
        model.set_delta(name)
        assert model.active_deltas == [name]
        torch.testing.assert_close(logits(model, ids), family.alone(name, ids), **CLOSE)
    base = family.alone(None, ids)
    with model.disable_deltas():
        assert torch.equal(logits(model, ids), base) and model.active_deltas == []
        named = logits(model, ids, delta_names="one")  # a call's own names win
    torch.testing.assert_close(named, family.alone("one", ids), **CLOSE)
    assert model.active_deltas == ["three"]
    model.disable_deltas()
    assert torch.equal(logits(model, ids), base)
    model.enable_deltas()
    torch.testing.assert_close(logits(model, ids), family.alone("three", ids), **CLOSE)
    model.delete_delta("three")
    assert model.active_deltas == [] and torch.equal(logits(model, ids), base)


@pytest.mark.untraced
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_load_cut_off_leaves_the_model_as_it_was(family, monkeypatch, error):
    model, ids = family.pair.load(family.pair.base), token_ids(3, 7)
    for name in ("one", "two"):
        model.load_delta(family.repos[name], name)
    plain, calls = PackedDelta.to, []

    def to(self, device):
        calls.append(device)
        if len(calls) == 2:
            raise error
        return plain(self, device)

    for again in (False, True):  # a new delta, and one that must come back
        with monkeypatch.context() as patched:
            if again:
                model.load_delta(family.repos["three"], "three")
                model.set_delta_memory(max(model.list_deltas().values()))
                model.set_delta_memory(None)
            calls.clear()
            patched.setattr(PackedDelta, "to", to)
            with pytest.raises(error):
                if again:
                    logits(model, ids, delta_names=["two", "three", None])
                else:
                    model.load_delta(family.repos["three"], "three")
        assert "three" not in model.delta_memory().resident
        assert list(model.list_deltas()) == list(NAMES if again else NAMES[:2])
        found = logits(model, ids, delta_names=["two", "one", None])
        for row, name in enumerate(("two", "one", None)):
            torch.testing.assert_close(found[row], family.alone(name, ids)[row], **CLOSE)


def test_a_long_load_shows_its_progress(family, monkeypatch):
    model, bars, plain = family.pair.load(family.pair.base), [], manager.logging.tqdm

    def tqdm(*args, **how):
        if str(how.get("desc")).startswith("Loading delta"):
            bars.append(how)
        return plain(*args, **how)

    monkeypatch.setattr(manager.logging, "tqdm", tqdm)
    model.load_delta(family.repos["one"], "one")
    assert bars == []  # it is small
    model.dm_deltas.progress_bytes = 0
    model.load_delta(family.repos["one"], "again")
    assert bars == [{"desc": "Loading delta again", "unit": "matrix"}]


def test_tied_weights_share_a_delta(make_family):
    model = loaded(make_family("llama_tied"))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = head.dm_row_deltas.packed, embeddings.dm_row_deltas.packed
    assert set(head) == set(NAMES)
    assert all(head[name] is embeddings[name] for name in NAMES)
    model.to("meta")
    for name in NAMES:
        packed = head[name]
        assert packed is embeddings[name]
        assert {t.device.type for t in packed.tensors.values()} == {"meta"}


def test_beneath_the_hooks_of_a_device_map(family):
    """Accelerate's hooks replace each module's forward."""
    model, ids = family.pair.load(family.pair.base), token_ids(3, 7)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    for name in NAMES:
        model.load_delta(family.repos[name], name)
    found = logits(model, ids, delta_names=["two", None, "one"])
    for row, name in enumerate(("two", None, "one")):
        torch.testing.assert_close(found[row], family.alone(name, ids)[row], **CLOSE)


def test_bytes_are_those_of_the_files(family, model):
    for name, entry in model.dm_deltas.pool.entries.items():
        on_disk = sum(f.stat().st_size for f in family.repos[name].glob("*.safetensors"))
        assert 0 < entry.nbytes < on_disk < entry.nbytes + 20_000  # headers
        overlay = entry.read().overlay.values()  # in the base's dtype once it is beside it
        wider = sum(t.numel() * (model.dtype.itemsize - t.element_size()) for t in overlay)
        assert model.list_deltas()[name] == entry.nbytes + wider


def test_a_delta_repo_becomes_one_of_many(family):
    ids = token_ids(3, 7)
    plain = family.pair.load(family.pair.base)
    assert plain.active_deltas == [] and plain.list_deltas() == {}
    model = family.pair.load(family.repos["two"])
    before = logits(model, ids)
    assert model.active_deltas == ["default"] and "dm_deltas" not in model.__dict__
    model.load_delta(family.repos["one"], "one")
    assert list(model.list_deltas()) == ["default", "one"]
    assert model.active_deltas == ["default"]
    torch.testing.assert_close(logits(model, ids), before, **CLOSE)
    found = logits(model, ids, delta_names=["one", "default", "__base__"])
    torch.testing.assert_close(found[0], family.alone("one", ids)[0], **CLOSE)
    torch.testing.assert_close(found[1], before[1], **CLOSE)
    assert torch.equal(found[2], family.alone(None, ids)[2])
    for refused in (model.save_pretrained, model.dequantize):
        with pytest.raises(DeltaMixError, match="is for a model with one delta"):
            refused("anywhere")


def test_saving_a_base_saves_the_base(family, model, tmp_path):
    with model.disable_deltas():
        model.save_pretrained(tmp_path / "base")
    again = family.pair.load(tmp_path / "base")
    assert torch.equal(logits(again, token_ids()), family.alone(None, token_ids()))


mixes = st.lists(
    st.tuples(
        st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=5),
        st.integers(1, 9),  # length
        st.sampled_from(["stay", "delete", "load"]),
        st.sampled_from(NAMES),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.untraced
@given(mixes)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_mix_while_deltas_come_and_go(family, shared, mix):
    model, alone = shared
    for names, length, action, which in mix:
        if action == "delete" and which in model.list_deltas():
            model.delete_delta(which)
        if action == "load" and which not in model.list_deltas():
            model.load_delta(family.repos[which], which)
        present = [name if name in model.list_deltas() else None for name in names]
        ids = token_ids(len(names), length, seed=length)
        found = logits(model, ids, delta_names=present)
        for row, name in enumerate(present):
            torch.testing.assert_close(found[row], logits(alone[name], ids)[row], **CLOSE)


@pytest.fixture(scope="module")
def shared(family):
    """A model whose deltas come and go, and every delta's own model."""
    folders = {None: family.pair.base, **family.repos}
    return loaded(family), {name: family.pair.load(folder) for name, folder in folders.items()}


def test_generate(family, model):
    if not model.can_generate():
        pytest.skip("writes no text")
    ids, options = token_ids(3, 5), {"max_new_tokens": 5, "do_sample": False}
    names = ["two", None, "one"]
    for more in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        found = model.generate(ids, delta_names=names, **options, **more)
        each = more.get("num_return_sequences", 1)
        for row, name in enumerate(names):
            folder = family.pair.base if name is None else family.repos[name]
            expected = family.pair.load(folder).generate(ids, **options, **more)
            mine = slice(row * each, (row + 1) * each)
            size = min(found.shape[1], expected.shape[1])  # rows that end early are padded
            assert torch.equal(found[mine, :size], expected[mine, :size])


def test_pipeline(family, model):
    if not model.can_generate():
        pytest.skip("writes no text")
    run = pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    texts = [text_of(row) for row in token_ids(8, 6)]
    names = ["two", None, "one", "three"] * 2
    options = {"max_new_tokens": 5, "do_sample": False}
    mixed = run(texts, batch_size=8, delta_names=names, **options)
    for found, text, name in zip(mixed, texts, names, strict=True):
        assert found == run(text, delta_names=name or "__base__", **options)
    if family.pair.name != "llama_tied":  # whose tied head repeats the last token anyway
        assert mixed != run(texts, delta_names="__base__", **options)


def test_pipeline_names_are_for_one_batch(family, model):
    if not model.can_generate():
        pytest.skip("writes no text")
    run = pipeline("text-generation", model=model, tokenizer=make_tokenizer(), batch_size=2)
    with pytest.raises(DeltaMixError, match="a pipeline calls for batch_size texts at a time"):
        run(["w5 w6"] * 3, delta_names=["one", "two", None], max_new_tokens=2)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens"]])
@torch.no_grad()
def test_adapters_come_after_the_first_delta(make_family, targets):
    """They rename what they wrap, but deltas still find it."""
    family, ids = make_family("qwen3"), token_ids(2, 5)
    model = family.pair.load(family.pair.base)
    model.load_delta(family.repos["one"], "one")
    adapted = get_peft_model(model, LoraConfig(target_modules=targets))
    model.load_delta(family.repos["two"], "two")
    for name in ("one", "two"):
        model.set_delta(name)
        torch.testing.assert_close(logits(adapted, ids), family.alone(name, ids), **CLOSE)
        model.delete_delta(name)
    assert torch.equal(logits(adapted, ids), family.alone(None, ids))
    late = family.pair.load(family.pair.base)
    get_peft_model(late, LoraConfig(target_modules=targets))
    with pytest.raises(DeltaMixError, match="load deltas first, and give the model adapters"):
        late.load_delta(family.repos["one"], "one")


def test_what_is_refused(family, model, copied):
    with pytest.raises(DeltaMixError, match="no delta called 'four' is loaded"):
        model.set_delta("four")
    with pytest.raises(DeltaMixError, match="no delta called 'four'"):
        logits(model, token_ids(1), delta_names=["four"])
    with pytest.raises(DeltaMixError, match="deltas are not added up"):
        model.set_delta(["one", "two"])
    with pytest.raises(DeltaMixError, match="deltas are not added up"):
        logits(model, token_ids(2), delta_names=[["one", "two"], None])
    with pytest.raises(DeltaMixError, match="2 names for a batch of 3 rows"):
        logits(model, token_ids(3), delta_names=["one", "two"])
    with pytest.raises(DeltaMixError, match="delta_names is empty"):
        named_route([])
    with pytest.raises(DeltaMixError, match="'one' is loaded already"):
        model.load_delta(family.repos["two"], "one")
    with pytest.raises(DeltaMixError, match="cannot name a delta"):
        model.load_delta(family.repos["two"], "__base__")
    with pytest.raises(DeltaMixError, match="is not a delta repo"):
        model.load_delta(family.pair.base, "whole")
    with pytest.raises(DeltaMixError, match="cannot find the delta repo"):
        model.load_delta(family.repos["one"] / "none", "absent")
    other = family.pair.load(family.repos["one"] / ".." / "two-tuned")
    with pytest.raises(DeltaMixError, match="wrong base"):
        other.load_delta(family.repos["one"], "one")
    assert list(model.list_deltas()) == list(NAMES)


def test_what_sees_no_batch_is_refused_in_a_mixed_one(make_family):
    """T5 looks its relative positions up as [queries, keys]; here that could pass for a batch."""
    family = make_family("t5")
    model, ids = loaded(family), token_ids(7, 7)
    for name in NAMES:
        found = logits(model, ids, delta_names=[name] * 7)
        torch.testing.assert_close(found, family.alone(name, ids), **CLOSE)
    with pytest.raises(DeltaMixError, match="give all rows the same delta"):
        logits(model, ids, delta_names=["one", "two", *["three"] * 5])


@pytest.mark.untraced
def test_twenty_deltas_through_room_for_four(make_family):
    """Threads ask at random; whatever was moved out meanwhile, every row is right."""
    family = make_family("llama_tied")
    model = family.pair.load(family.pair.base)
    model.load_delta(family.repos["one"], "first")
    budget = 4 * max(find_delta_bytes(family, name) for name in NAMES)
    model.set_delta(None)
    model.set_delta_memory(budget)
    kinds = {f"tenant{i}": NAMES[i % 3] for i in range(20)}
    for name, kind in kinds.items():
        model.load_delta(family.repos[kind], name)
    ids = token_ids(4, 6)
    expected = {name: family.alone(name, ids) for name in (None, *NAMES)}
    failures: list[object] = []

    def ask(seed: int) -> None:
        own = random.Random(seed)
        try:
            for _ in range(12):
                names = [None, *own.sample(list(kinds), 3)]
                own.shuffle(names)
                found = logits(model, ids, delta_names=names)
                if model.delta_memory().total > budget:
                    failures.append("above the budget")
                for row, name in enumerate(names):
                    right = expected[kinds.get(name)][row]
                    if not torch.allclose(found[row], right, **CLOSE):
                        failures.append(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads)
    memory = model.delta_memory()
    assert len(memory.resident) < 8 and len(model.list_deltas()) == 21 and memory.host == {}
    with pytest.raises(DeltaMixError, match="cannot hold"):
        logits(model, token_ids(6), delta_names=list(kinds)[:6])


def find_delta_bytes(family: Family, name: str) -> int:
    model = family.pair.load(family.pair.base)
    model.load_delta(family.repos[name], name)
    return model.list_deltas()[name]
