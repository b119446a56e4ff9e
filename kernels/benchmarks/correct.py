"""The kernels against float64 at the shapes of real layers, and at odd ones. One JSON line a case.

Outputs begin as NaN and inputs are random. `error` is the norm of the difference over the norm of
what is right, `largest` the largest difference over the largest value; `same` says that two runs
gave the same bits. Cases run in processes of their own, which also compile side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import cases
import torch
import torch.nn.functional as F
from torch import Tensor

# Operands are rounded to 2^-9 and 2^-12: a wrong bit or scale is above 0.1.
TOLERANCES = {"bf16": 1e-2, "fp16": 2e-3}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = False


def layouts() -> dict[str, tuple[int, int, list[tuple[int, int, int]]]]:
    """Name -> m, n and runs of the layers of a block, and of odd shapes."""
    from factors import EVERY, MIXED, TINY
    from shapes import MODELS, runs

    block, every, odd, wide = MODELS["Llama-3-8B"], (4096, 1024), (131, 203), (64, 520)
    if SMALL:
        block, every, odd, wide = TINY, (40, 72), (43, 51), (16, 136)
    found = {li.name: (li.m, li.n, runs(li)) for li in block}
    found |= {"odd": (*odd, MIXED), "rank1": (*wide, [(1, 4, 2)])}
    return found | {"every": (*every, EVERY)}


def judged(run: Callable[[], Tensor], expected: Tensor, tolerance: float) -> dict:
    """Run twice, compare with `expected` and with each other."""
    found, again = run(), run()
    same = bool(torch.equal(found, again))
    difference = found.double() - expected
    error = float(difference.norm() / expected.norm())
    largest = float(difference.abs().max() / expected.abs().max())
    good = error <= tolerance and largest <= 3 * tolerance and same
    where = {}
    if not good:
        bad = ~(difference.abs() <= 3 * tolerance * expected.abs().max())
        where = {"bad": int(bad.sum()), "of": bad.numel(), "NaN": int(found.isnan().sum())}
        where["first"] = bad.nonzero()[:3].tolist()
    return {"ok": good, "error": _short(error), "largest": _short(largest), "same": same, **where}


def _short(value: float) -> float | str:
    return float(f"{value:.2g}") if value == value else "NaN"


def inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def single(kind: str, layer: str, dtype_name: str, rows_list: tuple[int, ...]) -> Iterator[dict]:
    """One matrix by factors in memory: with its base ("linear"), alone ("alone") or transposed.

    "groups of U" and "min-max" are with the base too, in forms that decoding has no kernels for.
    """
    import deltamix_kernels as dk
    from factors import exact, kernel_form, random_factors
    from timing import DEVICE

    m, n, runs = layouts()[layer]
    dtype, tolerance = DTYPES[dtype_name], TOLERANCES[dtype_name]
    group = {"groups of U": (0, 128), "min-max": (128, 128)}.get(kind, (0, 0))
    if kind == "min-max":
        runs = [(max(1, c // 8), v, v) for c, v in _widths_of_v(runs)]
    factors = random_factors(m, n, runs, DEVICE, 0, group, gaussian=kind != "min-max")
    packed = kernel_form(factors)
    weight = inputs(DEVICE, dtype, m, n) / n**0.5
    # real layers have none: what is compiled here serves the benchmarks too
    bias = None if layer.endswith("_proj") else inputs(DEVICE, dtype, m)
    for rows in rows_list:
        transposed = kind == "transposed"
        x = inputs(DEVICE, dtype, rows, m if transposed else n)
        expected = exact(factors, x, transposed)
        if kind in ("alone", "transposed"):
            run = partial(dk.low_rank, x, packed, transposed)
        else:
            expected += F.linear(
                x.double(), weight.double(), None if bias is None else bias.double()
            )
            run = partial(dk.delta_linear, x, weight, bias, packed)
        yield {"rows": rows, **judged(run, expected, tolerance)}


def _widths_of_v(runs: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Ranks by V width, widest first."""
    widths = sorted({v for _, v, _ in runs}, reverse=True)
    return [(sum(c for c, v, _ in runs if v == bits), bits) for bits in widths]


