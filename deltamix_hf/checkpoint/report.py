"""What a delta repo holds and where its bytes went, from its files alone.

Neither the base nor any weight of the model is read: headers, the ranks' widths, and config.json.
`rank_sizes` reads the packed factors too, one matrix at a time.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import DeltaMixConfig
from ..nn.experts import fused_name
from ..storage.headers import read_headers
from ..storage.sizes import SizeReport, size_report
from .base import KeyMap
from .delta_repo import Contents, contents_of, find_delta
from .model_class import delta_config, empty_model


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix.

    Attributes:
        shape: [m, n] of the dense matrix.
        v_bits, u_bits: int64 [k], widths of both sides of every rank kept, as stored.
        payload, scales, metadata: bytes of its codes, of its scales and zero points, and of its
            ranks' widths; headers of files are counted for the whole repo only.
        error: relative error that compression recorded; None if it recorded none, or no number of
            at least 0.
    """

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
        contents: its tensors, sorted; they are not read.
        config: how it was made, and of which base.
        size: true bytes by kind.
        matrices: by module name, in the model's order; those that kept no rank too.
        overlay: what is stored whole, by tensor name: its dtype's name, shape and bytes.
    """

    contents: Contents
    config: DeltaMixConfig
    size: SizeReport
    matrices: dict[str, MatrixReport]
    overlay: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def by_type(self) -> dict[str, dict[int | None, MatrixReport]]:
        """Type of layer (the name without its number) -> depth (None: no number) -> matrix.

        The experts of one 3-D parameter are taken together, as one tall matrix.
        """
        grouped: dict[str, list[MatrixReport]] = {}
        for name, matrix in self.matrices.items():
            grouped.setdefault(fused_name(name) or name, []).append(matrix)
        found: dict[str, dict[int | None, MatrixReport]] = {}
        for name, matrices in grouped.items():
            kind, depth = type_and_depth(name)
            found.setdefault(kind, {})[depth] = _together(matrices)
        return found


def type_and_depth(name: str) -> tuple[str, int | None]:
    """Star the first number in a module's name, and give that number."""
    number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    if number is None:
        return name, None
    return f"{name[: number.start()]}*{name[number.end() :]}", int(number.group())


def inspect_repo(repo: str | Path, trust_remote_code: bool = False) -> RepoReport:
    """Read a delta repo's headers and widths.

    Args:
        repo: folder or Hub id.
        trust_remote_code: run the repo's own code for its model.

    Raises:
        DeltaMixError: not found, not a delta repo, damaged, or of a class transformers has not.
    """
    repo = str(repo)
    model_config = delta_config(repo, trust_remote_code)  # before its weights are fetched
    files, config, _ = find_delta(repo, {})
    infos = read_headers(files)
    model = empty_model(repo, model_config, trust_remote_code)
    contents = contents_of(infos, config, KeyMap(model))
    shapes = contents.shapes()
    widths = torch.zeros(0, dtype=torch.int64)
    matrices = {n: MatrixReport(s, widths, widths, 0, 0, 0, None) for n, s in shapes.items()}
    for name in contents.packed:
        matrices |= _matrices(contents, name)
    whole = {name: infos[stored] for name, stored in contents.whole.items()}
    overlay = {name: (info.dtype, info.shape, info.nbytes) for name, info in whole.items()}
    size = size_report(Path(files[0]).parent, shapes)
    return RepoReport(contents, config, size, matrices, overlay)


def rank_sizes(report: RepoReport, name: str) -> Tensor:
    """Measure |u_i|·|v_i| of every rank of a matrix, float32 [k] in stored order.

    In the plain metric that is the singular value; in that of the layer it is what the rank adds to
    the weight all the same.
    """
    if not report.matrices[name].rank:
        return torch.zeros(0)
    contents, (fused, _, number) = report.contents, name.rpartition(".")
    alone = name in contents.packed  # no expert
    packed = contents.read_packed(
        name if alone else fused, lambda stored: contents.infos[stored].read()
    )
    factors = packed.split()[0 if alone else int(number)]
    assert factors is not None
    return factors.left().norm(dim=1) * factors.right().norm(dim=1)


def _matrices(contents: Contents, name: str) -> dict[str, MatrixReport]:
    """Report on the matrix `name`, or on every expert of that 3-D parameter that kept ranks."""
    packed, found = contents.read_packed(name), {}
    for number, factors in enumerate(packed.split()):
        end = "" if packed.counts is None else f".{number}"
        if factors is not None:
            words, stored = factors.ranks[:, 0].long(), contents.packed[name] + end
            error = contents.config.errors.get(stored, -1.0)
            found[name + end] = MatrixReport(
                shape=(factors.m, factors.n),
                v_bits=words % 16,
                u_bits=words // 16 % 16,
                error=error if 0 <= error < 1e300 else None,  # no NaN or the like
                **factors.nbytes,
            )
    return found


def _together(matrices: list[MatrixReport]) -> MatrixReport:
    """Put matrices of one shape below each other; the error of all is their mean."""
    errors = [matrix.error for matrix in matrices if matrix.error is not None]
    kinds = ("payload", "scales", "metadata")
    sums = {kind: sum(getattr(matrix, kind) for matrix in matrices) for kind in kinds}
    m, n = matrices[0].shape
    return replace(
        matrices[0],
        shape=(m * len(matrices), n),
        v_bits=torch.cat([matrix.v_bits for matrix in matrices]),
        u_bits=torch.cat([matrix.u_bits for matrix in matrices]),
        error=sum(errors) / len(errors) if errors else None,
        **sums,
    )
