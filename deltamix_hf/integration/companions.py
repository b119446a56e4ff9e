"""The small files beside a fine-tune's weights, which a delta repo takes along.

Tokenizers, chat templates, processors, poolings, vocabularies of all kinds, at any depth: every
file that is neither weights nor code, as its author left it. Their author may be a stranger
(docs/security.md): links out of the folder, hidden files and what is beyond the bounds below stay.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile
from transformers.utils import logging

from ..storage.untrusted_paths import CONFIG, find_file, lies_inside

logger = logging.get_logger(__name__)

MOST_FILES, MOST_BYTES, DEEPEST = 500, 200_000_000, 5  # bytes of all; folders in one another
_MOST_LISTED = 10_000
# Weights and code, and pickles and archives, which may hold either.
_LEFT = re.compile(
    r".*\.(safetensors|bin|pt|pth|pte|ckpt|h5|hdf5|keras|msgpack|onnx|onnx_data|gguf|ggml|npy|npz|pkl"
    r"|pickle|joblib|dill|tflite|mlmodel|pb|ot|nemo|engine|zip|tar|gz|tgz|bz2|xz|zst|7z|rar|whl|py|pyc"
    r"|pyi|ipynb|sh|bash|bat|cmd|ps1|m?js|ts|html?|php|pl|rb|lua|r|c|cc|cpp|cuh?|h|hpp|rs|go|java|jar"
    r"|so|dll|dylib|exe|a|o)",
    re.IGNORECASE,
)
# What only training needs, or is said of the whole model, its weights, and what saving writes.
_NOT_WANTED = re.compile(
    r"(.*/)?(\..*|checkpoint-\d+/.*|.*\.md|trainer_state\.json|training_args\.bin|.*\.index\.json"
    r"|adapter_config\.json|events\.out\.tfevents.*)|(generation_)?config\.json"
    r"|((pytorch|tf|flax|rust|adapter)_)?model[^/]*\.(safetensors|bin|h5|msgpack|ot)"
)


def copy_companions(source: str | None, folder: Path, **how: Any) -> None:
    """Copy the small files of the repo `source` (path or Hub id) into `folder`, and log what stays.

    `how` is how to fetch it (`token`, `revision`, `cache_dir`, `subfolder`). What is in `folder`
    already stays as it is. Warns if the repo is gone.
    """
    if not source:
        return
    left, found, nbytes = list[str](), dict[str, str](), 0
    try:
        for name, size in sorted(_listed(source, how)):
            if _NOT_WANTED.fullmatch(name) or (folder / name).exists():
                continue
            fits = len(found) < MOST_FILES and nbytes + size <= MOST_BYTES
            path = _companion(source, name, how) if fits else None
            if path is None:
                left.append(name)
            else:
                found[name], nbytes = path, nbytes + size
    except OSError:  # deleted since, or private: no reason to lose the compressed model
        warnings.warn(
            f"cannot find {source!r} any more, so its tokenizer is not saved along; call "
            "tokenizer.save_pretrained on the same folder",
            UserWarning,
            stacklevel=3,
        )
    for name, path in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    if left:
        shown = ", ".join(map(repr, left[:20])) + (" ..." if len(left) > 20 else "")
        logger.warning("not saved along, being code, weights, links or too much: %s", shown)


def _companion(source: str, name: str, how: dict[str, Any]) -> str | None:
    """Find a file of a repo, unless it is weights, code, too deep or a link out."""
    sound = name.isprintable() and ".." not in name.split("/") and name.count("/") <= DEEPEST
    if not sound or _LEFT.fullmatch(name):
        return None
    found = find_file(source, name, how)
    return found if found is not None and lies_inside(source, found) else None


def _listed(source: str, how: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield a repo's files by name from its folder, with their bytes; no more than _MOST_LISTED.

    Those of a repo of the Hub that cannot be reached now are those fetched before. Raises an
    OSError if there is no such repo.
    """
    inner = how.get("subfolder", "").strip("/")
    if os.path.isdir(source):
        source = os.path.join(source, inner)
    else:
        try:
            api, commit = HfApi(token=how.get("token")), how.get("revision")
            tree = api.list_repo_tree(source, inner or None, recursive=True, revision=commit)
            files = [e for e in islice(tree, _MOST_LISTED) if isinstance(e, RepoFile)]
            yield from ((e.path.removeprefix(f"{inner}/"), e.size) for e in files)
            return
        except Exception:  # whatever a client may say: offline, gated, no such id
            config = find_file(source, CONFIG, how)
            source = os.path.dirname(config) if config else ""
    paths = islice(Path(source).rglob("*"), _MOST_LISTED) if source else ()
    for path in paths:
        if path.is_file():
            yield path.relative_to(source).as_posix(), path.stat().st_size