def decode(
    layers: list[str], dtype_name: str, rows_list: tuple[int, ...], biased: bool = False
) -> Iterator[dict]:
    """Layers of one input by their plan, with the base."""
    import deltamix_kernels as dk
    from factors import exact, kernel_form, random_factors
    from timing import DEVICE

    dtype, tolerance = DTYPES[dtype_name], TOLERANCES[dtype_name]
    made = []
    for i, layer in enumerate(layers):
        m, n, runs = layouts()[layer]
        made.append(random_factors(m, n, runs, DEVICE, i))
    plan = dk.DecodePlan([kernel_form(factors) for factors in made], dtype)
    weights = [inputs(DEVICE, dtype, f.m, f.n) / f.n**0.5 for f in made]
    biases = [inputs(DEVICE, dtype, f.m) if biased else None for f in made]
    for rows in rows_list:
        x = inputs(DEVICE, dtype, rows, made[0].n)
        expected = [
            exact(f, x) + x.double() @ w.double().T + (0 if b is None else b.double())
            for f, w, b in zip(made, weights, biases, strict=True)
        ]

        def run(x: Tensor = x) -> Tensor:
            return torch.cat(plan.linear(x, weights, biases), 1)

        yield {"rows": rows, **judged(run, torch.cat(expected, 1), tolerance)}


def grouped(
    layer: str, dtype_name: str, tenants: int, rows_list: tuple[int, ...], kind: str = "linear"
) -> Iterator[dict]:
    """Rows in random order over `tenants` deltas and the base.

    kind: "linear", "biased", where each delta has its own bias, or "embedding".
    """
    import deltamix_kernels as dk
    from factors import exact, kernel_form, random_factors
    from timing import DEVICE

    from deltamix_hf.multi_delta.routing import RowSlots

    m, n, runs = layouts()[layer]
    dtype, tolerance, embed = DTYPES[dtype_name], TOLERANCES[dtype_name], kind == "embedding"
    group_sizes = (0, 128) if embed else (0, 0)
    made = [random_factors(m, n, runs, DEVICE, i, group_sizes) for i in range(tenants)]
    bias, *own = [inputs(DEVICE, dtype, m) if kind == "biased" else None for _ in [0, *made]]
    table = dk.Table(256, m, n, DEVICE, embed)
    slots = {str(i): (7 * i + 3) % 256 for i in range(tenants)}
    for i, factors in enumerate(made):
        assert table.put(slots[str(i)], kernel_form(factors), dtype, own[i])
    weight = inputs(DEVICE, dtype, m, n) / n**0.5
    for rows in rows_list:
        chosen = torch.randint(-1, tenants, (rows,)).tolist()
        names = [str(i) if i >= 0 else None for i in chosen]
        plan = RowSlots(names, min(rows, 256), DEVICE, slots)
        of_batch = dk.Rows(plan.order, plan.starts, plan.slots)
        ids = torch.randint(m, (rows,), device=DEVICE)
        x = ids if embed else inputs(DEVICE, dtype, rows, n)
        base = F.embedding(ids, weight) if embed else F.linear(x, weight, bias)
        expected = base.double()
        for i, factors in enumerate(made):
            mine = torch.tensor([c == i for c in chosen], device=DEVICE)
            if embed:
                left, right = factors.left().double(), factors.right().double()
                expected[mine] += left[:, ids[mine]].T @ right
            else:
                expected[mine] = exact(factors, x[mine]) + F.linear(
                    x[mine].double(), weight.double(), None if bias is None else own[i].double()
                )

        def run(x: Tensor = x, base: Tensor = base, of_batch: dk.Rows = of_batch) -> Tensor:
            y = base.clone()
            if embed:
                dk.grouped_embed(y, x, table, of_batch)
            else:
                dk.grouped_add(y, x, table, of_batch, bias)
            return y

        row = judged(run, expected, tolerance)
        of_base = torch.tensor([c < 0 for c in chosen], device=DEVICE)
        row["base rows untouched"] = bool(torch.equal(run()[of_base], base[of_base]))
        row["ok"] = row["ok"] and row["base rows untouched"]
        yield {"rows": rows, "tenants": tenants, **row}


