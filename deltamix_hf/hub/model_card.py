"""The model card of a delta repo, made from its files: what it is, how to use it, what it costs.

Our part stands between two comments and is made anew at every push. What people write before or
after it stays, and so does metadata that is not ours.
"""

from __future__ import annotations

import io
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoint.report import RepoReport
from ..storage.sizes import KINDS

PICTURE = "allocation.png"  # a file beside the card
BEGIN, END = "<!-- deltamix: begin -->", "<!-- deltamix: end -->"
TAGS = ("deltamix", "delta-compression")
# Tasks by the end of a class name; classes that serve several tasks are left out.
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
LOADERS = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}


def model_card(
    report: RepoReport,
    repo_id: str,
    config: dict[str, Any],
    earlier: ModelCard | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """The card of the delta repo that `report` describes, to be pushed to `repo_id`.

    Args:
        config: config.json as it will be uploaded.
        earlier: the card that is there already.
        tags: tags besides our own.

    """
    settings = config["quantization_config"]
    task = task_of(config.get("architectures") or [])
    body = "\n".join([BEGIN, *_sections(report, repo_id, settings, task), END])
    known = earlier.data.to_dict() if earlier is not None else {}
    known |= {
        "library_name": "transformers",
        "base_model": settings["base_model"],
        "base_model_relation": "adapter",  # it cannot be run without the base
        "tags": list(dict.fromkeys([*(known.get("tags") or []), *TAGS, *(tags or [])])),
    }
    if task:
        known["pipeline_tag"] = task
    text = body if earlier is None else _replaced(earlier.text, body)
    return ModelCard(f"---\n{ModelCardData(**known).to_yaml()}\n---\n\n{text.strip()}\n")


def task_of(architectures: list[str]) -> str | None:
    """The pipeline's name for a model class; None where a class serves several."""
    for end, task in TASKS.items():
        if architectures and architectures[0].endswith(end):
            return task
    return None


def picture(report: RepoReport) -> bytes:
    """PNG of where the bits went."""
    from .plots import allocation_figure

    buffer = io.BytesIO()
    figure = allocation_figure(report)
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _replaced(text: str, body: str) -> str:
    """`text` with our part renewed; put at the end of a text that has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{body}{after}"
    return f"{text.rstrip()}\n\n{body}"


def _sections(
    report: RepoReport, repo_id: str, settings: dict[str, Any], task: str | None
) -> list[str]:
    name = repo_id.rpartition("/")[2]
    return [
        f"# {name}",
        "",
        f"The difference between a fine-tune and its base, [{settings['base_model']}]"
        f"(https://huggingface.co/{settings['base_model']}), compressed to "
        f"{report.size.fraction} of its bf16 bytes with "
        "[deltamix_hf](https://pypi.org/project/deltamix-hf/). The base is fetched when this "
        "is loaded, and checked.",
        "",
        *_use(repo_id, task),
        *_sizes(report),
        f"![Bits by layer]({PICTURE})",
        "",
        *_quality(report, settings),
        *_origin(settings),
    ]


def _use(repo_id: str, task: str | None) -> list[str]:
    loader = LOADERS.get(task or "", "AutoModel")
    return [
        "```python",
        "# pip install deltamix-hf",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("{repo_id}")',
        "```",
        "",
    ]


def _sizes(report: RepoReport) -> list[str]:
    size = report.size
    rows = [(kind, getattr(size, kind)) for kind in KINDS]
    return [
        "| weight files | MB | share |",
        "|---|---:|---:|",
        *(f"| {kind} | {count / 1e6:.2f} | {count / size.total:.1%} |" for kind, count in rows),
        f"| all | {size.total / 1e6:.2f} | 100% |",
        f"| what differs from the base, in bf16 | {size.reference / 1e6:.2f} | "
        f"ratio {size.ratio:.5f} |",
        "",
        "MB are 10^6 bytes. Payload: codes of the factors; metadata: file headers and the width of "
        "every rank; overlay: tensors stored whole.",
        "",
    ]


def _quality(report: RepoReport, settings: dict[str, Any]) -> list[str]:
    lines = []
    measured = settings.get("measured") or {}
    if "kl" in measured:
        lines.append(
            f"- KL to the fine-tune: {measured['kl']:.2g} nats for each prediction, on "
            f"{measured['positions']} predictions on calibration text that tuning had not seen"
        )
    errors = sorted((settings.get("errors") or {}).values())
    if errors:
        lines.append(
            "- relative error of the matrices, of their outputs where there was calibration text: "
            f"median {errors[len(errors) // 2]:.2g}, largest {errors[-1]:.2g} "
            f"({len(errors)} matrices)"
        )
    return [*lines, f"- calibrated on: {settings.get('calibration_source') or 'nothing'}", ""]


def _origin(settings: dict[str, Any]) -> list[str]:
    revision = settings.get("base_revision")
    pinned = f", revision `{revision}`" if revision else ""
    count = len(settings.get("base_fingerprints") or {})
    return [
        f"- base: `{settings['base_model']}`{pinned}; {count} tensors, each checked by its SHA-256 "
        "when the delta is loaded",
        f"- method: `{settings['method']}`, format {settings['format_version']}",
        "",
    ]
