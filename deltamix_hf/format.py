"""The delta repo's file format, version 2 (normative text: docs/format.md).

A delta repo is an ordinary transformers repo whose weight files hold, instead of the model,

- the packed tensors `<module>.dm_v`, `.dm_u`, `.dm_ranks` and, on min-max grids, `.dm_zeros` of
  each compressed matrix,
- the same of fused experts, `<parameter>_dm_v` and so on, and `<parameter>_dm_counts`,
- the overlay: every other tensor that differs from the base, whole, under its model name,
- guards: one-byte tensors that make a loader that ignores the format fail instead of loading noise.

`config.json` names the base, its revision and a fingerprint of each of its tensors. Nothing of the
base is stored. This is the only module that knows names, headers and fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import DeltaMixError
from .packed import PARTS, parts
from .packed_experts import EXPERT_PARTS, expert_parts

PREFIX = "dm_"
ROWS = "dm_rows"  # rows of an embedding or head that the base has not, [rows, n]
GUARD_SEPARATOR = ":"
GUARD = (torch.uint8, (1,))  # dtype and shape of a guard
_EXPERT_PART = re.compile(rf"(.+)_{PREFIX}({'|'.join(EXPERT_PARTS)})")
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_DIMENSIONS = 16
_MAX_EXTENT = 2**63  # of offsets, in bytes; torch's own limit
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype name, shape and absolute byte range in `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def placeholder(self) -> torch.Tensor:
        """A meta tensor of this shape and dtype.

        Raises:
            DeltaMixError: a dtype no tensor of ours has.
        """
        if self.dtype not in _DTYPES:
            raise DeltaMixError(f"a tensor of dtype {self.dtype}: the file is damaged")
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")


def read_header(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Tensor name -> TensorInfo of one safetensors file, read from its header alone.

    Raises:
        DeltaMixError: not a safetensors file, truncated, with a name twice, or with byte ranges
            that do not fill the file one after the other.
    """
    file = os.fspath(file)
    try:
        size = os.path.getsize(file)
        if size < 8:  # a pipe too, which would keep us waiting
            raise ValueError("it is shorter than the length of a header")
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length), object_pairs_hook=_without_twice)
        infos = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            infos[name] = _tensor_info(file, name, entry, 8 + length, size)
        _check_ranges(infos, 8 + length, size)
        with safe_open(file, framework="pt"):  # reads the header too, with checks of its own
            return infos
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        SafetensorError,
    ) as error:
        raise DeltaMixError(f"{file} is not a sound safetensors file: {error}") from error


