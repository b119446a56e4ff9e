"""Which implementation runs: environment over device; and the ops through Triton."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, inputs
from op_cases import arguments, relative
from packed_cases import pack
from torch._subclasses.fake_tensor import FakeTensorMode

from deltamix_hf import DeltaMixError
from deltamix_hf.ops import dispatch, native
from deltamix_hf.ops import low_rank as ops
from deltamix_hf.ops.dispatch import NATIVE, REFERENCE, TRITON, VARIABLE, choose

# Not under coverage, which makes Triton's interpreter three times slower.
pytestmark = pytest.mark.untraced

LAYOUT = (40, 70, [3, 2], [2, 4], 0)


@pytest.fixture
def case():
    packed, delta = pack(*LAYOUT, gaussian=True)
    for name, tensor in packed.tensors.items():
        setattr(packed, name, tensor.to(DEVICE))
    return packed, delta.to(DEVICE)


@pytest.fixture(params=[REFERENCE, TRITON])
def kernel(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)


def linear(packed, x, weight, bias):
    return ops.delta_linear(x, weight, bias, *arguments(packed))


def test_choice(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose(cpu) == (REFERENCE if native.library() is None else NATIVE)
    monkeypatch.setenv(VARIABLE, REFERENCE)
    assert choose(cpu) == choose(gpu) == REFERENCE
    monkeypatch.setenv(VARIABLE, TRITON)
    assert choose(gpu) == TRITON
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(DeltaMixError, match=r"'fast'.*triton, native, reference"):
        choose(cpu)


@pytest.mark.parametrize("work", [True, False])
def test_a_gpu_runs_the_kernels_if_they_work_there(monkeypatch, work):
    monkeypatch.delenv(VARIABLE, raising=False)
    asked, passed = [], {}
    monkeypatch.setattr(dispatch, "kernels_work", lambda device, _: asked.append(device) or work)
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    with FakeTensorMode():  # a compiler traces: it cannot be tried
        assert choose(one, passed=passed) == REFERENCE and not asked
    expected = TRITON if work else REFERENCE
    assert [choose(at, passed=passed) for at in (one, one, two, one)] == [expected] * 4
    assert asked == [one, two]


def test_a_triton_without_knobs_is_no_triton(monkeypatch, caplog):
    """Before 3.4, which torch 2.6 and 2.7 bring."""
    for name in [name for name in sys.modules if name.split(".")[0] == "deltamix_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    old = types.ModuleType("triton")
    old.__version__ = "3.3.1"
    monkeypatch.setitem(sys.modules, "triton", old)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", "deltamix_hf"):
        assert dispatch._import_kernels() is None
        assert "needs triton 3.4 or newer, found 3.3.1" in caplog.text
        caplog.clear()
        monkeypatch.setitem(sys.modules, "triton", None)  # not installed
        assert dispatch._import_kernels() is None and not caplog.records


def test_no_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_kernels", lambda: None)
    monkeypatch.setenv(VARIABLE, TRITON)
    with pytest.raises(DeltaMixError, match="cannot run on cuda: install triton"):
        choose(torch.device("cuda"))


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch.triton_kernels(), "INTERPRETED", False)
    monkeypatch.setenv(VARIABLE, TRITON)
    with pytest.raises(DeltaMixError, match="cannot run on cpu"):
        choose(torch.device("cpu"))


@pytest.mark.parametrize("with_bias", [False, True])
def test_each_implementation_is_right(case, kernel, with_bias):
    packed, delta = case
    x, weight = inputs(3, 70, torch.float32), inputs(40, 70, torch.float32)
    bias = inputs(1, 40, torch.float32, 3)[0] if with_bias else None
    expected = F.linear(x.double(), weight.double() + delta, bias.double() if with_bias else None)
    assert relative(linear(packed, x, weight, bias), expected) < 1e-6


def test_gradients(case, kernel):
    packed, delta = case
    x, weight = inputs(3, 70, torch.float32), inputs(40, 70, torch.float32, 1)
    bias = inputs(1, 40, torch.float32, 2)[0]
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    plain = [t.detach().double().requires_grad_() for t in leaves]
    grad = inputs(3, 40, torch.float32, 3)
    linear(packed, *leaves).backward(grad)
    (plain[0] @ (plain[1] + delta).T + plain[2]).backward(grad.double())
    for ours, theirs in zip(leaves, plain, strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-6


def test_the_ops_keep_torchs_rules(case, kernel):
    packed, _ = case
    x, weight = inputs(2, 70, torch.float32).requires_grad_(), inputs(40, 70, torch.float32, 1)
    torch.library.opcheck(ops.delta_linear, (x, weight, None, *arguments(packed)))
    torch.library.opcheck(ops.low_rank, (x, *arguments(packed, False)))
