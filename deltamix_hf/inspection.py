"""What a delta repo holds and where its bytes went, from its files alone.

Neither the base nor any weight of the model is read: headers, the ranks' widths, and config.json.
`rank_sizes` reads the packed factors too, one matrix at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .architecture import empty_model, is_delta, read_config
from .base import KeyMap
from .config import DeltaMixConfig
from .delta_repo import find_delta
from .errors import DeltaMixError
from .format import PREFIX, SizeReport, TensorInfo, is_guard, packed_modules, read_headers
from .format import size_report as measure_size
from .packed import PackedFactors, check_parts, layout_of, parts


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix.

    Attributes:
        stored: the module's name in the files; None if it kept no rank.
        shape: [m, n] of the dense matrix.
        v_bits, u_bits: int64 [k], widths of both sides of every rank kept, as stored.
        payload, scales, metadata: bytes of its codes, of its scales and zero points, and of its
            ranks' widths; headers of files are counted for the whole repo only.
        error: relative error that compression recorded; None if it recorded none.
    """

    stored: str | None
    shape: tuple[int, int]
    v_bits: Tensor
    u_bits: Tensor
    payload: int
    scales: int
    metadata: int
    error: float | None

    @property
    def rank(self) -> int:
        return len(self.v_bits)

    @property
    def bytes(self) -> int:
        return self.payload + self.scales + self.metadata

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.shape[0] * self.shape[1])

    @property
    def widths(self) -> dict[tuple[int, int], int]:
        """(V width, U width) -> how many ranks have them, widest first."""
        pairs = Counter(zip(self.v_bits.tolist(), self.u_bits.tolist(), strict=True))
        return dict(sorted(pairs.items(), reverse=True))


@dataclass(frozen=True)
class RepoReport:
    """A delta repo.

    Attributes:
        files: its weight files.
        config: how it was made, and of which base.
        size: true bytes by kind.
        matrices: by module name, in the model's order; those that kept no rank too.
        overlay: what is stored whole, by tensor name: its dtype's name, shape and bytes.
    """

    files: list[str]
    config: DeltaMixConfig
    size: SizeReport
    matrices: dict[str, MatrixReport]
    overlay: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def by_type(self) -> dict[str, dict[int | None, MatrixReport]]:
        """Type of layer (the name without its number) -> depth (None: no number) -> matrix."""
        found: dict[str, dict[int | None, MatrixReport]] = {}
        for name, matrix in self.matrices.items():
            kind, depth = type_and_depth(name)
            found.setdefault(kind, {})[depth] = matrix
        return found


def type_and_depth(name: str) -> tuple[str, int | None]:
    """A module's name with its first number starred, and that number."""
    number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    if number is None:
        return name, None
    return f"{name[: number.start()]}*{name[number.end() :]}", int(number.group())


def inspect_repo(repo: str | Path) -> RepoReport:
    """Read a delta repo's headers and widths.

    Args:
        repo: folder or Hub id.

    Raises:
        DeltaMixError: not found, not a delta repo, damaged, or of a class transformers has not.
    """
    repo = str(repo)
    model_config = read_config(repo)
    if not is_delta(model_config):
        raise DeltaMixError(f"{repo!r} is not a delta repo: it holds a whole model")
    files, config = find_delta(repo, {})
    keys = KeyMap(empty_model(repo, model_config))
    infos = read_headers(files)
    stored = packed_modules(infos, config.codebook == "gaussian", config.errors)
    shapes = {_module(keys, name): name for name in stored}
    order = [n.removesuffix(".weight") for n in keys.state]
    matrices = {
        name: _matrix(infos, config, shapes.get(name), name, _shape(keys, repo, name))
        for name in sorted({*shapes, *config.dropped}, key=_positions(order))
    }
    size = measure_size(Path(files[0]).parent, {name: m.shape for name, m in matrices.items()})
    return RepoReport(files, config, size, matrices, _overlay(infos))


def rank_sizes(report: RepoReport, name: str) -> Tensor:
    """|u_i|·|v_i| of every rank of a matrix, float32 [k] in stored order.

    In the plain metric that is the singular value; in that of the layer it is what the rank adds to
    the weight all the same.
    """
    matrix, config = report.matrices[name], report.config
    if matrix.stored is None:
        return torch.zeros(0)
    infos = read_headers(report.files)
    names = parts(config.codebook == "gaussian")
    tensors: dict[str, Any] = {
        part: _read(infos, f"{matrix.stored}.{PREFIX}{part}") for part in names
    }
    runs, group_sizes = layout_of(tensors["ranks"], config.group_size)
    check_parts(*matrix.shape, runs, group_sizes, tensors)
    factors = PackedFactors(*matrix.shape, group_sizes, runs, **tensors)
    return factors.left().norm(dim=1) * factors.right().norm(dim=1)


def _module(keys: KeyMap, stored: str) -> str:
    return keys.rename(f"{stored}.weight")[0].removesuffix(".weight")


def _positions(order: list[str]) -> Any:
    place = {name: i for i, name in enumerate(order)}
    return lambda name: place.get(name, len(place))


def _shape(keys: KeyMap, repo: str, name: str) -> tuple[int, int]:
    weight = keys.state.get(f"{name}.weight")
    if weight is None or weight.ndim != 2:
        raise DeltaMixError(f"the model of {repo!r} has no matrix {name}, which its delta changes")
    return weight.shape[0], weight.shape[1]


def _matrix(
    infos: dict[str, TensorInfo],
    config: DeltaMixConfig,
    stored: str | None,
    name: str,
    shape: tuple[int, int],
) -> MatrixReport:
    """`stored` is the module's name in the files; None for a matrix that kept no rank."""
    error = config.errors.get(name)
    if stored is None:
        nothing = torch.zeros(0, dtype=torch.int64)
        return MatrixReport(None, shape, nothing, nothing, 0, 0, 0, error)
    ranks = _read(infos, f"{stored}.{PREFIX}ranks")
    try:
        layout_of(ranks, config.group_size)
    except DeltaMixError as damage:
        raise DeltaMixError(f"{name}: {damage}") from None
    words = ranks[:, 0].long()
    length = {p: _length(infos.get(f"{stored}.{PREFIX}{p}")) for p in ("v", "u", "ranks", "zeros")}
    return MatrixReport(
        stored=stored,
        shape=shape,
        v_bits=words % 16,
        u_bits=words // 16 % 16,
        payload=length["v"] + length["u"],
        scales=length["ranks"] - 2 * len(words) + length["zeros"],
        metadata=2 * len(words),
        error=error,
    )


def _overlay(infos: dict[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {
        name: (info.dtype, info.shape, _length(info))
        for name, info in infos.items()
        if not is_guard(name) and not name.rpartition(".")[2].startswith(PREFIX)
    }


def _length(info: TensorInfo | None) -> int:
    return 0 if info is None else info.end - info.start


def _read(infos: dict[str, TensorInfo], name: str) -> Tensor:
    with safe_open(infos[name].file, framework="pt") as handle:
        return handle.get_tensor(name)
