"""Tiny base / fine-tune pairs and what the tests ask of them. Used by `conftest.py` and the tests.

A pair is made from its config class with seeded random weights. The fine-tune changes every
matrix by 10 % of its norm along a spectrum that decays as 1/i, plus a floor of white noise, and
every vector a little: so nothing equals the base and no delta is exactly low-rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from deltamix_hf import DeltaMixConfig
from deltamix_hf.method import DEFAULT_METHOD, METHODS, SWITCHES

VOCAB = 256
EXPERTS = 4
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def _llama_tied() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=16))


def _gpt2() -> PreTrainedModel:
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, **size, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    )


def _mixtral() -> PreTrainedModel:
    """Its checkpoints hold every expert apart, which transformers fuses on loading."""
    return MixtralForCausalLM(
        MixtralConfig(**DECODER, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )


def _gpt_oss() -> PreTrainedModel:
    """Transposed weights, with biases, and a gate of its own."""
    model = GptOssForCausalLM(
        GptOssConfig(**DECODER, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )
    for parameter in model.parameters():  # its experts are not initialised
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.05)
    return model


def _bert() -> PreTrainedModel:
    size = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**size))


def _t5() -> PreTrainedModel:
    size = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, **size, decoder_start_token_id=2, tie_word_embeddings=True)
    )


@dataclass(frozen=True)
class Family:
    """How to build an architecture, load it, and how much its delta may take.

    `packed`: matrices that are packed, ties counted once; None: not counted here. `generates`:
    `generate()` makes sense.
    """

    build: Callable[[], PreTrainedModel]
    auto: type
    budget: dict[str, Any]
    packed: int | None = None
    generates: bool = True
    headless_base: bool = False


FAMILIES = {
    "llama": Family(_llama, AutoModelForCausalLM, {"ratio": 0.2}, 2 * 5 + 2),
    "llama_tied": Family(_llama_tied, AutoModelForCausalLM, {"ratio": 0.25}, 2 * 5 + 1),
    "qwen3": Family(_qwen3, AutoModelForCausalLM, {"ratio": 0.2}, 2 * 5 + 2),
    "gpt2": Family(_gpt2, AutoModelForCausalLM, {"ratio": 0.2}, 2 * 4 + 2),
    "bert": Family(_bert, AutoModelForMaskedLM, {"ratio": 0.2}, 2 * 6 + 3, False),
    "bert_from_headless": Family(
        _bert, AutoModelForMaskedLM, {"ratio": 0.3}, 2 * 6 + 2, False, headless_base=True
    ),
    "t5": Family(_t5, AutoModelForSeq2SeqLM, {"ratio": 0.2}, 2 * 6 + 2 * 10 + 1),
}


# Fused experts: `test_experts.py`. `packed` counts layers; the experts' matrices come on top.
MIXTURES = {
    "mixtral": Family(_mixtral, AutoModelForCausalLM, {"ratio": 0.3}, 2 * 2 + 2),
    "gpt_oss": Family(_gpt_oss, AutoModelForCausalLM, {"ratio": 0.3}, 2 * 2 + 2),
}


@dataclass(frozen=True)
class Pair:
    """Folders of a base and its fine-tune, and the fine-tune's own logits."""

    name: str
    family: Family
    base: Path
    tuned: Path
    logits: Tensor

    def config(self, **options: Any) -> DeltaMixConfig:
        return make_config(self.base, **{**self.family.budget, **options})

    def compress(self, **options: Any) -> PreTrainedModel:
        """The fine-tune compressed on load; data-free unless `calibration` is given."""
        config = self.config(**options)
        return self.family.auto.from_pretrained(self.tuned, quantization_config=config)

    def load(self, folder: Path, **kwargs: Any) -> PreTrainedModel:
        return self.family.auto.from_pretrained(folder, **kwargs)


