"""`deltamix generate`, `chat` and `serve`: ask a delta repo, or any model."""

from typing import Annotated, Any

import typer

from ..errors import DeltaMixError
from .console import Base, Repo, TrustRemoteCode

MostTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Sample = Annotated[bool, typer.Option(help="Draw tokens at random instead of the likeliest.")]
# What `serve` is given that is not for us is for transformers.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def generate(
    repo: Repo,
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    base: Base = None,
    max_new_tokens: MostTokens = 128,
    sample: Sample = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write on from a prompt, as it is.

    Example: deltamix generate my-delta "Once upon a time"
    """
    model, tokenizer = _load(repo, base, trust_remote_code)
    _answer(model, tokenizer, tokenizer(prompt, return_tensors="pt"), max_new_tokens, sample)


def chat(
    repo: Repo,
    base: Base = None,
    max_new_tokens: MostTokens = 512,
    sample: Sample = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model that has a chat template; an empty line or Ctrl-D ends it.

    Example: deltamix chat my-delta
    """
    model, tokenizer = _load(repo, base, trust_remote_code)
    if not tokenizer.chat_template:
        raise DeltaMixError(
            f"the tokenizer of {repo!r} has no chat template; use `deltamix generate` instead"
        )
    turns: list[dict[str, str]] = []
    while text := _ask():
        turns.append({"role": "user", "content": text})
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = _answer(model, tokenizer, inputs, max_new_tokens, sample)
        turns.append({"role": "assistant", "content": said})


def serve(context: typer.Context, repo: Repo) -> None:
    """Answer over HTTP as OpenAI's API does, at http://localhost:8000/v1 unless told otherwise.

    All options are those of `transformers serve`, and passed on to it.

    Example: deltamix serve my-delta --port 8001 --host 0.0.0.0
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise DeltaMixError('serving needs more packages: pip install "transformers[serving]"')
    from transformers.cli.transformers import app

    app(["serve", repo, *context.args], standalone_mode=False)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _load(repo: str, base: str | None, trusted: bool) -> tuple[Any, Any]:
    from .models import load_model, load_tokenizer

    # One answer at a time: dense is fastest.
    model = load_model(repo, base, dequantize=True, trust_remote_code=trusted)
    if not model.can_generate():
        raise DeltaMixError(f"{repo!r} is a {type(model).__name__}, which cannot generate text")
    return model, load_tokenizer(repo, trusted)


def _answer(model: Any, tokenizer: Any, inputs: Any, most: int, sample: bool) -> str:
    """Print the answer as it comes and return its text."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = inputs.to(model.device)
    given.pop("token_type_ids", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found = model.generate(
        **given, max_new_tokens=most, do_sample=sample, pad_token_id=pad, streamer=streamer
    )
    start = 0 if model.config.is_encoder_decoder else given["input_ids"].shape[1]
    return tokenizer.decode(found[0, start:], skip_special_tokens=True)
