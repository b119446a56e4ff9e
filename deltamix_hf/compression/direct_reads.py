"""Layers whose weight a model reads past the layer's own forward: a delta there would be missed.

One short forward pass shows it; parts that are models of their own kind and did not run in it, such
as the speech encoder behind a decoder, get one for themselves.
"""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import first_line
from ..nn.probing import DirectReads, probe_inputs

logger = logging.get_logger(__name__)


@torch.no_grad()
def read_directly(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Find which of the modules `names` have their weight read by others in a forward pass.

    What runs for no input that we can make up is taken for read by its layer: the log says so.
    """
    modules = {name: model.get_submodule(name) for name in names}
    reads, why = DirectReads(modules), "nothing calls them"
    for place, part in model.named_modules():
        inside = [name for name in modules if name.startswith(f"{place}." if place else "")]
        if not isinstance(part, PreTrainedModel) or not reads.ran.isdisjoint(inside):
            continue
        try:
            with reads.watching(model):
                part(**probe_inputs(part))
        except Exception as error:  # anything a model may say to inputs it does not like
            why = first_line(error)
    if missed := [name for name in modules if name not in reads.ran]:
        logger.info("cannot try out whether %s, ... are read directly: %s", missed[0], why)
    return [name for name in modules if f"{name}.weight" in reads.found]
