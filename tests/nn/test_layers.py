"""DeltaLinear and DeltaEmbedding: made in place, compute what the dense weight would, and undo."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from packed_cases import each_codebook, pack, quantizer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import Gemma3TextConfig, OPTConfig
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

from deltamix_hf import DeltaEmbedding, DeltaLinear, DeltaMixError
from deltamix_hf.nn.compiled import layer, layers_of_one_input
from deltamix_hf.nn.layers import attach, delta_class, delta_modules, detach, weight_of
from deltamix_hf.ops.experts import expert_low_rank
from deltamix_hf.ops.low_rank import delta_linear, low_rank, low_rank_rows
from deltamix_hf.quantization.packed_layout import parts


class Turned(nn.Linear):
    def forward(self, x):
        return super().forward(x.flip(-1))


class Pair(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


class SameProduct(nn.Linear):
    def forward(self, x):
        return (x @ self.weight.T + self.bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [FalconLinear, SameProduct])
def test_subclasses_with_the_same_product_are_packed(cls, bias):
    if cls is SameProduct and not bias:
        pytest.skip("has a bias")
    state = torch.random.get_rng_state()
    made = delta_class(cls)
    assert issubclass(made, DeltaLinear) and torch.equal(torch.random.get_rng_state(), state)
    module = cls(24, 40, bias=bias)
    packed, delta = pack(40, 24, [8, 3, 2, 2], [8, 4, 2, 2], 16)
    dense = module.weight.detach().double() + delta
    attach(module, packed)
    x = torch.randn(2, 5, 24)
    expected = x.double() @ dense.T + (module.bias.double() if bias else 0)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    detach(module)
    assert type(module) is cls


@pytest.mark.parametrize(
    "cls", [Turned, Pair, IdeficsDecoupledLinear, NonDynamicallyQuantizableLinear]
)
def test_other_subclasses_are_stored_whole(cls):
    assert delta_class(cls) is None


# Relative RMS of packed against merged dense weights: base and delta are added after the product
# instead of before it, so one more rounding in the dtype.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def linear(m=40, n=24, bias=True, gaussian=False) -> tuple[nn.Linear, torch.Tensor]:
    """A DeltaLinear and its dense weight [m, n], float64."""
    module = nn.Linear(n, m, bias=bias)
    packed, delta = pack(m, n, [8, 3, 2, 2], [8, 4, 2, 2], 16, gaussian=gaussian)
    dense = module.weight.detach().double() + delta
    attach(module, packed)
    return module, dense


def embedding(module: nn.Embedding, gaussian=False) -> torch.Tensor:
    """Attach a delta to `module`; returns its dense weight, float64."""
    m, n = module.weight.shape
    packed, delta = pack(m, n, [8, 3, 2, 2], [8, 4, 2, 2], 16, gaussian=gaussian)
    dense = module.weight.detach().double() + delta
    attach(module, packed)
    return dense


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@each_codebook
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_linear_computes_the_dense_product(dtype, bias, gaussian):
    module, _ = linear(bias=bias, gaussian=gaussian)
    module.to(dtype).requires_grad_(False)
    x = torch.randn(3, 5, 24).to(dtype)
    found, dense = module(x), weight_of(module).double() + module.packed().dense()
    expected = x.double() @ dense.T + (module.bias.double() if bias else 0)
    assert type(module) is DeltaLinear and found.dtype == dtype
    assert relative(found, expected) < TOLERANCES[dtype]


@each_codebook
def test_casting_leaves_the_packed_tensors_alone(gaussian):
    module, dense = linear(gaussian=gaussian)
    before = {k: p.detach().clone() for k, p in module.delta_parameters().items()}
    module.half().double()
    for part, parameter in module.delta_parameters().items():
        assert parameter.dtype == before[part].dtype and torch.equal(parameter, before[part])
    # The base weight went through half precision, the delta did not.
    assert relative(module.merged_weight(), dense) < 1e-3


@each_codebook
def test_gradient_through_x_is_the_dense_one(gaussian):
    module, dense = linear(gaussian=gaussian)
    x = torch.randn(6, 24, requires_grad=True)
    module(x).square().sum().backward()
    reference = x.detach().double().requires_grad_()
    (reference @ dense.T + module.bias.double()).square().sum().backward()
    assert relative(x.grad, reference.grad) < 1e-5
    assert module.weight.grad is None and not module.weight.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in module.delta_parameters().values())


@each_codebook
@torch.no_grad()
def test_output_dtype_under_autocast_is_the_plain_one(gaussian):
    module, _ = linear(gaussian=gaussian)
    x = torch.randn(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = module(x), nn.Linear(24, 40)(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert relative(found, module(x).detach()) < TOLERANCES[torch.bfloat16]


@each_codebook
def test_embedding_looks_up_dense_rows(gaussian):
    module = nn.Embedding(50, 24, padding_idx=3)
    dense = embedding(module, gaussian)
    ids = torch.tensor([[0, 49, 3], [7, 7, 1]])
    assert type(module) is DeltaEmbedding
    torch.testing.assert_close(module(ids).double(), dense[ids], rtol=1e-5, atol=1e-5)
    assert module.half()(ids).dtype == torch.float16


def test_embedding_takes_int32_ids_as_the_plain_one_does():
    module = nn.Embedding(50, 24)
    embedding(module)
    ids = torch.tensor([4, 2])
    assert torch.equal(module(ids.int()), module(ids))


@each_codebook
def test_scaled_embedding_of_gemma3_keeps_its_forward(gaussian):
    config = Gemma3TextConfig(hidden_size=24)
    plain = Gemma3TextScaledWordEmbedding(50, 24, 0, embed_scale=config.hidden_size**0.5)
    changed = copy.deepcopy(plain)
    dense = embedding(changed, gaussian)
    ids = torch.tensor([[0, 49, 3]])
    expected = dense[ids] * 24**0.5
    torch.testing.assert_close(changed(ids).double(), expected, rtol=1e-5, atol=1e-5)
    assert relative(plain(ids), expected) > 0.1  # the delta matters here
    assert isinstance(changed, Gemma3TextScaledWordEmbedding)
    detach(changed)
    assert type(changed) is Gemma3TextScaledWordEmbedding
    assert torch.equal(changed(ids), plain(ids))


def test_shifted_positions_of_opt_keep_their_forward():
    config = OPTConfig(max_position_embeddings=30, hidden_size=24)
    plain = OPTLearnedPositionalEmbedding(config.max_position_embeddings, 24)
    changed = copy.deepcopy(plain)
    dense = embedding(changed)
    mask = torch.ones(1, 5, dtype=torch.int64)
    expected = dense[torch.arange(5) + 2][None]
    torch.testing.assert_close(changed(mask, 0).double(), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_that_read_their_weight_themselves_are_not_packed():
    """Whisper's positions slice the weight; a delta beside it would be ignored unseen."""
    positions = WhisperPositionalEmbedding(30, 24)
    assert delta_class(type(positions)) is None
    assert delta_class(MarianSinusoidalPositionalEmbedding) is not None  # calls super().forward


