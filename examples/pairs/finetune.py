"""Full fine-tuning on a CPU: every weight moves, the loss counts answer tokens only.

What makes it affordable on two cores (SmolLM2-135M, 535 tokens a step): bf16 autocast where there
is AVX-512, and logits only where an answer token is predicted (about 30 of 535 positions; the
full [535, 49152] logits and their gradient would cost more than all 30 layers).

A checkpoint (weights, Adam moments, step, losses) is one safetensors file, written beside its
final name and then renamed, so a kill at any moment costs at most `checkpoint_every` steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from .batches import Batch


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a fine-tune besides the base and the batches: nothing is random."""

    steps: int
    tokens_per_step: int = 535
    learning_rate: float = 2e-4
    warmup: int = 20
    threads: int = 1
    checkpoint_every: int = 50

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine down to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def answer_loss(model, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats per token) of a causal model at the scored positions only."""
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state  # [batch, length, hidden]
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    return cross_entropy(model.lm_head(hidden[:, :-1][scored]).float(), targets[scored])


def finetune(
    model, batches: Sequence[Batch], recipe: Recipe, checkpoint: Path | None = None
) -> list[float]:
    """Train `model` in place, one batch a step; returns the loss of every step.

    With a `checkpoint` path, continues from that file where it exists; the caller removes it.
    """
    if len(batches) < recipe.steps:
        raise ValueError(f"{recipe.steps} steps need as many batches, got {len(batches)}")
    # AVX2 has no bf16: emulated, the 100 steps of the demo were not half done after 25 minutes
    narrow = "AVX512" in torch.backends.cpu.get_cpu_capability()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, weight_decay=0.0)
    losses = _load(checkpoint, model, optimizer, recipe) if checkpoint else []
    note_column = TextColumn("{task.fields[note]}")
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), note_column)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("fine-tuning", total=recipe.steps, completed=len(losses), note="")
        for step in range(len(losses), recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                loss = answer_loss(model, batches[step])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            recent = sum(losses[-20:]) / len(losses[-20:])
            note = f"step {step + 1}/{recipe.steps}  loss {recent:.3f}"
            progress.update(bar, advance=1, note=note)
            if checkpoint and (step + 1) % recipe.checkpoint_every == 0:
                _save(checkpoint, model, optimizer, recipe, losses)
                progress.log(note)
    torch.set_num_threads(threads_before)
    model.eval()
    return losses


def _save(path: Path, model, optimizer, recipe: Recipe, losses: list[float]) -> None:
    tensors = {}
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        tensors[f"weight.{name}"] = weight.detach()
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    temporary = path.with_suffix(".tmp")
    metadata = {"losses": json.dumps(losses), "recipe": repr(recipe)}
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def _load(path: Path, model, optimizer, recipe: Recipe) -> list[float]:
    if not path.exists():
        return []
    with safe_open(path, "pt") as file, torch.no_grad():
        metadata = file.metadata()
        if metadata["recipe"] != repr(recipe):
            raise ValueError(f"{path} was made with {metadata['recipe']}; delete it to start anew")
        losses = json.loads(metadata["losses"])
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[weight] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
            }
    return losses
