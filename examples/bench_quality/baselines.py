"""Baseline compressors of a fine-tune's delta, judged at equal true bytes.

Each takes ΔW = W_ft − W_base [m, n] of every matrix and gives back the dense ΔW_hat its codes
stand for, and the bytes of those codes. Written from the papers' formulas:

low rank            Ryu et al., arXiv 2305.18425. ΔW ≈ U·B with U [m, k] the first k left singular
                    vectors, B = Uᵀ·ΔW [k, n]; both bfloat16.
whitened low rank   SVD-LLM, Wang et al., arXiv 2403.07378. The same with U from the SVD of ΔW·L,
                    L·Lᵀ = C + 1 % of its mean diagonal, C [n, n] the Gram of the inputs: the least
                    error tr(E·C·Eᵀ) of all matrices of rank k.
BitDelta            Liu et al., arXiv 2402.10193. ΔW ≈ α·S; S is +1 where ΔW > 0, else −1, one bit
                    a weight; α = mean|ΔW|, one float32 a matrix. `distill_scales` then trains all
                    α by min ‖Z_ft − Z_hat‖² over the logits Z. The paper leaves embeddings and
                    the head out; at equal bytes they are matrices like the others.
DARE                Yu et al., arXiv 2311.03099. Drop each weight with probability p, multiply the
                    others by 1 / (1 − p). Kept values are bfloat16; their places are drawn from a
                    seed and so cost nothing. A fixed number is kept, to meet the budget exactly.
int2, int4          Round to nearest, min-max grids of 128 weights of a row
                    (`deltamix_hf.quantization.uniform`): bfloat16 scale and zero point for each,
                    2.14 and 4.16 bits a weight.

The last and BitDelta have a size of their own and are reported at that. Every method also pays for
the overlay (norms, biases, ...: whole, in the fine-tune's dtype) and a safetensors header, as our
own format does, and is reported by the same `SizeReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from deltamix_hf.evaluation.quality import Batch
from deltamix_hf.linalg.second_moments import damped
from deltamix_hf.linalg.svd import thin_svd
from deltamix_hf.nn.layers import weight_of
from deltamix_hf.quantization.gptq import round_rows
from deltamix_hf.storage.sizes import SizeReport, header_bytes

Deltas = Mapping[str, Tensor]  # module name -> ΔW float32 [m, n]
Grams = Mapping[str, Tensor]  # module name -> C [n, n]; a name that lacks stands for the identity


@dataclass(frozen=True)
class Result:
    """What a method makes of the matrices: ΔW_hat float32 by module name, and its bytes by kind."""

    deltas: dict[str, Tensor]
    payload: int
    scales: int = 0
    metadata: int = 0

    @property
    def total(self) -> int:
        return self.payload + self.scales + self.metadata


@dataclass(frozen=True)
class Method:
    """A baseline: `compress(deltas, grams, budget_bytes)`, and what its file is made of.

    Attributes:
        parts: the tensors it stores for each matrix, which cost header bytes.
        fixed_size: it ignores the budget and has a size of its own.
    """

    compress: Callable[[Deltas, Grams, int], Result]
    parts: tuple[str, ...]
    fixed_size: bool = False


def low_rank(deltas: Deltas, grams: Grams, budget_bytes: int, whitened: bool) -> Result:
    """The best k ranks of each ΔW, or of ΔW·L if `whitened`, where there is a Gram.

    Every matrix gets the same share of its bytes; what one leaves goes to the next, as in
    `deltamix_hf.compression.matrix_pipeline`.
    """
    found = {}
    left, weight = budget_bytes, sum(delta.numel() for delta in deltas.values())
    for name in sorted(deltas, key=lambda name: -sum(deltas[name].shape)):
        delta = deltas[name].double()
        share = left * delta.numel() // weight
        target = delta
        if whitened and name in grams:
            target = delta @ torch.linalg.cholesky(damped(grams[name].double(), 0.01))
        u = thin_svd(target, rank=max(share, 0) // (2 * sum(delta.shape)))[0]
        b = u.T @ delta
        found[name] = u.bfloat16().float() @ b.bfloat16().float()
        left -= 2 * (u.numel() + b.numel())
        weight -= delta.numel()
    return Result(found, payload=budget_bytes - left)


def bitdelta(deltas: Deltas, grams: Grams, budget_bytes: int) -> Result:
    """One bit a weight, one scale a matrix, before any distillation."""
    return _signed(deltas, torch.stack([delta.abs().mean() for delta in deltas.values()]))


def _signed(deltas: Deltas, scales: Tensor) -> Result:
    """Signs of `deltas` times `scales` [number of matrices]."""
    pairs = zip(deltas.items(), scales, strict=True)
    found = {name: torch.where(delta > 0, scale, -scale) for (name, delta), scale in pairs}
    payload = sum(-(-delta.numel() // 8) for delta in deltas.values())
    return Result(found, payload=payload, scales=4 * len(found))


def distill_scales(
    finetuned: PreTrainedModel,
    deltas: Deltas,
    batches: Sequence[Batch],
    steps: int = 200,
    lr: float = 1e-4,
) -> Result:
    """BitDelta with the scales trained to give the fine-tune's logits.

    Mean squared error over the real tokens of a batch (over the classes of a classifier), Adam;
    the defaults are the paper's, with the cosine decay of its code. `finetuned`, in evaluation
    mode, is the teacher and, with its matrices exchanged on the fly, the student: it is left as it
    was. Labels of `batches` are not used; batches are taken in turn.
    """
    scales = torch.stack([delta.abs().mean() for delta in deltas.values()]).requires_grad_()
    optimizer = torch.optim.Adam([scales], lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = batches[step % len(batches)]
        inputs = {k: v.to(finetuned.device) for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            wanted = _real(finetuned(**inputs).logits, inputs)
        weights = {
            f"{name}.weight": _weight(finetuned, name)
            - (delta - torch.where(delta > 0, scale, -scale)).to(finetuned.dtype)
            for (name, delta), scale in zip(deltas.items(), scales, strict=True)
        }
        found = _real(functional_call(finetuned, weights, (), inputs).logits, inputs)
        # Of the scales alone: backward() would leave gradients in the fine-tune's own parameters.
        (scales.grad,) = torch.autograd.grad(F.mse_loss(found.float(), wanted.float()), [scales])
        optimizer.step()
        decay.step()
    return _signed(deltas, scales.detach())


def _real(logits: Tensor, inputs: Batch) -> Tensor:
    """Logits of a classifier [rows, classes], of a language model [real tokens, vocabulary]."""
    if logits.dim() == 2 or "attention_mask" not in inputs:
        return logits
    return logits[inputs["attention_mask"].bool()]


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    return weight_of(model.get_submodule(name)).detach()


def dare(deltas: Deltas, grams: Grams, budget_bytes: int, seed: int = 0) -> Result:
    """The same share 1 − p of every matrix, at places drawn from `seed` (8 bytes of metadata)."""
    weights = sum(delta.numel() for delta in deltas.values())
    affordable = max(budget_bytes - 8, 0) // 2
    generator = torch.Generator().manual_seed(seed)
    found, payload = {}, 0
    for name, delta in deltas.items():
        flat, size = delta.flatten(), delta.numel()
        count = min(size, affordable * size // weights)
        kept = torch.randperm(size, generator=generator)[:count].to(delta.device)
        sparse = torch.zeros_like(flat)
        sparse[kept] = flat[kept].bfloat16().float() * (size / max(count, 1))
        found[name] = sparse.view_as(delta)
        payload += 2 * count
    return Result(found, payload=payload, metadata=8)


def round_to_nearest(
    deltas: Deltas, grams: Grams, budget_bytes: int, bits: int, group_size: int = 128
) -> Result:
    """`bits` a weight and as many for a group's zero point, which counts as scale."""
    found, payload, scales = {}, 0, 0
    for name, delta in deltas.items():
        width = torch.full((len(delta),), bits, device=delta.device)
        rounded = round_rows(delta, width, group_size)
        found[name] = rounded.dequantize()
        payload += -(-bits * rounded.codes.numel() // 8)
        groups = rounded.scales.numel()
        scales += 2 * groups + -(-bits * groups // 8)
    return Result(found, payload=payload, scales=scales)


METHODS: dict[str, Method] = {
    "low rank": Method(partial(low_rank, whitened=False), ("u", "b")),
    "whitened low rank": Method(partial(low_rank, whitened=True), ("u", "b")),
    "DARE": Method(dare, ("values",)),
    "BitDelta": Method(bitdelta, ("signs", "scale"), fixed_size=True),
    "int2": Method(partial(round_to_nearest, bits=2), ("codes", "scales", "zeros"), True),
    "int4": Method(partial(round_to_nearest, bits=4), ("codes", "scales", "zeros"), True),
}


def reference_bytes(deltas: Deltas, overlay: Mapping[str, Tensor]) -> int:
    """bfloat16 bytes of all that differs from the base: what a ratio refers to."""
    return 2 * sum(tensor.numel() for tensor in (*deltas.values(), *overlay.values()))


def size_report(
    result: Result, method: Method, deltas: Deltas, overlay: Mapping[str, Tensor]
) -> SizeReport:
    """All bytes of a delta file: `result`, the overlay as stored, and a safetensors header."""
    whole = sum(tensor.numel() * tensor.element_size() for tensor in overlay.values())
    # No stored part of a matrix has a longer header entry than the matrix itself in bfloat16.
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in overlay.items()}
    for name, delta in deltas.items():
        entries |= dict.fromkeys(
            (f"{name}.{part}" for part in method.parts), (torch.bfloat16, tuple(delta.shape))
        )
    return SizeReport(
        payload=result.payload,
        scales=result.scales,
        metadata=result.metadata + header_bytes(entries, result.total + whole),
        overlay=whole,
        reference=reference_bytes(deltas, overlay),
    )


def matrix_budget(total: int, method: Method, deltas: Deltas, overlay: Mapping[str, Tensor]) -> int:
    """What `total` bytes leave for the matrices after the overlay and the header.

    Raises:
        ValueError: nothing is left.
    """
    fixed = size_report(Result({}, payload=total), method, deltas, overlay).total - total
    if fixed >= total:
        raise ValueError(f"the overlay and the header take {fixed:,} of {total:,} bytes")
    return total - fixed


@contextmanager
@torch.no_grad()
def approximated(model: PreTrainedModel, deltas: Deltas, result: Result) -> Iterator[None]:
    """The fine-tune with W_base + ΔW_hat for W_ft = W_base + ΔW; its own weights come back."""
    own = {name: _weight(model, name).clone() for name in deltas}
    try:
        for name, weight in own.items():
            error = result.deltas[name] - deltas[name]
            _weight(model, name).copy_(weight.float() + error)
        yield
    finally:
        for name, weight in own.items():
            _weight(model, name).copy_(weight)
