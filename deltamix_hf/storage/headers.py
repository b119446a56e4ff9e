"""Read and check safetensors headers before any tensor, and fingerprint tensors."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..errors import DeltaMixError

_MAX_DIMENSIONS = 16
LONGEST_NAME = 1000  # characters; transformers' patterns take seconds for one of 100,000
_MAX_EXTENT = 2**63  # of offsets, in bytes; torch's own limit
DTYPE_NAMES = {
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
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype name, shape and absolute byte range in `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def placeholder(self) -> torch.Tensor:
        """Make a meta tensor of this shape and dtype; a DeltaMixError if torch has none such."""
        if self.dtype not in _DTYPES:
            raise DeltaMixError(
                f"{self.name} is a tensor of dtype {self.dtype}: the file is damaged"
            )
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")

    def read(self) -> torch.Tensor:
        """Read the tensor onto the CPU; a DeltaMixError if torch has no such dtype."""
        self.placeholder()
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)


def read_header(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read the tensors of one safetensors file, by name, from its header alone.

    Raises a DeltaMixError unless the file is sound: no name twice, byte ranges that fill the file.
    """
    file = os.fspath(file)
    try:
        if os.path.getsize(file) < 8:  # a pipe too, which would keep us waiting
            raise ValueError("it is shorter than the length of a header")
        with safe_open(file, framework="pt"):  # refuses nearly all that is malformed
            pass
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length), object_pairs_hook=_without_twice)
        header.pop("__metadata__", None)
        infos = {}
        for name, entry in header.items():
            if len(name) > LONGEST_NAME:
                raise ValueError(f"{name[:80]} ... is a name of {len(name)} characters")
            if any(p.isdigit() and not p.isdecimal() for p in name.split(".")):  # such as ²
                raise ValueError(f"{name} has a number in it that is none")
            shape = tuple(entry["shape"])
            extent = math.prod(max(d, 1) for d in shape)  # torch multiplies those beside a 0, too
            if len(shape) > _MAX_DIMENSIONS or 16 * extent >= _MAX_EXTENT:
                raise ValueError(f"tensor {name} has an absurd shape of {len(shape)} dimensions")
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            infos[name] = TensorInfo(name, file, entry["dtype"], shape, start, end)
    except (OSError, ValueError, SafetensorError) as error:
        raise DeltaMixError(f"{file} is not a sound safetensors file: {error}") from error
    return infos


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; readers differ on which of two equal keys counts."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


@contextmanager
def opened(infos: Mapping[str, TensorInfo]) -> Iterator[Callable[[str], torch.Tensor]]:
    """Context manager: a function that reads a tensor by name; the files stay mapped with them.

    It raises a DeltaMixError for a dtype that torch has not.
    """
    with ExitStack() as stack:
        files = {info.file for info in infos.values()}
        handles: dict[str, Any] = {f: stack.enter_context(safe_open(f, "pt")) for f in files}

        def read(name: str) -> torch.Tensor:
            infos[name].placeholder()
            return handles[infos[name].file].get_tensor(name)

        yield read


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, TensorInfo]:
    """Read the headers of all shards, as `read_header`; a DeltaMixError if two hold one tensor."""
    infos: dict[str, TensorInfo] = {}
    for file in files:
        found = read_header(file)
        if twice := sorted(infos.keys() & found.keys()):
            raise DeltaMixError(f"{twice[0]} is in {infos[twice[0]].file} and again in {file}")
        infos |= found
    return infos


_READ = 1 << 18  # at once; of pieces of 4 MB the allocator kept 11 MB for good


def fingerprint(info: TensorInfo) -> str:
    """Hash a stored tensor, dtype, shape and raw bytes: SHA-256, its first 32 hex digits."""
    digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
    with open(info.file, "rb") as handle:
        handle.seek(info.start)
        left = info.nbytes
        while left > 0 and (chunk := handle.read(min(left, _READ))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()[:32]


def fingerprints(infos: Mapping[str, TensorInfo], show: bool = False) -> dict[str, str]:
    """Hash tensors in threads (it releases the GIL), 0.9 s per GB on an EPYC core; `show` a bar."""
    shown: dict[str, Any] = {"desc": "Hashing the base", "unit": "B", "unit_scale": True}
    whole = sum(info.nbytes for info in infos.values())
    found = {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        logging.tqdm(total=whole, disable=not show, **shown) as bar,
    ):
        for name, value in zip(infos, pool.map(fingerprint, infos.values()), strict=True):
            found[name] = value
            bar.update(infos[name].nbytes)
    return found


def check_base(
    recorded: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    where: str,
    measure: Callable[[Mapping[str, TensorInfo]], Mapping[str, str]] = fingerprints,
) -> None:
    """Raise a DeltaMixError unless a base has the very tensors the delta was made against.

    `measure` gives fingerprints; one that remembers spares a second delta the hashing.
    """
    if not recorded:
        raise DeltaMixError(
            "the delta repo's config.json holds no base_fingerprints; re-make the delta"
        )
    if missing := [name for name in recorded if name not in base]:
        raise DeltaMixError(
            f"wrong base: {where} lacks {len(missing)} tensors the delta needs, first "
            f"{missing[0]!r}; give the right base as DeltaMixConfig(base_model=...)"
        )
    found = measure({name: base[name] for name in recorded})
    if changed := [name for name in recorded if found[name] != recorded[name]]:
        raise DeltaMixError(
            f"wrong base: {len(changed)} of {len(recorded)} tensors of {where} differ from the "
            f"base the delta was made from, first {changed[0]!r}; the base changed or is another "
            "model. Give the right one as DeltaMixConfig(base_model=..., base_revision=...)"
        )
