"""The pipeline: delta → SVD → widths → V by GPTQ → U re-fitted → U rounded → gains → packing.

The only module that knows the order of the stages. All methods share it; `Method` says which
parts are on. In the metric (A on outputs, C on inputs, see `factor`) dropping rank i costs
h_i = sigma_i²; rounding its two vectors with relative errors d_v and d_u costs
h_i·[1 − (1 − d_v)·(1 − d_u)]. A global allocation is made from these; the published DeltaMix
measures its own table, and Delta-CoMe has fixed bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from ..allocation import per_matrix
from ..allocation.whole_model import DEFAULT_GAP, solve_global
from ..calibration.data import no_text_given
from ..calibration.statistics import Metrics
from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..jobs.instruments import Stopwatch
from ..jobs.resume_store import ResumeStore
from ..jobs.workers import Workers, cost
from ..linalg.second_moments import blended, damped, dense, diagonal
from ..linalg.whitened_svd import Factors, factorise, spectrum
from ..quantization.error_table import error_table, pick
from ..quantization.gptq import Rounded, gptq_columns, gptq_rows, round_rows
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import GroupSizes, rank_bytes
from ..quantization.target_correction import (
    corrected_left_factor,
    metric_error,
    plain_left_factor,
    unbiased_gains,
)
from .budget import Budget, rank_options

# Shares of the mean diagonal added to the metrics before they are used.
OUTPUT_DAMPING, INPUT_DAMPING = DAMPING = 0.1, 0.01


@dataclass(frozen=True)
class Matrix:
    """One matrix to compress: how to get its delta ΔW float32 [m, n], and its metrics."""

    shape: tuple[int, int]
    delta: Callable[[], Tensor]
    metrics: Callable[[], Metrics] = Metrics
    embedding: bool = False


@dataclass(frozen=True)
class Widths:
    """Bits of both vectors of every rank, in order of falling sigma: int64 [k] each."""

    v: Tensor
    u: Tensor


@dataclass(frozen=True)
class Compressed:
    """Result for one matrix: packed factors (None: no rank was affordable) and relative error."""

    packed: PackedDelta | None
    error: float


class Compressor:
    """Compress one matrix after the other, in any order, within one budget.

    With a global allocation the widths of every rank are fixed at the start, from the spectra of
    all matrices. Otherwise every matrix gets the same share of the budget (its bf16 bytes times one
    common ratio), and what one matrix leaves unspent goes to the next.

    What an earlier run has left in `store` is taken from there.
    """

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        budget: Budget,
        config: DeltaMixConfig,
        store: ResumeStore | None = None,
        watch: Stopwatch | None = None,
        workers: Workers | None = None,
    ):
        self.workers = workers or Workers()
        self.store, self.watch = store or ResumeStore(), watch or Stopwatch()
        self.shapes = {name: matrix.shape for name, matrix in matrices.items()}
        self.config, self.method = config, config.method
        self.quantizer = config.method.quantizer
        self.sizes = {name: m * n for name, (m, n) in self.shapes.items()}
        self.group_sizes = {n: config.method.group_sizes(m.embedding) for n, m in matrices.items()}
        self.gap = 0.0
        self._left, self._weight = budget.ranks, sum(self.sizes.values())
        self._plan: dict[str, Widths] = {}
        if config.method.allocation == "global" and not self._recall_plan():
            energies = self._spectra(matrices)
            if self.workers.rank == 0:
                self._solve(matrices, energies, budget.ranks)
                self._keep_plan()
            else:
                self.workers.wait(self.store, "allocation")
                self._recall_plan()

    def _recall_plan(self) -> bool:
        found = self.store.read("allocation")
        if found is None:
            return False
        tensors, self.gap = found
        self._plan = {name: Widths(*tensors[name].long()) for name in self.shapes}
        return True

    def _keep_plan(self) -> None:
        widths = {n: torch.stack([w.v, w.u]).to(torch.uint8) for n, w in self._plan.items()}
        self.store.write("allocation", widths, self.gap)

    def _spectra(self, matrices: Mapping[str, Matrix]) -> list[Tensor]:
        """Energies of the ranks of every matrix; each worker measures a share of them."""
        owners = self.workers.owners({name: cost(*m.shape) for name, m in matrices.items()})
        mine = [name for name in matrices if owners[name] == self.workers.rank]
        measured: dict[str, Tensor] = {}
        for name in logging.tqdm(mine, desc="Measuring spectra", unit="matrix"):
            if found := self.store.read(f"spectrum of {name}"):
                measured[name] = found[0]["energies"]
                continue
            matrix = matrices[name]
            with _named(name):
                delta = matrix.delta()
                whitening = self._whitening(self._informed(delta, matrix.metrics()))
                with self.watch.stage("spectra"):
                    sigma = spectrum(delta, whitening.outputs, whitening.inputs, DAMPING)
            measured[name] = (sigma**2).cpu()
            self.store.write(f"spectrum of {name}", {"energies": measured[name]})
        for name in matrices.keys() - measured.keys() if self.workers.rank == 0 else ():
            self.workers.wait(self.store, f"spectrum of {name}")
            measured[name] = self.store.load(f"spectrum of {name}")[0]["energies"]
        return [measured[name] for name in matrices if name in measured]

    def _solve(self, matrices: Mapping[str, Matrix], energies: list[Tensor], budget: int) -> None:
        options = [
            rank_options(matrix.shape, self.group_sizes[name], self.config)
            for name, matrix in matrices.items()
        ]
        with self.watch.stage("HiGHS"):
            gap = self.config.allocation_gap or DEFAULT_GAP
            found = solve_global(energies, [choices for choices, _ in options], budget, gap)
        self.gap = found.gap
        for name, (_, pairs), picked in zip(matrices, options, found.choice, strict=True):
            widths = torch.tensor(pairs)[picked]
            # Among equal energies the solver may drop any; the kept ones must come first.
            widths = widths[torch.argsort((widths[:, 0] == 0).int(), stable=True)]
            self._plan[name] = Widths(widths[:, 0], widths[:, 1])

    def _factors(self, delta: Tensor, metrics: Metrics, rank: int | None = None) -> Factors:
        """Ranks of ΔW."""
        whitening = self._whitening(metrics)
        with self.watch.stage("SVD"):
            return factorise(delta, whitening.outputs, whitening.inputs, rank, DAMPING)

    def _whitening(self, metrics: Metrics) -> Metrics:
        """The metrics in which the SVD is taken."""
        if not self.method.whiten:
            return Metrics()
        return metrics if self.method.fisher else Metrics(None, metrics.inputs)

    def _informed(self, delta: Tensor, metrics: Metrics) -> Metrics:
        """The metrics, with what ΔW itself says of them if the user gave no text.

        Training changes a weight by sums of g·xᵀ: the columns of ΔW are made of the gradients at
        its outputs, its rows of its inputs. So ΔW·ΔWᵀ stands in for G and ΔWᵀ·ΔW for C.
        """
        share = self.method.delta_metric if no_text_given(self.config) else 0.0
        if not share:
            return metrics
        if not torch.isfinite(delta).all():
            raise ValueError("the delta holds NaN or infinity")
        return Metrics(
            blended(metrics.outputs, delta, share), blended(metrics.inputs, delta.T, share)
        )

    def _damped(self, metrics: Metrics) -> Metrics:
        return Metrics(
            damped(metrics.outputs, OUTPUT_DAMPING) if self.method.fisher else None,
            damped(metrics.inputs, INPUT_DAMPING),
        )

    def compress(self, name: str, delta: Tensor, metrics: Metrics) -> Compressed:
        """Compress ΔW float32 [m, n] into its part of the budget.

        Raises:
            DeltaMixError: the delta holds NaN or infinity, or a metric cannot be factorised.
        """
        with _named(name), self.watch.stage("quantization"):
            result = self._compress(name, delta, metrics)
        packed = result.packed
        self.store.write(f"matrix {name}", packed.tensors if packed else {}, result.error)
        return self._paid(name, result)

    def recall(self, name: str) -> Compressed | None:
        """Read the result of an earlier run, on the CPU; None if there is none."""
        found = self.store.read(f"matrix {name}")
        if found is None:
            return None
        tensors, error = found
        packed = None
        if tensors:
            packed = PackedDelta.checked(*self.shapes[name], self.method.group_size, tensors)
        return self._paid(name, Compressed(packed, error))

    def _paid(self, name: str, result: Compressed) -> Compressed:
        if result.packed is not None:
            self._left -= sum(result.packed.nbytes.values())
        self._weight -= self.sizes[name]
        return result

    def _compress(self, name: str, delta: Tensor, metrics: Metrics) -> Compressed:
        method, group_sizes, measured = self.method, self.group_sizes[name], metrics.inputs
        metrics = self._informed(delta, metrics)
        if name in self._plan:
            widths = self._plan[name]
            kept = int((widths.v > 0).sum())
            factors = self._factors(delta, metrics, kept)
            k = len(factors.sigma)
            v = self._round_v(factors.right, metrics, widths.v[:k])
            widths = Widths(widths.v[:k], widths.u[:k])
        else:
            share = self._left * self.sizes[name] // self._weight
            factors, v = self._within(share, delta, metrics, group_sizes)
            widths = Widths(v.bits, v.bits)
        kept_ranks = (widths.v > 0).to(delta.device)
        v, factors = v.rows(kept_ranks), factors.kept(kept_ranks)
        left, sigma, right = factors.left, factors.sigma, factors.right
        if not len(sigma):
            return Compressed(None, metric_error(delta, left, right, measured))
        right_hat, u_bits = v.dequantize(), widths.u.to(delta.device)[kept_ranks]
        if method.correct_target:
            target, inner = corrected_left_factor(delta, metrics.inputs, right_hat, sigma)
        else:
            target, inner = plain_left_factor(left, metrics.inputs, right_hat, sigma)
        near = self._damped(metrics)
        if not self.quantizer.zero_points:
            # GPTQ in A is no better here: KL at 1/16 and 1/64 0.00041 and 0.0229 on
            # pocket-shakespeare, 0.00042 and 0.0229 without it. The gains make up for it.
            costs = diagonal(near.outputs)
            u = round_rows(target.T, u_bits, group_sizes[1], self.quantizer, costs)
        else:
            u = gptq_columns(target, inner, u_bits, group_sizes[1])
        del target, inner
        if method.unbiased_gains:
            left_hat = u.dequantize().T
            u = u.scaled(unbiased_gains(factors, left_hat, right_hat, near.outputs, near.inputs))
            del left_hat
        error = metric_error(delta, u.dequantize().T, right_hat, measured)
        packed = PackedDelta.pack(v, u)
        return Compressed(packed if packed.rank else None, error)

    def _round_v(self, right: Tensor, metrics: Metrics, bits: Tensor) -> Rounded:
        inputs, group_size = dense(metrics.inputs), self.method.group_size
        return gptq_rows(right, inputs, bits, group_size, self.quantizer, INPUT_DAMPING)

    def _within(
        self,
        share: int,
        delta: Tensor,
        metrics: Metrics,
        group_sizes: GroupSizes,
    ) -> tuple[Factors, Rounded]:
        """Widths that fit `share` bytes, and V rounded to them."""
        method, (m, n) = self.method, tuple(delta.shape)
        widths = range(9)
        cost = {b: rank_bytes(m, n, b, b, group_sizes, self.quantizer) for b in widths}
        least = min(b for b in method.bits if b > 0)
        if method.allocation == "bands":
            factors = self._factors(delta, metrics, max(share // cost[least], 0))
            bits = per_matrix.bands(len(factors.sigma), cost, share)
            return factors, self._round_v(factors.right, metrics, bits)
        # All ranks are candidates: with C, a rank may be worth more than one of larger sigma.
        rank = None if 0 in method.bits else max(share // cost[least], 0)
        factors = self._factors(delta, metrics, rank)
        with self.watch.stage("error table"):
            table, rounded = error_table(
                factors, metrics.inputs, method.bits, method.group_size, self.quantizer
            )
        prices = [cost[b] for b in method.bits]
        with self.watch.stage("HiGHS"):
            (choice,) = per_matrix.solve(table, prices, share, self.config.f_max).choice
        return factors, pick(table, rounded, choice)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which matrix an error is about: NaN weights, a metric that cannot be factorised."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, DeltaMixError):
            raise
        raise DeltaMixError(f"{name}: {error}") from error