@each_codebook
def test_merged_weight_is_the_dense_one(gaussian):
    module, dense = linear(gaussian=gaussian)
    assert module.merged_weight().dtype == torch.float32
    torch.testing.assert_close(module.merged_weight().double(), dense, rtol=1e-6, atol=1e-6)


@each_codebook
def test_detach_restores_the_plain_module(gaussian):
    plain = nn.Linear(24, 40)
    module = copy.deepcopy(plain)
    packed, _ = pack(40, 24, [3], [3], 16, gaussian=gaussian)
    attach(module, packed)
    detach(module)
    x = torch.randn(2, 24)
    assert type(module) is nn.Linear and module.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(module(x), plain(x)) and not hasattr(module, "dm_own")


def test_attach_keeps_identity_and_hooks():
    module = nn.Linear(24, 40)
    weight, seen = module.weight, []
    module.register_forward_hook(lambda *args: seen.append(True))
    packed, _ = pack(40, 24, [3], [3], 16)
    attach(module, packed)
    module(torch.randn(1, 24))
    assert module.weight is weight and seen == [True]


@pytest.mark.parametrize(
    ("part", "gaussian"),
    [(part, gaussian) for gaussian in (False, True) for part in parts(quantizer(gaussian))],
)
@pytest.mark.parametrize("damage", [lambda t: t[:, :-1], lambda t: t[1:], lambda t: t.int()])
def test_attach_refuses_what_does_not_fit(part, damage, gaussian):
    packed, _ = pack(40, 24, [3, 2], [3, 2], 16, gaussian=gaussian)
    module = nn.Linear(24, 40)
    damaged = replace(packed, **{part: damage(packed.tensors[part])})
    with pytest.raises(DeltaMixError, match=f"dm_{part} "):
        attach(module, damaged)
    assert type(module) is nn.Linear and not hasattr(module, f"dm_{part}")


def test_attach_refuses_the_wrong_matrix():
    packed, _ = pack(40, 24, [3], [3], 16)
    with pytest.raises(DeltaMixError, match=r"\[24, 40\]"):
        attach(nn.Linear(40, 24), packed)


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.Bilinear(2, 3, 4), DeltaLinear(8, 8)])
def test_other_modules_cannot_carry_a_delta(module):
    assert delta_class(type(module)) is None
    packed, _ = pack(8, 8, [3], [3], 0)
    with pytest.raises(DeltaMixError, match=type(module).__name__):
        attach(module, packed)


def test_delta_modules_lists_only_packed_ones():
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.Embedding(30, 24))
    packed, _ = pack(40, 24, [3], [3], 16)
    attach(model[0], packed)
    assert list(delta_modules(model)) == ["0"]


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("backend", "gaussian"), [("eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_compiles_without_graph_breaks(backend, gaussian):
    module, _ = linear(gaussian=gaussian)
    table = nn.Embedding(50, 24)
    embedding(table, gaussian)
    model = nn.Sequential(table, module)
    ids = torch.tensor([[4, 9, 0]])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-6, atol=1e-6)


def test_no_argument_that_inductor_has_itself():
    """It passes an op's arguments by name beside its own `kernel`."""
    for op in (delta_linear, low_rank, low_rank_rows, expert_low_rank, layer, layers_of_one_input):
        schema = op._opoverload._schema
        assert not {"kernel", "cls"} & {argument.name for argument in schema.arguments}


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_others_may_add_to_the_output_in_place(shape):
    module, _ = linear()
    x = torch.randn(shape, requires_grad=True)
    expected = module(x) + 1
    y = module(x)
    y += 1
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None
