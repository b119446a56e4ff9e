"""Layers that read the same tensor (q/k/v, gate/up) make their products together.

On a GPU that is two launches for all of them: h = x·V̂ᵀ, then the base's products with Û's part of
them. On a CPU it is one call of the native op, or one look-up of all codes of V: at one token the
overhead of small operations is most of the delta's time.

Which layers may share an input is known by name; whether they do is seen at run time: the first one
that is called computes all outputs, the others take theirs if they are called with the very same
tensor. If grouped layers share no input, the others' products are wasted; after two misses the
group dissolves. With gradients, every layer is on its own.
"""

from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import lookup, native
from ..ops.dispatch import NATIVE, TRITON, choose, kernel_packed, persistent, triton_kernels
from ..ops.packed_op import state_of
from . import compiled
from .delta_module import own_deltas
from .layers import DeltaLinear, weight_of

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Cross-attention: its q reads another tensor than its k and v.
_CROSS = ("cross", "encdec", "encoder_attn")


@dataclass
class _Shared:
    """x as it was, the outputs of all members, and those that have not been taken yet."""

    x: Tensor
    state: Any
    outputs: dict[int, Tensor]

    def has(self, key: int, x: Tensor, state: Any) -> bool:
        """Whether the output of member `key` for this x is waiting."""
        return self.x is x and self.state == state and key in self.outputs


