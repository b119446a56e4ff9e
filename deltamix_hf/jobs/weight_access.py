"""Where a fine-tune's weights are while it is compressed: in memory, or in their files.

`LazyWeights` runs a model that is built with its buffers but without its weights. Every block of
its chain, and every other module that owns parameters, gets its weights when it is called and
loses them when it is done, so one block at a time is in memory. What a backward pass needs of a
weight is read again then. Where a matrix has been compressed, its weight is the base's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """Build a model in its config's dtype, its parameters without values.

    Raises DeltaMixError if the class refuses the config.
    """
    make: Any = cls
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = make._from_config(config, dtype=config.dtype or torch.float32)
    except Exception as error:  # of whatever type the model's own code raises for odd sizes
        raise DeltaMixError(f"config.json makes no {cls.__name__}: {first_line(error)}") from error
    return model.requires_grad_(False).eval()


class LazyWeights:
    """Weights of a model, as `unloaded` makes it, which has them while its modules run on `device`.

    They are read from `tuned`, or from `base` once `put_base` was called; `overlay` is in memory
    all the time, by name, and may be changed there.
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
        # By block, or another module with parameters: modules inside, what it has, running calls.
        self._owners: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
        self._taken: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        self._calls = Counter[nn.Module]()
        blocks = {block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m}
        inside: tuple[str, ...] = ()  # prefixes of names in blocks
        for name, buffer in model.named_buffers():
            value = tuned.read(name).to(buffer.dtype) if name in tuned else buffer
            buffer.data = value.to(device)
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            if module in blocks:
                inside += (f"{name}.",)
                self._add(module, list(module.named_modules(prefix=name)))
            elif module._parameters:
                self._add(module, [(name, module)])

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

    def _add(self, module: nn.Module, owners: list[tuple[str, nn.Module]]) -> None:
        self._owners[module] = owners
        module.register_forward_pre_hook(lambda module, args: self._take(module))
        module.register_forward_hook(
            lambda module, args, output: self._release(module), always_call=True
        )

    def _take(self, module: nn.Module) -> None:
        self._calls[module] += 1
        if self._calls[module] > 1:
            return
        taken = self._taken[module] = []
        for name, owner in self._owners[module]:
            for leaf, empty in owner._parameters.items():
                if empty is None or empty.device.type != "meta":
                    continue  # packed factors
                full = f"{name}.{leaf}".lstrip(".")
                value = self.read(full).to(self.device, empty.dtype).contiguous()
                self._addresses[value.untyped_storage().data_ptr()] = full
                taken.append((owner, leaf, empty))
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _release(self, module: nn.Module) -> None:
        self._calls[module] -= 1
        if self._calls[module]:
            return
        for owner, leaf, empty in self._taken.pop(module):
            held = owner._parameters[leaf]
            assert held is not None
            self._addresses.pop(held.untyped_storage().data_ptr(), None)
            owner._parameters[leaf] = empty


Weights = LoadedWeights | LazyWeights
