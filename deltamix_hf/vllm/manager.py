"""Many deltas beside one base in a vLLM server, where it keeps LoRAs otherwise.

To vLLM a delta is an adapter: `--lora-modules name=repo`, `/v1/load_lora_adapter`, and `model` in a
request name it, the scheduler mixes adapters in a batch, and the prefix cache keeps them apart by
name and path. What a worker does with an adapter is ours: packed as on disk, beside the base.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.v1.worker import lora_model_runner_mixin as runner

from ..checkpoint.base import resolve_base
from ..checkpoint.delta_repo import StoredDelta, find_delta
from ..constants import QUANT_METHOD
from ..errors import DeltaMixError
from .batch import Batch, by_row
from .layers import deltas_of
from .loader import BaseRepo, check_arrived, finding_places

_vllms_own = runner.LRUCacheWorkerLoRAManager  # keeps adapters as dense slots


class VllmDeltaManager:
    """What vLLM's model runner asks of its LoRA manager, for packed deltas.

    It is made with the configuration of a base that is served with `--quantization deltamix
    --enable-lora`, and the device of its weights. Raises DeltaMixError if the model would run
    compiled, or as CUDA graphs.
    """

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device):
        compilation = vllm_config.compilation_config
        if {compilation.mode.name, compilation.cudagraph_mode.name} != {"NONE"}:
            raise DeltaMixError(
                "which rows take which delta is decided as the model runs: add --enforce-eager"
            )
        self.device = device
        self.batch = Batch()
        self.names: OrderedDict[int, None] = OrderedDict()  # adapters' ids, used longest ago first
        self.pinned: set[int] = set()
        self.dummies: set[int] = set()  # vLLM's, to measure memory with
        self.capacity: int = vllm_config.lora_config.max_cpu_loras
        self._contents: dict[tuple[str, str], str] = {}  # name and path -> hash of its files
        self._prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        """Find the model's base on disk; the model stays as it is."""
        wanted, load = vllm_config.model_config, vllm_config.load_config
        files, _ = resolve_base(wanted.model, wanted.revision, {"cache_dir": load.download_dir})
        self.base = BaseRepo(files, wanted.hf_config, wanted.model)
        self.model = model
        for _, deltas in deltas_of(model).values():
            deltas.batch = self.batch
        return model

    # Adapters

    def add_adapter(self, request: Any) -> bool:
        """Read a delta repo and put it beside the base; again only if it is to be reloaded.

        Raises DeltaMixError for no delta repo of this base, or one that cannot share it.
        """
        number = request.lora_int_id
        if number in self.names and not request.load_inplace:
            self.names.move_to_end(number)
            return True
        delta, group_size = self._read(request)
        self.remove_adapter(number)
        while len(self.names) >= self.capacity:
            oldest = next((old for old in self.names if old not in self.pinned), None)
            if oldest is None:
                raise DeltaMixError(f"all {self.capacity} deltas are pinned: raise --max-cpu-loras")
            self.remove_adapter(oldest)
        try:
            self._place(number, delta, group_size)
        except BaseException:
            self._remove(number)
            raise
        self.names[number] = None
        return True

    def _read(self, request: Any) -> tuple[StoredDelta, int]:
        files, settings, _ = find_delta(request.lora_path, {})
        delta = self.base.read(request.lora_path, files, settings)
        for name, tensor in delta.overlay.items():
            if tensor.ndim > 1:
                raise DeltaMixError(
                    f"{request.lora_path!r} stores {name} {list(tensor.shape)} whole, which cannot "
                    "lie beside the base's: serve it by itself"
                )
        # Refuse other contents under a name and path that the prefix cache may know.
        tensors, method = sorted((delta.content or {}).items()), settings.method
        contents = repr((method.codebook, method.group_size, tensors))
        found = hashlib.sha256(contents.encode()).hexdigest()
        known = self._contents.setdefault((request.lora_name, request.lora_path), found)
        if self._prefix_cache and known != found:
            raise DeltaMixError(
                f"{request.lora_path!r} has changed since it was loaded as {request.lora_name!r}, "
                "and vLLM's prefix cache may hold what it made of prompts: load it under another "
                "name or from another path"
            )
        return delta, method.group_size

    @torch.no_grad()
    def _place(self, number: int, delta: StoredDelta, group_size: int) -> None:
        whole = self._loaded(self.base.changes(delta))
        check_arrived(self.model, delta)
        for name, value in whole.items():
            owner, _, leaf = name.rpartition(".")
            module: Any = self.model.get_submodule(owner)
            deltas = getattr(module, "deltas", None) if leaf == "bias" else None
            if deltas is not None and not getattr(module, "skip_bias_add", False):
                if not isinstance(module, RowParallelLinear) or module.tp_rank == 0:
                    deltas.biases[number] = value.float() - module.bias.float()
            elif "norm" in type(module).__name__.lower():
                parameter = nn.Parameter(value, requires_grad=False)
                by_row(module, self.batch).setdefault(number, {})[leaf] = parameter
            else:
                raise DeltaMixError(
                    f"the delta changes {name} of a {type(module).__name__}, which cannot differ "
                    "from one row to the next: serve it by itself"
                )
        for layer, deltas in deltas_of(self.model).values():
            if deltas.incoming:
                deltas.requested[number] = deltas.take(layer, group_size, self.device)

    def _loaded(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Let vLLM load these tensors, and return the whole ones by their names in its model.

        Packed tensors are kept by their layers. Whole ones are loaded in the place of the base's,
        taken from there, and the base's put back: so vLLM cuts and joins them as it would.
        """
        small = {n: p for n, p in self.model.named_parameters() if p.ndim == 1 and p.numel()}
        before = {name: parameter.detach().clone() for name, parameter in small.items()}
        try:
            with finding_places(self.model):
                self.model.load_weights(weights)
            return {
                n: p.detach().clone() for n, p in small.items() if not torch.equal(p, before[n])
            }
        finally:
            for name, parameter in small.items():
                parameter.data.copy_(before[name])

    def remove_adapter(self, number: int) -> bool:
        """Forget a delta."""
        if number not in self.names:
            return False
        del self.names[number]
        self.pinned.discard(number)
        self._remove(number)
        return True

    def _remove(self, number: int) -> None:
        for _, deltas in deltas_of(self.model).values():
            deltas.incoming.clear()
            deltas.requested.pop(number, None)
            deltas.biases.pop(number, None)
        for module in self.model.modules():
            module.__dict__.get("dm_overlays", {}).pop(number, None)

    def remove_all_adapters(self) -> None:
        """Forget all, vLLM's dummies too."""
        self.dummies.clear()
        for number in list(self.names):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Keep a delta though others be used later."""
        if number in self.names:
            self.pinned.add(number)
        return number in self.names

    def list_adapters(self) -> set[int]:
        """Ids of all that are loaded."""
        return set(self.names) | self.dummies

    # Batches

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """Load these, and let rows follow `mapping` from now on."""
        wanted = [request for request in requests if request.lora_int_id not in self.dummies]
        for request in wanted:  # first: none of them makes room for another
            if request.lora_int_id in self.names:
                self.names.move_to_end(request.lora_int_id)
        for request in wanted:
            if request.lora_int_id not in self.names:
                self.add_adapter(request)
        if mapping is not None:
            self.batch.set(mapping.index_mapping, mapping.prompt_mapping)

    # What vLLM measures memory with: deltas take none beyond their own

    dummy_lora_cache = staticmethod(nullcontext)

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        self.dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        return default

    def supports_tower_connector_lora(self) -> bool:
        return False


def install() -> None:
    """Make vLLM's model runner ask `_manager` who manages adapters; more than once is harmless.

    `register` lets us come so far only with a version of vLLM that this was tried with.
    """
    runner.LRUCacheWorkerLoRAManager = _manager


def _manager(vllm_config: Any, device: Any, *args: Any) -> Any:
    """Make the adapters' manager of a model: ours for a base with `--quantization deltamix`.

    Raises DeltaMixError for adapters beside a delta repo.
    """
    config = vllm_config.quant_config
    if config is None or config.get_name() != QUANT_METHOD:
        return _vllms_own(vllm_config, device, *args)
    if config.settings is not None:
        raise DeltaMixError(
            "a delta repo is served by itself; for several deltas (--enable-lora) serve their base "
            "with --quantization deltamix, and name this one as an adapter too"
        )
    return VllmDeltaManager(vllm_config, device)
