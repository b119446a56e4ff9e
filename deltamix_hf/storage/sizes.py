"""Count the bytes of a delta repo by kind, on disk and before it is written."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..quantization.packed_layout import bytes_by_kind
from .headers import DTYPE_NAMES, TensorInfo, read_headers
from .names import ROWS, is_guard, packed_part
from .untrusted_paths import lies_inside


def reference_bytes(
    matrices: Mapping[str, tuple[int, ...]], overlay: Mapping[str, tuple[int, ...]]
) -> int:
    """Count bf16 bytes of all that differs from the base, by the shapes of what is stored."""
    rows = {f"{name}.{ROWS}" for name in matrices}  # added to a matrix, whose shape has them
    whole = [shape for name, shape in overlay.items() if name not in rows]
    return 2 * sum(math.prod(shape) for shape in [*matrices.values(), *whole])


def header_bytes(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], total: int) -> int:
    """Bound a file's header for these tensors (or larger ones) with `total` data bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in shapes.items():
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [total, total]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """List all safetensors files of a delta repo, sorted: what "bytes on disk" counts.

    Links out of it are none of its files.
    """
    found = sorted(Path(folder).glob("*.safetensors"))
    return [path for path in found if lies_inside(os.fspath(folder), os.fspath(path))]


KINDS = ("payload", "scales", "metadata", "overlay")  # of bytes; together they are all


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a delta repo's weight files by kind, and of all that differs in bf16 (`reference`).

    Metadata is headers, guards, per-rank widths and experts' counts.
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
    """Measure a delta repo on disk; a DeltaMixError if a weight file is not sound.

    `weights`: name -> [m, n] of every compressed matrix, also of those that kept no rank
    (`nn.experts.compressed_shapes`).
    """
    files, ranks = weight_files(folder), 0
    parts: Counter[str] = Counter()
    overlay: dict[str, TensorInfo] = {}
    for name, info in read_headers(files).items():
        if place := packed_part(name):
            parts[place[2]] += info.nbytes
            ranks += info.shape[0] if place[2] == "ranks" else 0
        elif not is_guard(name):
            overlay[name] = info
    kinds = bytes_by_kind(parts, ranks) | {"overlay": sum(i.nbytes for i in overlay.values())}
    on_disk = sum(file.stat().st_size for file in files)
    kinds["metadata"] = on_disk - kinds["payload"] - kinds["scales"] - kinds["overlay"]
    reference = reference_bytes(weights, {name: info.shape for name, info in overlay.items()})
    return SizeReport(reference=reference, **kinds)
