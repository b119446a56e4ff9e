"""Writing a delta repo: what is stored, all or nothing, with the files beside the weights.

transformers writes straight into the target folder and knows nothing of the tokenizer. A delta
model therefore carries its own `save_pretrained`: transformers writes into a hidden sibling folder,
the fine-tune's other files are copied along (`companions`), and only then are all renamed into
place.
"""

import inspect
import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.base import BaseCheckpoint, guard_names, untied_state
from ..checkpoint.delta_repo import model_fingerprint
from ..checkpoint.tensor_diff import differences
from ..config import DeltaMixConfig, overlay_dtype
from ..constants import BESIDE, FETCHED, NOTICE
from ..errors import DeltaMixError, first_line
from ..hub.push import push_folder
from ..nn.delta_module import DeltaModule, check_frozen, joined_class, own_deltas
from ..nn.layers import change_class, resizes
from ..nn.tensor_parallel import wanted, whole
from ..storage.durable import check_output, written_whole
from ..storage.headers import TensorInfo, fingerprints, read_headers
from ..storage.names import GUARD, packed_part
from ..storage.sizes import weight_files
from .companions import copy_companions

# Options of `push_to_hub` that `save_pretrained(push_to_hub=True)` passes on; its token is both's.
HUB_OPTIONS = inspect.signature(push_folder).parameters.keys() - {"folder", "base", "token"}

Places = dict[str, TensorInfo]  # parameter -> where files hold it


@torch.no_grad()
def delta_state_dict(
    model: PreTrainedModel, base: BaseCheckpoint, places: Places
) -> dict[str, Tensor]:
    """Collect what a delta repo stores: packed tensors, overlay and guards, under model names.

    Of processes that share a model all must call this; packed parameters of which each holds a part
    are read again from their `places`. Raises a DeltaMixError if a base weight was edited (merged
    adapters), weights are offloaded, or the delta repo to read from is gone.
    """
    tied = model.all_tied_weights_keys.items()
    for twin, source in ((t, s) for t, s in tied if packed_part(t) is None):
        both = [model.get_parameter_or_buffer(name) for name in (twin, source)]
        here = both[0] is not both[1] and all(t.device.type != "meta" for t in both)
        if here and not both[0].equal(both[1]):
            raise DeltaMixError(
                f"{twin} was tied to {source} and no longer is (peft's modules_to_save?): what is "
                "tied is stored once; call model.dequantize(), untie the config, and save that"
            )
    stored: dict[str, Tensor] = {}
    frozen = {f"{n}.{leaf}" for n, m in own_deltas(model).items() for leaf in m.dm_own}
    frozen |= {f"{n}.weight" for n, m in model.named_modules() if "dm_edited" in vars(m)}

    def unpacked() -> Iterator[tuple[str, Tensor]]:
        """Yield what is to be compared with the base; packed tensors are stored on the way."""
        for name, tensor in untied_state(model).items():
            if tensor.device.type == "meta":
                raise DeltaMixError(
                    f"{name} is offloaded and cannot be saved from here; load without offload"
                )
            if packed_part(name):
                stored[name] = _read_whole(places[name]) if name in places else whole(tensor)
            elif name in base or not base.supplies(name):
                yield name, whole(tensor)

    for found in differences(model, base, unpacked()):
        if found.kind != "same" and found.name in frozen:
            raise DeltaMixError(
                f"the frozen base weight {found.name} was edited (merged adapters?); save the "
                "dense model instead: model.dequantize(), then save_pretrained"
            )
        if found.kind != "same":
            stored[found.name] = found.ours
    return _completed(model, base, stored)


