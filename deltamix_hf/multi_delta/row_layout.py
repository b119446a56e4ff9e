"""Which modules keep the rows of a batch apart, seen in two forward passes of the base.

Sizes alone do not tell: two pictures are no two rows, a table of 512 positions may pass for 512
tokens, and what an expert gets of a batch for two rows. So two rows are run, and then three, the
first one twice: what a module gets must be what it got, with the first row's part twice. A part may
have many entries, the tokens of a row, say.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import first_line
from ..nn.delta_module import first_tensor
from ..nn.probing import DirectReads, evaluating, hooked, probe_inputs

logger = logging.get_logger(__name__)

EACH = "each row"  # entries of every row, in the order of the batch
SHARED = "shared"  # one entry for all rows, positions say, whatever the batch
_CLOSE = 0.1  # of the distance between two rows; other batch sizes move the last digits

Calls = defaultdict[str, list[tuple[Tensor, int]]]
"""What modules got, by name, in each call: two numbers for each entry [n, 2], and dimensions."""


@torch.no_grad()
def observe(model: PreTrainedModel) -> tuple[dict[nn.Module, str], set[str]]:
    """Find which modules get EACH or SHARED, and the names of parameters that others read.

    What does not run for inputs that we can make up, such as the vision tower behind a text, is in
    neither.
    """
    named = {n: m for n, m in model.named_modules() if m._parameters or m._buffers}
    reads = DirectReads(named)
    two, three = Calls(list), Calls(list)
    with evaluating(model):
        for calls, rows in (two, [0, 1]), (three, [0, 0, 1]):
            try:
                inputs = probe_inputs(model)
                given = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
                with hooked(named, partial(_note, calls)), reads.watching(model):
                    model.forward(**given)  # itself, not what torch.compile makes of it
            except Exception as error:  # what has run until then has run
                why = first_line(error)
                logger.info("cannot try out where rows of a batch are kept apart: %s", why)
    counts = defaultdict(set)  # of flat entries, by modules of a kind: all blocks', all experts'
    for name in named:
        both = two[name] + three[name]
        counts[_kind(name)].add(tuple(len(x) for x, dims in both if dims == 2))
    layouts = {}
    for name, module in named.items():
        seen = {_layout(a, b) for (a, _), (b, _) in zip(two[name], three[name], strict=False)}
        # Experts that take tokens apart cannot have as many each: not of 22 tokens and of 33.
        one = len(two[name]) == len(three[name]) and len(seen) == len(counts[_kind(name)]) == 1
        if one and "" not in seen:
            layouts[module] = seen.pop()
    return layouts, reads.found


def _note(calls: Calls, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    found = first_tensor(args, kwargs)
    x = torch.tensor(0.0) if found is None else found
    entries = x.reshape(len(x), -1).double().cpu() if x.dim() else torch.zeros(0, 1)
    angles = torch.arange(entries.shape[1], dtype=torch.float64)
    waves = torch.stack([angles.cos(), (2 * angles).sin() + 1], dim=1)
    calls[name].append((entries.double() @ waves, x.dim()))


def _kind(name: str) -> str:
    """Return a module's name without its number in the innermost list around it."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join("*" if i in numbers[-1:] else part for i, part in enumerate(parts))


def _layout(two: Tensor, three: Tensor) -> str:
    """Tell what entries [n, 2] of two and of three rows are, "" for neither EACH nor SHARED."""
    if len(two) == len(three) == 1 and torch.allclose(two, three, rtol=1e-3):
        return SHARED
    if not len(two) or len(two) % 2 or 2 * len(three) != 3 * len(two):
        return ""
    first, second = two.chunk(2)
    error = (three - torch.cat([first, first, second])).norm()
    return EACH if error <= _CLOSE * (first - second).norm() + 1e-3 * two.norm() else ""
