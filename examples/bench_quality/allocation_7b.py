"""Time, memory and certified gap of `solve_global` on a model shaped like Llama-2-7B.

224 matrices x 4096 ranks with power-law energies of random exponents, 1/16 of the bf16 bytes, and
6, 17 or 50 choices: equal widths for V and U, pairs of {2, 3, 4, 8}, pairs of 2..8.

    python examples/bench_quality/allocation_7b.py [seed ...]
"""

import itertools
import resource
import sys
import time
from collections.abc import Sequence

import highspy
import numpy as np
import torch

from deltamix_hf.allocation.whole_model import Choices, solve_global
from deltamix_hf.quantization.packed_layout import rank_bytes
from deltamix_hf.quantization.uniform import MIN_MAX

LAYERS = 32
# Rows and columns of q, k, v, o, gate, up, down.
SHAPES = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
GROUP = 128
BUDGET = 1 / 16

Pairs = Sequence[tuple[int, int]]
DROPPED = (0, 0)
TABLES: tuple[Pairs, ...] = (
    [DROPPED, *((b, b) for b in (2, 3, 4, 6, 8))],
    [DROPPED, *itertools.product((2, 3, 4, 8), repeat=2)],
    [DROPPED, *itertools.product(range(2, 9), repeat=2)],
)


def model(pairs: Pairs, seed: int) -> tuple[list[torch.Tensor], list[Choices], int]:
    """Energies and choices of all matrices, and the budget in bytes."""
    generator = np.random.default_rng(seed)
    energies, choices, total = [], [], 0
    for m, n in SHAPES * LAYERS:
        decay, level = generator.uniform((0.3, -4.0), (2.5, 0.0))
        energies.append(10.0**level * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -decay)
        # About 6 dB a bit; how far above the ideal differs between matrices and sides.
        noise_v, noise_u = generator.uniform(1.5, 3.0, 2)
        left = [1 - (1 - noise_v * 4.0**-v) * (1 - noise_u * 4.0**-u) for v, u in pairs[1:]]
        cost = [rank_bytes(m, n, v, u, (GROUP, GROUP), MIN_MAX) for v, u in pairs]
        choices.append(Choices(torch.tensor([1.0, *left]), torch.tensor(cost)))
        total += 2 * m * n
    return energies, choices, int(total * BUDGET)


def main() -> None:
    columns: list[int] = []
    pass_model = highspy.Highs.passModel

    def counted(solver: highspy.Highs, lp: highspy.HighsLp) -> highspy.HighsStatus:
        columns.append(lp.num_col_)
        return pass_model(solver, lp)

    highspy.Highs.passModel = counted
    for pairs, seed in itertools.product(TABLES, map(int, sys.argv[1:] or ["0"])):
        energies, choices, budget = model(pairs, seed)
        columns.clear()
        started = time.perf_counter()
        found = solve_global(energies, choices, budget)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{len(energies)} matrices, {sum(map(len, energies))} ranks x {len(pairs)} choices, "
            f"seed {seed}: {seconds:.1f} s, peak {peak} MB so far, error {found.error:.6f}, "
            f"gap {found.gap:.1e}, {budget - found.spent} of {budget} bytes unspent, "
            f"columns given to HiGHS: {columns}",
            flush=True,
        )


if __name__ == "__main__":
    main()