def gather(dtype_name: str) -> Iterator[dict]:
    """Each row's own vector."""
    import deltamix_kernels as dk
    from timing import DEVICE

    dtype = DTYPES[dtype_name]
    vectors = [inputs(DEVICE, dtype, 4096) for _ in range(3)]
    addresses = torch.tensor([v.data_ptr() for v in vectors[1:]] + [0], device=DEVICE)
    of_rows = torch.tensor([0, -1, 1, 2, 1], dtype=torch.int32, device=DEVICE)
    expected = torch.stack([vectors[i] for i in (1, 0, 2, 0, 2)])
    found = dk.gather(vectors[0], addresses, of_rows)
    yield {"ok": torch.equal(found, expected)}


def all_cases(tiny: bool) -> dict[str, cases.Case]:
    """Those that compile longest first."""
    real = ["q_proj", "k_proj", "gate_proj", "down_proj"]
    few, classes = (1, 8, 9, 16), [(1, 16), (64,), (512,)]
    big, wide = "q_proj", "down_proj"
    qkv, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if tiny:
        real, few, classes, big, wide = ["k_proj"], (1,), [(1, 3)], "k_proj", "down_proj"
    found: dict[str, cases.Case] = {}
    for rows in (few,) if tiny else (few, (37, 64)):
        for layers in (qkv, mlp, [wide], ["odd", "odd"], ["every"], ["rank1"]):
            found[f"decode {layers[0]} bf16 {rows}"] = partial(decode, layers, "bf16", rows)
        found[f"decode k_proj fp16 {rows}"] = partial(decode, ["k_proj"], "fp16", rows)
        found[f"decode biased bf16 {rows}"] = partial(decode, qkv, "bf16", rows, True)
    for rows in classes:
        for layer, tenants in ((big, 16), (wide, 4), ("odd", 3)):
            key = f"grouped {layer} bf16 {rows}"
            found[key] = partial(grouped, layer, "bf16", tenants, rows)
        for kind in ("biased", "embedding"):
            found[f"grouped {kind} {rows}"] = partial(grouped, "every", "bf16", 3, rows, kind)
        for layer in [*real, "odd", "every", "rank1"]:
            found[f"linear {layer} bf16 {rows}"] = partial(single, "linear", layer, "bf16", rows)
        for layer in [big, "odd"]:
            found[f"linear {layer} fp16 {rows}"] = partial(single, "linear", layer, "fp16", rows)
            key = f"transposed {layer} bf16 {rows}"
            found[key] = partial(single, "transposed", layer, "bf16", rows)
        for kind in ("alone", "groups of U", "min-max"):
            found[f"{kind} {big} bf16 {rows}"] = partial(single, kind, big, "bf16", rows)
    if not tiny:  # more rows than are multiplied at a time
        found["linear k_proj bf16 (9000,)"] = partial(single, "linear", "k_proj", "bf16", (9000,))
    found["gather"] = partial(gather, "bf16")
    return found


def main() -> None:
    global SMALL
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, in the interpreter")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        SMALL = True
        TOLERANCES["bf16"] *= 2  # the interpreter truncates where a GPU rounds
    found = all_cases(options.tiny)
    if options.worker:
        from factors import poisoned

        torch.manual_seed(0)
        torch.set_num_threads(1)
        with torch.no_grad(), poisoned():
            cases.serve(found)
    else:
        cases.run(list(found), 2 if options.tiny else options.workers, 300 if options.tiny else 60)


if __name__ == "__main__":
    main()
