"""Compiled and captured models: every row by its own delta, and nothing is compiled twice."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE
from many_deltas import CLOSE, Family, loaded
from tiny_pairs import logits, token_ids
from transformers import CompileConfig

from deltamix_hf import DeltaMixError
from deltamix_hf.multi_delta import grouped, routing
from deltamix_hf.multi_delta.layers import RoutedDeltas
from deltamix_hf.nn.delta_module import DeltaModule
from deltamix_hf.nn.layers import weight_of
from deltamix_hf.ops.dispatch import TRITON, VARIABLE

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.untraced

IDS = token_ids(3, 5)
MIXED = ["one", None, "three"]


@pytest.fixture(scope="module")
def family(one_block) -> Family:
    return one_block


@pytest.fixture
def model(family):
    torch.compiler.reset()
    return loaded(family)


@pytest.fixture
def compiled(model):
    """The model's compiled forward, which has run once; compiling again is an error."""
    found = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    logits(found, IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield found


def test_no_recompile_whatever_the_tenants(family, model, compiled):
    for names in (MIXED, ["two"] * 3, [None] * 3, "three", ["three", "one", "two"]):
        expected = logits(model, IDS, delta_names=names)
        with model.use_deltas(names):
            torch.testing.assert_close(logits(compiled, IDS), expected, **CLOSE)
    torch.testing.assert_close(logits(compiled, IDS), family.alone("one", IDS), **CLOSE)
    model.set_delta("two")
    torch.testing.assert_close(logits(compiled, IDS), family.alone("two", IDS), **CLOSE)
    with model.disable_deltas():
        assert torch.equal(logits(compiled, IDS)[1], logits(model, IDS)[1])
    for name in family.repos:
        model.delete_delta(name)
    base = family.alone(None, IDS)
    torch.testing.assert_close(logits(compiled, IDS), base, **CLOSE)
    model.load_delta(family.repos["three"], "again")
    with model.use_deltas([None, "again", None]):
        found = logits(compiled, IDS)
    torch.testing.assert_close(found[1], family.alone("three", IDS)[1], **CLOSE)
    torch.testing.assert_close(found[::2], base[::2], **CLOSE)


def test_compiled_before_the_first_delta_touches_a_module(family):
    """Which modules a delta changes is no reason to compile again."""
    torch.compiler.reset()
    model = family.pair.load(family.pair.base)
    model.load_delta(family.repos["one"], "one")
    deltas = model.dm_deltas
    deltas._remove("one")  # nothing is left but classes, which were changed beforehand
    assert all(not m.packed and not m.overlay for m in layer_deltas(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits(compiled, IDS)
    deltas.pool.entries["one"].resident = False
    with torch._dynamo.config.patch(error_on_recompile=True), model.use_deltas("one"):
        found = logits(compiled, IDS)
    torch.testing.assert_close(found, family.alone("one", IDS), **CLOSE)


def layer_deltas(model):
    return [m.dm_row_deltas for m in model.modules() if isinstance(m, DeltaModule)]


def test_inductor(family, model):
    compiled = torch.compile(model, fullgraph=True)
    with model.use_deltas(MIXED):
        found = logits(compiled, IDS)
    torch.testing.assert_close(found, logits(model, IDS, delta_names=MIXED), **CLOSE)


def test_layer_norms_and_positions(make_family):
    """GPT-2: layer norms, biases and Conv1D are stored whole; positions are looked up once."""
    torch.compiler.reset()
    model = loaded(make_family("gpt2"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = torch.arange(5).expand(3, 5)
    for names in (MIXED, ["two", "one", None]):
        expected = logits(model, IDS, delta_names=names)
        with model.use_deltas(names):
            found = logits(compiled, IDS, position_ids=positions)
            torch.testing.assert_close(found, expected, **CLOSE)
            with pytest.raises(DeltaMixError, match="one row for the whole batch"):
                logits(compiled, IDS)


def test_generate_with_a_static_cache(family, model):
    options = {"max_new_tokens": 6, "do_sample": False}
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    for names in (MIXED, ["two", "one", None]):
        for more in ({}, {"num_beams": 2, "num_return_sequences": 2}):
            expected = model.generate(IDS, delta_names=names, **options, **more)
            found = model.generate(IDS, delta_names=names, **options, **more, **static)
            assert torch.equal(found, expected)
    assert model._compiled_call is not None


def test_what_cannot_be_compiled(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="gives no gradients"):
        compiled(IDS)
    torch.compiler.reset()
    with pytest.raises(Exception, match="takes its deltas from outside"):
        logits(compiled, IDS, delta_names=MIXED)


# By Triton: one launch for all rows. In float16: the kernels multiply no float32.

HALF = {"rtol": 2e-2, "atol": 2e-2}


def triton_logits(model, ids, **options):
    return logits(model, ids.to(model.device), **options).cpu().float()


@pytest.fixture
def launched(model, monkeypatch):
    """The model by Triton; modules that take the loop over deltas."""
    model.to(DEVICE, torch.float16)
    monkeypatch.setenv(VARIABLE, TRITON)
    looped = []
    plain = RoutedDeltas.output

    def output(self, module, *args):
        looped.append(module)
        return plain(self, module, *args)

    monkeypatch.setattr(RoutedDeltas, "output", output)
    return looped


@pytest.fixture
def layer(model, launched):
    """One layer that all deltas pack; what the interpreter does takes a second a layer."""
    return model.model.layers[0].self_attn.q_proj


def make(layer, rows=3, length=2):
    """Random inputs of a layer."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, length, layer.in_features, generator=random).to(DEVICE, torch.float16)


def by_layer(model, layer, x, names):
    with torch.no_grad(), model.use_deltas(names):
        return layer(x)


def expected_of(family, layer, x, names):
    """The layer's float64 output by the deltas' own packed factors."""
    rows = []
    for row, name in zip(x.cpu().double(), names, strict=True):
        weight = weight_of(layer).cpu().double()
        if name is not None:
            weight = weight + layer.dm_row_deltas.packed[name].dense().cpu().double()
        rows.append(row @ weight.T)
    return torch.stack(rows)


def check(family, model, layer, names):
    x = make(layer, len(names))
    expected = expected_of(family, layer, x, names)
    found = by_layer(model, layer, x, names)
    torch.testing.assert_close(found.cpu().double(), expected, **HALF)
    return found


def test_no_loop_where_the_kernels_serve_all(family, model, launched):
    """Deltas with the Gaussian codebook, "one" and "three"; "two" is on a min-max grid."""
    names = ["one", None, "three"]
    found = triton_logits(model, IDS, delta_names=names)
    assert not launched
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], family.alone(name, IDS)[row], **HALF)
    layer = model.model.layers[0].self_attn.q_proj
    check(family, model, layer, ["one", "two", None])
    assert launched == [layer, layer]


def test_float32_and_prompts_take_the_loop(family, model, layer, launched):
    """The kernels decode codes for every 16 rows; a long prompt dequantizes factors once."""
    check(family, model, layer, MIXED)
    assert not launched
    x = make(layer, 3, 50)
    torch.testing.assert_close(
        by_layer(model, layer, x, MIXED).cpu().double(),
        expected_of(family, layer, x, MIXED),
        **HALF,
    )
    assert launched == [layer, layer]
    model.float()
    torch.testing.assert_close(
        by_layer(model, layer, x.float(), MIXED).cpu().double(),
        expected_of(family, layer, x, MIXED),
        **HALF,
    )
    assert len(launched) == 4


def test_deltas_come_and_go_in_the_tables(family, model, layer, launched):
    first = check(family, model, layer, MIXED)
    model.delete_delta("one")
    model.delete_delta("three")
    assert all(
        deltas.table is None or not deltas.table.names - {"two"} for deltas in layer_deltas(model)
    )
    model.load_delta(family.repos["three"], "three")  # into the other's slot
    model.load_delta(family.repos["one"], "one")
    assert torch.equal(check(family, model, layer, MIXED), first)
    assert not launched


def test_more_deltas_than_slots(family, model, layer, launched, monkeypatch):
    model.dm_deltas.router.slots.size = 3
    with pytest.raises(DeltaMixError, match="tables hold 3 deltas"):
        model.load_delta(family.repos["one"], "four")
    assert "four" not in model.list_deltas()
    monkeypatch.delenv(VARIABLE)
    model.load_delta(family.repos["one"], "four")
    assert "four" not in model.dm_deltas.router.slots
    monkeypatch.setenv(VARIABLE, TRITON)
    check(family, model, layer, ["four", None, "three"])
    assert launched


@pytest.fixture
def recording(monkeypatch):
    """Pretend to record a CUDA graph: launches then read what a replay would."""

    def record(on):
        for module in (routing, grouped):
            monkeypatch.setattr(module, "capturing", lambda _: on)

    return record


def test_a_graph_reads_what_changes(family, model, layer, launched, recording):
    model.delete_delta("two")
    for names in (MIXED, MIXED):
        check(family, model, layer, names)
    read = model.dm_deltas.router._fixed[3, model.device]
    addresses = [t.data_ptr() for t in (read.order, read.starts, read.slots, read.of_rows)]
    for names in (MIXED, ["three", "three", "one"]):
        with model.use_deltas(names):
            recording(True)
            check(family, model, layer, names)
            recording(False)
    assert read is model.dm_deltas.router._fixed[3, model.device]
    assert addresses == [t.data_ptr() for t in (read.order, read.starts, read.slots, read.of_rows)]
    recording(True)
    named = model.dm_deltas.router.using(routing.Route(MIXED))  # as forward(delta_names=...) does
    refused = pytest.raises(DeltaMixError, match="name the deltas with use_deltas")
    with refused, named, torch.no_grad():
        layer(make(layer))
    recording(False)
    with pytest.raises(DeltaMixError, match="a CUDA graph would keep"):
        model.load_delta(family.repos["two"], "two")  # on a min-max grid
    assert list(model.list_deltas()) == ["one", "three"]


def test_graphs_of_what_is_not_in_the_tables(family, model, layer, recording, monkeypatch):
    x = make(layer)
    by_layer(model, layer, x, ["one"] * 3)
    recording(True)
    with pytest.raises(DeltaMixError, match="a CUDA graph would keep"):
        by_layer(model, layer, x, ["one"] * 3)  # "two" is resident, and could come next
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(DeltaMixError, match="choose the Triton kernels"):
        by_layer(model, layer, x, ["one"] * 3)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_captured_graph_replays_with_other_tenants(family, model, launched):
    model.delete_delta("two")
    ids = IDS.to(DEVICE)
    with model.use_deltas(MIXED):
        for _ in range(2):
            logits(model, ids, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = logits(model, ids, use_cache=False)
    model.load_delta(family.repos["one"], "four")
    for names in (["three", "four", None], ["one", "one", "three"], [None] * 3):
        expected = logits(model, ids, use_cache=False, delta_names=names)
        with model.use_deltas(names):
            graph.replay()
        torch.testing.assert_close(found, expected, **HALF)
    assert not launched
