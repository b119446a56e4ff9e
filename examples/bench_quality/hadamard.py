"""Would rotating the rank vectors by a Hadamard matrix before rounding them help? At what cost?

Rotation makes entries look normal and spreads outliers; products then need x·H and Hᵀ·y. Vectors
are rotated in blocks (the largest power of two, at most 512, that divides their length) after
random signs, rounded by GPTQ in the rotated metric, and rotated back; all else is the default
method without tuning. Printed: KL to the fine-tune on held-out rows, at equal bytes.

    python examples/bench_quality/hadamard.py [pair ...]
"""

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from bench_quality.judge import Judge
from bench_quality.texts import get_pair
from torch import Tensor
from transformers.utils import logging

from deltamix_hf import METHODS, DeltaMixConfig
from deltamix_hf.compression import job, matrix_pipeline
from deltamix_hf.nn.layers import weight_of
from deltamix_hf.quantization.gptq import Rounded, gptq_rows
from deltamix_hf.quantization.packed_delta import PackedDelta
from deltamix_hf.quantization.quantizer import Quantizer
from deltamix_hf.quantization.uniform import MIN_MAX

PAIRS = ("pocket-shakespeare", "rxnfp")
ARMS = {"as it is": "", "V rotated": "v", "V and U rotated": "vu"}
SHARES = (16, 64)
LARGEST = 512


def rotate(rows: Tensor, back: bool = False) -> Tensor:
    """Rows [k, d] times the orthonormal D·H (or its inverse), D random signs, H in blocks."""
    d = rows.shape[-1]
    signs = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(d)) * 2.0 - 1
    block = min(d & -d, LARGEST)  # the largest power of two in d
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    turned = rows if back else rows * signs
    turned = (turned.reshape(-1, d // block, block) @ h).reshape(rows.shape)
    return turned * signs if back else turned


class Turned(Rounded):
    """Rounded in the rotated basis."""

    def dequantize(self) -> Tensor:
        return rotate(super().dequantize(), back=True)


def turned_rows(
    weight: Tensor,
    hessian: Tensor | None,
    bits: Tensor,
    group_size: int,
    quantizer: Quantizer = MIN_MAX,
    weights: Tensor | None = None,
) -> Rounded:
    """`gptq_rows` of rotated rows. A diagonal cost, or `weights`, is nearly even once rotated."""
    full = hessian is not None and hessian.dim() == 2
    hessian = rotate(rotate(hessian).T).T if full else None
    return Turned(**vars(gptq_rows(rotate(weight), hessian, bits, group_size, quantizer)))


@dataclasses.dataclass
class Dense:
    """Stands for the packed factors, whose bytes it has, where codes are of rotated vectors."""

    delta: Tensor
    nbytes: dict[str, int]
    rank: int

    @classmethod
    def pack(cls, v: Rounded, u: Rounded) -> "Dense":
        packed = PackedDelta.pack(v, u)
        return cls(u.dequantize().T @ v.dequantize(), packed.nbytes, packed.rank)

    def dense(self) -> Tensor:
        return self.delta


def attach_dense(self: job.Job, name: str) -> None:
    packed = self._results.pop(name).packed
    with torch.no_grad():
        weight = weight_of(self.targets[name])
        weight.copy_(self.base.read(f"{name}.weight"))
        if packed is not None:
            weight += packed.dense()


def kl(judge: Judge, share: int, sides: str) -> float:
    plain = matrix_pipeline.gptq_rows, matrix_pipeline.round_rows, matrix_pipeline.PackedDelta
    if "v" in sides:
        matrix_pipeline.gptq_rows = turned_rows
    if "u" in sides:
        matrix_pipeline.round_rows = lambda weight, *rest, **how: turned_rows(
            weight, None, *rest, **how
        )
    old_attach = job.Job._attach
    matrix_pipeline.PackedDelta = Dense
    job.Job._attach = attach_dense
    try:
        config = DeltaMixConfig(
            base_model=str(judge.pair.base),
            ratio=1 / share,
            calibration=judge.pair.texts(),
            method=dataclasses.replace(METHODS["deltamix-kl"], tune_steps=0),
        )
        model = judge.load(judge.pair.finetuned, quantization_config=config)
    finally:
        matrix_pipeline.gptq_rows, matrix_pipeline.round_rows, matrix_pipeline.PackedDelta = plain
        job.Job._attach = old_attach
    return judge.figures(model)["kl"]


def cost(d: int = 4096, turns: int = 50) -> float:
    """Time of rotating one vector in and one out, relative to one [d, d] product in float32."""
    x, weight = torch.randn(1, d), torch.randn(d, d)
    blocks = torch.randn(LARGEST, LARGEST)

    def product() -> Tensor:
        return F.linear(x, weight)

    def rotations() -> Tensor:
        return (x.view(-1, LARGEST) @ blocks) + (x.view(-1, LARGEST) @ blocks)

    spent = []
    for what in (product, rotations):
        what()
        started = time.perf_counter()
        for _ in range(turns):
            what()
        spent.append(time.perf_counter() - started)
    return spent[1] / spent[0]


def main() -> None:
    logging.disable_progress_bar()
    print(f"rotating in and out / base product of 4096 x 4096, one row, CPU: {cost():.3f}")
    print("| pair | ratio | " + " | ".join(ARMS) + " |\n" + "| --- " * (2 + len(ARMS)) + "|")
    for name in sys.argv[1:] or PAIRS:
        judge = Judge(get_pair(name))
        for share in SHARES:
            found = [kl(judge, share, sides) for sides in ARMS.values()]
            cells = " | ".join(f"{x:.5f}" for x in found)
            print(f"| {name} | 1/{share} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
