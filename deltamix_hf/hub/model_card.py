"""The model card of a delta repo, made from its files: what it is, how to use it, what it costs.

Our part (`model_card_template.md`) stands between two comments and is made anew at every push. What
people write before or after it stays, and so does metadata that is not ours.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint.report import RepoReport
from ..storage.sizes import KINDS

PICTURE = "allocation.png"  # a file beside the card
TEMPLATE = Path(__file__).with_name("model_card_template.md")
BEGIN, END = "<!-- deltamix: begin -->", "<!-- deltamix: end -->"
TAGS = ("deltamix", "delta-compression")
KL = "KL to the fine-tune, nats per token"
# Pipelines and auto classes by the end of a class name; classes of several tasks are left out.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
}


def model_card(
    report: RepoReport,
    repo_id: str,
    config: dict[str, Any],
    earlier: ModelCard | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """Write the card of the delta repo that `report` describes, to be pushed to `repo_id`.

    `config` is config.json as it will be uploaded, `earlier` the card that is there already, and
    `tags` stand beside our own.
    """
    settings = config["quantization_config"]
    name = repo_id.rpartition("/")[2]
    task, loader = task_of(config.get("architectures") or [])
    data = earlier.data if earlier is not None else ModelCardData()
    before, after = _around(earlier.text if earlier is not None else "")
    return ModelCard.from_template(
        _metadata(data, name, settings, task, tags or []),
        template_path=str(TEMPLATE),
        settings=settings,
        errors=sorted((settings.get("errors") or {}).values()),
        size=report.size,
        kinds=KINDS,
        picture=PICTURE,
        **{"name": name, "repo_id": repo_id, "loader": loader},
        **{"before": before, "begin": BEGIN, "end": END, "after": after},
    )


def task_of(architectures: list[str]) -> tuple[str | None, str]:
    """Find the pipeline (None where a class serves several) and auto class of a model class."""
    for end, found in TASKS.items():
        if architectures and architectures[0].endswith(end):
            return found
    return None, "AutoModel"


def _metadata(
    data: Any, name: str, settings: dict[str, Any], task: str | None, tags: list[str]
) -> ModelCardData:
    """Set our part of a card's metadata `data`, a `ModelCardData`."""
    data.library_name = "transformers"
    data.base_model = settings["base_model"]
    data.base_model_relation = "adapter"  # it cannot be run without the base
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS, *tags]))
    data.pipeline_tag = task or data.pipeline_tag
    results = [result for result in data.eval_results or [] if result.metric_name != KL]
    if (kl := (settings.get("measured") or {}).get("kl")) is not None:
        source = settings.get("calibration_source") or "calibration text"
        value, kind = float(f"{kl:.2g}"), task or "other"
        results.append(EvalResult(kind, "calibration", source, "kl", value, metric_name=KL))
    data.model_name, data.eval_results = (name, results) if results else (None, None)
    return data


def _around(text: str) -> tuple[str, str]:
    """Split what people wrote into the texts before and after our part; before, if we have none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return before.lstrip(), after.rstrip()
    return (f"{text.strip()}\n\n" if text.strip() else ""), ""