class SharedInput:
    """One to three layers with one input; holds outputs only until the last of them is taken.

    The deltas of `members` have the Gaussian codebook and one scale a vector.
    """

    most_misses = 2  # after so many calls with other inputs the group dissolves

    def __init__(self, members: list[DeltaLinear]):
        self.members = members
        self.lengths = [weight_of(member).shape[0] for member in members]  # outputs of each
        self.misses = 0
        packed = [member.packed() for member in members]
        self._quick = len(members) > 1 and all(map(lookup.supported, packed))
        self._begin()

    def _begin(self) -> None:
        self.number = compiled.register(self)
        self._running: dict[int, _Shared] = {}  # by thread
        self._plan: Any = None
        self._planned: Any = None  # what the plan was made of
        self._words: list[native.Words] | None = None
        self._read: list[int] = []  # the addresses that are in there

    def __getstate__(self) -> dict[str, Any]:
        kept = ("number", "_running", "_plan", "_planned", "_words", "_read")
        return {key: value for key, value in vars(self).items() if key not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def kernel_for(self, member: DeltaLinear, x: Tensor) -> str | None:
        """Return what `choose` picks if it runs, without gradients, on all members where x is."""
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        kernel = choose(x.device)
        if kernel == TRITON:
            k, compiling = triton_kernels(), torch.compiler.is_compiling()
            few = compiling or 0 < x.numel() <= k.DECODE_ROWS * x.shape[-1]
            fits = few and x.dtype in k.DECODE_DTYPES
        else:
            fits = x.device.type == "cpu" and x.dtype != torch.float64
            fits = fits and (kernel == NATIVE or self._quick)
            fits = fits and not torch.compiler.is_compiling()
        # a shadow of a member, or a replica of one, has tensors of its own
        if not fits or all(one is not member for one in self.members):
            return None
        for one in self.members:
            held: Any = one._parameters
            weight, v = held["weight"], held["dm_v"]
            if not weight.device == v.device == x.device or weight.dtype != x.dtype:
                return None
        if kernel == NATIVE and not (native.readable(x) and self._native_words()):
            return None
        return kernel

    def output(self, member: DeltaLinear, x: Tensor, kernel: str) -> Tensor:
        """Return the member's output [..., m] for x [..., n]; its first call computes all."""
        compiling = torch.compiler.is_compiling()
        if len(self.members) == 1 and not compiling:
            return self.products(x, kernel)[0]
        thread, state = (0, None) if compiling else (get_ident(), state_of(x))
        key, shared = id(member), self._running.get(thread)
        if shared is not None and not shared.has(key, x, state):
            shared, self.misses = None, self.misses + 1
            if self.misses >= self.most_misses:
                for one in self.members:
                    one.dm_shared_input = SharedInput([one])
        if shared is None:
            made = (
                compiled.layers_of_one_input(x, self.number)
                if compiling
                else self.products(x, kernel)
            )
            outputs = {id(one): y for one, y in zip(self.members, made, strict=True)}
            shared = self._running[thread] = _Shared(x, state, outputs)
        y = shared.outputs.pop(key)
        if not shared.outputs:
            del self._running[thread]
        return y

    def products(self, x: Tensor, kernel: str | None = None) -> list[Tensor]:
        """Return x·Wᵀ + (x·V̂ᵀ)·Ûᵀ + bias [..., m] of every member for x [..., n]."""
        kernel = kernel or choose(x.device)
        held = [member._parameters for member in self.members]
        weights: Any = [parameters["weight"] for parameters in held]
        biases = [parameters["bias"] for parameters in held]
        if kernel == NATIVE:
            outputs = [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
            native.add_products(outputs, x, self._native_words() or ())
            return outputs
        flat = x.reshape(-1, x.shape[-1])
        if kernel == TRITON:
            if not 0 < flat.shape[0] <= triton_kernels().DECODE_ROWS:
                return [member.alone(x) for member in self.members]
            found = self._plan_for(x).linear(flat, weights, biases)
            return [y.view(*x.shape[:-1], y.shape[1]) for y in found]
        packed = [member.packed() for member in self.members]
        with torch.autocast(x.device.type, enabled=False):
            parts = lookup.shared(flat, packed)
            outputs = [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
            return [y.add_(part.view(y.shape)) for y, part in zip(outputs, parts, strict=True)]

    def _native_words(self) -> list[native.Words] | None:
        """The members' factors as the native op takes them, read anew when they have moved."""
        parts = ("dm_v", "dm_u", "dm_ranks")
        held: list[Any] = [member._parameters for member in self.members]
        read = [tensors[part].data_ptr() for tensors in held for part in parts]
        if read != self._read:
            each = [native.words_of(member.packed()) for member in self.members]
            words = [own[0] for own in each if own is not None and own[0] is not None]
            self._words, self._read = words if len(words) == len(each) else None, read
        return self._words

    def _plan_for(self, x: Tensor) -> Any:
        """The members' `DecodePlan`, made anew when their codes have moved or changed."""
        of: list[Any] = [x.dtype]
        for member in self.members:
            of.append(member.__dict__["dm_own"]["weight"])
            held: Any = member._parameters
            of += [state_of(held[name]) for name in ("dm_v", "dm_u", "dm_ranks")]
        if of != self._planned:
            packed = [kernel_packed(member.packed()) for member in self.members]
            k = triton_kernels()
            self._plan = persistent(x.device, lambda: k.DecodePlan(packed, x.dtype))
            self._planned = of
        return self._plan

    def forget(self) -> None:
        """Drop the plan, whose codes would stay on the device that the members leave."""
        self._plan = self._planned = None


def link_shared_inputs(model: nn.Module) -> None:
    """Find the groups of a model; call it again when its layers have changed."""
    layers = [m for m in own_deltas(model).values() if isinstance(m, DeltaLinear)]
    packed = {m: m.packed() for m in layers}
    for member, p in packed.items():
        plain = p.zeros is None and not any(p.group_sizes)
        member.dm_shared_input = SharedInput([member]) if plain else None
    for name, parent in model.named_modules():
        if any(mark in name.lower() for mark in _CROSS):
            continue
        children = dict(parent.named_children())
        for names in NAMES:
            found = [c for n in names if isinstance(c := children.get(n), DeltaLinear)]
            alike = [m for m in found if m in packed and m.dm_shared_input is not None]
            # transformers hands a layer its part of a weight that processes share: its own only
            alike = [m for m in alike if not hasattr(m.weight, "device_mesh")]
            alike = [m for m in alike if packed[m].n == packed[alike[0]].n]
            if len(alike) > 1:
                group = SharedInput(alike)
                for member in alike:
                    member.dm_shared_input = group
