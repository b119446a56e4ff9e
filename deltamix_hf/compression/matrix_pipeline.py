"""The pipeline: delta → SVD → widths → V by GPTQ → U re-fitted → U rounded → gains → packing.

The only module that knows the order of the stages. All methods share it; `Method` says which
parts are on. In the metric (A on outputs, C on inputs, see `whitened_svd`) dropping rank i costs
h_i = sigma_i²; rounding its two vectors with relative errors d_v and d_u costs
h_i·[1 − (1 − d_v)·(1 − d_u)]. A global allocation is made from these; the published DeltaMix
measures its own table, and Delta-CoMe has fixed bands.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
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
from ..jobs.workers import ALONE, Workers
from ..linalg.second_moments import blended, damped, dense, diagonal
from ..linalg.whitened_svd import Factors, factorise, spectrum
from ..quantization.error_table import error_table, pick
from ..quantization.gptq import Rounded, gptq_columns, gptq_rows, round_rows
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import GroupSizes, rank_bytes, scales_fit
from ..quantization.target_correction import (
    corrected_left_factor,
    metric_error,
    plain_left_factor,
    unbiased_gains,
)
from .budget import rank_options

# Shares of the mean diagonal added to the metrics before they are used.
OUTPUT_DAMPING, INPUT_DAMPING = DAMPING = 0.1, 0.01


@dataclass(frozen=True)
class Compressed:
    """Result for one matrix: packed factors (None: no rank was affordable) and relative error."""

    packed: PackedDelta | None
    error: float


class Compressor:
    """Compress one matrix after the other, in any order, within one `budget` of bytes.

    With a global allocation the widths of every rank are fixed at the start, from the spectra of
    all matrices. Otherwise every matrix gets the same share of the budget (its bf16 bytes times one
    common ratio), and what one matrix leaves unspent goes to the next.

    `shapes` are [m, n] of all matrices, some of which are `embeddings`; `measure` gives ΔW float32
    [m, n] and the metrics of one. What an earlier run has left in `store` is taken from there.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        embeddings: Collection[str],
        measure: Callable[[str], tuple[Tensor, Metrics]],
        budget: int,
        config: DeltaMixConfig,
        store: ResumeStore | None = None,
        watch: Stopwatch | None = None,
        workers: Workers = ALONE,
    ):
        self.shapes, self.measure, self.workers = shapes, measure, workers
        self.store, self.watch = store or ResumeStore(), watch or Stopwatch()
        self.config, self.method = config, config.method
        self.quantizer = config.method.quantizer
        self.sizes = {name: m * n for name, (m, n) in shapes.items()}
        self.group_sizes = {name: self.method.group_sizes(name in embeddings) for name in shapes}
        self._left, self._weight = budget, sum(self.sizes.values())
        self._plan = self._allocation() if self.method.allocation == "global" else {}

    def _allocation(self) -> dict[str, Tensor]:
        """Widths of all ranks, read or solved for: uint8 [2, k], of V and U by falling sigma."""
        if (found := self.store.read("allocation")) is not None:
            return found[0]
        energies = self._spectra()
        if self.workers.rank:
            return self.workers.wait(self.store, "allocation")[0]
        shapes, config = self.shapes, self.config
        options = [rank_options(shapes[n], self.group_sizes[n], config) for n in shapes]
        with self.watch.stage("HiGHS"):
            gap = config.allocation_gap or DEFAULT_GAP
            choices = [choices for choices, _ in options]
            picked = solve_global(energies, choices, self._left, gap).choice
        plan = {}
        for name, (_, pairs), ranks in zip(shapes, options, picked, strict=True):
            widths = torch.tensor(pairs, dtype=torch.uint8)[ranks]
            # Among equal energies the solver may drop any; the kept ones must come first.
            plan[name] = widths[torch.argsort((widths[:, 0] == 0).int(), stable=True)].T
        self.store.write("allocation", plan)
        return plan

    def _spectra(self) -> list[Tensor]:
        """Energies of the ranks of every matrix; each worker measures a share of them."""
        owners = self.workers.owners(self.shapes)
        mine = [name for name in self.shapes if owners[name] == self.workers.rank]
        measured: dict[str, Tensor] = {}
        for name in logging.tqdm(mine, desc="Measuring spectra", unit="matrix"):
            if found := self.store.read(f"spectrum of {name}"):
                measured[name] = found[0]["energies"]
                continue
            with _named(name):
                delta, metrics = self.measure(name)
                whitening = self._whitening(self._informed(delta, metrics))
                del metrics
                with self.watch.stage("spectra"):
                    sigma = spectrum(delta, whitening.outputs, whitening.inputs, DAMPING)
            measured[name] = (sigma**2).cpu()
            self.store.write(f"spectrum of {name}", {"energies": measured[name]})
        for name in self.shapes.keys() - measured.keys() if self.workers.rank == 0 else ():
            tensors, _ = self.workers.wait(self.store, f"spectrum of {name}")
            measured[name] = tensors["energies"]
        return [measured[name] for name in self.shapes if name in measured]

    def _factors(
        self, delta: Tensor, metrics: Metrics, rank: int | None = None, nearly: bool = False
    ) -> Factors:
        """Ranks of ΔW."""
        whitening = self._whitening(metrics)
        with self.watch.stage("SVD"):
            return factorise(delta, whitening.outputs, whitening.inputs, rank, DAMPING, nearly)

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

    def compress(self, name: str, delta: Tensor, metrics: Metrics) -> Compressed:
        """Compress ΔW float32 [m, n] into its part of the budget.

        Raises DeltaMixError if it holds NaN or infinity, or a metric cannot be factorised.
        """
        with _named(name), self.watch.stage("quantization"):
            result = self._compress(name, delta, metrics)
            packed = result.packed
            if packed is not None and not scales_fit(packed.ranks):
                raise ValueError(
                    f"the delta holds values up to {float(delta.abs().max()):.3g}, for which there "
                    "are no scales in the format: is this the right base?"
                )
        self.store.write(f"matrix {name}", packed.tensors if packed else {}, result.error)
        return self._paid(name, result)

    def recall(self, name: str) -> Compressed | None:
        """Read the result of an earlier run, on the CPU; None if there is none."""
        if (found := self.store.read(f"matrix {name}")) is None:
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
            v_bits, u_bits = self._plan[name].long()
            factors = self._factors(delta, metrics, int((v_bits > 0).sum()), nearly=True)
            k = len(factors.sigma)
            v, u_bits = self._round_v(factors.right, metrics, v_bits[:k]), u_bits[:k]
        else:
            share = self._left * self.sizes[name] // self._weight
            factors, v = self._within(share, delta, metrics, group_sizes)
            u_bits = v.bits
        kept = (v.bits > 0).to(delta.device)
        u_bits, v, factors = u_bits.to(delta.device)[kept], v.rows(kept), factors.kept(kept)
        left, sigma, right = factors.left, factors.sigma, factors.right
        if not len(sigma):
            return Compressed(None, metric_error(delta, left, right, measured))
        right_hat = v.dequantize()
        if method.correct_target:
            target, inner = corrected_left_factor(delta, metrics.inputs, right_hat, sigma)
        else:
            target, inner = plain_left_factor(left, metrics.inputs, right_hat, sigma)
        outputs = damped(metrics.outputs, OUTPUT_DAMPING) if method.fisher else None
        if not self.quantizer.zero_points:
            # GPTQ in A is no better here: KL at 1/16 and 1/64 0.00041 and 0.0229 on
            # pocket-shakespeare, 0.00042 and 0.0229 without it. The gains make up for it.
            costs = diagonal(outputs)
            u = round_rows(target.T, u_bits, group_sizes[1], self.quantizer, costs)
        else:
            u = gptq_columns(target, inner, u_bits, group_sizes[1])
        del target, inner
        if method.unbiased_gains:
            left_hat, inputs = u.dequantize().T, damped(metrics.inputs, INPUT_DAMPING)
            u = u.scaled(unbiased_gains(factors, left_hat, right_hat, outputs, inputs))
            del left_hat
        error = metric_error(delta, u.dequantize().T, right_hat, measured)
        packed = PackedDelta.pack(v, u)
        return Compressed(packed if packed.rank else None, error)

    def _round_v(self, right: Tensor, metrics: Metrics, bits: Tensor) -> Rounded:
        inputs, group_size = dense(metrics.inputs), self.method.group_size
        return gptq_rows(right, inputs, bits, group_size, self.quantizer, INPUT_DAMPING)

    def _within(
        self, share: int, delta: Tensor, metrics: Metrics, group_sizes: GroupSizes
    ) -> tuple[Factors, Rounded]:
        """Widths that fit `share` bytes, and V rounded to them."""
        method, (m, n) = self.method, tuple(delta.shape)
        cost = {b: rank_bytes(m, n, b, b, group_sizes, self.quantizer) for b in range(9)}
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