def _tensor_info(file: str, name: str, entry: dict[str, Any], data: int, size: int) -> TensorInfo:
    """One header entry, checked; `data` is where the file's tensor bytes begin."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"tensor {name} has shape {list(shape)} and offsets [{start}, {end}]")
    if not isinstance(dtype, str) or not data + start <= data + end <= size:
        raise ValueError(f"tensor {name} lies outside the file")
    # Dimensions beside a 0 take no bytes; torch still multiplies them.
    if len(shape) > _MAX_DIMENSIONS or 16 * math.prod(max(d, 1) for d in shape) >= _MAX_EXTENT:
        raise ValueError(f"tensor {name} has an absurd shape of {len(shape)} dimensions")
    if dtype in _DTYPES and end - start != _DTYPES[dtype].itemsize * math.prod(shape):
        raise ValueError(f"tensor {name}, {dtype} {list(shape)}, cannot have {end - start} bytes")
    return TensorInfo(file, dtype, shape, data + start, data + end)


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ on which of two equal keys counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_ranges(infos: Mapping[str, TensorInfo], start: int, end: int) -> None:
    """Refuse tensors that share bytes, and bytes of no tensor, as the safetensors library does."""
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != start:
            raise ValueError(f"tensor {name} does not begin where the one before it ends")
        start = info.end
    if start != end:
        raise ValueError(f"{end - start} bytes at its end belong to no tensor")


def read_tensor(info: TensorInfo, name: str) -> torch.Tensor:
    """The tensor that is called `name` in its file, on the CPU."""
    with safe_open(info.file, framework="pt") as handle:
        return handle.get_tensor(name)


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, TensorInfo]:
    """`read_header` over all shards of a checkpoint.

    Raises:
        DeltaMixError: a shard is not sound, or two hold the same tensor.
    """
    infos: dict[str, TensorInfo] = {}
    for file in files:
        found = read_header(file)
        if twice := sorted(infos.keys() & found.keys()):
            raise DeltaMixError(f"{twice[0]} is in {infos[twice[0]].file} and again in {file}")
        infos |= found
    return infos


_READ = 1 << 18  # at once; of pieces of 4 MB the allocator kept 11 MB for good


def fingerprint(info: TensorInfo) -> str:
    """SHA-256 (first 32 hex digits) of a stored tensor: its dtype, shape and raw bytes."""
    digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
    with open(info.file, "rb") as handle:
        handle.seek(info.start)
        left = info.end - info.start
        while left > 0 and (chunk := handle.read(min(left, _READ))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()[:32]


def fingerprints(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Fingerprint of every tensor, in threads (hashing releases the GIL).

    About 0.9 CPU seconds per GB on an AMD EPYC core.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(infos, pool.map(fingerprint, infos.values()), strict=True))


def check_base(
    recorded: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    where: str,
    measure: Callable[[Mapping[str, TensorInfo]], Mapping[str, str]] = fingerprints,
) -> None:
    """Refuse a base whose tensors are not the very ones the delta was made against.

    `measure` gives fingerprints; one that remembers spares a second delta the hashing.

    Raises:
        DeltaMixError: names the first tensors that are missing or changed.
    """
    if not recorded:
        raise DeltaMixError(
            "the delta repo's config.json holds no base_fingerprints; re-make the delta"
        )
    missing = [name for name in recorded if name not in base]
    if missing:
        raise DeltaMixError(
            f"wrong base: {where} lacks {len(missing)} tensors the delta needs, first "
            f"{missing[0]!r}; give the right base as DeltaMixConfig(base_model=...)"
        )
    found = measure({name: base[name] for name in recorded})
    changed = [name for name in recorded if found[name] != recorded[name]]
    if changed:
        raise DeltaMixError(
            f"wrong base: {len(changed)} of {len(recorded)} tensors of {where} differ from the "
            f"base the delta was made from, first {changed[0]!r}; the base changed or is another "
            "model. Give the right one as DeltaMixConfig(base_model=..., base_revision=...)"
        )


def packed_part(name: str) -> tuple[str, str, str] | None:
    """What a tensor's name says: what it is packed for, "." or "_" (an expert's), and which part.

    `model.q_proj`, "." and `v` for `model.q_proj.dm_v`; None for what is no packed tensor.
    """
    module, _, leaf = name.rpartition(".")
    if leaf.startswith(PREFIX) and leaf.removeprefix(PREFIX) in PARTS:
        return module, ".", leaf.removeprefix(PREFIX)
    found = _EXPERT_PART.fullmatch(name)
    return (found[1], "_", found[2]) if found else None


def packed_names(
    names: Iterable[str], gaussian: bool, expected: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """Packed modules, and packed 3-D parameters, by tensor names; incomplete sets are refused.

    `gaussian`: the codebook, which has no zero points. `expected`: matrices that must be there.

    Raises:
        DeltaMixError: a matrix is missing, lacks one of its tensors, or has one of the other
            codebook.
    """
    wanted = {".": set(parts(gaussian)), "_": set(expert_parts(gaussian))}
    found: dict[str, dict[str, set[str]]] = {".": {}, "_": {}}
    for name in names:
        if place := packed_part(name):
            owner, joint, part = place
            found[joint].setdefault(owner, set()).add(part)
    absent = sorted(
        name
        for name in expected
        if name not in found["."] and name.rpartition(".")[0] not in found["_"]
    )
    if absent:
        raise DeltaMixError(
            f"the delta repo lacks the packed matrix {absent[0]}: the file is incomplete"
        )
    for joint, owners in found.items():
        for owner, present in owners.items():
            if missing := sorted(wanted[joint] - present):
                raise DeltaMixError(
                    f"the delta repo lacks {owner}{joint}{PREFIX}{missing[0]}: the file is "
                    "incomplete"
                )
            if surplus := sorted(present - wanted[joint]):
                raise DeltaMixError(
                    f"the delta repo holds {owner}{joint}{PREFIX}{surplus[0]}, which its codebook "
                    "has not: weights and config.json do not fit"
                )
    return list(found["."]), list(found["_"])


def guard_names(weights: Sequence[str], base_model_prefix: str) -> list[str]:
    """Names of the guards; `weights` are the matrices read from the base, in the model's order.

    transformers strips "<prefix><any character>" from a key when the rest is a model key, so stock
    loading maps "<prefix>:<weight>" onto the real weight and stops on the shape mismatch [1], while
    the colon keeps the guard from being a real key of any repo. The guarded weight is one of the
    base model, not of a head that other classes lack; one guard is for classes whose keys have the
    prefix, the other for those without (AutoModel).
    """
    if not weights:
        return []
    inside = f"{base_model_prefix}."
    weight = next((name for name in weights if name.startswith(inside)), weights[0])
    inner = weight.removeprefix(inside)
    return [f"{base_model_prefix}{GUARD_SEPARATOR}{key}" for key in (inner, inside + inner)]


def _counted(name: str, matrices: Container[str]) -> bool:
    """Whether a tensor's elements are among those of a matrix that differs: rows added to it."""
    module, _, leaf = name.rpartition(".")
    return leaf == ROWS and module in matrices


