"""What this package shares with transformers and the Hub; importing it imports nothing heavy."""

from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

QUANT_METHOD = "deltamix"
# In the config.json of a delta repo, where transformers looks for the name of the weight file:
# without us it refuses this one, and so says what is missing.
NOTICE = "this is a delta repo, which needs `pip install deltamix-hf` or `import deltamix_hf`"
# How `from_pretrained` was told to fetch what it is loading, and each model that it has loaded. Not
# kept in the model: a token would be pickled with it.
FETCHING: ContextVar[dict[str, Any]] = ContextVar("deltamix_fetching", default={})  # noqa: B039
FETCHED: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
# Where to look and by whose right, which holds for other repos too.
ACCESS = ("cache_dir", "token", "local_files_only", "proxies")
BESIDE = (*ACCESS, "subfolder")  # of other files of the same repo and commit
