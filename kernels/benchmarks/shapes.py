"""Linear layers of real models, and the widths an allocation at 1/16 gives their ranks.

Widths are those that `deltamix-kl` chose on a real pair (docs/results/quality), by type of layer:
the share of ranks with each (V bits, U bits). How many ranks a matrix gets follows from its bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

MIX = Path(__file__).parent / "widths.json"


@dataclass(frozen=True)
class Linear:
    """One linear layer [m, n]; layers of a block with the same `reads` have the same input."""

    name: str
    m: int
    n: int
    reads: str
    bias: bool = False

    @property
    def base_bytes(self) -> int:
        return 2 * self.m * self.n


def block(hidden: int, kv: int, mlp: int, bias: bool = False) -> list[Linear]:
    """The linear layers of a llama-like block, in order."""
    return [
        Linear("q_proj", hidden, hidden, "attention", bias),
        Linear("k_proj", kv, hidden, "attention", bias),
        Linear("v_proj", kv, hidden, "attention", bias),
        Linear("o_proj", hidden, hidden, "heads"),
        Linear("gate_proj", mlp, hidden, "mlp"),
        Linear("up_proj", mlp, hidden, "mlp"),
        Linear("down_proj", hidden, mlp, "gated"),
    ]


MODELS = {
    "Llama-3-8B": block(4096, 1024, 14336),
    "Qwen2.5-7B": block(3584, 512, 18944, bias=True),
    "Llama-3-70B": block(8192, 1024, 28672),
    "tiny": block(64, 32, 128),  # for dry runs on a CPU
}
BLOCKS = {"Llama-3-8B": 32, "Qwen2.5-7B": 28, "Llama-3-70B": 80}


def groups(model: str) -> list[list[Linear]]:
    """A block's layers that read the same input, in order."""
    return [list(some) for _, some in groupby(MODELS[model], key=lambda linear: linear.reads)]


def runs(linear: Linear, ratio: float = 1 / 16) -> list[tuple[int, int, int]]:
    """(count, v_bits, u_bits) runs that take `ratio` of the matrix's bf16 bytes, as stored."""
    shares = json.loads(MIX.read_text(encoding="utf-8"))["shares"][linear.name]
    widths = sorted(
        ((tuple(map(int, key.split("/"))), s) for key, s in shares.items()), reverse=True
    )
    columns_n, columns_m = -(-linear.n // 8), -(-linear.m // 8)
    rank_bytes = sum(s * (v * columns_n + u * columns_m + 6) for (v, u), s in widths)
    total = ratio * linear.base_bytes / rank_bytes
    found = [(round(total * s), v, u) for (v, u), s in widths]
    return [run for run in found if run[0]]


def delta_bytes(linear: Linear, layout: list[tuple[int, int, int]]) -> int:
    columns_n, columns_m = -(-linear.n // 8), -(-linear.m // 8)
    return sum(c * (v * columns_n + u * columns_m + 6) for c, v, u in layout)


def bytes_of(linears: list[Linear]) -> tuple[int, int]:
    """(base, delta) bytes of these layers: bf16 weights, and deltas of 1/16 of that."""
    delta = sum(delta_bytes(linear, runs(linear)) for linear in linears)
    return sum(linear.base_bytes for linear in linears), delta