def is_guard(name: str) -> bool:
    return GUARD_SEPARATOR in name


def reference_bytes(
    matrices: Mapping[str, tuple[int, ...]], overlay: Mapping[str, tuple[int, ...]]
) -> int:
    """bf16 bytes of every tensor that differs from the base, from the shapes of what is stored."""
    whole = [shape for name, shape in overlay.items() if not _counted(name, matrices)]
    return 2 * sum(math.prod(shape) for shape in [*matrices.values(), *whole])


def header_bytes(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], total: int) -> int:
    """Upper bound of a safetensors file's header for these tensors with `total` data bytes.

    Shapes may be upper bounds too: more digits only make the header longer.
    """
    offsets = [total, total]
    header = {
        name: {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        for name, (dtype, shape) in shapes.items()
    }
    entries = len(json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")))
    return 8 + -(-entries // 8) * 8


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All safetensors files of a delta repo, sorted: what "bytes on disk" counts."""
    return sorted(Path(folder).glob("*.safetensors"))


KINDS = ("payload", "scales", "metadata", "overlay")  # of bytes; together they are all


@dataclass(frozen=True)
class SizeReport:
    """True bytes of a delta repo's weight files, split by kind.

    `total` = payload + scales + metadata + overlay, and equals the files' sizes; metadata is
    headers, guards, per-rank widths and experts' counts. `reference` is the bf16 bytes of all that
    differs.
    """

    payload: int
    scales: int
    metadata: int
    overlay: int
    reference: int

    @property
    def total(self) -> int:
        return self.payload + self.scales + self.metadata + self.overlay

    @property
    def ratio(self) -> float:
        return self.total / self.reference if self.reference else 0.0

    @property
    def fraction(self) -> str:
        """The ratio as people say it: "1/16.0"."""
        return f"1/{1 / self.ratio:.1f}" if self.ratio else "nothing"


def size_report(
    folder: str | os.PathLike[str], weights: Mapping[str, tuple[int, ...]]
) -> SizeReport:
    """Measure a delta repo on disk.

    `weights`: name -> shape [m, n] of every compressed matrix, those too that kept no rank
    (`experts.compressed_shapes`).
    """
    files = weight_files(folder)
    infos = read_headers(files)
    kinds = dict.fromkeys(("payload", "scales", "overlay"), 0)
    overlay: dict[str, tuple[int, ...]] = {}
    widths = 0
    for name, info in infos.items():
        place, size = packed_part(name), info.end - info.start
        part = place and place[2]
        if part in ("v", "u"):
            kinds["payload"] += size
        elif part == "ranks":
            widths += 2 * info.shape[0]
            kinds["scales"] += size - 2 * info.shape[0]
        elif part == "zeros":
            kinds["scales"] += size
        elif part == "counts":
            widths += size
        elif not is_guard(name):
            kinds["overlay"] += size
            overlay[name] = info.shape
    on_disk = sum(file.stat().st_size for file in files)
    headers = on_disk - sum(kinds.values()) - widths
    reference = reference_bytes(weights, overlay)
    return SizeReport(metadata=headers + widths, reference=reference, **kinds)
