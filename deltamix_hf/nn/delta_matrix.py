"""What layers with one weight share: others see that with the delta, and may make it dense."""

import copy
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import DeltaMixError
from . import compiled
from .delta_module import DeltaModule, merged_name
from .visible_weight import VisibleWeight


def weight_of(module: nn.Module, leaf: str = "weight") -> Tensor:
    """Return a weight of `module`, of one with deltas the base's: `getattr` may see another."""
    known = module._parameters if leaf in module._parameters else vars(module)
    return cast(Tensor, known[leaf] if leaf in known else getattr(module, leaf))


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` an instance of `cls`, for accelerate's hooks too: they keep a forward."""
    object.__setattr__(module, "__class__", cls)
    if "_old_forward" in module.__dict__:
        object.__setattr__(module, "_old_forward", MethodType(cls.forward, module))


def detach(module: DeltaModule) -> None:
    """Drop the layer's own delta and restore the plain class (weights untouched)."""
    for name in module.delta_parameters():
        delattr(module, name)
    for leaf in module.dm_own:
        module._buffers.pop(merged_name(leaf), None)
    for name in ("dm_own", "dm_number", "dm_shared_input", "dm_twins", "dm_visible"):
        module.__dict__.pop(name, None)
    change_class(module, module.dm_plain_class)


class DeltaMatrix(DeltaModule):
    """A layer whose `weight` others see with the delta, once `dm_visible` is set."""

    dm_visible = False
    dm_twins: list[Any]  # all layers that share its weight and delta, itself too

    def _stored(self, leaf: str) -> Any:
        """Return the base's tensor; AttributeError before there is one."""
        own = self._parameters if leaf in self._parameters else vars(self)
        if leaf not in own:
            raise AttributeError(leaf)
        return own[leaf]

    @property
    def weight(self) -> Any:
        """Return the base's parameter, or a `VisibleWeight` if a delta changes it."""
        base = self._stored("weight")
        if base is None or not self.dm_visible or base.device.type == "meta":
            return base
        if torch.compiler.is_compiling():
            return compiled.weight(base, self.dm_number)
        if self.dm_row_deltas is not None and not self.dm_row_deltas.changes_weight():
            return base
        return VisibleWeight.whole(self, base)

    @weight.setter
    def weight(self, value: Any) -> None:
        """Take a tensor that is no parameter: a replica's (`nn.DataParallel`), with its factors."""
        if self._parameters:
            self._check_whole()
        vars(self)["weight"] = value

    @property
    def bias(self) -> Any:
        """Return the base's parameter, or a `VisibleWeight` if a named delta has another."""
        base, deltas = self._stored("bias"), self.dm_row_deltas
        seen = self.dm_visible and deltas is not None and not torch.compiler.is_compiling()
        if base is None or not seen or not deltas.changes_bias():
            return base
        return VisibleWeight.whole(self, base, "bias")

    @bias.setter
    def bias(self, value: Any) -> None:
        vars(self)["bias"] = value

    def _check_whole(self) -> None:
        if "dm_own" in vars(self) and "weight" not in self._parameters:
            raise DeltaMixError(
                "the weight of a layer with a delta cannot be computed of other tensors (pruning, "
                "torch.nn.utils.weight_norm): call model.dequantize() first"
            )

    def register_parameter(self, name: str, param: Any) -> None:
        known = getattr(param, "dm_base", param) if name in ("weight", "bias") else param
        super().register_parameter(name, known)

    def __delattr__(self, name: str) -> None:
        if name == "weight" and "dm_own" in vars(self):
            self.become_dense()  # and plain: `torch.nn.utils.parametrize` goes on with that
            delattr(self, name)
        else:
            super().__delattr__(name)

    # peft stores and loads whole what it has wrapped, embeddings and heads, as `base_layer`

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix.endswith("base_layer.") and self.dm_visible:
            for leaf in ("weight", "bias"):
                if f"{prefix}{leaf}" in destination:
                    destination[f"{prefix}{leaf}"] = self.in_use(leaf).detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}weight")
        if found is not None and self.dm_visible and "weight" in self._parameters:
            own = weight_of(self)
            if found.shape == own.shape and not torch.equal(found.to(own), own):
                self.become_dense()  # and plain
        load: Any = super() if isinstance(self, DeltaMatrix) else self
        load._load_from_state_dict(state_dict, prefix, *rest)

    def in_use(self, leaf: str = "weight") -> Tensor:
        """Return the weight by which the layer multiplies now, or the bias that it adds.

        Raises:
            DeltaMixError: rows take different ones, or the base's was taken away.
        """
        if leaf == "bias":
            bias, deltas = weight_of(self, leaf), self.dm_row_deltas
            return bias if deltas is None else deltas.bias(self, bias)
        self._check_whole()
        if self.dm_row_deltas is not None:
            return self.dm_row_deltas.weight(self)
        return self.merged_weight() if "dm_own" in vars(self) else weight_of(self)

    def become_dense(self) -> None:
        """Merge the delta into the base's parameter, for all twins, which are plain layers then.

        Raises:
            DeltaMixError: named deltas are beside the weight.
        """
        if self.dm_row_deltas is not None:
            raise DeltaMixError(
                "a layer with named deltas cannot be changed or copied by itself: load the delta "
                "repo alone with from_pretrained, or delete the deltas first"
            )
        weight: Any = weight_of(self)
        weight.data.copy_(self.merged_weight())  # views of it stay so
        settled = VisibleWeight.settled(weight)
        for twin in self.dm_twins:
            group: Any = getattr(twin, "dm_shared_input", None)
            for member in group.members if group else ():
                member.dm_shared_input = type(group)([member])
            detach(twin)
            twin._parameters["weight"] = settled
            vars(twin)["dm_edited"] = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as part of a model; a layer copied by itself is dense, so that it can be trained."""
        if memo:
            return super().__deepcopy__(memo)
        made = type(self).__new__(type(self))
        others = ("dm_twins", "dm_shared_input")
        state = {key: value for key, value in vars(self).items() if key not in others}
        made.__setstate__(copy.deepcopy(state) | {"dm_twins": [made]})
        made.become_dense()
        return made
