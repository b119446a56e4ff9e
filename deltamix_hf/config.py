"""`DeltaMixConfig`: everything a user can choose, validated, and what a delta repo remembers.

One object plays two roles, as in every transformers quantization backend. Passed to
`from_pretrained` with a plain fine-tune it says how to compress; read back from `config.json` it
says what the repo holds. `base_model`, `base_revision`, `base_kwargs` and `dequantize` may be
given again when a delta repo is loaded (the base moved, or a dense model is wanted).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .constants import QUANT_METHOD
from .errors import DeltaMixError
from .presets import ALLOCATIONS, CODEBOOKS, PRESETS, SWITCHES, resolve
from .quantization.packed_layout import GROUP_EXPONENTS, GroupSizes

FORMAT_VERSION = 2
DEFAULT_METHOD = "deltamix-kl"
WIDTHS = tuple(range(9))
DEFAULT_RATIO = 1 / 16
# Never written to config.json: run-time only.
_NOT_SERIALISED = {"base_kwargs", "checkpoint_dir", "base_given"}
_LONGEST_GROUP = 2**30
_TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


class DeltaMixConfig(QuantizationConfigMixin):
    """How to compress a fine-tune against its base, and where that base is.

    Args:
        base_model: path or Hub id of the frozen base (safetensors).
        base_revision: branch, tag or commit of the base; compressing pins it to the commit.
        method: `"deltamix-kl"` (least change of the model's output distribution), `"deltamix"`
            (error table, 0/1 program, target correction) or `"delta-come"` (fixed bands of 8, 3
            and 2 bits). A method is a preset of the switches below (`presets.py`).
        ratio: all bytes of the delta's weight files / bf16 bytes of every tensor that differs from
            the base. Default 1/16.
        bits_per_weight: the same budget in bits per weight that differs (`ratio = bits / 16`).
        budget_bytes: the same budget in bytes. Give at most one of the three.
        bits: candidate widths, each 0 to 8; 0 drops a rank.
        f_max: at most this many distinct widths per matrix (`allocation="matrix"`; `None`: no
            limit).
        group_size: weights that share a scale; 0 means one scale per rank vector.
        embedding_group_size: elements of U that share a scale in embeddings, whose rows differ in
            size as tokens differ in use; a power of two from 16, or 0 for as elsewhere.
        whiten: take the SVD of ΔW weighted by the layer's metric instead of ΔW itself.
        fisher: weigh output errors by what they do to the model's predictions.
        delta_metric: the share of both metrics that is taken from ΔW itself, 0 to 1, if
            `calibration` is `None` or `"self"`.
        allocation: `"bands"`, `"matrix"` (each gets the same ratio) or `"global"`.
        split_widths: U and V of a rank may have different widths (`allocation="global"`).
        codebook: `"min-max"` (uniform, with zero points) or `"gaussian"`.
        correct_target: re-fit U to the full ΔW given the rounded V.
        sequential: fit each layer to what the compressed layers before it hand on.
        unbiased_gains: scale ranks so that rounding shrinks nothing.
        drop_penalty: a dropped rank counts as this many times its error (`allocation="global"`).
        tune_steps: steps of tuning the stored scales by KL to the fine-tune; 0 for none.
        bf16_overlay: round tensors that are stored whole to bfloat16.
        calibration: texts, token ids `[samples, length]`, the name of a data set (Hub id, or a
            local `.txt` / `.jsonl` file), or `"self"`: the fine-tune writes them. `None` is
            `"self"` for a causal language model and a method with `fisher`; else the weights alone
            decide.
        num_samples: calibration sequences at most.
        seq_length: tokens per calibration sequence at most.
        seed: order in which calibration texts are drawn.
        modules_to_not_convert: names (or last parts of names) of modules to keep out of the packed
            form; if they differ from the base they are stored whole.
        dequantize: load a delta repo as plain dense modules.
        base_kwargs: how to fetch the base (`token`, `cache_dir`, `local_files_only`, `subfolder`).
        checkpoint_dir: folder in which compression keeps what it has finished. An interrupted one
            that is started again with the same arguments goes on from there; saving removes it.
        format_version: version of the delta repo's format.
        calibration_source: written by compression: what the calibration data was, in words.
        base_fingerprints: written by compression: base tensor name -> fingerprint.
        measured: written by compression: `kl`, nats for each of `positions` predictions, to the
            fine-tune, on calibration texts that tuning has not seen.
        errors: written by compression: module name, or `<parameter>.<expert>` -> relative error
            tr(EᵀE·C)/tr(ΔWᵀΔW·C).
        overlay: written by saving: names of the tensors that are stored whole.
        resized: written by compression: embeddings or heads of another number of rows than in the
            base: module name -> rows of the base and of the fine-tune.
        dropped: written by compression: matrices that differ but were not worth a single rank; they
            stay as they are in the base.

    Raises:
        DeltaMixError: a value is out of range; the message names it.
    """

    bits: list[int]
    group_size: int
    embedding_group_size: int
    whiten: bool
    fisher: bool
    delta_metric: float
    allocation: str
    split_widths: bool
    codebook: str
    correct_target: bool
    sequential: bool
    unbiased_gains: bool
    drop_penalty: float
    tune_steps: int
    bf16_overlay: bool
    base_given: bool  # by the user, not by a delta repo's config.json

    def __init__(
        self,
        /,  # a key "self" of a config.json is an unknown option like any other
        base_model: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        method: str = DEFAULT_METHOD,
        ratio: float | None = None,
        bits_per_weight: float | None = None,
        budget_bytes: int | None = None,
        bits: Sequence[int] | None = None,
        f_max: int | None = None,
        group_size: int | None = None,
        embedding_group_size: int | None = None,
        whiten: bool | None = None,
        fisher: bool | None = None,
        delta_metric: float | None = None,
        allocation: str | None = None,
        split_widths: bool | None = None,
        codebook: str | None = None,
        correct_target: bool | None = None,
        sequential: bool | None = None,
        unbiased_gains: bool | None = None,
        drop_penalty: float | None = None,
        tune_steps: int | None = None,
        bf16_overlay: bool | None = None,
        calibration: Sequence[str] | torch.Tensor | str | None = None,
        num_samples: int = 128,
        seq_length: int = 2048,
        seed: int = 0,
        modules_to_not_convert: Sequence[str] | None = None,
        dequantize: bool = False,
        base_kwargs: dict[str, Any] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        format_version: int = FORMAT_VERSION,
        calibration_source: str | None = None,
        base_fingerprints: dict[str, str] | None = None,
        measured: dict[str, float] | None = None,
        errors: dict[str, float] | None = None,
        dropped: Sequence[str] | None = None,
        overlay: Sequence[str] | None = None,
        resized: dict[str, list[int]] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ):
        if unknown:
            raise DeltaMixError(
                f"DeltaMixConfig has no option {sorted(unknown)}; see help(DeltaMixConfig)"
            )
        if quant_method != QUANT_METHOD:
            raise DeltaMixError(
                f"quant_method is {quant_method!r}, DeltaMixConfig reads {QUANT_METHOD!r} only"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.base_model = _path("base_model", base_model)
        self.base_given = base_model is not None
        self.base_revision = base_revision
        self.method = method
        self.ratio = ratio
        self.bits_per_weight = bits_per_weight
        self.budget_bytes = budget_bytes
        self.f_max = f_max
        if not isinstance(method, str) or method not in PRESETS:
            raise DeltaMixError(f"method is {method!r}; choose one of {list(PRESETS)}")
        given = locals()
        for name, value in resolve(method, {switch: given[switch] for switch in SWITCHES}).items():
            setattr(self, name, value)
        self.calibration = calibration
        self.num_samples = num_samples
        self.seq_length = seq_length
        self.seed = seed
        self.modules_to_not_convert = modules_to_not_convert
        self.dequantize = dequantize
        self.base_kwargs = _mapping("base_kwargs", base_kwargs)
        self.checkpoint_dir = _path("checkpoint_dir", checkpoint_dir)
        self.format_version = format_version
        self.calibration_source = calibration_source
        self.base_fingerprints = _mapping("base_fingerprints", base_fingerprints)
        self.measured = _mapping("measured", measured)
        self.errors = _mapping("errors", errors)
        self.dropped = _names("dropped", dropped or [])
        self.overlay = None if overlay is None else _names("overlay", overlay)
        self.resized = _mapping("resized", resized)
        self._validate()

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What a `config.json` says; options that only the user may give are refused.

        We never write these. A repo that has them was edited, and would choose which proxy, cache
        or token its base is fetched with.

        Raises:
            DeltaMixError: such an option, or a value is out of range.
        """
        if given := sorted(_NOT_SERIALISED & _mapping("quantization_config", config_dict).keys()):
            raise DeltaMixError(
                f"config.json sets {given[0]}, which is for who loads it to choose: remove it from "
                f"the file, and pass DeltaMixConfig({given[0]}=...) if you want it"
            )
        found = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        (found[0] if return_unused_kwargs else found).base_given = False
        return found

    def _validate(self) -> None:
        self._validate_budget()
        self._validate_switches()
        try:
            widths = sorted(set(self.bits))
            bad = [b for b in widths if isinstance(b, bool) or b not in WIDTHS]
        except TypeError:
            widths, bad = [], []
        if bad or not any(widths):
            raise DeltaMixError(
                f"bits is {self.bits!r}; give candidate widths from 0 to 8, at least one above 0"
            )
        self.bits = [int(b) for b in widths]
        if self.f_max is not None:
            _check_int("f_max", self.f_max, 1)
            if self.allocation != "matrix":
                raise DeltaMixError(
                    f"f_max limits the widths of allocation='matrix', this is {self.allocation!r}"
                )
        _check_int("group_size", self.group_size, 0)
        if self.group_size > _LONGEST_GROUP:
            raise DeltaMixError(f"group_size is {self.group_size}; at most 2^30 (0: no groups)")
        _check_int("embedding_group_size", self.embedding_group_size, 0)
        if self.embedding_group_size not in (0, *(2**e for e in GROUP_EXPONENTS)):
            raise DeltaMixError(
                f"embedding_group_size is {self.embedding_group_size}; it must be 0 or a power of "
                f"two from {2 ** GROUP_EXPONENTS[0]} to {2 ** GROUP_EXPONENTS[-1]}"
            )
        _check_int("num_samples", self.num_samples, 1)
        _check_int("seq_length", self.seq_length, 1)
        _check_int("seed", self.seed, 0)
        _check_int("format_version", self.format_version, 1)
        if self.format_version > FORMAT_VERSION:
            raise DeltaMixError(
                f"the repo is in format {self.format_version}, this deltamix_hf reads up to "
                f"{FORMAT_VERSION}; upgrade with `pip install -U deltamix-hf`"
            )
        if self.modules_to_not_convert is not None:
            self.modules_to_not_convert = _names(
                "modules_to_not_convert", self.modules_to_not_convert
            )
        self._validate_records()
        self._validate_calibration()

    def _validate_records(self) -> None:
        for name in ("base_revision", "calibration_source"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise DeltaMixError(f"{name} is a {type(value).__name__}; it must be a text")
        for name, kind in (("base_fingerprints", str), ("measured", float), ("errors", float)):
            for key, value in getattr(self, name).items():
                fits = isinstance(value, str) if kind is str else _is_number(value)
                if not isinstance(key, str) or not fits:
                    raise DeltaMixError(f"{name} says {value!r} of {key!r}: config.json is damaged")

        for key, value in self.resized.items():
            counts = value if isinstance(value, list | tuple) and len(value) == 2 else [None]
            if not isinstance(key, str) or not all(type(c) is int and c > 0 for c in counts):
                raise DeltaMixError(f"resized says {value!r} of {key!r}: config.json is damaged")

    def _validate_switches(self) -> None:
        for name, value in resolve(self.method, self.__dict__).items():
            kind = type(getattr(PRESETS[self.method], name))
            if kind is bool and not isinstance(value, bool):
                raise DeltaMixError(f"{name} is {value!r}; it must be True or False")
        for name, choices in (("allocation", ALLOCATIONS), ("codebook", CODEBOOKS)):
            if getattr(self, name) not in choices:
                raise DeltaMixError(
                    f"{name} is {getattr(self, name)!r}; choose one of {list(choices)}"
                )
        _check_int("tune_steps", self.tune_steps, 0)
        if not _is_number(self.drop_penalty) or not 1 <= self.drop_penalty < math.inf:
            raise DeltaMixError(
                f"drop_penalty is {self.drop_penalty!r}; it must be a finite number of at least 1"
            )
        if not _is_number(self.delta_metric) or not 0 <= self.delta_metric <= 1:
            raise DeltaMixError(f"delta_metric is {self.delta_metric!r}; it must lie in 0 to 1")
        if self.split_widths and self.allocation != "global":
            raise DeltaMixError('split_widths=True needs allocation="global"')
        if self.allocation == "bands" and self.codebook != "min-max":
            raise DeltaMixError('allocation="bands" needs codebook="min-max"')

    def _validate_budget(self) -> None:
        given = [
            n for n in ("ratio", "bits_per_weight", "budget_bytes") if getattr(self, n) is not None
        ]
        if len(given) > 1:
            raise DeltaMixError(f"{' and '.join(given)} all set the budget; give only one of them")
        for name in given:
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value < math.inf
            ):
                raise DeltaMixError(f"{name} is {value!r}; it must be a finite number above 0")
        if not given:
            self.ratio = DEFAULT_RATIO
        if self.ratio is not None and self.ratio > 1:
            raise DeltaMixError(f"ratio is {self.ratio}; at most 1 (1/16 is the default)")
        if self.bits_per_weight is not None and self.bits_per_weight > 16:
            raise DeltaMixError(f"bits_per_weight is {self.bits_per_weight}; at most 16 (bf16)")
        if self.budget_bytes is not None and self.budget_bytes != int(self.budget_bytes):
            raise DeltaMixError(f"budget_bytes is {self.budget_bytes!r}; give a whole number")

    def _validate_calibration(self) -> None:
        data = self.calibration
        if data is None:
            return
        if isinstance(data, torch.Tensor):
            if data.ndim != 2 or data.dtype not in _TOKEN_DTYPES or data.numel() == 0:
                raise DeltaMixError(
                    f"calibration tensor has shape {list(data.shape)} and dtype {data.dtype}; "
                    "give non-empty integer token ids [samples, length]"
                )
        elif isinstance(data, str):
            if not data:
                raise DeltaMixError("calibration is an empty name; use None for data-free")
        elif not isinstance(data, Sequence) or not all(isinstance(t, str) for t in data):
            raise DeltaMixError(
                f"calibration is a {type(data).__name__}; give a list of texts, a token id tensor, "
                "the name of a data set, or None for data-free"
            )
        elif not any(t.strip() for t in data):
            raise DeltaMixError("calibration holds no text; use None for data-free compression")

    def budget(self, reference_bytes: int) -> int:
        """Bytes allowed for the weight files, given the bf16 bytes of all tensors that differ."""
        if self.budget_bytes is not None:
            return int(self.budget_bytes)
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight / 16 * reference_bytes)
        return int((self.ratio or DEFAULT_RATIO) * reference_bytes)

    def group_sizes(self, embedding: bool) -> GroupSizes:
        """Elements of V and of U that share a scale, in an embedding or any other matrix."""
        own = self.embedding_group_size if embedding else 0
        return self.group_size, own or self.group_size

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user may override when loading an existing delta repo."""
        given = {"dequantize": self.dequantize, "base_kwargs": self.base_kwargs}
        if self.base_model is not None:
            given |= {"base_model": self.base_model, "base_revision": self.base_revision}
            given |= {"base_given": self.base_given}
        return given

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Texts and token ids are not written: `calibration_source` describes them."""
        out = {k: v for k, v in self.__dict__.items() if v is not None and k not in _NOT_SERIALISED}
        if not isinstance(self.calibration, str):
            out.pop("calibration", None)
        return json.loads(json.dumps(out))

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        records = ("base_fingerprints", "errors", "dropped", "overlay", "resized")
        shown = {k: v for k, v in self.to_dict().items() if k not in records}
        return f"DeltaMixConfig {json.dumps(shown, indent=2)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DeltaMixError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _path(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise DeltaMixError(f"{name} is a {type(value).__name__}; it must be a path or Hub id")
    return None if value is None else os.fspath(value)


def _names(name: str, value: Any) -> list[str]:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(n, str) for n in value):
        raise DeltaMixError(f"{name} must be a list of module names")
    return list(value)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise DeltaMixError(f"{name} is a {type(value).__name__}; it must be a dict")
    return dict(value or {})


def overlay_dtype(dtype: torch.dtype, config: DeltaMixConfig) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is stored whole."""
    wide = dtype in (torch.float32, torch.float64)
    return torch.bfloat16 if wide and config.bf16_overlay else dtype