def stored_without_base(
    model: PreTrainedModel, base: BaseCheckpoint, overlay: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Collect what `delta_state_dict` does of a model whose base weights are nowhere."""
    packed = {name: t for name, t in untied_state(model).items() if packed_part(name)}
    return _completed(model, base, packed | overlay)


def _completed(
    model: PreTrainedModel, base: BaseCheckpoint, stored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Cast what is stored whole, as the method says, and add the guards."""
    quantizer: Any = model.hf_quantizer
    for name, tensor in stored.items():
        if packed_part(name) is None:
            dtype = overlay_dtype(tensor.dtype, quantizer.quantization_config)
            stored[name] = tensor.to(dtype)
    dtype, shape = GUARD
    guards = guard_names(model, base, stored)
    return stored | {name: torch.zeros(shape, dtype=dtype) for name in guards}


def _read_whole(info: TensorInfo) -> Tensor:
    try:
        return info.read()
    except OSError as error:
        raise DeltaMixError(
            "a model shared out among processes is saved from the delta repo it was loaded "
            f"from, which is gone: {first_line(error)}"
        ) from error


class _Frozen:
    def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
        """Set as `nn.Module.requires_grad_`; DeltaMixError if true: packed factors are frozen."""
        return cast(Any, super()).requires_grad_(check_frozen(self, requires_grad))


class DeltaModel(_Frozen):
    """What a model with a delta of its own does in another way than its class, which comes next."""

    @classmethod
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` of the class without these methods."""
        return cls.dm_plain_class.from_pretrained(*args, **kwargs)

    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        """Count as `PreTrainedModel.num_parameters` what the fine-tune has, not packed factors."""
        count: int = cast(Any, super()).num_parameters(only_trainable, exclude_embeddings)
        packed = (t.numel() for name, t in self.named_parameters() if packed_part(name))
        return count if only_trainable else count - sum(packed)

    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as `PreTrainedModel.save_pretrained`, complete and atomic.

        Raises:
            DeltaMixError: the folder cannot be written, or holds a whole model; nothing is left
                behind.
        """
        target = Path(save_directory).absolute()
        hub = {k: kwargs.pop(k) for k in HUB_OPTIONS if k in kwargs}
        alone = _adapter_alone(self)
        quantizer: Any = self.hf_quantizer
        if not alone:
            check_output(target)
        with written_whole(target) as staging:
            cast(Any, super()).save_pretrained(staging, **kwargs)
            if (staging / "config.json").exists() and not alone:  # one process of several writes it
                source = self.config.name_or_path
                known = {k: v for k, v in FETCHED.get(self, {}).items() if k in BESIDE}
                known["token"] = kwargs.get("token") or known.get("token")
                copy_companions(source, staging, **known, revision=quantizer.commit)
                _complete_config(staging / "config.json")
        if wanted(self):
            torch.distributed.barrier()  # what the others read next is there
        if not alone:
            quantizer.store.remove()
        if push_to_hub:
            _check_one_process(self)
            push = self.push_to_hub if alone else partial(push_folder, target)
            if not alone:
                hub.setdefault("trust_remote_code", _runs_own_code(self))
            push(hub.pop("repo_id", target.name), token=kwargs.get("token"), **hub)

    def push_to_hub(
        self: Any, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
    ) -> str:
        """Push as `PreTrainedModel.push_to_hub`, with a model card made from what was measured.

        `options` are `push_folder`'s. With an adapter on top only that is pushed, as elsewhere.

        Raises:
            DeltaMixError: the base is a local folder, which nobody else could load.
        """
        if _adapter_alone(self):
            return cast(Any, super()).push_to_hub(repo_id, max_shard_size=max_shard_size, **options)
        _check_one_process(self)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            options.setdefault("trust_remote_code", _runs_own_code(self))
            return push_folder(Path(folder), repo_id, **options)

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse to resize, which makes new modules and so would drop the delta unseen.

        Raises:
            DeltaMixError: the embeddings carry a packed delta.
        """
        ends = (self.get_input_embeddings(), self.get_output_embeddings())
        packed = any(isinstance(module, DeltaModule) for module in ends)
        if packed and resizes(self, *args, **kwargs):
            raise DeltaMixError(
                "the embeddings carry a packed delta and cannot be resized; resize the fine-tune "
                "before compressing it, or call model.dequantize() first"
            )
        return cast(Any, super()).resize_token_embeddings(*args, **kwargs)


class DeltaPart(_Frozen):
    """What a part of such a model, a model of its own kind, does in another way than its class."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a delta repo of a part could not be loaded."""
        raise DeltaMixError(
            "a part of a model with a delta cannot be saved by itself: save the whole model, or "
            "call its dequantize() first"
        )


def add_methods(model: PreTrainedModel) -> None:
    """Put `DeltaModel` before the model's class, and `DeltaPart` before those of its parts."""
    for module in model.modules():
        # The model itself too if nothing is packed: what differs is stored whole, or nothing does.
        if module is model or (isinstance(module, PreTrainedModel) and own_deltas(module)):
            more = DeltaModel if module is model else DeltaPart
            if not isinstance(module, more):
                change_class(module, joined_class(type(module), (more, type(module))))


def remove_methods(model: PreTrainedModel) -> None:
    """Restore the classes of the model and its parts."""
    for module in model.modules():
        if isinstance(module, (DeltaModel, DeltaPart)):
            change_class(cast(Any, module), cast(Any, module).dm_plain_class)


def _complete_config(path: Path) -> None:
    """Record the fingerprints of what was saved in config.json.

    And have transformers stop with a line that names this package, where it is not installed.
    """
    config = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": NOTICE}
    infos = read_headers(weight_files(path.parent))
    settings = config["quantization_config"]
    settings["tensor_fingerprints"] = fingerprints(infos)
    settings["settings_fingerprint"] = DeltaMixConfig.from_dict(settings).decoding_fingerprint()
    settings["model_fingerprint"] = model_fingerprint(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_one_process(model: PreTrainedModel) -> None:
    if wanted(model):
        raise DeltaMixError(
            "processes that share a model cannot push it: save_pretrained(folder) in all of them, "
            "then 'deltamix push folder'"
        )


def _runs_own_code(model: PreTrainedModel) -> bool:
    """Tell whether the model's class is of its repo's own code, which the caller has trusted."""
    return model._auto_class is not None


def _adapter_alone(model: PreTrainedModel) -> bool:
    """Tell whether a PEFT adapter was added: then transformers saves that, and nothing else."""
    return getattr(model, "_hf_peft_config_loaded", False)
