"""Many fine-tunes on one base in one process: load, choose for a call or a row, disable, delete.

`model.load_delta(repo, "math")` works on any model whose weights are a base's, and on a model
loaded from a delta repo, whose own delta is then called "default". Names and behaviour are those of
PEFT's adapters: `set_delta` chooses one for all calls, and
`model(..., delta_names=[...])` or `model.generate(..., delta_names=[...])` for each row of a call,
None or "__base__" being the base. Names given to a call win over what is set or disabled.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint.base import BaseCheckpoint, resolve_base, same
from ..checkpoint.delta_repo import StoredDelta, find_delta, read_again, read_delta
from ..constants import FETCHED
from ..errors import DeltaMixError
from ..nn.delta_module import DeltaModule, own_deltas
from ..nn.layers import change_class, detach_all, tied_tensors, weight_of
from ..nn.tensor_parallel import is_sharded
from ..ops.dispatch import TRITON, choose, triton_kernels
from ..quantization.packed_delta import PackedDelta
from ..storage.headers import check_base
from ..storage.untrusted_paths import read_beside
from .config_mismatch import chat_template, differing, differing_generation, warning
from .end_tokens import Ends, repo_ends
from .grouped import refresh, table_bytes
from .layers import PARAMETRIZED, RoutedDeltas, make_routed
from .model import part_class, routed_model_class
from .pool import Pool
from .routing import BASE, Route, Router, named_route, row_delta
from .row_layout import observe

_ROUNDED = torch.bfloat16, torch.float16
DEFAULT = "default"  # what PEFT calls the first one


class DeltaManager:
    """The deltas of one model."""

    progress_bytes = 100_000_000  # from here on, loading shows its progress: a second from a disk

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.router = Router()
        self.router.model = model
        self.pool = Pool(self._place, self._remove, self._sizes, self._by_kernels)
        self.enabled = True
        self.ends: Ends = {}
        self._modules: dict[str, set[DeltaModule]] = {}  # resident delta -> what it changes
        quantizer: Any = getattr(model, "hf_quantizer", None)
        files = getattr(quantizer, "base_files", None)  # of a delta repo
        how, place = dict(FETCHED.get(model, {})), model.name_or_path
        how["revision"] = getattr(model.config, "_commit_hash", None) or how.get("revision")
        found = files or resolve_base(place, how["revision"], how)[0]
        self._base = BaseCheckpoint(found, model)
        self._comparable = quantizer is None or bool(files)  # another's changes the weights
        how.pop("variant", None)
        self._template = chat_template(partial(read_beside, place, "", kwargs=how, links=True))
        own = self._detached_own(quantizer) if files else None
        self._layouts, self._read_directly = observe(model)
        if own is not None:
            self.pool.add(DEFAULT, *own)
            self.choose(DEFAULT)
        else:
            self._check_unedited(1)
        for module in model.modules():
            # Now, not with the first delta that changes it: what torch.compile has seen must keep
            # its class.
            if _maps_one_tensor(module):
                self._routed(module, set())

    # Loading and deleting

    def load(self, repo: str, name: str, verify_tensors: bool = True, **kwargs: Any) -> None:
        """Read a delta repo, check that it belongs to this base, and add it as `name`."""
        if not isinstance(name, str) or not name or name == BASE:
            raise DeltaMixError(f"{name!r} cannot name a delta; give a text other than {BASE!r}")
        self.pool.check_new(name)
        files, config, theirs = find_delta(repo, kwargs)
        config.verify_tensors = verify_tensors
        beside = partial(read_beside, repo, files[0], kwargs=kwargs)
        if found := self._differing(beside, theirs):
            warnings.warn(warning(repo, found), stacklevel=3)
        base, ends = self._base, repo_ends(beside, theirs)
        self._check_unedited(64)
        check_base(config.base_fingerprints, base.infos, "the model's base", base.fingerprints)
        read = partial(read_delta, repo, files, config, base.keys)
        first = read()
        base.check_all_pinned(first.overlay, config.base_fingerprints)
        only = self.pool.add(name, first, partial(read_again, read, first.content))
        self.ends.pop(name, None)  # of an earlier one
        if ends is not None:
            self.ends[name] = ends
        if only:
            self.choose(name)

    def _differing(self, read: Callable[[str], Any], config: dict[str, Any]) -> dict[str, Any]:
        """Name what a delta repo sets otherwise and cannot have beside the base: (ours, its)."""
        found, theirs = differing(self.model.config, config), read("generation_config.json")
        ours = getattr(self.model, "generation_config", None)
        if ours is not None and theirs is not None:
            found |= differing_generation(ours, theirs)
        if (template := chat_template(read)) not in (None, self._template):
            found["chat_template"] = self._template, template
        return found

    def _place(self, name: str, stored: StoredDelta) -> None:
        """Put a delta's tensors beside the base's, on the base's devices."""
        touched, slots = self._modules.setdefault(name, set()), self.router.slots
        if not slots.take(name) and choose(self.model.device) == TRITON:
            raise DeltaMixError(
                f"the kernels' tables hold {slots.size} deltas on the device at a time: delete "
                "some, or bound them with set_delta_memory"
            )
        matrices: Iterable[tuple[str, PackedDelta]] = stored.packed.items()
        if stored.nbytes >= self.progress_bytes:
            matrices = logging.tqdm(matrices, desc=f"Loading delta {name}", unit="matrix")
        for weight, packed in matrices:
            if packed.counts is not None:  # a 3-D parameter of experts
                owner, leaf, own = self._owner(weight)
                experts: Any = self._routed(owner, touched).packed.setdefault(name, {})
                experts[leaf] = packed.to(own.device)
                continue
            twins = {m: weight_of(m).device for m in self._twins(weight)}
            placed = {device: packed.to(device) for device in set(twins.values())}  # shared
            for module, device in twins.items():
                self._routed(module, touched).packed[name] = placed[device]
        for tensor_name, value in stored.overlay.items():
            for twin in tied_tensors(self.model, tensor_name):
                owner, leaf, own = self._owner(twin)
                overlay = self._routed(owner, touched).overlay.setdefault(name, {})
                if twin in self._read_directly and not (leaf == "weight" and owner.dm_visible):
                    raise DeltaMixError(
                        f"the model reads {twin} past its layer, where no delta beside a base can "
                        f"replace it: load {stored.source!r} by itself, with from_pretrained"
                    )
                value = overlay[leaf] = value.to(own.device, own.dtype)  # twins share it
                whole, _, made = twin.partition(f".{PARAMETRIZED}.")
                if made:  # a weight is computed of it: whose it is runs by row
                    module = self.model.get_submodule(whole)
                    mark = self._routed(module, touched).overlay.setdefault(name, {})
                    mark.setdefault(PARAMETRIZED, value)
        for module in touched:
            refresh(module, name)

    def _remove(self, name: str) -> None:
        for module in self._modules.pop(name, ()):
            module.dm_row_deltas.packed.pop(name, None)
            module.dm_row_deltas.overlay.pop(name, None)
            refresh(module, name)
        self.router.slots.pop(name, None)

    def _sizes(self, stored: StoredDelta) -> tuple[int, int]:
        """Bytes on the device: of the tensors alone, and with what the kernels' tables hold."""
        whole, tables = stored.overlay.items(), 0
        plain = sum(t.numel() * self._owner(name)[2].element_size() for name, t in whole)
        for weight, packed in stored.packed.items():
            plain += sum(packed.nbytes.values())
            experts = packed.counts is not None
            twins = [None] if experts else self._twins(weight)
            tables += sum(table_bytes(m, own) for m in twins for own in packed.split() if own)
        return plain, plain + tables

    def _by_kernels(self) -> bool:
        model = self.model
        return choose(model.device) == TRITON and model.dtype in triton_kernels().DECODE_DTYPES

    def _owner(self, name: str) -> tuple[nn.Module, str, Tensor]:
        """Find a tensor of the base by its name: its module, its name there, and itself."""
        owner, _, leaf = name.rpartition(".")
        module = self._base.keys.modules[owner]
        return module, leaf, weight_of(module, leaf)

    def _twins(self, name: str) -> list[nn.Module]:
        """Find a module by its name, and those whose weight is tied to its weight."""
        tensors = tied_tensors(self.model, f"{name}.weight")
        return [self._base.keys.modules[tensor.removesuffix(".weight")] for tensor in tensors]

    def _routed(self, module: nn.Module, touched: set[DeltaModule]) -> RoutedDeltas:
        """Return the named deltas of a module, which is noted in `touched`."""
        if not isinstance(module, DeltaModule):
            module = make_routed(module, self.router, self._layouts.get(module, ""))
        touched.add(module)
        return module.dm_row_deltas

    def delete(self, name: str) -> None:
        """Forget a delta once no call uses it; it is no longer active."""
        if name == self.pool.active:
            self.choose(None)
        self.pool.discard(name)

    # Choosing

    def choose(self, name: str | None) -> None:
        """Set the delta of all calls that name none; None is the base.

        Raises DeltaMixError for more than one name, or if no delta of that name is loaded.
        """
        self.pool.activate(row_delta(name))
        self.enable(self.enabled)

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        self.router.set_default(Route([self.pool.active if enabled else None]))

    def recomputed(self, plain: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `plain`, a checkpoint function, so that `function` finds its deltas later too."""
        route = self.router.route

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.pool.holding(route.names), self.router.using(route, recomputed=True):
                return function(*args, **kwargs)

        return plain(again, *args, **kwargs)

    def remember_checkpointed(self) -> None:
        """Make gradient checkpointing, where it is on, run layers with the deltas they had."""
        for module in self.model.modules():
            plain = module.__dict__.get("_gradient_checkpointing_func")
            if plain is not None and getattr(plain, "func", None) != self.recomputed:
                module.__dict__["_gradient_checkpointing_func"] = partial(self.recomputed, plain)

    @contextmanager
    def using(self, names: str | Sequence[str | None]) -> Iterator[None]:
        """Context manager: calls that name no deltas use these, in captured graphs too."""
        route, router = named_route(names), self.router
        assert route is not None
        # its turn first: who waits for it must not hold deltas
        with router.turn, self.pool.holding(route.names), router.announcing(route):
            yield

    # What it needs to know

    @torch.no_grad()
    def _check_unedited(self, step: int) -> None:
        """Compare every `step`-th row of the model's tensors with the base's files.

        All rows before the first delta, in 0.5 to 0.9 s a GB on an EPYC core, about what hashing
        takes; before each further one every 64th, in 0.05 to 0.08 s. Not compared are tensors of
        other shapes, of a base that another library quantized and, after the first time, those
        made of several. Raises DeltaMixError if one was edited: an adapter merged, say.
        """
        base, tied = self._base, self.model.all_tied_weights_keys
        names = [name for name in base.keys.state if name in base and name not in tied]
        for name in names if self._comparable else ():
            tensor = self._owner(name)[2]  # wherever adapters have put it
            if not (step == 1 or base.is_plain(name)) or not tensor.ndim:
                continue
            stored = base.read(name)
            if tensor.is_floating_point() and tensor.shape == stored.shape:
                ours, theirs = tensor[::step], stored[::step]
                # which may have been rounded on its way here
                if not any(same(ours, theirs.to(d)) for d in (stored.dtype, *_ROUNDED)):
                    raise DeltaMixError(
                        f"{name} of the model is not what the base's files hold: it was edited in "
                        "memory (an adapter merged, weights scaled?); load the base anew, or "
                        "compress what you have as a fine-tune of it"
                    )

    @torch.no_grad()
    def _detached_own(self, quantizer: Any) -> tuple[StoredDelta, Any]:
        """Make the model of a delta repo its base; return its own delta, and how to read it."""
        model, base, config = self.model, self._base, quantizer.quantization_config
        where = config.base_model, quantizer.base_files[0]
        beside = partial(read_beside, *where, kwargs=config.base_kwargs, links=True)
        if (ends := repo_ends(beside, beside("config.json") or {})) is not None:
            self.ends[None] = ends
        tied = set(model.all_tied_weights_keys)
        packed = {
            name if leaf == "weight" else f"{name}.{leaf}": module.packed(leaf)
            for name, module in own_deltas(model).items()
            for leaf in module.dm_own
            if f"{name}.{leaf}" not in tied
        }
        detach_all(model)
        overlay: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if name not in tied and name in base and not same(tensor, value := base.read(name)):
                overlay[name] = tensor.clone()
                tensor.copy_(value)
        source, read = str(model.name_or_path), None
        stored = StoredDelta(packed, overlay, config.base_fingerprints, source)
        if quantizer.pre_quantized and os.path.isdir(source):
            again = partial(read_delta, source, quantizer.delta_files, config, base.keys)
            read = partial(read_again, again, quantizer.content)
        return stored, read


def manager_of(model: PreTrainedModel) -> DeltaManager:
    """Return the deltas of a model; the first call makes the model ready for them.

    Raises DeltaMixError if parts of the model are offloaded or in other processes.
    """
    if "dm_deltas" not in model.__dict__:
        with _MAKING:  # threads that come first together share one
            if "dm_deltas" not in model.__dict__:
                _make(model)
    return model.__dict__["dm_deltas"]


_MAKING = RLock()


def _make(model: PreTrainedModel) -> None:
    if is_sharded(model):
        raise DeltaMixError(
            "the model is shared out among processes and cannot take several deltas in; load "
            "it without tp_plan, or one delta repo by itself with from_pretrained"
        )
    if any(t.device.type == "meta" for t in model.state_dict().values()):
        raise DeltaMixError(
            "parts of the model are offloaded; load it whole to serve several deltas from it"
        )
    if wrapped := [n for n, m in model.named_modules() if type(m).__module__.startswith("peft.")]:
        raise DeltaMixError(
            f"an adapter has replaced {wrapped[0]}: load deltas first, and give the model adapters "
            "afterwards"
        )
    deltas = DeltaManager(model)
    deltas.remember_checkpointed()
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model:
            change_class(part, part_class(type(part)))
            part.__dict__["dm_whole"] = deltas
    change_class(model, routed_model_class(type(model), DEFAULT in deltas.pool.entries))
    model.__dict__["dm_deltas"] = deltas


def _maps_one_tensor(module: nn.Module) -> bool:
    """Whether it is a layer that a delta may change and that maps one tensor to another."""
    own = list(module.parameters(recurse=False))
    if not own or any(module.children()) or not all(p.is_floating_point() for p in own):
        return False
    _, *taken = inspect.signature(type(module).forward).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in taken) == 1