def make_config(
    base: str | Path | None = None, method: Any = DEFAULT_METHOD, **options: Any
) -> DeltaMixConfig:
    """A config of these options, among which switches of the method may be.

    HiGHS takes up to 2 s to prove the last 1e-4 of the optimum of a tiny model: left out.
    """
    switches = {name: options.pop(name) for name in SWITCHES if name in options}
    chosen = replace(METHODS[method], **switches) if switches else method
    return DeltaMixConfig(base, method=chosen, **{"allocation_gap": 1.0, **options})


@torch.no_grad()
def fine_tune(model: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Change every parameter in place the way training would: see the module docstring."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim < 2:
            parameter += 0.2 * size * noise
            continue
        m, n = len(parameter), parameter[0].numel()
        spectrum = 1 / torch.arange(1, min(m, n) + 1)
        left = torch.randn(m, len(spectrum), generator=random) * spectrum
        delta = left @ torch.randn(len(spectrum), n, generator=random)
        delta = (delta / delta.norm()).view(parameter.shape) + 0.1 * noise / noise.norm()
        parameter += size * parameter.norm() * delta


def make_pair(name: str, folder: Path, family: Family | None = None, tokens: int = 0) -> Pair:
    """`family`: if it is none of those above; `tokens`: how many more than the base's are tuned."""
    family = family or (FAMILIES | MIXTURES)[name]
    torch.manual_seed(0)
    model = family.build().eval()
    base = model
    if family.headless_base:  # no head and no prefix, but a pooler that the model has not
        base = AutoModel.from_config(model.config)
        base.load_state_dict(model.base_model.state_dict(), strict=False)
    base.save_pretrained(folder / "base")
    if tokens:
        rows = len(model.get_input_embeddings().weight) + tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    fine_tune(model)
    model.save_pretrained(folder / "tuned")
    ids = token_ids() % 200 if tokens else None  # fewer tokens than these are left
    return Pair(name, family, folder / "base", folder / "tuned", logits(model, ids))


def token_ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=random)


def quick(method: str) -> dict[str, Any]:
    """Options that let a method run every part of its pipeline, but briefly."""
    return {"num_samples": 8, "tune_steps": 3} if method == "deltamix-kl" else {}


def calibration_ids() -> Tensor:
    return token_ids(8, 32, seed=7)


def inputs_of(model: PreTrainedModel, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Token ids [2, 12] or those given, and sound [rows, 80, 40] for a model that hears."""
    ids = token_ids() if ids is None else ids
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if model.main_input_name == "input_features":
        random = torch.Generator().manual_seed(3)
        return {"input_features": torch.randn(len(ids), 80, 40, generator=random), **decoder}
    return {"input_ids": ids, **decoder}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None, **options: Any) -> Tensor:
    """Logits [2, 12, vocabulary], or the last hidden state of a headless model."""
    return model(**inputs_of(model, ids), **options)[0]


@torch.no_grad()
def generated(model: PreTrainedModel, **options: Any) -> Tensor:
    return model.generate(token_ids(), max_new_tokens=6, do_sample=False, **options)


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".dm_" in name}


def parts_on_disk(pair: Pair, first: str, folder: Path) -> dict[str, Any]:
    """Options to load every other part of a model on disk; `first`: where the first one is.

    Parts are what accelerate never splits; what is tied is in one place.
    """
    model = pair.family.build()
    names = list(_parts(model, set(model._no_split_modules or [])))
    other = {"cpu": "disk", "disk": "cpu"}[first]
    places = {name: (first, other)[i % 2] for i, name in enumerate(names)}
    for twin, source in model.all_tied_weights_keys.items():
        there = next(places[name] for name in names if source.startswith(f"{name}."))
        places[next(name for name in names if twin.startswith(f"{name}."))] = there
    return {"device_map": places, "offload_folder": folder}


def _parts(module: nn.Module, whole: set[str], prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        name = f"{prefix}{name}"
        own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if own or not list(child.children()) or type(child).__name__ in whole:
            yield name
        else:
            yield from _parts(child, whole, f"{name}.")


def relative(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected values, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content: to show that nothing was written."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: "w4" has id 4, anything else is <unk>."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    words |= {f"w{i}": i for i in range(4, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def text_of(ids: Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())
