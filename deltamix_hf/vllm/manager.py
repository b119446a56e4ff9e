"""Many deltas beside one base in a vLLM server, where it keeps LoRAs otherwise.

To vLLM a delta is an adapter: `--lora-modules name=repo`, `/v1/load_lora_adapter`, and `model` in a
request name it, the scheduler mixes adapters in a batch, and the prefix cache keeps them apart by
name and path. What a worker does with an adapter is ours: packed as on disk, beside the base.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker import lora_model_runner_mixin as runner

from ..checkpoint.base import resolve_base
from ..checkpoint.delta_repo import find_delta
from ..constants import QUANT_METHOD
from ..errors import DeltaMixError
from .batch import Batch, keep_finite
from .beside import Beside, build
from .layers import deltas_of
from .loader import BaseRepo

_vllms_own = runner.LRUCacheWorkerLoRAManager  # keeps adapters as dense slots


class _Accepted(NamedTuple):
    """A delta in host memory, its name, and the paths that it was loaded from."""

    beside: Beside
    name: str
    paths: set[str]


class VllmDeltaManager:
    """What vLLM's model runner asks of its LoRA manager, for packed deltas.

    It is made with the configuration of a base that is served with `--quantization deltamix
    --enable-lora`, and the device of its weights. Raises DeltaMixError if the model would run
    compiled, or as CUDA graphs, or take embeddings for prompts.
    """

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device):
        compilation = vllm_config.compilation_config
        if {compilation.mode.name, compilation.cudagraph_mode.name} != {"NONE"}:
            raise DeltaMixError(
                "which rows take which delta is decided as the model runs: add --enforce-eager"
            )
        if vllm_config.model_config.enable_prompt_embeds:
            raise DeltaMixError(
                "a delta may change the embedding, which prompts of embeddings go round: leave out "
                "--enable-prompt-embeds"
            )
        self.device = device
        self.batch = Batch()
        self.accepted: dict[int, _Accepted] = {}  # by id, in host memory
        self.names: OrderedDict[int, None] = OrderedDict()  # on the device, used longest ago first
        self.pinned: set[int] = set()
        self.dummies: set[int] = set()  # vLLM's, to measure memory with
        self.capacity: int = vllm_config.lora_config.max_cpu_loras
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.room = memory // 2 // vllm_config.parallel_config.tensor_parallel_size
        # Of all that the prefix cache may know: an id, or name and path -> hash of the files.
        self._contents: dict[int | tuple[str, str], str] = {}
        self._prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        """Find the model's base on disk; the model stays as it is."""
        wanted, load = vllm_config.model_config, vllm_config.load_config
        files, _ = resolve_base(wanted.model, wanted.revision, {"cache_dir": load.download_dir})
        self.base = BaseRepo(files, wanted, wanted.model)
        self.model = model
        for _, deltas in deltas_of(model).values():
            deltas.batch = self.batch
        for module in model.modules():
            if isinstance(module, AttentionLayerBase):
                keep_finite(module, self.batch)
        return model

    # Adapters

    def add_adapter(self, request: Any) -> bool:
        """Read a delta repo and put it beside the base; again only if it is to be reloaded.

        Raises DeltaMixError for no delta repo of this base, or one that cannot share it; all is as
        it was then. What was accepted once is not read again.
        """
        number, inplace = request.lora_int_id, request.load_inplace
        paths = {request.lora_path}
        if number in self.accepted:
            self._check_named(request)
            if not inplace:
                self._bring([number])
                return True
            paths |= self.accepted[number].paths
        found = self._read(request)
        self._check_contents(request, found.contents)
        kept = {each.beside.contents: each.beside for each in self.accepted.values()}
        found = kept.setdefault(found.contents, found)
        if (used := sum(each.nbytes for each in kept.values())) > self.room:
            raise DeltaMixError(
                f"with {request.lora_path!r} the deltas in host memory would take "
                f"{used / 1e9:.1f} GB of the {self.room / 1e9:.1f} GB they may: remove some "
                "(remove_lora), or start the server anew"
            )
        ready = found.to(self.device)
        self._take_off(number)
        self.accepted[number] = _Accepted(found, request.lora_name, paths)
        self._put(number, ready, ())
        if self._prefix_cache:
            self._contents[number] = self._contents[_place_of(request)] = found.contents
        return True

    def _check_named(self, request: Any) -> None:
        """Refuse another name or path for a number in use; in place another path may come."""
        number, known = request.lora_int_id, self.accepted[request.lora_int_id]
        other_path = request.lora_path not in known.paths and not request.load_inplace
        if request.lora_name != known.name or other_path:
            raise DeltaMixError(
                f"delta {number} is {known.name!r} from {sorted(known.paths)[0]!r}, not "
                f"{request.lora_name!r} from {request.lora_path!r}: give each its own number"
            )

    def _check_contents(self, request: Any, found: str) -> None:
        """Refuse other contents where the prefix cache may know some, and running requests do."""
        for key in (request.lora_int_id, _place_of(request)):
            if self._prefix_cache and self._contents.get(key, found) != found:
                raise DeltaMixError(
                    f"{request.lora_path!r} has changed since it was loaded as "
                    f"{request.lora_name!r}, or is not what delta {request.lora_int_id} was, and "
                    "vLLM's prefix cache may hold what that made of prompts: load it under "
                    "another name and number"
                )

    def _read(self, request: Any) -> Beside:
        files, settings, _ = find_delta(request.lora_path, {})
        delta = self.base.read(request.lora_path, files, settings)
        for name, tensor in delta.overlay.items():
            if tensor.ndim > 1:
                raise DeltaMixError(
                    f"{request.lora_path!r} stores {name} {list(tensor.shape)} whole, which cannot "
                    "lie beside the base's: serve it by itself"
                )
        tensors, method = sorted((delta.content or {}).items()), settings.method
        contents = repr((method.codebook, method.group_size, tensors))
        found = hashlib.sha256(contents.encode()).hexdigest()
        return build(self.model, self.base, delta, method.group_size, found)

    def _bring(self, numbers: Collection[int]) -> None:
        """Have these accepted deltas on the device, and mark them as used."""
        for number in numbers:
            if number in self.names:
                self.names.move_to_end(number)
            else:
                self._put(number, self.accepted[number].beside.to(self.device), numbers)

    def _put(self, number: int, ready: Beside, needed: Collection[int]) -> None:
        """Put it beside the model; others make room, `needed` and pinned ones last."""
        others = sorted(self.names, key=lambda old: (old in needed, old in self.pinned))
        for old in others[: max(0, len(others) + 1 - self.capacity)]:
            self._take_off(old)
        self.names[number] = None
        ready.put(number, self.batch)

    def _take_off(self, number: int) -> None:
        if number in self.names:
            del self.names[number]
            self.accepted[number].beside.take_off(number)

    def remove_adapter(self, number: int) -> bool:
        """Forget a delta."""
        if number not in self.accepted:
            return False
        self._take_off(number)
        self.pinned.discard(number)
        del self.accepted[number]
        return True

    def remove_all_adapters(self) -> None:
        """Forget all; after a dummy run of vLLM's only what that took for deltas."""
        if self.dummies:
            self.dummies.clear()
            return
        for number in list(self.accepted):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Keep a delta on the device as long as others can make room."""
        if number in self.accepted:
            self._bring([number])
            self.pinned.add(number)
        return number in self.accepted

    def list_adapters(self) -> set[int]:
        """Ids of all that are on the device."""
        return set(self.names) | self.dummies

    # Batches

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """Load these, and let rows follow `mapping` from now on.

        An error here ends vLLM's engine; those that `add_adapter` took come from memory.
        """
        wanted = [request for request in requests if request.lora_int_id not in self.dummies]
        for request in wanted:
            if request.lora_int_id in self.accepted:
                self._check_named(request)
            else:
                self.add_adapter(request)
        numbers = {request.lora_int_id for request in wanted}
        if mapping is not None:  # of two deltas with one name vLLM names one in `requests`
            named = {*mapping.index_mapping, *mapping.prompt_mapping}
            numbers |= {number for number in self.accepted if number in named}
        self._bring(numbers)
        if mapping is not None:
            known = self.names.keys() | self.dummies
            self.batch.set(mapping.index_mapping, mapping.prompt_mapping, known)

    # What vLLM measures memory with: deltas take none beyond their own

    dummy_lora_cache = staticmethod(nullcontext)

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        self.dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        return default

    def supports_tower_connector_lora(self) -> bool:
        return False


def _place_of(request: Any) -> tuple[str, str]:
    return request.lora_name, request.lora_path


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
