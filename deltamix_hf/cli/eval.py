"""`deltamix eval`: what a delta keeps of its fine-tune, on text of the user's."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import DeltaMixError
from .console import AsJson, Base, DeltaRepo, TrustRemoteCode, make_table, out

if TYPE_CHECKING:
    from ..evaluation.quality import Metrics


def evaluate(
    repo: DeltaRepo,
    text: Annotated[
        str, typer.Option(help="Held-out text: a .txt file (a text a line), .jsonl, or a data set.")
    ],
    finetuned: Annotated[
        str | None, typer.Option(help="The fine-tune itself: gives KL to it and the gain kept.")
    ] = None,
    base: Base = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts at most, drawn at random.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text at most.")] = 512,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity on held-out text; with --finetuned, KL to it and the share of its gain kept.

    Text that the delta was calibrated on flatters it: give other text.

    Example: deltamix eval my-delta --text heldout.txt --finetuned ./tuned
    """
    from .. import DeltaMixConfig
    from ..calibration.data import token_batches
    from ..checkpoint.model_class import delta_config
    from .models import load_model, load_tokenizer

    delta_config(repo, trust_remote_code)
    settings = DeltaMixConfig(calibration=text, num_samples=samples, seq_length=length)
    texts = token_batches(settings, lambda: load_tokenizer(repo, trust_remote_code))
    batches = [{"input_ids": ids} for ids in texts]
    model = load_model(repo, base, trust_remote_code=trust_remote_code)
    _check_kind(model)
    tuned = None
    if finetuned is not None:
        tuned = load_model(finetuned, trust_remote_code=trust_remote_code)
    found = _judge(model, tuned, batches)
    if as_json:
        out.print_json(json.dumps(_figures(found)), ensure_ascii=True)
    else:
        out.print(_table(_figures(found)))


def _check_kind(model: Any) -> None:
    """Refuse masked and sequence-to-sequence models: plain text is not enough to judge them."""
    from ..calibration.self_text import writes_text

    if not writes_text(model) and "Classification" not in type(model).__name__:
        raise DeltaMixError(
            f"deltamix eval judges causal language models and classifiers, not a "
            f"{type(model).__name__}; use deltamix_hf.evaluation.quality.compare with batches of "
            "your own"
        )


def _judge(model: Any, tuned: Any, batches: list[dict[str, Any]]) -> dict[str, Metrics]:
    """Judge base, delta and, if given, fine-tune; without one, KL means nothing."""
    from ..evaluation.quality import compare

    reference = model if tuned is None else tuned
    with model.disable_deltas():
        found = {"base": compare(reference, model, batches)}
    if tuned is not None:
        found["fine-tune"] = compare(tuned, tuned, batches)
    return found | {"delta": compare(reference, model, batches)}


def _figures(found: dict[str, Metrics]) -> dict[str, dict[str, float | None]]:
    """Choose the figures of each model that mean something; None where there is no figure."""
    from ..evaluation.quality import gain_kept

    has_reference = "fine-tune" in found
    figures = {}
    for name, metrics in found.items():
        row = {"perplexity": metrics.perplexity, "nll": metrics.nll, "tokens": metrics.tokens}
        if has_reference:
            row |= {"kl": metrics.kl, "same_first_choice": metrics.agreement}
        figures[name] = {k: v if math.isfinite(v) else None for k, v in row.items()}
    if has_reference and found["base"].nll != found["fine-tune"].nll:  # NaN too: nothing has labels
        kept = gain_kept(*(found[name].nll for name in ("base", "fine-tune", "delta")))
        figures["delta"]["gain_kept"] = kept if math.isfinite(kept) else None
    return figures


def _table(figures: dict[str, dict[str, float | None]]) -> Table:
    formats = {
        "perplexity": "{:.4g}",
        "kl": "{:.3g}",
        "same_first_choice": "{:.2%}",
        "gain_kept": "{:.2%}",
    }
    shown = [k for k in formats if any(row.get(k) is not None for row in figures.values())]
    tokens = next(iter(figures.values()))["tokens"]
    caption = (
        f"{tokens} predictions; KL to the fine-tune in nats for each; share of first choices that "
        "are the fine-tune's; share of its gain in nats over the base that is kept"
    )
    table = make_table("", *(key.replace("_", " ") for key in shown), caption=caption)
    for name, row in figures.items():
        cells = [(formats[key], row.get(key)) for key in shown]
        table.add_row(name, *("" if value is None else form.format(value) for form, value in cells))
    return table
