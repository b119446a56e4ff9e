"""What the tests of the vLLM plug-in share: a small base, two deltas to it, and servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would spin

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from server import Server
from tiny_pairs import DECODER, Family, Pair, fine_tune, make_tokenizer, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TOKENS = 64
PROMPTS = token_ids(8, 12).tolist()


class Deltas:
    """A base and two deltas to it, in folders of these names, with a tokenizer."""

    def __init__(self, root: Path):
        self.root = root
        torch.manual_seed(0)
        # vLLM's attention on CPUs has heads of 32 at least
        config = LlamaConfig(**DECODER, head_dim=32, attention_bias=True, tie_word_embeddings=True)
        model = LlamaForCausalLM(config).eval()
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._save(model, "base")
        for i, name in enumerate(("a", "b")):
            model.load_state_dict(start)
            fine_tune(model, seed=1 + i, size=0.3)
            self._save(model, f"tuned-{name}")
            family = Family(lambda: model, AutoModelForCausalLM, {"ratio": 0.25}, 11)
            pair = Pair(name, family, root / "base", root / f"tuned-{name}", torch.empty(0))
            methods = {"a": "deltamix", "b": "delta-come"}  # both codebooks
            pair.compress(method=methods[name], calibration=None).save_pretrained(root / name)
            make_tokenizer().save_pretrained(root / name)
        self._continued: dict[str, list[list[int]]] = {}

    def _save(self, model: PreTrainedModel, name: str) -> None:
        model.save_pretrained(self.root / name)
        make_tokenizer().save_pretrained(self.root / name)

    def continued(self, name: str) -> list[list[int]]:
        """What transformers generates greedily after each of the prompts."""
        if name not in self._continued:
            self._continued[name] = self.generated(name, PROMPTS, TOKENS)
        return self._continued[name]

    @torch.no_grad()
    def generated(self, name: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """The same after any prompts of one length."""
        model = AutoModelForCausalLM.from_pretrained(self.root / name)
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        ids = model.generate(torch.tensor(prompts), do_sample=False, eos_token_id=None, **options)
        return ids[:, len(prompts[0]) :].tolist()


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    return Deltas(tmp_path_factory.mktemp("deltas"))


@pytest.fixture(scope="session")
def many(deltas: Deltas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The base with room for two deltas; none is loaded."""
    log = tmp_path_factory.mktemp("many") / "log"
    options = ["--quantization", "deltamix", "--enable-lora", "--max-loras", "2"]
    options += ["--served-model-name", "base", "--block-size", "32"]
    with Server(deltas.root / "base", log, *options) as server:
        yield server
