"""`deltamix diff`: how far a fine-tune is from its base, and what budget its delta needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import AsJson, TrustRemoteCode, make_table, out

if TYPE_CHECKING:
    from ..evaluation.distance import Distance


def diff(
    finetuned: Annotated[str, typer.Argument(help="The fine-tune: a folder or Hub id.")],
    base: Annotated[str, typer.Option(help="Its base, or another model of the family.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say how far two models of a family are apart, and what a delta would lose at each budget.

    From the files alone: nothing is run, one matrix at a time is in memory.

    Example: deltamix diff me/my-finetune --base org/base
    """
    from .. import DeltaMixConfig
    from ..checkpoint.base import resolve_base
    from ..checkpoint.model_class import empty_model
    from ..evaluation.distance import measure

    model = empty_model(finetuned, trust_remote_code=trust_remote_code)
    tuned_files, _ = resolve_base(finetuned, None, {})
    base_files, _ = resolve_base(base, None, {})
    found = measure(model, tuned_files, base_files, DeltaMixConfig())
    if as_json:
        out.print_json(json.dumps(_figures(found)), ensure_ascii=True)
        return
    if not found.budgets:
        out.print(f"All {found.same} tensors are identical: the delta is empty.")
        return
    out.print(_types_table(found))
    out.print()
    out.print(_budget_table(found))
    out.print(_advice(found))


def _figures(found: Distance) -> dict[str, Any]:
    from ..evaluation.distance import relative

    return {
        "relative_distance": found.relative,
        "identical_tensors": found.same,
        "stored_whole": sorted(found.overlay),
        "reference_bytes": found.reference,
        "matrices": {
            name: {
                "shape": list(matrix.shape),
                "relative_distance": relative([matrix]),
                "ranks_for_90_percent": matrix.ranks_for_90,
            }
            for name, matrix in found.matrices.items()
        },
        "budgets": [
            {"ratio": b.ratio, "bytes": b.bytes, "energy_lost": b.lost} for b in found.budgets
        ],
        "suggested_ratio": found.suggested.ratio if found.suggested else None,
    }


def _types_table(found: Distance) -> Table:
    from ..evaluation.distance import relative

    caption = (
        f"{found.same} tensors are identical, {len(found.overlay)} others differ and are stored "
        "whole (norms, biases, tiny matrices); ranks: the median of those that hold 90 % of |ΔW|²"
    )
    columns = ("count", "shape", "|ΔW|/|W|", "ranks")
    table = make_table("matrices", *columns, title="how far", caption=caption)
    for name, group in found.by_type().items():
        shapes = {matrix.shape for matrix in group}
        ranks = sorted(matrix.ranks_for_90 for matrix in group)
        full = min(min(shape) for shape in shapes)
        table.add_row(
            name,
            str(len(group)),
            " × ".join(map(str, shapes.pop())) if len(shapes) == 1 else "several",
            f"{relative(group):.3g}",
            f"{ranks[len(ranks) // 2]} of {full}",
        )
    table.add_row("all", str(len(found.matrices)), "", f"{found.relative:.3g}", "")
    return table


def _budget_table(found: Distance) -> Table:
    columns = ("MB", "bits a weight", "share of |ΔW|² lost")
    table = make_table("ratio", *columns, title="what a delta would lose")
    for budget in found.budgets:
        lost = "too small" if budget.lost is None else f"{budget.lost:.1%}"
        table.add_row(
            f"1/{1 / budget.ratio:g}", f"{budget.bytes / 1e6:.2f}", f"{16 * budget.ratio:g}", lost
        )
    return table


def _advice(found: Distance) -> str:
    from ..evaluation.distance import SAFE_LOSS

    rule = (
        f"Up to {SAFE_LOSS:.1%} lost kept at least 99.5 % of the gain over the base on the real "
        "pairs of docs/results/quality.md"
    )
    if found.suggested is None:
        return (
            f"\n{rule}; none of these budgets does. Its delta has no few directions: either give "
            "it more bytes, or it is not a fine-tune of this base."
        )
    return f"\n{rule}: give it --ratio 1/{1 / found.suggested.ratio:g} or more."
