"""Where a fine-tune's weights are while it is compressed: in memory, or in their files.

`LazyWeights` runs a model that is built with its buffers but without its weights. Every block of
its chain, and every other module that owns parameters, gets its weights when it is called and
loses them when it is done, so one block at a time is in memory. What a backward pass needs of a
weight is read again then. Where a matrix has been compressed, its weight is the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.base import BaseCheckpoint
from ..errors import DeltaMixError, first_line
from .instruments import trim_heap


class LoadedWeights:
    """Weights of a model in memory; `device` is where it runs."""

    def __init__(self, model: PreTrainedModel, base: BaseCheckpoint):
        self.model, self.base, self.device = model, base, model.device

    def read(self, name: str) -> Tensor:
        """Read the fine-tune's value of a parameter."""
        return self.model.get_parameter(name).detach()

    def read_expert(self, name: str, number: int) -> Tensor:
        """Read one matrix of a 3-D parameter."""
        return self.read(name)[number]

    @torch.no_grad()
    def put_base(self, name: str, number: int | None = None) -> None:
        """Give a parameter, or one matrix of a 3-D one, the base's value."""
        parameter = self.model.get_parameter(name)
        if number is None:
            parameter.copy_(self.base.read(name))
        else:
            parameter[number].copy_(self.base.read_expert(name, number))


def unloaded(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model in its config's dtype whose parameters have shapes and no values.

    Raises:
        DeltaMixError: the class refuses the config.
    """
    make: Any = cls
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = make._from_config(config, dtype=config.dtype or torch.float32)
    except Exception as error:  # of whatever type the model's own code raises for odd sizes
        raise DeltaMixError(f"config.json makes no {cls.__name__}: {first_line(error)}") from error
    return model.requires_grad_(False).eval()


@dataclass
class _Part:
    """A block with all it holds, or another module with its own parameters alone."""

    owners: list[tuple[str, nn.Module]]  # full names of modules and themselves
    users: int = 0
    taken: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)


class LazyWeights:
    """Weights of a model, as `unloaded` makes it, which has them while its modules run.

    Args:
        tuned: where its weights are.
        base: where they are once `put_base` was called.
        device: where it runs.
        overlay: what is in memory all the time, by name, and may be changed there.

    Raises:
        DeltaMixError: a parameter of the model is in no file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tuned: BaseCheckpoint,
        base: BaseCheckpoint,
        device: torch.device,
        overlay: Mapping[str, Tensor],
    ):
        self.model, self.tuned, self.base, self.device = model, tuned, base, device
        model.dm_device = device  # type: ignore[assignment]
        self.overlay, self.names_of_base = overlay, set[str]()
        self.experts_of_base: dict[str, list[int]] = {}
        self._ties: dict[str, str] = dict(model.all_tied_weights_keys)
        self._addresses: dict[int, str] = {}  # of weights in memory -> their names
        self._parts: dict[nn.Module, _Part] = {}
        for name, _ in model.named_parameters():
            if self._ties.get(name, name) not in tuned:
                raise DeltaMixError(f"the fine-tune's files hold no {name}: they are incomplete")
        named = list(model.named_modules())
        lists = [m for _, m in named if isinstance(m, nn.ModuleList)]
        blocks = {id(block) for blocks in lists for block in blocks}
        prefixes: tuple[str, ...] = ()
        for name, module in named:
            if name.startswith(prefixes or "\n"):
                continue
            if id(module) in blocks:
                prefixes += (f"{name}.",)
                inside = [(n, m) for n, m in named if n == name or n.startswith(f"{name}.")]
                self._add(module, _Part(inside))
            elif module._parameters:
                self._add(module, _Part([(name, module)]))
        for name, module in named:
            for leaf, buffer in module._buffers.items():
                full = f"{name}.{leaf}".lstrip(".")
                if buffer is not None:
                    value = tuned.read(full).to(buffer.dtype) if full in tuned else buffer
                    module._buffers[leaf] = value.to(device)

    def read(self, name: str) -> Tensor:
        """Read the present value of a parameter, on the CPU, in the dtype of its file."""
        name = self._ties.get(name, name)
        if name in self.overlay:
            return self.overlay[name]
        value = (self.base if name in self.names_of_base else self.tuned).read(name)
        for number in self.experts_of_base.get(name, ()):
            value[number] = self.base.read_expert(name, number)
        return value

    def read_expert(self, name: str, number: int) -> Tensor:
        return self.tuned.read_expert(name, number)

    def put_base(self, name: str, number: int | None = None) -> None:
        if number is None:
            self.names_of_base.add(name)
        else:
            self.experts_of_base.setdefault(name, []).append(number)

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Context manager: keep a block's weights in memory."""
        self._take(module)
        try:
            yield
        finally:
            self._release(module)
            trim_heap()

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Context manager: let autograd save names of weights, and read them again backward."""

        def pack(tensor: Tensor) -> Any:
            name = self._addresses.get(tensor.untyped_storage().data_ptr())
            if name is None:
                return tensor
            return name, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, dtype, *place = packed
            return self.read(name).to(self.device, dtype).contiguous().as_strided(*place)

        with saved_tensors_hooks(pack, unpack):
            yield

    def _add(self, module: nn.Module, part: _Part) -> None:
        self._parts[module] = part
        module.register_forward_pre_hook(lambda module, args: self._take(module))
        module.register_forward_hook(
            lambda module, args, output: self._release(module), always_call=True
        )

    def _take(self, module: nn.Module) -> None:
        part = self._parts[module]
        part.users += 1
        if part.users > 1:
            return
        for name, owner in part.owners:
            for leaf, empty in owner._parameters.items():
                if empty is None or empty.device.type != "meta":
                    continue  # packed factors
                full = f"{name}.{leaf}".lstrip(".")
                value = self.read(full).to(self.device, empty.dtype).contiguous()
                self._addresses[value.untyped_storage().data_ptr()] = full
                part.taken.append((owner, leaf, empty))
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _release(self, module: nn.Module) -> None:
        part = self._parts[module]
        part.users -= 1
        if part.users:
            return
        for owner, leaf, empty in part.taken:
            held = owner._parameters[leaf]
            assert held is not None
            self._addresses.pop(held.untyped_storage().data_ptr(), None)
            owner._parameters[leaf] = empty
        part.taken.clear()


Weights = LoadedWeights | LazyWeights
