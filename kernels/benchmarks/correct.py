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
ROWS = (1, 16, 64, 512)
MODEL = "Llama-3-8B"
ODD = (131, 203)


def layouts() -> dict[str, tuple[int, int, list[tuple[int, int, int]]]]:
    """Name -> m, n and runs of the layers of a block, and of odd shapes."""
    from factors import EVERY, MIXED
    from shapes import MODELS, runs

    found = {li.name: (li.m, li.n, runs(li)) for li in MODELS[MODEL]}
    found |= {"odd": (*ODD, MIXED), "rank1": (64, 520, [(1, 4, 2)])}
    return found | {"every": (*((96, 136) if MODEL == "tiny" else (4096, 1024)), EVERY)}


def poison() -> None:
    """Let fresh tensors begin as NaN, so that an element no program writes shows."""
    empty = torch.Tensor.new_empty

    def new_empty(self: Tensor, *shape: object, **kwargs: object) -> Tensor:
        made = empty(self, *shape, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.Tensor.new_empty = new_empty


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
    """One matrix: with its base ("linear"), alone ("alone") or its transpose ("transposed")."""
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


def group(layers: list[str], dtype_name: str, rows_list: tuple[int, ...]) -> Iterator[dict]:
    """Layers of one input: one shrink, then an expand each."""
    import deltamix_kernels as dk
    from factors import exact, kernel_form, random_factors
    from timing import DEVICE

    dtype, tolerance = DTYPES[dtype_name], TOLERANCES[dtype_name]
    made = []
    for i, layer in enumerate(layers):
        m, n, runs = layouts()[layer]
        made.append(random_factors(m, n, runs, DEVICE, i))
    packed = [kernel_form(factors) for factors in made]
    weights = [inputs(DEVICE, dtype, f.m, f.n) / f.n**0.5 for f in made]
    for rows in rows_list:
        x = inputs(DEVICE, dtype, rows, made[0].n)

        def run(x: Tensor = x) -> Tensor:
            h, first, found = dk.shrink(x, packed), 0, []
            for weight, p in zip(weights, packed, strict=True):
                found.append(dk.finish_linear(x, weight, None, h, p, first))
                first += p.rank
            return torch.cat(found, 1)

        expected = torch.cat(
            [
                exact(f, x) + x.double() @ weight.double().T
                for f, weight in zip(made, weights, strict=True)
            ],
            1,
        )
        yield {"rows": rows, **judged(run, expected, tolerance)}


def grouped(
    layer: str, dtype_name: str, tenants: int, rows_list: tuple[int, ...], embed: bool = False
) -> Iterator[dict]:
    """Rows in random order over `tenants` deltas and the base: a linear layer or an embedding."""
    import deltamix_kernels as dk
    from factors import exact, kernel_form, random_factors
    from timing import DEVICE

    from deltamix_hf.multi_delta.routing import RowSlots

    m, n, runs = layouts()[layer]
    dtype, tolerance = DTYPES[dtype_name], TOLERANCES[dtype_name]
    group_sizes = (0, 128) if embed else (0, 0)
    made = [random_factors(m, n, runs, DEVICE, i, group_sizes) for i in range(tenants)]
    table = dk.Table(256, m, n, DEVICE)
    slots = {str(i): (7 * i + 3) % 256 for i in range(tenants)}
    for i, factors in enumerate(made):
        assert table.put(slots[str(i)], kernel_form(factors))
    weight = inputs(DEVICE, dtype, m, n) / n**0.5
    for rows in rows_list:
        chosen = torch.randint(-1, tenants, (rows,)).tolist()
        plan = RowSlots(rows, min(rows, 256), DEVICE)
        plan.load([str(i) if i >= 0 else None for i in chosen], slots)
        of_batch = dk.Rows(plan.order, plan.starts, plan.slots)
        ids = torch.randint(m, (rows,), device=DEVICE)
        x = ids if embed else inputs(DEVICE, dtype, rows, n)
        base = F.embedding(ids, weight) if embed else F.linear(x, weight)
        expected = base.double()
        for i, factors in enumerate(made):
            mine = torch.tensor([c == i for c in chosen], device=DEVICE)
            if not mine.any():
                continue
            if embed:
                left, right = factors.left().double(), factors.right().double()
                expected[mine] += left[:, ids[mine]].T @ right
            else:
                expected[mine] += exact(factors, x[mine])

        def run(x: Tensor = x, base: Tensor = base, of_batch: dk.Rows = of_batch) -> Tensor:
            y = base.clone()
            if embed:
                dk.grouped_embed(y, x, table, of_batch)
            else:
                dk.grouped_add(y, x, table, of_batch)
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
    classes = [(1, 16), (64,), (512,)]
    big, wide = "q_proj", "down_proj"
    qkv, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if tiny:
        real, classes, big, wide = ["k_proj"], [(1, 3)], "k_proj", "down_proj"
    found: dict[str, cases.Case] = {}
    for rows in classes:
        for layer, tenants in ((big, 16), (wide, 4), ("odd", 3)):
            key = f"grouped {layer} bf16 {rows}"
            found[key] = partial(grouped, layer, "bf16", tenants, rows)
        found[f"grouped embedding {rows}"] = partial(grouped, "every", "bf16", 3, rows, True)
        for members in (qkv, mlp):
            found[f"group {members[0]} bf16 {rows}"] = partial(group, members, "bf16", rows)
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
    global MODEL
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, in the interpreter")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        MODEL = "tiny"
        TOLERANCES["bf16"] *= 2  # the interpreter truncates where a GPU rounds
    found = all_cases(options.tiny)
    if options.worker:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        poison()
        with torch.no_grad():
            cases.serve(found)
    else:
        cases.run(list(found), 2 if options.tiny else options.workers, 300 if options.tiny else 60)


if __name__ == "__main__":
    main()
