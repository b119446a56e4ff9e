"""`DeltaMixConfig`: everything a user can choose, validated, and what a delta repo remembers.

One object plays two roles, as in every transformers quantization backend. Passed to
`from_pretrained` with a plain fine-tune it says how to compress; read back from `config.json` it
says what the repo holds. `base_model`, `base_revision`, `base_kwargs`, `dequantize` and
`verify_tensors` may be given when a delta repo is loaded (the base moved, a dense model is wanted).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .constants import QUANT_METHOD
from .errors import DeltaMixError
from .method import DEFAULT_METHOD, SWITCHES, Method, find_method, is_number, require, require_int

FORMAT_VERSION = 2
DEFAULT_RATIO = 1 / 16
# Never written to config.json, and no file may set them: for who loads or compresses to choose.
_NOT_SERIALISED = {"base_kwargs", "checkpoint_dir", "base_given", "dequantize", "verify_tensors"}
_TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


class DeltaMixConfig(QuantizationConfigMixin):
    """How to compress a fine-tune against its base, and where that base is.

    Args:
        base_model: path or Hub id of the frozen base (safetensors).
        base_revision: branch, tag or commit of the base; compressing pins it to the commit.
        method: `"deltamix-kl"` (least change of the model's output distribution), `"deltamix"`
            (error table, 0/1 program, target correction), `"delta-come"` (fixed bands of 8, 3
            and 2 bits), or a `Method` with other switches.
        ratio: all bytes of the delta's weight files / bf16 bytes of every tensor that differs from
            the base. Default 1/16.
        bits_per_weight: the same budget in bits per weight that differs (`ratio = bits / 16`).
        budget_bytes: the same budget in bytes. Give at most one of the three.
        f_max: at most this many distinct widths per matrix (`allocation="matrix"`; `None`: no
            limit).
        allocation_gap: with `allocation="global"`, stop at this relative gap between the error and
            a proven bound on the least possible (`None`: 1e-6).
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
        verify_tensors: compare the delta's own tensors with their fingerprints when loading, 0.9 s
            for a GB of delta on an EPYC core.
        base_kwargs: how to fetch the base (`token`, `cache_dir`, `subfolder`, `variant`, ...).
        checkpoint_dir: folder in which compression keeps what it has finished. An interrupted one
            that is started again with the same arguments goes on from there; saving removes it.
        format_version: version of the delta repo's format.
        calibration_source: written by compression: what the calibration data was, in words.
        base_fingerprints: written by compression: base tensor name -> fingerprint.
        tensor_fingerprints: written by saving: stored tensor name -> fingerprint.
        settings_fingerprint: written by saving: `decoding_fingerprint` as it was then.
        model_fingerprint: written by saving: `delta_repo.model_fingerprint` as it was then.
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

    base_given: bool  # by the user, not by a delta repo's config.json

    def __init__(
        self,
        /,  # a key "self" of a config.json is an unknown option like any other
        base_model: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        method: Method | str = DEFAULT_METHOD,
        ratio: float | None = None,
        bits_per_weight: float | None = None,
        budget_bytes: int | None = None,
        f_max: int | None = None,
        allocation_gap: float | None = None,
        calibration: Sequence[str] | torch.Tensor | str | None = None,
        num_samples: int = 128,
        seq_length: int = 2048,
        seed: int = 0,
        modules_to_not_convert: Sequence[str] | None = None,
        dequantize: bool = False,
        verify_tensors: bool = True,
        base_kwargs: dict[str, Any] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        format_version: int = FORMAT_VERSION,
        calibration_source: str | None = None,
        base_fingerprints: dict[str, str] | None = None,
        tensor_fingerprints: dict[str, str] | None = None,
        settings_fingerprint: str | None = None,
        model_fingerprint: str | None = None,
        measured: dict[str, float] | None = None,
        errors: dict[str, float] | None = None,
        dropped: Sequence[str] | None = None,
        overlay: Sequence[str] | None = None,
        resized: dict[str, list[int]] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ):
        if switches := sorted(unknown.keys() & set(SWITCHES)):
            raise DeltaMixError(
                f"{switches} are switches of the method: give them as DeltaMixConfig(method="
                f"dataclasses.replace(METHODS[{DEFAULT_METHOD!r}], {switches[0]}=...))"
            )
        if unknown:
            raise DeltaMixError(
                f"DeltaMixConfig has no option {sorted(unknown)}; see help(DeltaMixConfig)"
            )
        if quant_method != QUANT_METHOD:
            raise DeltaMixError(
                f"quant_method is {quant_method!r}, DeltaMixConfig reads {QUANT_METHOD!r} only"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.base_model, self.base_given = _path("base_model", base_model), base_model is not None
        self.base_revision, self.base_kwargs = base_revision, _mapping("base_kwargs", base_kwargs)
        self.method, self.f_max, self.allocation_gap = find_method(method), f_max, allocation_gap
        self.ratio, self.bits_per_weight, self.budget_bytes = ratio, bits_per_weight, budget_bytes
        self.calibration, self.calibration_source = calibration, calibration_source
        self.num_samples, self.seq_length, self.seed = num_samples, seq_length, seed
        self.modules_to_not_convert = _names("modules_to_not_convert", modules_to_not_convert)
        self.dequantize, self.checkpoint_dir = dequantize, _path("checkpoint_dir", checkpoint_dir)
        self.format_version, self.verify_tensors = format_version, verify_tensors
        self.base_fingerprints = _mapping("base_fingerprints", base_fingerprints, _is_text)
        self.tensor_fingerprints = _mapping("tensor_fingerprints", tensor_fingerprints, _is_text)
        self.settings_fingerprint = settings_fingerprint
        self.model_fingerprint = model_fingerprint
        self.measured = _mapping("measured", measured, _is_finite)
        self.errors = _mapping("errors", errors, is_number)
        self.dropped, self.overlay = _names("dropped", dropped) or [], _names("overlay", overlay)
        self.resized = _mapping("resized", resized, _are_two_counts)
        self._check_options()
        self._check_budget()
        self._check_calibration()

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What a `config.json` says; the method's switches stand beside the other options.

        Raises DeltaMixError if a value is out of range, and for options that only users may give.
        We never write these. A repo that has them was edited, and would choose which proxy, cache
        or token its base is fetched with.
        """
        options = _mapping("quantization_config", config_dict)
        if options.get("dequantize") is False:
            del options["dequantize"]  # written by earlier versions
        if theirs := sorted(_NOT_SERIALISED & options.keys()):
            raise DeltaMixError(
                f"config.json sets {theirs[0]}, which is for who loads it to choose: remove it "
                f"from the file, and pass DeltaMixConfig({theirs[0]}=...) if you want it"
            )
        given = {name: options.pop(name, None) for name in SWITCHES}
        switches = {name: value for name, value in given.items() if value is not None}
        options["method"] = replace(find_method(options.get("method", DEFAULT_METHOD)), **switches)
        found = super().from_dict(options, return_unused_kwargs, **kwargs)
        (found[0] if return_unused_kwargs else found).base_given = False
        return found

    def _check_options(self) -> None:
        texts = "base_revision", "calibration_source", "settings_fingerprint", "model_fingerprint"
        for name in texts:
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise DeltaMixError(f"{name} is a {type(value).__name__}; it must be a text")
        if self.f_max is not None:
            require_int("f_max", self.f_max, 1)
            if self.method.allocation != "matrix":
                raise DeltaMixError(
                    "f_max limits the widths of allocation='matrix', "
                    f"this is {self.method.allocation!r}"
                )
        if (gap := self.allocation_gap) is not None:
            fits = is_number(gap) and 0 < gap <= 1
            require("allocation_gap", gap, fits, "above 0 and at most 1")
        counts = {"num_samples": 1, "seq_length": 1, "seed": 0, "format_version": 1}
        for name, least in counts.items():
            require_int(name, getattr(self, name), least)
        if self.format_version > FORMAT_VERSION:
            raise DeltaMixError(
                f"the repo is in format {self.format_version}, this deltamix_hf reads up to "
                f"{FORMAT_VERSION}; upgrade with `pip install -U deltamix-hf`"
            )

    def _check_budget(self) -> None:
        budgets = {n: getattr(self, n) for n in ("ratio", "bits_per_weight", "budget_bytes")}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) > 1:
            raise DeltaMixError(f"{' and '.join(given)} all set the budget; give only one of them")
        if not given:
            self.ratio = DEFAULT_RATIO
        for name, value in given.items():
            fits = is_number(value) and 0 < value < math.inf
            require(name, value, fits, "a finite number above 0")
            if name == "budget_bytes":
                require(name, value, value == int(value), "a whole number")
            else:
                most, what = (1, " (1/16 is the default)") if name == "ratio" else (16, " (bf16)")
                require(name, value, value <= most, f"at most {most}{what}")

    def _check_calibration(self) -> None:
        data = self.calibration
        if isinstance(data, torch.Tensor):
            if data.ndim != 2 or data.dtype not in _TOKEN_DTYPES or data.numel() == 0:
                raise DeltaMixError(
                    f"calibration tensor has shape {list(data.shape)} and dtype {data.dtype}; "
                    "give non-empty integer token ids [samples, length]"
                )
        elif isinstance(data, str):
            if not data:
                raise DeltaMixError("calibration is an empty name; use None for data-free")
        elif data is not None:
            if not isinstance(data, Sequence) or not all(isinstance(t, str) for t in data):
                raise DeltaMixError(
                    f"calibration is a {type(data).__name__}; give a list of texts, a token id "
                    "tensor, the name of a data set, or None for data-free"
                )
            if not any(text.strip() for text in data):
                raise DeltaMixError("calibration holds no text; use None for data-free compression")

    def budget(self, reference_bytes: int) -> int:
        """Bytes allowed for the weight files, given the bf16 bytes of all tensors that differ."""
        if self.budget_bytes is not None:
            return int(self.budget_bytes)
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight / 16 * reference_bytes)
        return int((self.ratio or DEFAULT_RATIO) * reference_bytes)

    def decoding_fingerprint(self) -> str:
        """Hash what says how stored tensors are decoded: SHA-256, its first 32 hex digits."""
        facts = [self.method.group_size, self.method.codebook, self.resized]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user may override when loading an existing delta repo."""
        names = ["dequantize", "base_kwargs", "verify_tensors"]
        if self.base_model is not None:
            names += ["base_model", "base_revision", "base_given"]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """All that is set, JSON-ready: of the method its name and each switch.

        Texts and token ids are not written: `calibration_source` describes them.
        """
        out = {k: v for k, v in vars(self).items() if v is not None and k not in _NOT_SERIALISED}
        if not isinstance(self.calibration, str):
            out.pop("calibration", None)
        out |= {**vars(self.method), "method": self.method.name}
        del out["name"]
        return json.loads(json.dumps(out))

    def __repr__(self) -> str:
        records = (
            "base_fingerprints",
            "tensor_fingerprints",
            "errors",
            "dropped",
            "overlay",
            "resized",
        )
        shown = {k: v for k, v in self.to_dict().items() if k not in records}
        return f"DeltaMixConfig {json.dumps(shown, indent=2)}"


def _path(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise DeltaMixError(f"{name} is a {type(value).__name__}; it must be a path or Hub id")
    return None if value is None else os.fspath(value)


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(n, str) for n in value):
        raise DeltaMixError(f"{name} must be a list of module names")
    return list(value)


def _mapping(
    name: str, value: Any, fits: Callable[[Any], bool] = lambda item: True
) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise DeltaMixError(f"{name} is a {type(value).__name__}; it must be a dict")
    for key, item in (value or {}).items():
        if not _is_text(key) or not fits(item):
            raise DeltaMixError(f"{name} says {item!r} of {key!r}: config.json is damaged")
    return dict(value or {})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e300  # of ints, too, which no float holds


def _are_two_counts(value: Any) -> bool:
    counts = value if isinstance(value, list | tuple) and len(value) == 2 else [None]
    return all(type(count) is int and count > 0 for count in counts)


def overlay_dtype(dtype: torch.dtype, config: DeltaMixConfig) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is stored whole."""
    wide = dtype in (torch.float32, torch.float64)
    return torch.bfloat16 if wide and config.method.bf16_overlay else dtype
